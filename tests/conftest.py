"""Small data that a network learns in a second, and the real data where it is there."""

import signal
from pathlib import Path

import pytest
import torch

from dl_utils import SETTINGS, Split, TrainConfig, load_fashion_mnist, train

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def same_conditions_everywhere():
    torch.set_num_threads(1)
    # A shell starts background jobs deaf to Ctrl-C, and their children would be so too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def make_split(count: int, seed: int) -> Split:
    """Noise with a bright square, whose place tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = 0.2 * torch.randn(count, 1, 28, 28, generator=generator)
    for image, label in zip(images, labels.tolist()):
        row, column = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
        image[0, row : row + 8, column : column + 5] += 2
    return Split(images, labels)


@pytest.fixture(scope="session")
def splits():
    return {"train": make_split(330, 1), "val": make_split(100, 2), "test": make_split(150, 3)}


@pytest.fixture(scope="session")
def config():
    return TrainConfig(epochs=3, batch_size=16)


@pytest.fixture(scope="session")
def trained(splits, config):
    """A short run of every setting on the small data."""
    return {name: train(setting, splits, config) for name, setting in SETTINGS.items()}


@pytest.fixture(scope="session")
def real_splits():
    if not (ROOT / "data/FashionMNIST/raw/train-images-idx3-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not in data/FashionMNIST/raw")
    return load_fashion_mnist(ROOT / "data")
