"""Small data that a network learns in a second with any seed, in files like those of
Fashion-MNIST, and the real data. A test stands for a user who is hurt when it fails."""

import gzip
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch
from tiny import sums

import dl_utils as dl

ROOT = Path(__file__).parent.parent
SETTINGS = {name: replace(row, lr=0.06) for name, row in dl.SETTINGS.items()}  # for small data
RAW, REAL_FILES = ROOT / "data/FashionMNIST/raw", dl.DATA_FILES

# A checkout may be read-only, and hypothesis keeps folders in it.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.devnull
hypothesis.settings.register_profile("no folder", database=None)
hypothesis.settings.load_profile("no folder")
torch.set_num_threads(1)
# A shell starts background jobs deaf to Ctrl-C, and their children would be so too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the small data, which is Fashion-MNIST from now on: 480 and 150 images of
    noise with a bright square, whose place tells the class, but for every twelfth."""
    root = tmp_path_factory.mktemp("data")
    (raw := root / "FashionMNIST/raw").mkdir(parents=True)
    for part, count, seed in (("train", 480, 1), ("t10k", 150, 2)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        images = torch.randint(128, (count, 28, 28), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist()):
            row, column = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
            image[row : row + 8, column : column + 5] += 127
        labels[::12] = torch.randint(10, labels[::12].shape, generator=generator).byte()
        kinds = {"images-idx3": (bytes(16), images), "labels-idx1": (bytes(8), labels)}
        for kind, (header, values) in kinds.items():
            content = gzip.compress(header + values.numpy().tobytes())
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(content)
    dl.DATA_FILES = sums(raw)
    return root


@pytest.fixture
def one():
    """A thread that trains, in place of processes."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(scope="session")
def splits(tiny):
    return dl.load_fashion_mnist(tiny)


@pytest.fixture(scope="session")
def config():
    return dl.TrainConfig(epochs=3, batch_size=16)


@pytest.fixture(scope="session")
def trained(splits, config):
    """A short run of every setting on the small data."""
    return {name: dl.train(row, splits, config) for name, row in SETTINGS.items()}


@pytest.fixture(scope="session")
def real_splits():
    if not (RAW / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not in data/FashionMNIST/raw")
    with mock.patch.object(dl, "DATA_FILES", REAL_FILES):
        return dl.load_fashion_mnist()


def study_rows(accuracies, part="A", setting="baseline", seed=101, **values):
    """Rows of a study: a configuration with one seed for each validation accuracy."""
    row = {**vars(dl.Setting("s", "s")), **vars(dl.TrainConfig()), **values}
    row = {"part": part, "setting": setting, **{name: row[name] for name in dl.FIELDS}}
    outcomes = [(a, a + 0.05, 1.0) if a else (a, a, a) for a in accuracies]
    return [row | {"seed": seed + i} | dict(zip(dl.OUTCOME, o)) for i, o in enumerate(outcomes)]


def start(root, *arguments, **options):
    """The command line in a process of its own, with real workers, on the small data in root."""
    command = [sys.executable, str(ROOT / "tests/tiny.py"), *map(str, arguments)]
    environment = os.environ | {"TINY": str(root), "PYTHONUNBUFFERED": ""} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, env=environment, start_new_session=True, **options)


def save(folder, *runs):
    """Each run under the name that train_and_save gives it."""
    for run in runs:
        dl.save_checkpoint(dl.checkpoint_path(folder, run.setting, run.config), run)


def weights_equal(a, b):
    return all(map(torch.equal, a.model.state_dict().values(), b.model.state_dict().values()))
