"""LeNet-5 on Fashion-MNIST: no regularization, dropout, weight decay, batch normalization.

Everything that EX1.ipynb computes is here, in reading order: settings, data, model,
evaluation, checkpoints, training, search, theory, report, command line. Accuracies are
fractions, losses are in nats per image, images are (N, 1, 28, 28) float32.

    python dl_utils.py train dropout            train one setting from scratch into runs/
    python dl_utils.py test weights/dropout.pt  accuracies of one saved file
    python dl_utils.py test                     the whole table, from the saved files
    python dl_utils.py search                   the hyperparameter search, resumable
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------ settings


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True)
class Setting:
    """What is compared: one row of hyperparameters of the model and its regularization.

    dropout: probability of dropping a hidden fully connected unit (Srivastava et al. 2014).
    weight_decay: lambda of the L2 penalty lambda / 2 * ||w||^2 (Krogh and Hertz 1991), which
        covers weights only, or with decay_all also biases and batch-norm parameters.
    batch_norm: normalize hidden layers (Ioffe and Szegedy 2015); norm_layers says which of
        them, norm_place where: before pooling, after pooling, or after the activation.
    lr: initial learning rate, tuned for each setting.

    Raises ValueError for a value out of its range.
    """

    name: str
    label: str
    dropout: float = 0.0
    weight_decay: float = 0.0
    batch_norm: bool = False
    lr: float = 0.02
    activation: str = "relu"
    pooling: str = "max"
    norm_layers: str = "all"
    norm_place: str = "before_pooling"
    decay_all: bool = False

    def __post_init__(self):
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}; expected 0 <= p < 1")
        _require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}; expected a finite number >= 0",
        )
        _require(0 < self.lr < math.inf, f"lr is {self.lr}; expected a finite number > 0")
        for key in ("batch_norm", "decay_all"):
            value = getattr(self, key)
            _require(isinstance(value, bool), f"{key} is {value!r}; expected True or False")
        _require_choices(self, SETTING_CHOICES)


@dataclass(frozen=True)
class TrainConfig:
    """What all settings share: length, batches, randomness, optimizer.

    seed draws initial weights, order of batches and dropout masks, each from a stream of its
    own; split_seed draws the validation images. schedule scales the learning rate per step.

    Raises ValueError for a value out of its range.
    """

    epochs: int = 20
    batch_size: int = 64
    seed: int = 0
    split_seed: int = 0
    optimizer: str = "sgd"
    schedule: str = "cosine"

    def __post_init__(self):
        for key, least in {"epochs": 1, "batch_size": 1, "seed": 0, "split_seed": 0}.items():
            value = getattr(self, key)
            _require(
                type(value) is int and value >= least,
                f"{key} is {value!r}; expected a whole number of {least} or more",
            )
        _require_choices(self, CONFIG_CHOICES)


def _require_choices(record, choices: dict) -> None:
    for key, allowed in choices.items():
        value = getattr(record, key)
        _require(
            isinstance(value, str) and value in allowed,
            f"{key} is {value!r}; expected one of {', '.join(allowed)}",
        )


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
POOLINGS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
# One block of layers in the order of computation, for each place of batch normalization.
# Max pooling commutes with an increasing activation, and before it is four times cheaper.
BLOCK_ORDERS = {
    "before_pooling": ("norm", "pool", "act"),
    "after_pooling": ("pool", "norm", "act"),
    "after_activation": ("pool", "act", "norm"),
}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
}
SCHEDULES = {  # factor of the learning rate after a fraction t of all steps
    "constant": lambda t: 1.0,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
}
SETTING_CHOICES = {
    "activation": ACTIVATIONS,
    "pooling": POOLINGS,
    "norm_layers": ("all", "conv"),
    "norm_place": BLOCK_ORDERS,
}
CONFIG_CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("baseline", "No regularization"),
        Setting("dropout", "Dropout", dropout=0.2),
        Setting("weight_decay", "Weight decay", weight_decay=1e-3),
        Setting("batch_norm", "Batch normalization", batch_norm=True),
        Setting("combined", "All three", dropout=0.1, weight_decay=1e-3, batch_norm=True),
    )
}

# ---------------------------------------------------------------------------------- data

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, scaled to 0..1
VALIDATION_IMAGES = 5_000
RAW_FILES = {  # name of the unpacked file: its SHA-256
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class Split(NamedTuple):
    """Images (N, 1, 28, 28), float32 and standardized, and their labels (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor


def find_device() -> torch.device:
    """CUDA if there is one, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_fashion_mnist(root: str | Path = "data", split_seed: int = 0) -> dict[str, Split]:
    """Read Fashion-MNIST (Xiao et al. 2017), downloading it to root where it is missing.

    Returns "train" (55,000 images) and "val" (5,000), drawn at random from the 60,000
    training images by split_seed, and "test" (10,000).
    Raises FileNotFoundError where files are missing and cannot be downloaded, ValueError
    where a file's contents are not those of Fashion-MNIST.
    """
    from torchvision.datasets import FashionMNIST  # slow to import, needed for data alone

    raw = Path(root) / "FashionMNIST" / "raw"
    for name, digest in RAW_FILES.items():
        path = raw / name
        _require(
            not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() == digest,
            f"{path} does not hold what Fashion-MNIST holds; delete it, and it is made anew",
        )
    try:
        raw_train, raw_test = (FashionMNIST(root, part, download=True) for part in (True, False))
    except Exception as error:  # of the file system, of the network, of a checksum
        reason = str(error).strip().split("\n")[-1]
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {raw} and cannot be put there ({reason}); copy the four "
            f"files {', '.join(f'{name}.gz' for name in RAW_FILES)} there"
        ) from error

    def split(data: FashionMNIST, index=slice(None)) -> Split:
        images = data.data[index].unsqueeze(1).float()
        return Split(images.div_(255).sub_(MEAN).div_(STD), data.targets[index])

    generator = torch.Generator().manual_seed(split_seed)
    order = torch.randperm(len(raw_train), generator=generator)
    return {
        "train": split(raw_train, order[VALIDATION_IMAGES:]),
        "val": split(raw_train, order[:VALIDATION_IMAGES]),
        "test": split(raw_test),
    }


def minibatches(split: Split, batch_size: int, generator: torch.Generator | None = None):
    """Yield the split in batches of batch_size, the last one ragged: in a random order drawn
    from generator, or in the order of the images without one."""
    if generator is None:
        yield from map(Split._make, zip(*(part.split(batch_size) for part in split)))
        return
    order = torch.randperm(len(split.labels), generator=generator)
    for index in order.to(split.labels.device).split(batch_size):
        yield Split(split.images[index], split.labels[index])


# --------------------------------------------------------------------------------- model


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) for 28 x 28 images: (N, 1, 28, 28) to logits (N, 10).

    61,706 parameters; batch normalization adds 2 for each channel or unit it normalizes.
    A technique that is off leaves an identity in its place, so that every variant has the
    same layer names. The other arguments are those of Setting.
    """

    def __init__(
        self, dropout=0.0, batch_norm=False, *, activation="relu", pooling="max",
        norm_layers="all", norm_place="before_pooling",
    ):  # fmt: skip
        def block(number: int, norm: nn.Module, pool: nn.Module | None) -> dict:
            layers = {"norm": norm, "pool": pool, "act": ACTIVATIONS[activation]()}
            order = [key for key in BLOCK_ORDERS[norm_place] if layers[key] is not None]
            return {f"{key}{number}": layers[key] for key in order}

        def conv_norm(channels):
            return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()

        def unit_norm(units):
            on = batch_norm and norm_layers == "all"
            return nn.BatchNorm1d(units) if on else nn.Identity()

        pool = POOLINGS[pooling]
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 6, kernel_size=5, padding=2),  # (N, 6, 28, 28)
                **block(1, conv_norm(6), pool(2)),  # (N, 6, 14, 14)
                conv2=nn.Conv2d(6, 16, kernel_size=5),  # (N, 16, 10, 10)
                **block(2, conv_norm(16), pool(2)),  # (N, 16, 5, 5)
                flatten=nn.Flatten(),  # (N, 400)
                fc3=nn.Linear(400, 120),  # (N, 120)
                **block(3, unit_norm(120), None),
                drop3=nn.Dropout(dropout),
                fc4=nn.Linear(120, 84),  # (N, 84)
                **block(4, unit_norm(84), None),
                drop4=nn.Dropout(dropout),
                fc5=nn.Linear(84, 10),  # (N, 10): logits
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


SEED_STREAMS = ("weights", "batches", "dropout")


def _stream(seed: int, name: str) -> int:
    """A seed for one use of randomness; no two uses of any two seeds share one."""
    return len(SEED_STREAMS) * seed + SEED_STREAMS.index(name)


def build_model(setting: Setting, seed: int = 0) -> LeNet5:
    """LeNet-5 as the setting wants it. Settings of one seed start from the same weights."""
    keys = ("dropout", "batch_norm", "activation", "pooling", "norm_layers", "norm_place")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_stream(seed, "weights"))
        model = LeNet5(**{key: getattr(setting, key) for key in keys})
    return model.to(memory_format=torch.channels_last)  # faster, the same function


def layer_summary(model: nn.Module, input_shape=(1, 1, 28, 28)) -> pd.DataFrame:
    """One row per layer that does something: name, layer, output shape, parameters."""
    rows, training = [], model.training
    activation = torch.zeros(input_shape)
    with torch.inference_mode():
        for name, layer in getattr(model.eval(), "layers", model).named_children():
            activation = layer(activation)
            if isinstance(layer, nn.Identity) or getattr(layer, "p", 1) == 0:
                continue
            count = sum(parameter.numel() for parameter in layer.parameters())
            rows.append((name, str(layer), tuple(activation.shape), count))
    model.train(training)
    return pd.DataFrame(rows, columns=["name", "layer", "output shape", "parameters"])


# ---------------------------------------------------------------------------- evaluation


class Metrics(NamedTuple):
    """Mean cross-entropy in nats per image, and the fraction of images classified right."""

    loss: float
    accuracy: float


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module):
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def evaluate(model: nn.Module, split: Split, batch_size: int = 500) -> Metrics:
    """Loss and accuracy over a split in evaluation mode: no dropout, batch normalization by
    its running statistics. The training mode is restored afterwards."""
    _check_split(split)
    losses, hits = [], []
    with _evaluation_mode(model):
        for images, labels in minibatches(split, batch_size):
            logits = model(images)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            hits.append((logits.argmax(1) == labels).sum())
    count = len(split.labels)
    return Metrics(
        loss=math.fsum(torch.stack(losses).tolist()) / count,
        accuracy=int(torch.stack(hits).sum()) / count,
    )


def _check_split(split: Split) -> None:
    images, labels = split
    shape = tuple(images.shape)
    _require(
        images.ndim == 4 and shape[1:] == (1, 28, 28) and images.dtype == torch.float32,
        f"images are {shape} of {images.dtype}; expected (N, 1, 28, 28) of torch.float32",
    )
    _require(
        labels.shape == shape[:1] and labels.dtype == torch.int64,
        f"labels are {tuple(labels.shape)} of {labels.dtype}; "
        f"expected ({shape[0]},) of torch.int64",
    )
    _require(len(labels) > 0, "the split is empty; expected at least one image")
    low, high = int(labels.min()), int(labels.max())
    _require(0 <= low and high < len(CLASSES), f"labels run from {low} to {high}; expected 0 to 9")


def predict(model: nn.Module, split: Split) -> Tensor:
    """Class probabilities (N, 10) in evaluation mode."""
    _check_split(split)
    with _evaluation_mode(model):
        return torch.cat([model(batch.images).softmax(1) for batch in minibatches(split, 500)])


def confusion_matrix(model: nn.Module, split: Split) -> pd.DataFrame:
    """Counts of images, (10, 10): rows are true classes, columns are predicted ones."""
    pairs = split.labels * len(CLASSES) + predict(model, split).argmax(1)
    counts = torch.bincount(pairs.cpu(), minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    return pd.DataFrame(counts.numpy(), index=CLASSES, columns=CLASSES)


# --------------------------------------------------------------------------- checkpoints

FORMAT, VERSION = "EX1 LeNet-5 checkpoint", 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or cannot be written where it should go."""


@dataclass
class Checkpoint:
    """A trained model with everything that explains it.

    model: in evaluation mode, with the weights after epoch `epoch`, the best on validation.
    history: tidy DataFrame of epoch, split, loss, accuracy, one row per epoch and split.
    metrics: split name to Metrics of the kept model. seconds: time that training took.
    For a bare state_dict only model and setting are known; the rest is None or empty.
    """

    model: LeNet5
    setting: Setting
    config: TrainConfig | None = None
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    epoch: int | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    seconds: float | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, overwrite: bool = False) -> None:
    """Write a checkpoint of plain types, whole or not at all.

    Raises CheckpointError where the file exists and overwrite is off, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already; name another file, or allow overwriting")
    try:
        _write_atomically(path, _to_bytes(checkpoint))
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror}); free space or name another file"
        raise CheckpointError(reason) from error


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint, or a bare state_dict of this LeNet-5, without running code from it.

    Raises FileNotFoundError where there is no file, CheckpointError where it is not a
    checkpoint of this program, is damaged, or holds values out of range.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint that train saved")
    try:
        checkpoint = _from_bytes(path.read_bytes())
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}); expected a checkpoint file"
        raise CheckpointError(reason) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a usable checkpoint: {error}") from error
    checkpoint.model.to(device)
    return checkpoint


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "setting": asdict(checkpoint.setting),
        "config": asdict(checkpoint.config),
        "history": checkpoint.history.to_dict("list"),
        "epoch": checkpoint.epoch,
        "metrics": {name: list(metrics) for name, metrics in checkpoint.metrics.items()},
        "seconds": checkpoint.seconds,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "state_dict": {k: v.cpu() for k, v in checkpoint.model.state_dict().items()},
    }
    payload["sha256"] = _digest(payload)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def _digest(payload: dict) -> str:
    """SHA-256 of everything in a payload but the digest itself."""
    plain = {k: v for k, v in payload.items() if k not in ("state_dict", "sha256")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(payload["state_dict"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_bytes(data: bytes) -> Checkpoint:
    try:
        payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways
        reason = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise ValueError(f"it cannot be read as plain tensors ({reason})") from error
    _require(isinstance(payload, dict), f"it holds a {type(payload).__name__}, not a checkpoint")
    if payload and all(isinstance(value, Tensor) for value in payload.values()):
        return _from_state_dict(payload)
    _require(payload.get("format") == FORMAT, "it was not saved by save_checkpoint")
    _require(
        payload.get("version") == VERSION,
        f"it is of format version {payload.get('version')}, this program reads {VERSION}",
    )
    parts = "setting config history epoch metrics seconds state_dict sha256"
    missing = set(parts.split()) - payload.keys()
    _require(not missing, f"it lacks {', '.join(sorted(missing))}")
    setting = _record(Setting, payload["setting"], "setting")
    config = _record(TrainConfig, payload["config"], "config")
    model = _load_weights(build_model(setting), payload["state_dict"])
    _require(_digest(payload) == payload["sha256"], "its contents do not match its checksum")
    return Checkpoint(
        model,
        setting,
        config,
        pd.DataFrame(payload["history"]),
        payload["epoch"],
        {name: Metrics(*values) for name, values in payload["metrics"].items()},
        payload["seconds"],
    )


def _record(kind, values, name: str):
    _require(isinstance(values, dict), f"its {name} is a {type(values).__name__}, not a dict")
    wrong = {f.name for f in fields(kind)} ^ values.keys()
    _require(not wrong, f"its {name} lacks, or has unknown, fields: {', '.join(map(str, wrong))}")
    return kind(**values)


def _from_state_dict(weights: dict[str, Tensor]) -> Checkpoint:
    setting = Setting(
        "state_dict",
        "Bare state_dict",
        batch_norm="layers.norm1.weight" in weights,
        norm_layers="all" if "layers.norm3.weight" in weights else "conv",
    )
    return Checkpoint(_load_weights(build_model(setting), weights), setting)


def _load_weights(model: LeNet5, weights: dict[str, Tensor]) -> LeNet5:
    expected = model.state_dict()
    for problem, keys in {
        "lacks": expected.keys() - weights.keys(),
        "has an unknown": weights.keys() - expected.keys(),
    }.items():
        _require(not keys, f"it is of another network: it {problem} {', '.join(sorted(keys))}")
    for key, tensor in weights.items():
        want = expected[key]
        _require(isinstance(tensor, Tensor), f"{key} is a {type(tensor).__name__}, not a Tensor")
        _require(
            tensor.shape == want.shape and tensor.dtype == want.dtype,
            f"{key} is {tuple(tensor.shape)} of {tensor.dtype}; "
            f"expected {tuple(want.shape)} of {want.dtype}",
        )
        _require(bool(tensor.isfinite().all()), f"{key} holds NaN or infinite values")
    model.load_state_dict(weights)
    return model.eval()


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file beside path, flush it to disk, and rename it to path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def add_rows(path: str | Path, rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Add rows to a CSV file, replacing those of the same keys; returns the whole table.

    Safe against other processes that add to the same file, and against interruption.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if path.exists():
            old = read_table(path)
            new = set(rows[keys].itertuples(index=False, name=None))
            kept = [key not in new for key in old[keys].itertuples(index=False, name=None)]
            rows = pd.concat([old[kept], rows], ignore_index=True)
        _write_atomically(path, rows.to_csv(index=False).encode())
    return rows


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a CSV file of add_rows, floats to the last digit."""
    return pd.read_csv(path, float_precision="round_trip")


# ------------------------------------------------------------------------------ training


@contextlib.contextmanager
def _one_thread():
    """One thread: the same bits whatever the number of cores, and no crowding in workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_optimizer(model: nn.Module, setting: Setting, config: TrainConfig):
    """The optimizer, with the L2 penalty on weights alone or, with decay_all, on everything."""
    decayed = [p for p in model.parameters() if p.ndim > 1 or setting.decay_all]
    free = [p for p in model.parameters() if not (p.ndim > 1 or setting.decay_all)]
    groups = [{"params": decayed, "weight_decay": setting.weight_decay}, {"params": free}]
    return OPTIMIZERS[config.optimizer]([g for g in groups if g["params"]], lr=setting.lr)


def train(
    setting: Setting,
    splits: dict[str, Split],
    config: TrainConfig,
    *,
    device: str | torch.device | None = None,
    measure: tuple[str, ...] | None = None,
    progress=None,
) -> Checkpoint:
    """Train one setting from scratch and keep the epoch of highest validation accuracy.

    splits must hold "train" and "val"; after every epoch all of them, or those named in
    measure, are measured in evaluation mode. progress is called without arguments after
    every epoch. On the CPU it runs on one thread and gives the same bits every time.
    Raises ValueError for splits or a batch size that cannot be trained on, and when the loss
    stops being finite.
    """
    device = torch.device(device or find_device())
    measure = tuple(splits) if measure is None else measure
    _require("val" in measure and "train" in splits, "expected splits named train and val")
    for split in splits.values():
        _check_split(split)
    count, size = len(splits["train"].labels), config.batch_size
    _require(size <= count, f"batch_size is {size}; expected at most the {count} images there are")
    _require(
        not setting.batch_norm or min(size, count % size or size) > 1,
        f"batch_size {size} leaves a batch of one image, which batch normalization cannot use; "
        "choose another",
    )
    splits = {name: Split(*(part.to(device) for part in split)) for name, split in splits.items()}
    rows, best, start = [], None, time.perf_counter()
    generators = [device] if device.type == "cuda" else []
    with _one_thread(), torch.random.fork_rng(devices=generators):
        model = build_model(setting, config.seed).to(device)
        optimizer = make_optimizer(model, setting, config)
        steps = config.epochs * math.ceil(count / size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES[config.schedule](step / steps)
        )
        batch_order = torch.Generator().manual_seed(_stream(config.seed, "batches"))
        torch.manual_seed(_stream(config.seed, "dropout"))
        for epoch in range(1, config.epochs + 1):
            _train_epoch(model, splits["train"], size, batch_order, optimizer, schedule, epoch)
            metrics = {name: evaluate(model, splits[name]) for name in measure}
            rows += [(epoch, name, *values) for name, values in metrics.items()]
            if best is None or metrics["val"].accuracy > best[1]["val"].accuracy:
                weights = {k: v.clone() for k, v in model.state_dict().items()}
                best = epoch, metrics, weights
            if progress:
                progress()
    epoch, metrics, weights = best
    model.load_state_dict(weights)
    history = pd.DataFrame(rows, columns=["epoch", "split", "loss", "accuracy"])
    seconds = round(time.perf_counter() - start, 1)
    return Checkpoint(model.eval(), setting, config, history, epoch, metrics, seconds)


def _train_epoch(model, split, batch_size, generator, optimizer, schedule, epoch) -> None:
    model.train()
    total = torch.zeros((), device=split.labels.device)
    for images, labels in minibatches(split, batch_size, generator):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()  # read once an epoch: reading it every step would wait for it
    _require(
        math.isfinite(total),
        f"training diverged in epoch {epoch}: the sum of its losses is {float(total)}; "
        "choose a lower learning rate",
    )


def train_many(
    jobs,
    executor=None,
    *,
    splits: dict[str, Split] | None = None,
    root: str | Path = "data",
    names: tuple[str, ...] = ("train", "val", "test"),
    measure: tuple[str, ...] | None = None,
    workers: int | None = None,
    on_finish=None,
) -> list[Checkpoint | Exception]:
    """Train independent (setting, config) jobs in parallel, with one progress bar.

    executor: any concurrent.futures.Executor; by default processes of one thread each, as
        many as workers says, or as there are cores.
    splits: the data; by default each worker reads Fashion-MNIST from root, once.
    names: the splits that training may see. measure: as in train.
    on_finish: called in this process with each Checkpoint as soon as it is there.

    Returns the checkpoints in the order of jobs. A job that fails is reported at once, the
    others go on, and its place in the list holds the exception.
    """
    jobs = list(jobs)
    results: list = [None] * len(jobs)
    if not jobs:
        return results
    if splits is None and executor is None:
        load_fashion_mnist(root)  # one download, or one error, instead of one in each worker
    with contextlib.ExitStack() as stack:
        ticks = None
        if executor is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ticks = os.path.join(folder, "epochs")  # one byte per finished epoch
            executor = stack.enter_context(_processes(min(len(jobs), workers or os.cpu_count())))
        total = sum(config.epochs for _, config in jobs)
        bar = stack.enter_context(tqdm(total=total, unit="epoch", disable=None))
        pending = {
            executor.submit(_run_job, job, splits, str(root), names, measure, ticks): index
            for index, job in enumerate(jobs)
        }
        while pending:
            finished, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                index = pending.pop(future)
                setting, config = jobs[index]
                try:
                    results[index] = _from_bytes(future.result())
                except Exception as error:
                    results[index] = error
                    bar.write(f"{setting.name}, seed {config.seed}, failed: {error}", sys.stderr)
                else:
                    if on_finish:
                        on_finish(results[index])
            done = sum(c.epochs for (_, c), r in zip(jobs, results) if r is not None)
            if ticks and os.path.exists(ticks):
                done = max(done, os.path.getsize(ticks))
            bar.update(done - bar.n)
    return results


def _run_job(job, splits, root, names, measure, ticks) -> bytes:
    setting, config = job
    if splits is None:
        splits = _load_once(root, config.split_seed)

    def progress():
        if ticks:
            with open(ticks, "ab") as file:
                file.write(b".")

    splits = {name: splits[name] for name in names if name in splits}
    return _to_bytes(train(setting, splits, config, measure=measure, progress=progress))


_load_once = functools.lru_cache(maxsize=1)(load_fashion_mnist)


@contextlib.contextmanager
def _processes(workers: int):
    """A pool of spawned processes that ends with this one, however this one ends."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


# -------------------------------------------------------------------------------- search


class Study(NamedTuple):
    """A part of the search: every combination of the values in grid, for each seed.

    question names the panel of plot_search that shows it, x the field on its axis, lines the
    fields that tell its lines apart. The keys of grid are fields of Setting or TrainConfig;
    what it leaves out is as in SEARCH_START.
    """

    question: str
    x: str
    lines: tuple[str, ...]
    setting: str
    grid: dict[str, tuple]
    seeds: tuple[int, ...] = (0,)

    def jobs(self) -> list[tuple[Setting, TrainConfig]]:
        start, config = SEARCH_START
        own = {f.name for f in fields(Setting)}
        jobs = []
        for values in itertools.product(*self.grid.values()):
            change = dict(zip(self.grid, values))
            setting = replace(
                start, name=self.setting, **{k: v for k, v in change.items() if k in own}
            )
            change = {k: v for k, v in change.items() if k not in own}
            jobs += [(setting, replace(config, seed=seed, **change)) for seed in self.seeds]
        return jobs


SEARCH_START = Setting("start", "Start of the search", lr=0.04), TrainConfig(12, 128)
SEARCH: tuple[Study, ...] = ()
SEARCH_COLUMNS = [
    "setting", "activation", "pooling", "batch_norm", "norm_layers", "norm_place", "dropout",
    "weight_decay", "decay_all", "optimizer", "batch_size", "schedule", "lr", "epochs", "seed",
]  # fmt: skip


def _search_key(setting: Setting, config: TrainConfig) -> dict:
    record = {**asdict(setting), **asdict(config), "setting": setting.name}
    return {key: record[key] for key in SEARCH_COLUMNS}


def search(
    path: str | Path = "weights/search.csv", plan=SEARCH, executor=None, **options
) -> pd.DataFrame:
    """Run what is missing of the search and add each finished run to the table at path.

    Only the train and val splits reach training. options go to train_many.
    Returns the table: SEARCH_COLUMNS, val_accuracy (of the best epoch), seconds.
    """
    path = Path(path)
    done = set()
    if path.exists():
        done = set(read_table(path)[SEARCH_COLUMNS].itertuples(index=False, name=None))
    jobs = {tuple(_search_key(*job).values()): job for study in plan for job in study.jobs()}

    def record(checkpoint: Checkpoint) -> None:
        row = _search_key(checkpoint.setting, checkpoint.config)
        row |= {"val_accuracy": checkpoint.metrics["val"].accuracy, "seconds": checkpoint.seconds}
        add_rows(path, pd.DataFrame([row]), SEARCH_COLUMNS)

    train_many(
        [job for key, job in jobs.items() if key not in done],
        executor,
        names=("train", "val"),
        measure=("val",),
        on_finish=record,
        **options,
    )
    return read_table(path)


# -------------------------------------------------------------------------------- theory


def batch_norm_gradients(
    x: Tensor, gamma: Tensor, upstream: Tensor, eps: float
) -> dict[str, Tensor]:
    """The six answers of question 3 (theory.md), as Ioffe and Szegedy (2015) define the layer.

    x and upstream, which is df/dy, are (m,), m >= 1; gamma is a scalar.
    Returns df/d of gamma, beta, x_hat (m,), variance, mean and x (m,).
    """
    m, mean = len(x), x.mean()
    deviation = x - mean
    variance = deviation.square().mean()
    root = (variance + eps).sqrt()
    x_hat = deviation / root
    d_x_hat = upstream * gamma
    return {
        "gamma": (upstream * x_hat).sum(),
        "beta": upstream.sum(),
        "x_hat": d_x_hat,
        "variance": -(d_x_hat * deviation).sum() / (2 * root**3),
        "mean": -d_x_hat.sum() / root,
        "x": gamma
        / (m * root)
        * (m * upstream - upstream.sum() - x_hat * (upstream * x_hat).sum()),
    }


def check_batch_norm_gradients(m: int = 32, eps: float = 1e-5, seed: int = 0) -> pd.DataFrame:
    """Each formula of batch_norm_gradients against autograd, in float64 on a random batch of m.

    Returns one row per gradient: its name, number of elements, largest absolute difference.
    """
    draw = functools.partial(
        torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x, gamma, beta, upstream = draw(m), draw(()), draw(()), draw(m)
    for tensor in (x, gamma, beta):
        tensor.requires_grad_()
    mean = x.mean()
    variance = (x - mean).square().mean()
    x_hat = (x - mean) / (variance + eps).sqrt()
    y = gamma * x_hat + beta
    inputs = {"gamma": gamma, "beta": beta, "x_hat": x_hat, "variance": variance, "mean": mean,
              "x": x}  # fmt: skip
    expected = torch.autograd.grad(y, list(inputs.values()), upstream)
    found = batch_norm_gradients(x.detach(), gamma.detach(), upstream, eps)
    rows = [
        (name, found[name].numel(), float((found[name] - gradient).abs().max()))
        for name, gradient in zip(inputs, expected)
    ]
    return pd.DataFrame(rows, columns=["gradient", "elements", "largest difference"])


# -------------------------------------------------------------------------------- report

# Colours that differ for colour-blind readers and in grey (Okabe and Ito 2008).
COLORS = {
    "baseline": "#000000", "dropout": "#E69F00", "weight_decay": "#009E73",
    "batch_norm": "#0072B2", "combined": "#CC79A7",
}  # fmt: skip
# 97.5 % quantile of Student's t for 1 to 9 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SPLIT_STYLES = {"train": "--", "val": ":", "test": "-"}


def checkpoint_path(folder: str | Path, name: str, seed: int = 0) -> Path:
    """Where a run of a setting is saved: the first seed under the setting's own name."""
    return Path(folder) / (f"{name}.pt" if seed == 0 else f"{name}-seed{seed}.pt")


def result_row(checkpoint: Checkpoint) -> dict:
    """The row of results.csv: setting, seed, kept epoch, accuracies as fractions, seconds."""
    accuracies = {f"{name}_accuracy": value.accuracy for name, value in checkpoint.metrics.items()}
    return {
        "setting": checkpoint.setting.name,
        "seed": checkpoint.config.seed,
        "epoch": checkpoint.epoch,
        **accuracies,
        "seconds": checkpoint.seconds,
    }


def train_and_save(jobs, folder: str | Path = "runs", existing: str = "error", **options):
    """train_many, each run saved to folder as soon as it is finished: the checkpoint, its row of
    results.csv, its epochs in history.csv.

    existing: what to do where a checkpoint is there: "error", "replace" it, or "skip" the job
        if the checkpoint is of just this job, which goes on after an interruption.
    Raises CheckpointError before any training where something is in the way.
    """
    folder, missing = Path(folder), []
    for setting, config in jobs:
        path = checkpoint_path(folder, setting.name, config.seed)
        if not path.exists() or existing == "replace":
            missing.append((setting, config))
        elif existing == "error":
            raise CheckpointError(
                f"{path} exists already; choose another folder, or let existing ones be skipped "
                "or replaced"
            )
        else:
            old = load_checkpoint(path)
            if (old.setting, old.config) != (setting, config):
                raise CheckpointError(
                    f"{path} was trained with other hyperparameters; choose another folder, or "
                    "let it be replaced"
                )
            _save_run(folder, old)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{folder} cannot be written to ({error.strerror}); choose another folder"
        raise CheckpointError(reason) from error

    def save(checkpoint):
        path = checkpoint_path(folder, checkpoint.setting.name, checkpoint.config.seed)
        save_checkpoint(path, checkpoint, overwrite=existing == "replace")
        _save_run(folder, checkpoint)

    return train_many(missing, on_finish=save, **options)


def _save_run(folder: Path, checkpoint: Checkpoint) -> None:
    row = result_row(checkpoint)
    history = checkpoint.history.assign(setting=row["setting"], seed=row["seed"])
    history = history[["setting", "seed", "epoch", "split", "loss", "accuracy"]]
    add_rows(folder / "history.csv", history, ["setting", "seed"])
    add_rows(folder / "results.csv", pd.DataFrame([row]), ["setting", "seed"])


def reevaluate(checkpoint: Checkpoint, splits: dict[str, Split]) -> pd.DataFrame:
    """Measure a checkpoint again: one row per split with the images, the accuracy that the
    checkpoint recorded, the one measured now, and whether they are equal.

    Equal means that at most one image differs: on another processor, sums round differently.
    """
    rows = []
    for name, split in splits.items():
        metrics = evaluate(checkpoint.model, split)
        recorded = checkpoint.metrics.get(name, Metrics(math.nan, math.nan))
        rows.append((name, len(split.labels), recorded.accuracy, metrics.accuracy))
    table = pd.DataFrame(rows, columns=["split", "images", "recorded", "measured"])
    table["equal"] = (table.recorded - table.measured).abs() * table.images < 1.5
    return table


def percent(fraction: float) -> str:
    """An accuracy as the tables print it: percent with two decimals."""
    return f"{100 * fraction:.2f}"


def settings_table() -> pd.DataFrame:
    """The hyperparameters that differ between the settings."""
    rows = [
        {
            "setting": setting.label,
            "dropout p": f"{setting.dropout:g}" if setting.dropout else "off",
            "L2 λ": f"{setting.weight_decay:g}" if setting.weight_decay else "off",
            "batch norm": "on" if setting.batch_norm else "off",
            "learning rate": f"{setting.lr:g}",
        }
        for setting in SETTINGS.values()
    ]
    return pd.DataFrame(rows)


def summary_table(results: pd.DataFrame, seed: int = 0, names=tuple(SETTINGS)) -> pd.DataFrame:
    """The final accuracies of one seed in percent: one row per setting, train and test."""
    rows = results[results.seed == seed].set_index("setting")
    names = [name for name in names if name in rows.index]
    return pd.DataFrame(
        {
            "setting": [SETTINGS[name].label for name in names],
            "train %": [percent(rows.train_accuracy[name]) for name in names],
            "test %": [percent(rows.test_accuracy[name]) for name in names],
        }
    )


def _with_spread(mean: float, spread: float, form: str = ".2f") -> str:
    return f"{mean:{form}}" + ("" if math.isnan(spread) else f" ± {spread:{form.lstrip('+')}}")


def seed_table(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds of each setting, in percent, and the gap
    between train and test in points."""
    results = results.assign(gap=results.train_accuracy - results.test_accuracy)
    columns = {"train_accuracy": "train %", "val_accuracy": "val %", "test_accuracy": "test %",
               "gap": "gap", "epoch": "kept epoch"}  # fmt: skip
    rows = []
    for name, setting in SETTINGS.items():
        runs = results[results.setting == name]
        if runs.empty:
            continue
        row = {"setting": setting.label, "runs": str(len(runs))}
        for column, label in columns.items():
            scale, form = (1, ".1f") if column == "epoch" else (100, ".2f")
            row[label] = _with_spread(scale * runs[column].mean(), scale * runs[column].std(), form)
        rows.append(row)
    return pd.DataFrame(rows)


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval, as fractions."""

    mean: float
    half: float


def paired_difference(
    results: pd.DataFrame, setting: str, other: str = "baseline", column: str = "test_accuracy"
) -> Interval:
    """Mean difference between two settings over the seeds that both have (at most 10), with
    its 95 % interval by Student's t; the half width of a single pair is NaN."""
    runs = results.assign(gap=results.train_accuracy - results.test_accuracy)
    wide = runs.pivot(index="seed", columns="setting", values=column)
    pairs = (wide[setting] - wide[other]).dropna()
    count = len(pairs)
    half = T_975[count - 2] * pairs.std() / math.sqrt(count) if count > 1 else math.nan
    return Interval(float(pairs.mean()), float(half))


def difference_table(results: pd.DataFrame, other: str = "baseline") -> pd.DataFrame:
    """Paired differences of every setting to another, in points with 95 % intervals."""
    columns = {"train_accuracy": "train", "val_accuracy": "val", "test_accuracy": "test",
               "gap": "gap"}  # fmt: skip
    rows = []
    for name in SETTINGS:
        if name != other and name in set(results.setting):
            row = {"setting": SETTINGS[name].label}
            for column, label in columns.items():
                mean, half = paired_difference(results, name, other, column)
                row[label] = _with_spread(100 * mean, 100 * half, "+.2f")
            rows.append(row)
    return pd.DataFrame(rows)


def describe_machine() -> str:
    """Versions and hardware, in one line."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores, device {find_device()}"
    )


def show_table(table: pd.DataFrame, caption: str):
    """A table with its caption as Markdown: a table in Jupyter, on GitHub and in the PDF."""
    from IPython.display import Markdown

    align = ["left"] + ["right"] * (table.shape[1] - 1)
    body = table.astype(str).to_markdown(index=False, disable_numparse=True, colalign=align)
    return Markdown(f"**{caption}**\n\n{body}")


def _panels(axes, rows: int, columns: int, size: tuple[float, float], **options):
    """The figure and the flat list of its axes: those that were given, or new ones."""
    from matplotlib.figure import Figure

    if axes is None:
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    axes = [axes] if hasattr(axes, "plot") else list(getattr(axes, "flat", axes))
    return axes[0].figure, axes


def _show_image(axes, image: Tensor, title: str) -> None:
    axes.imshow(image[0].numpy() * STD + MEAN, cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()


def plot_examples(split: Split, axes=None):
    """The first image of each class, on ten axes."""
    figure, axes = _panels(axes, 2, 5, (7, 3.1))
    for label, ax in enumerate(axes[: len(CLASSES)]):
        first = int((split.labels == label).nonzero()[0])
        _show_image(ax, split.images[first], f"{label} {CLASSES[label]}")
    return figure


def plot_convergence(history: pd.DataFrame, results: pd.DataFrame, axes=None, names=None):
    """Train and test accuracy after each epoch, one panel per setting: seed 0 as a line, all
    seeds from least to greatest as a band, the kept epoch of seed 0 as a dot.

    history and results: the tables history.csv and results.csv.
    """
    names = names or [name for name in SETTINGS if name in set(history.setting)]
    rows = math.ceil(len(names) / 2)
    size = (7, 2.6 * rows + 0.3)
    figure, axes = _panels(axes, rows, min(2, len(names)), size, sharex=True, sharey=True)
    for ax, name in zip(axes, names):
        kept = results[(results.setting == name) & (results.seed == 0)].epoch.iloc[0]
        for split in ("train", "test"):
            runs = history[(history.setting == name) & (history.split == split)]
            runs = 100 * runs.pivot(index="epoch", columns="seed", values="accuracy")
            style = SPLIT_STYLES[split]
            ax.plot(runs.index, runs[0], style, color=COLORS[name], label=split)
            ax.fill_between(
                runs.index, runs.min(axis=1), runs.max(axis=1), color=COLORS[name], alpha=0.25, lw=0
            )
            ax.plot(kept, runs[0][kept], "o", color=COLORS[name], ms=5)
        ax.set_title(f"{SETTINGS[name].label}: accuracy by epoch", fontsize=10)
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=8)
        ax.set_ylabel("accuracy (%)")
        ax.set_xlabel("epoch")
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return figure


def plot_search(table: pd.DataFrame, plan=SEARCH, axes=None):
    """Validation accuracy against what was varied, one panel for each question of the plan:
    a dot for each run, a line through the means over the seeds, a ring around what was chosen.

    table: search.csv.
    """
    questions = list(dict.fromkeys(study.question for study in plan))
    rows = math.ceil(len(questions) / 2)
    figure, axes = _panels(axes, rows, 2, (7, 2.5 * rows))
    for ax, question in zip(axes, questions):
        studies = [study for study in plan if study.question == question]
        x, lines = studies[0].x, list(studies[0].lines)
        keys = {tuple(_search_key(*job).values()) for study in studies for job in study.jobs()}
        chosen = [key in keys for key in table[SEARCH_COLUMNS].itertuples(index=False, name=None)]
        runs = table[chosen].sort_values(x)
        if runs[x].dtype == object:
            runs = runs.assign(**{x: runs[x].str.replace("_", " ")})
        elif runs[x].max() > 4 * runs[x].min() > 0:
            ax.set_xscale("log")
            ax.set_xticks(sorted(runs[x].unique()), [f"{v:g}" for v in sorted(runs[x].unique())])
            ax.minorticks_off()
        for values, line in runs.groupby(lines):
            label = ", ".join(str(value).replace("_", " ") for value in values)
            means = 100 * line.groupby(x).val_accuracy.mean()
            (drawn,) = ax.plot(means.index, means, "-", lw=1, label=label)
            ax.plot(line[x], 100 * line.val_accuracy, ".", color=drawn.get_color(), ms=5)
            record = _search_key(SETTINGS[line.setting.iloc[0]], TrainConfig())
            where = str(record[x]).replace("_", " ") if isinstance(record[x], str) else record[x]
            if all(record[k] == v for k, v in zip(lines, values)) and where in means.index:
                ax.plot(where, means[where], "o", mfc="none", mec="black", ms=10)
        ax.set_title(question, fontsize=10)
        ax.set_xlabel(x.replace("_", " "))
        ax.set_ylabel("val accuracy (%)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    for ax in axes[len(questions) :]:
        ax.set_axis_off()
    return figure


def plot_confusion(matrix: pd.DataFrame, axes=None):
    """A confusion matrix, (10, 10), in percent of each true class."""
    figure, (ax, *_) = _panels(axes, 1, 1, (6, 5.2))
    shares = (100 * matrix.div(matrix.sum(axis=1), axis=0)).to_numpy()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=30)  # errors are told apart below 30 %
    for (row, column), share in ((rc, shares[rc]) for rc in itertools.product(range(10), repeat=2)):
        if share >= 0.05:
            color = "white" if share > 18 else "black"
            ax.text(column, row, f"{share:.1f}", ha="center", va="center", color=color, fontsize=8)
    ax.set_xticks(range(10), matrix.columns, rotation=45, ha="right")
    ax.set_yticks(range(10), matrix.index)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    ax.set_title("Predicted classes, in percent of each true class", fontsize=10)
    return figure


def plot_mistakes(model: nn.Module, split: Split, axes=None, count: int = 10):
    """The mistakes made with the highest probability: true class, predicted class, percent."""
    figure, axes = _panels(axes, math.ceil(count / 5), 5, (7, 1.75 * math.ceil(count / 5)))
    confidence, predicted = predict(model, split).max(1)
    confidence[predicted == split.labels] = -1
    for index, ax in zip(confidence.argsort(descending=True)[:count].tolist(), axes):
        truth, guess = (CLASSES[int(labels[index])] for labels in (split.labels, predicted))
        title = f"{truth},\ntaken for {guess} ({100 * confidence[index]:.1f} %)"
        _show_image(ax, split.images[index], title)
    return figure


# -------------------------------------------------------------------------- command line


def get_setting(name: str) -> Setting:
    """The setting of that name. Raises ValueError, naming the nearest one, if there is none."""
    if name in SETTINGS:
        return SETTINGS[name]
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"unknown setting {name!r}; {hint}expected one of {', '.join(SETTINGS)}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dl_utils.py", description="LeNet-5 on Fashion-MNIST with and without regularization."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, text, examples):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog="examples:\n" + "\n".join(f"  python dl_utils.py {e}" for e in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--data", default="data", help="folder of Fashion-MNIST (data)")
        return command

    command = add(
        "train", _train_command, "train settings from scratch",
        ["train dropout", "train dropout --seeds 3 --epochs 5", "train all --seeds 0 1 2 3 4"],
    )  # fmt: skip
    command.add_argument("settings", nargs="+", metavar="SETTING",
                         help=f"{', '.join(SETTINGS)}, or all")  # fmt: skip
    command.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (0)")
    default = TrainConfig()
    command.add_argument("--epochs", type=int, default=default.epochs, help="(%(default)s)")
    command.add_argument("--batch-size", type=int, default=default.batch_size, help="(%(default)s)")
    command.add_argument("--lr", type=float, help="initial learning rate (the setting's own)")
    command.add_argument("--out", default="runs", help="folder to write to (runs)")
    command.add_argument("--workers", type=_positive, help="runs at a time (one for each core)")
    command.add_argument("--existing", choices=("error", "skip", "replace"), default="error",
                         help="what to do about runs that are there already (error)")  # fmt: skip

    command = add(
        "test", _test_command, "measure saved weights and compare with what was recorded",
        ["test", "test weights/dropout.pt", "test runs"],
    )  # fmt: skip
    text = "a .pt file, or a folder of them with results.csv (weights)"
    command.add_argument("path", nargs="?", default="weights", help=text)

    command = add(
        "search", _search_command, "run what is missing of the hyperparameter search",
        ["search", "search --workers 4"],
    )  # fmt: skip
    command.add_argument("--out", default="weights/search.csv", help="(%(default)s)")
    command.add_argument("--workers", type=_positive, help="runs at a time (one for each core)")
    return parser


def _train_command(args) -> int:
    names = SETTINGS if "all" in args.settings else args.settings
    jobs = []
    for name, seed in itertools.product(names, args.seeds):
        setting = get_setting(name)
        config = TrainConfig(epochs=args.epochs, batch_size=args.batch_size, seed=seed)
        jobs.append((setting if args.lr is None else replace(setting, lr=args.lr), config))
    runs = train_and_save(jobs, args.out, args.existing, root=args.data, workers=args.workers)
    for run in runs:
        if isinstance(run, Checkpoint):
            path = checkpoint_path(args.out, run.setting.name, run.config.seed)
            accuracies = ", ".join(f"{k} {percent(v.accuracy)} %" for k, v in run.metrics.items())
            print(f"{path}: epoch {run.epoch} kept, {accuracies}, {run.seconds:.0f} s")
    return 2 if any(isinstance(run, Exception) for run in runs) else 0


def _test_command(args) -> int:
    path = Path(args.path)
    if not path.is_dir():
        table = reevaluate(load_checkpoint(path), load_fashion_mnist(args.data))
        known = table.recorded.notna().all()
        for row in table.itertuples():
            recorded = f"   recorded {percent(row.recorded)} %" if known else ""
            print(f"{row.split:<6} {percent(row.measured)} %{recorded}")
        print(_verdict(table.equal.all(), "what the file recorded") if known else
              "The file records no accuracies to compare with.")  # fmt: skip
        return 0 if table.equal.all() or not known else 1
    files = [checkpoint_path(path, name) for name in SETTINGS]
    files = [file for file in files if file.exists()]
    if not files:
        raise FileNotFoundError(f"{path} holds none of {', '.join(SETTINGS)} as .pt files")
    checkpoints = [load_checkpoint(file) for file in files]
    if not (path / "results.csv").exists():
        raise FileNotFoundError(
            f"{path / 'results.csv'} does not exist; expected it beside the weights"
        )
    recorded = read_table(path / "results.csv").set_index(["setting", "seed"])
    splits, same = load_fashion_mnist(args.data), True
    print(f"{'':<20} {'train %':>8} {'val %':>8} {'test %':>8}")
    for checkpoint in tqdm(checkpoints, unit="file", leave=False, disable=None):
        name, seed = checkpoint.setting.name, checkpoint.config.seed
        _require(
            (name, seed) in recorded.index,
            f"{path / 'results.csv'} has no row of {name}, seed {seed}; train it anew",
        )
        row = recorded.loc[(name, seed)]
        checkpoint.metrics = {name: Metrics(math.nan, row[f"{name}_accuracy"]) for name in splits}
        table = reevaluate(checkpoint, splits)
        same &= bool(table.equal.all())
        values = " ".join(f"{percent(value):>8}" for value in table.measured)
        tqdm.write(f"{checkpoint.setting.label:<20} {values}")
    print(_verdict(same, str(path / "results.csv")))
    return 0 if same else 1


def _verdict(equal: bool, reference: str) -> str:
    return f"The measured accuracies {'equal' if equal else 'DIFFER from'} {reference}."


def _search_command(args) -> int:
    table = search(args.out, root=args.data, workers=args.workers)
    print(f"{args.out}: {len(table)} runs")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: exit code 0, 1 where accuracies differ, 2 for bad input, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"dl_utils.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dl_utils.py: interrupted; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
