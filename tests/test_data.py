"""Fashion-MNIST: what is read, what is fetched, and what is said where it cannot be."""

import gzip
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from conftest import RAW
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file

import dl_utils as dl

LABELS, IMAGES = "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def raw(tiny, tmp_path):
    """A folder of its own with the four packed files."""
    return shutil.copytree(tiny / "FashionMNIST/raw", tmp_path / "FashionMNIST/raw")


def unpack(path):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def test_the_real_files_give_the_splits_of_the_report(real_splits, tmp_path):
    sizes = {name: len(split.labels) for name, split in real_splits.items()}
    assert sizes == {"train": 55_000, "val": 5_000, "test": 10_000}
    assert torch.bincount(real_splits["test"].labels).tolist() == [1000] * 10
    pixels = torch.cat([real_splits[name].images for name in ("train", "val")]).double()
    assert pixels.mean().abs() < 1e-3 and (pixels.std() - 1).abs() < 1e-3
    packed = (RAW / "t10k-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "images").write_bytes(gzip.decompress(packed))
    theirs = read_image_file(str(tmp_path / "images")).float().div(255).sub(dl.MEAN).div(dl.STD)
    assert torch.equal(real_splits["test"].images[:, 0], theirs)


def test_the_seed_draws_the_validation_images_and_every_image_is_used_once(tiny):
    first, again, other = (dl.load_fashion_mnist(tiny, seed) for seed in (0, 0, 1))
    assert torch.equal(first["val"].images, again["val"].images)
    assert not torch.equal(first["val"].images, other["val"].images)
    assert torch.equal(first["test"].images, other["test"].images)
    both = [torch.cat([s["train"].images, s["val"].images]).sum((1, 2, 3)) for s in (first, other)]
    assert torch.equal(both[0].sort()[0], both[1].sort()[0]) and len(both[0]) == 480


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "raw", "."])
def test_files_may_be_packed_or_not_each_for_itself_and_the_folder_a_level_deeper(raw, place):
    expected = dl.load_fashion_mnist(raw.parent.parent)["test"]
    unpack(raw / f"{LABELS}.gz")
    unpack(raw / f"{IMAGES}.gz")
    root = raw.parent.parent if place == "FashionMNIST/raw" else (raw / place).resolve()
    root = raw.parent if place == "raw" else root
    found = dl.load_fashion_mnist(root)["test"]
    assert all(map(torch.equal, found, expected))
    assert len(list(raw.iterdir())) == 4, "something was written beside what is there"


def test_a_packed_file_without_gz_in_its_name_is_read(raw):
    (raw / f"{LABELS}.gz").rename(raw / LABELS)  # as some browsers save it
    assert len(dl.load_fashion_mnist(raw)["test"].labels) == 150


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered", "other"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_file_is_named_kept_and_replaced_only_by_its_intact_twin(raw, damage, packed):
    path = raw / f"{IMAGES}.gz"
    twin = path.read_bytes()
    if not packed:
        unpack(path)
        path = raw / IMAGES
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    data = {"truncated": data[:-50], "empty": b"", "other": b"<html>404</html>"}.get(damage, data)
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=re.escape(f"{path} does not hold what Fashion-MNIST")
    ) as e:
        dl.load_fashion_mnist(raw.parent.parent)
    assert "move it away" in str(e.value) and "delete" not in str(e.value)
    assert path.read_bytes() == data
    if not packed:
        (raw / f"{IMAGES}.gz").write_bytes(twin)
        assert len(dl.load_fashion_mnist(raw)["train"].labels) == 440


def test_missing_files_without_network_are_named_and_nothing_is_made(raw, tmp_path, capsys):
    (raw / f"{LABELS}.gz").unlink()
    with pytest.raises(OSError, match=f"cannot be downloaded .*; put {LABELS}.gz there"):
        dl.load_fashion_mnist(raw)
    empty = tmp_path / "new"
    assert dl.main(["train", "baseline", "--data", str(empty), "--out", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.count(".gz") == 4 and not empty.exists()


@contextmanager
def server(folder, monkeypatch):
    """A mirror of the files in a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        mirrors = ["http://127.0.0.1:9/", f"http://127.0.0.1:{httpd.server_port}/"]
        monkeypatch.setattr(FashionMNIST, "mirrors", mirrors)
        yield
        httpd.shutdown()


def test_what_is_missing_is_downloaded_without_a_word(raw, tmp_path, monkeypatch, capfd):
    new = tmp_path / "new"
    with server(raw, monkeypatch):
        assert len(dl.load_fashion_mnist(new)["test"].labels) == 150
    assert capfd.readouterr() == ("", "")
    files = sorted(path.name for path in (new / "FashionMNIST/raw").iterdir())
    assert files == sorted(f"{name}.gz" for name in dl.DATA_FILES)
    assert len(dl.load_fashion_mnist(new)["test"].labels) == 150


def test_a_server_that_sends_something_else_leaves_nothing(raw, tmp_path, monkeypatch):
    (raw / f"{LABELS}.gz").write_bytes(b"<html>please log in</html>")
    with server(raw, monkeypatch), pytest.raises(OSError, match="the server sent something else"):
        dl.load_fashion_mnist(tmp_path / "new")
    assert not list(tmp_path.glob("new/**/t10k-labels*"))


def test_a_server_that_stays_silent_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        monkeypatch.setattr(dl, "TIMEOUT", 0.2)
        with pytest.raises(OSError, match="cannot be downloaded .*timed out"):
            dl.load_fashion_mnist(tmp_path)


def test_each_cause_is_called_by_its_name(raw, tmp_path, monkeypatch):
    with server(raw, monkeypatch):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(OSError, match=r"cannot be written \(Not a directory|File exists"):
            dl.load_fashion_mnist(tmp_path / "file")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(OSError, match=r"\.gz cannot be written \(No space\)"):
            dl.load_fashion_mnist(tmp_path / "full")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(OSError, match="is missing, and torchvision fails: import of torchvision"):
        dl.load_fashion_mnist(tmp_path / "new")
    monkeypatch.undo()


def test_the_default_folder_is_beside_the_module_wherever_one_works(tmp_path):
    if not (RAW / f"{LABELS}.gz").exists():
        pytest.skip("Fashion-MNIST is not in data/FashionMNIST/raw")
    script = f"import sys; sys.path.insert(0, {str(dl.HERE)!r}); import dl_utils as dl; " \
        "print(len(dl.read_data_files()[3]))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert done.stdout == b"10000\n" and not list(tmp_path.iterdir()), done.stderr
