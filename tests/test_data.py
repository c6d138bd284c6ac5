"""Fashion-MNIST: what is read, and what is said where it cannot be."""

import gzip
import os
import shutil
import threading
import time
import urllib.request
from urllib.error import URLError

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from torchvision.datasets import FashionMNIST

import dl_utils as dl

RAW = ROOT / "data/FashionMNIST/raw"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def copy(tmp_path, real_splits):
    """A data folder of its own, with the four original files and those unpacked from them."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in dl.RAW_FILES:
        shutil.copy(RAW / f"{name}.gz", raw)
        shutil.copy(RAW / name, raw)
    return raw


def message(root):
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        dl.load_fashion_mnist(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_splits_are_those_of_the_report(real_splits):
    sizes = {name: len(split.labels) for name, split in real_splits.items()}
    assert sizes == {"train": 55_000, "val": 5_000, "test": 10_000}
    for split in real_splits.values():
        dl._check_split(split)
    assert torch.bincount(real_splits["test"].labels).tolist() == [1000] * 10


def test_train_and_val_are_the_60000_training_images_once_each(real_splits):
    parts = [real_splits[name].images.double().sum((1, 2, 3)) for name in ("train", "val")]
    both = torch.cat(parts).sort()[0]
    pixels = FashionMNIST(ROOT / "data").data.double().div(255).sub(dl.MEAN).div(dl.STD)
    torch.testing.assert_close(both, pixels.sum((1, 2)).sort()[0], atol=1e-3, rtol=1e-4)


def test_pixels_are_standardized_by_the_training_images(real_splits):
    pixels = torch.cat([real_splits["train"].images, real_splits["val"].images]).double()
    assert pixels.mean().abs() < 1e-3 and (pixels.std() - 1).abs() < 1e-3


def test_split_follows_its_seed(real_splits):
    again = dl.load_fashion_mnist(ROOT / "data", split_seed=0)["val"]
    other = dl.load_fashion_mnist(ROOT / "data", split_seed=1)["val"]
    assert torch.equal(again.images, real_splits["val"].images)
    assert not torch.equal(other.labels, again.labels)


def test_no_files_and_no_network(tmp_path, capsys):
    said = message(tmp_path)
    assert str(tmp_path / "FashionMNIST/raw") in said
    for name in dl.RAW_FILES:
        assert f"{name}.gz" in said
    assert dl.main(["train", "baseline", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err == f"dl_utils.py: {said}\n" and out == ""


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / ("x" * 300)):
        assert "cannot be put there" in message(folder)


@pytest.mark.parametrize("leftover", [b"", b"\x1f\x8b\x08", b"<html>not found</html>"])
def test_leftovers_of_a_download(tmp_path, leftover):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in dl.RAW_FILES:
        (raw / f"{name}.gz").write_bytes(leftover)
    assert "cannot be put there (<urlopen error no network in tests>); copy" in message(tmp_path)
    assert all((raw / f"{name}.gz").read_bytes() == leftover for name in dl.RAW_FILES)


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_packed_files_are_checked(copy, damage):
    path = copy / "t10k-images-idx3-ubyte.gz"
    data = bytearray(path.read_bytes())
    if damage == "altered":
        data[len(data) // 2] ^= 1
    else:
        data = data[:-100]
    path.write_bytes(data)
    os.unlink(copy / "t10k-images-idx3-ubyte")
    assert "copy the four files" in message(copy.parent.parent)


@pytest.mark.parametrize("name", dl.RAW_FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "altered", "header"])
def test_unpacked_files_are_checked(copy, name, damage):
    path = copy / name
    data = bytearray(path.read_bytes())
    if damage == "altered":
        data[-7] ^= 1
    elif damage == "header":
        data[3] = 77
    else:
        data = data[: len(data) // 2 if damage == "truncated" else 0]
    path.write_bytes(data)
    said = message(copy.parent.parent)
    assert said.startswith(str(path)) and "delete it" in said
    path.unlink()
    if damage == "altered":
        assert len(dl.load_fashion_mnist(copy.parent.parent)["train"].labels) == 55_000


def test_a_file_that_another_process_is_unpacking_is_waited_for(copy):
    path = copy / "t10k-labels-idx1-ubyte"
    data = path.read_bytes()
    path.write_bytes(data[:99])

    holds = threading.Event()

    def unpack():
        with FileLock(copy / ".lock"):
            holds.set()
            time.sleep(1)
            path.write_bytes(data)

    thread = threading.Thread(target=unpack)
    thread.start()
    assert holds.wait(20)
    assert len(dl.load_fashion_mnist(copy.parent.parent)["test"].labels) == 10_000
    thread.join()


def test_a_folder_in_the_place_of_a_file(copy):
    path = copy / "train-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    said = message(copy.parent.parent)
    assert said == f"{path} cannot be read (Is a directory); delete it, and it is made anew"


def test_the_original_files_are_enough(copy):
    for name in dl.RAW_FILES:
        (copy / name).unlink()
    assert len(dl.load_fashion_mnist(copy.parent.parent)["test"].labels) == 10_000
    with gzip.open(copy / "t10k-labels-idx1-ubyte.gz") as file:
        assert file.read() == (copy / "t10k-labels-idx1-ubyte").read_bytes()
