"""Fashion-MNIST: what is read, what is fetched, and what is said where it cannot be."""

import functools
import gzip
import http.server
import re
import shutil
import socket
import threading

import pytest
import torch
from conftest import RAW
from torchvision.datasets.mnist import read_image_file

import dl_utils as dl

LABELS, IMAGES = "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    monkeypatch.setattr(dl, "SERVER", "http://127.0.0.1:9")


@pytest.fixture
def raw(tiny, tmp_path):
    """A folder of its own with the four packed files."""
    return shutil.copytree(tiny / "FashionMNIST/raw", tmp_path / "FashionMNIST/raw")


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


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_files_may_be_packed_or_not_each_for_itself_and_the_folder_a_level_deeper(raw, depth):
    root = [raw, *raw.parents][depth]
    expected = dl.load_fashion_mnist(root)["test"]
    packed = raw / f"{IMAGES}.gz"
    (raw / IMAGES).write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    (raw / f"{LABELS}.gz").rename(raw / LABELS)  # packed, as some browsers save it
    for hidden in (root / f"._{IMAGES}", root / f"._{IMAGES}.gz"):  # as macOS leaves them on exFAT
        hidden.write_bytes(b"Mac OS X")
    assert all(map(torch.equal, dl.load_fashion_mnist(root)["test"], expected))
    assert len(list(raw.glob("[!.]*"))) == 4, "something was written beside what is there"


@pytest.mark.parametrize("damage", ["cut", "changed", "no data"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_file_is_named_and_kept_and_its_intact_twin_read(raw, damage, packed):
    path = raw / f"{IMAGES}.gz"
    data = intact = path.read_bytes()
    if not packed:
        path = path.rename(raw / IMAGES)
        data = gzip.decompress(data)
    changed = data[:5000] + b"!!" + data[5002:]
    data = {"cut": data[:-50], "changed": changed, "no data": b"<html>404</html>"}[damage]
    path.write_bytes(data)
    sentence = f"{re.escape(str(path))} does not hold what Fashion-MNIST .*move it away"
    with pytest.raises(ValueError, match=sentence):
        dl.load_fashion_mnist(raw)
    if not packed:
        (raw / f"{IMAGES}.gz").write_bytes(intact)
        assert len(dl.load_fashion_mnist(raw)["train"].labels) == 440
    assert path.read_bytes() == data


def test_a_missing_file_is_named_and_nothing_is_made(raw, tmp_path, capsys):
    (raw / f"{LABELS}.gz").unlink()
    assert dl.main(["train", "baseline", "--data", str(raw), "--out", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert f"{LABELS}.gz is missing in {raw} and cannot be downloaded" in err and not out
    assert err.count("\n") == 1 and all(name in err for name in dl.DATA_FILES)
    assert len([*raw.iterdir()]) == 3


@pytest.fixture
def server(raw, monkeypatch):
    """A server of the files in raw."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=raw)
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(dl, "SERVER", f"http://127.0.0.1:{httpd.server_port}")
        yield
        httpd.shutdown()


def test_a_download_is_silent_and_wrong_content_not_kept(server, raw, tmp_path, monkeypatch, capfd):
    assert len(dl.load_fashion_mnist(tmp_path / "new")["test"].labels) == 150
    assert capfd.readouterr() == ("", "")
    files = sorted(path.name for path in (tmp_path / "new/FashionMNIST/raw").iterdir())
    assert files == sorted(f"{name}.gz" for name in dl.DATA_FILES)
    (raw / f"{LABELS}.gz").write_bytes(b"<html>please log in</html>")
    with pytest.raises(OSError, match="the server sent something else"):
        dl.load_fashion_mnist(tmp_path / "other")
    assert not list(tmp_path.glob("other/**/t10k-labels*"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(dl, "SERVER", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(dl, "TIMEOUT", 0.2)
        with pytest.raises(OSError, match="cannot be downloaded .*timed out"):
            dl.load_fashion_mnist(tmp_path / "silent")
