"""LeNet-5 on Fashion-MNIST: no regularization, dropout, weight decay, batch normalization.

Everything that EX1.ipynb computes is here, in reading order: settings, data, model,
evaluation, training, checkpoints, tables, many runs, search, theory, report, command line.
Accuracies are fractions, losses are in nats per image, images are (N, 1, 28, 28) float32.
The commands are listed by python dl_utils.py --help.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
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
import textwrap
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------ settings

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
POOLINGS = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
# The layers of a block after its convolution or fully connected layer, for each place of batch
# normalization. Maximum pooling before an increasing activation gives what it gives after it,
# on a quarter of the elements.
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
    # Half a cosine from 1 to 0 (Loshchilov and Hutter 2017).
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    # The same after a linear rise from 0; after Smith and Topin (2019), whose momentum varies.
    "one_cycle": lambda t: t / 0.2 if t < 0.2 else 0.5 * (1 + math.cos(math.pi * (t - 0.2) / 0.8)),
}
RANGES = {  # of the fields of Setting and TrainConfig that are numbers: type, least, below
    "dropout": (float, 0, 1),
    "weight_decay": (float, 0, math.inf),
    "lr": (float, 1e-6, math.inf),
    "epochs": (int, 1, math.inf),
    "batch_size": (int, 1, math.inf),
    "seed": (int, 0, 2**32 // 3),  # a run uses three seeds, and torch takes 32 bits of one
    "split_seed": (int, 0, 2**32),
}
CHOICES = {  # of their other fields
    "batch_norm": (False, True),
    "activation": ACTIVATIONS,
    "pooling": POOLINGS,
    "norm_layers": ("all", "conv"),
    "norm_place": BLOCK_ORDERS,
    "decay_all": (False, True),
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _check_fields(record) -> None:
    for key, value in vars(record).items():
        if key in ("name", "label"):
            _require(isinstance(value, str), f"{key} is {value!r}; expected a string")
        if key in CHOICES:
            names = ", ".join(map(str, CHOICES[key]))
            right = isinstance(value, (str, bool)) and value in tuple(CHOICES[key])
            _require(right, f"{key} is {value!r}; expected one of {names}")
        if key in RANGES:
            kind, least, below = RANGES[key]
            what = "a whole number" if kind is int else "a finite number"
            limits = f">= {least}" + (f" and < {below}" if below < math.inf else "")
            right = type(value) in (int, kind) and least <= value < below
            _require(right, f"{key} is {value!r}; expected {what} {limits}")


@dataclass(frozen=True)
class Setting:
    """What is compared: one row of hyperparameters of the model and its regularization.

    name: its key in SETTINGS and the stem of its files. label: its name in tables and figures,
        which does not count in comparisons.
    dropout: probability of dropping a hidden fully connected unit (Srivastava et al. 2014).
    weight_decay: lambda of the L2 penalty lambda / 2 * ||w||^2 (Krogh and Hertz 1991) on the
        weights or, with decay_all, on biases and the parameters of batch norm as well.
    batch_norm: normalize hidden layers (Ioffe and Szegedy 2015); norm_layers says which,
        norm_place where in the block of a layer.
    activation, pooling: keys of ACTIVATIONS and POOLINGS.
    lr: the highest learning rate, tuned for each setting.

    Raises ValueError for a value out of its range.
    """

    name: str
    label: str = field(compare=False)
    dropout: float = 0.0
    weight_decay: float = 0.0
    batch_norm: bool = False
    lr: float = 0.08
    activation: str = "relu"
    pooling: str = "max"
    norm_layers: str = "all"
    norm_place: str = "after_activation"
    decay_all: bool = False

    __post_init__ = _check_fields


@dataclass(frozen=True)
class TrainConfig:
    """What all settings share: length, batches, randomness, optimizer, schedule.

    seed fixes initial weights, order of batches and dropout masks, each in a stream of its
    own; split_seed is that of load_fashion_mnist. Raises ValueError for a value out of range.
    """

    epochs: int = 16
    batch_size: int = 128
    seed: int = 0
    split_seed: int = 0
    optimizer: str = "sgd"
    schedule: str = "one_cycle"

    __post_init__ = _check_fields


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("baseline", "No regularization", lr=0.08),
        Setting("dropout", "Dropout", dropout=0.1, lr=0.08),
        Setting("weight_decay", "Weight decay", weight_decay=1e-3, lr=0.08),
        Setting("batch_norm", "Batch normalization", batch_norm=True, lr=0.08),
        Setting("combined", "All three", dropout=0.1, weight_decay=1e-3, batch_norm=True, lr=0.08),
    )
}


def get_setting(name: str) -> Setting:
    """The setting of that name. Raises ValueError, suggesting the nearest, if there is none."""
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    names = ", ".join(SETTINGS)
    _require(name in SETTINGS, f"unknown setting {name!r}; {hint}expected one of {names}")
    return SETTINGS[name]


# ---------------------------------------------------------------------------------- data

# fmt: off
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle boot")
# fmt: on
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

    def to(self, device: str | torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; by default CUDA if there is one, else Apple's GPU, else the CPU.

    Raises ValueError for a device that this machine cannot use.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        sentence = f"this machine cannot use the device {device!r}; its own is {find_device()}"
        raise ValueError(sentence) from error


def load_fashion_mnist(root: str | Path = "data", split_seed: int = 0) -> dict[str, Split]:
    """Read Fashion-MNIST (Xiao et al. 2017), downloading it to root where it is missing.

    Returns "train" (55,000 images) and "val" (5,000), drawn at random from the 60,000
    training images by split_seed, and "test" (10,000).
    Raises FileNotFoundError where files are missing and cannot be downloaded, ValueError
    where a file does not hold what Fashion-MNIST holds.
    """
    raw, parts = Path(root) / "FashionMNIST" / "raw", []
    try:
        if not all((raw / name).exists() for name in RAW_FILES):
            from torchvision.datasets import FashionMNIST  # slow to import

            raw.mkdir(parents=True, exist_ok=True)
            with FileLock(raw / ".lock"):  # other workers may find the same files missing
                FashionMNIST(root, download=True)
    except Exception as error:  # of the file system, of the network, of a checksum
        reason = str(error).strip().split("\n")[-1]
        raise FileNotFoundError(
            f"Fashion-MNIST is missing or damaged in {raw} and cannot be put there ({reason}); "
            f"copy the four files {', '.join(f'{name}.gz' for name in RAW_FILES)} there"
        ) from error
    for name, digest in RAW_FILES.items():
        path, mend = raw / name, "delete it, and it is made anew"
        try:
            data = path.read_bytes()
            right = hashlib.sha256(data).hexdigest() == digest
            if not right:
                with FileLock(raw / ".lock"):  # another process may be unpacking it
                    data = path.read_bytes()
                right = hashlib.sha256(data).hexdigest() == digest
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); {mend}") from error
        _require(right, f"{path} does not hold what Fashion-MNIST holds; {mend}")
        header = 16 if "images" in name else 8  # bytes, of the IDX format
        parts.append(torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header))

    def split(pixels: Tensor, labels: Tensor, index=slice(None)) -> Split:
        images = pixels.view(-1, 1, 28, 28)[index].float()
        return Split(images.div_(255).sub_(MEAN).div_(STD), labels[index].long())

    generator = torch.Generator().manual_seed(split_seed)
    order = torch.randperm(len(parts[1]), generator=generator)
    return {
        "train": split(*parts[:2], order[VALIDATION_IMAGES:]),
        "val": split(*parts[:2], order[:VALIDATION_IMAGES]),
        "test": split(*parts[2:]),
    }


def minibatches(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
    """Yield the split in batches of batch_size, the last one ragged, in a random order drawn
    from generator (on the CPU)."""
    order = torch.randperm(len(split.labels), generator=generator)
    for index in order.to(split.labels.device).split(batch_size):
        yield Split(split.images[index], split.labels[index])


def _check_split(split: Split) -> None:
    count = len(split.images)
    _require(count > 0, "the split is empty; expected at least one image")
    wanted = {"images": ((count, 1, 28, 28), torch.float32), "labels": ((count,), torch.int64)}
    for (name, (shape, dtype)), part in zip(wanted.items(), split):
        found, expected = f"{tuple(part.shape)} of {part.dtype}", f"{shape} of {dtype}"
        _require(found == expected, f"{name} are {found}; expected {expected}")
    low, high = int(split.labels.min()), int(split.labels.max())
    _require(low >= 0 and high <= 9, f"labels run from {low} to {high}; expected 0 to 9")


# --------------------------------------------------------------------------------- model


NETWORK = ("dropout", "batch_norm", "activation", "pooling", "norm_layers", "norm_place")


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) for 28 x 28 images: (N, 1, 28, 28) to logits (N, 10).

    61,706 parameters; batch normalization adds 2 for each channel or unit it normalizes. The
    arguments are those of Setting; ValueError for a value out of its range. A technique that is
    off leaves an identity in its place, so that every variant has the same layer names.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: str = "relu",
        pooling: str = "max",
        norm_layers: str = "all",
        norm_place: str = "after_activation",
    ):
        super().__init__()
        network = (dropout, batch_norm, activation, pooling, norm_layers, norm_place)
        _check_fields(SimpleNamespace(**dict(zip(NETWORK, network))))
        pool = POOLINGS[pooling]
        norm2d = nn.BatchNorm2d if batch_norm else nn.Identity
        norm1d = nn.BatchNorm1d if batch_norm and norm_layers == "all" else nn.Identity

        def block(number: int, **parts: nn.Module) -> dict[str, nn.Module]:
            parts["act"] = ACTIVATIONS[activation]()
            return {
                f"{key}{number}": parts[key] for key in BLOCK_ORDERS[norm_place] if key in parts
            }

        layers = {
            "conv1": nn.Conv2d(1, 6, kernel_size=5, padding=2),  # (N, 6, 28, 28)
            **block(1, norm=norm2d(6), pool=pool(2)),  # (N, 6, 14, 14)
            "conv2": nn.Conv2d(6, 16, kernel_size=5),  # (N, 16, 10, 10)
            **block(2, norm=norm2d(16), pool=pool(2)),  # (N, 16, 5, 5)
            "flatten": nn.Flatten(),  # (N, 400)
            "fc3": nn.Linear(400, 120),  # (N, 120)
            **block(3, norm=norm1d(120)),
            "drop3": nn.Dropout(dropout),
            "fc4": nn.Linear(120, 84),  # (N, 84)
            **block(4, norm=norm1d(84)),
            "drop4": nn.Dropout(dropout),
            "fc5": nn.Linear(84, 10),  # (N, 10): logits
        }
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _network(setting: Setting) -> LeNet5:
    return LeNet5(**{key: getattr(setting, key) for key in NETWORK})


def _seed_of(use: str, seed: int) -> int:
    """A seed for one use of randomness; no two uses of any two seeds share one."""
    return 3 * seed + ("weights", "batches", "dropout").index(use)


def build_model(setting: Setting, seed: int = 0) -> LeNet5:
    """LeNet-5 as the setting wants it. Settings of one seed start from the same weights."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds a GPU as well: fork_rng would not restore that.
        torch.random.default_generator.manual_seed(_seed_of("weights", seed))
        model = _network(setting)
    return model.to(memory_format=torch.channels_last)  # faster, the same function


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module):
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def layer_summary(model: nn.Module, input_shape=(1, 1, 28, 28)) -> pd.DataFrame:
    """Send one input through the layers of a Sequential, in order. Returns one row per layer
    that does something: its name, output shape, number of parameters."""
    rows, activation = [], torch.zeros(input_shape).to(next(model.parameters()))
    with _evaluation_mode(model):
        for name, layer in getattr(model, "layers", model).named_children():
            activation = layer(activation)
            idle = isinstance(layer, nn.Identity) or getattr(layer, "p", None) == 0  # dropout of 0
            if not idle:
                count = sum(parameter.numel() for parameter in layer.parameters())
                rows.append((name, tuple(activation.shape), count))
    return pd.DataFrame(rows, columns=["layer", "output shape", "parameters"])


# ---------------------------------------------------------------------------- evaluation


class Metrics(NamedTuple):
    """Mean cross-entropy in nats per image, and the fraction of images classified right."""

    loss: float
    accuracy: float


EVALUATION_BATCH = 500  # images; they fit the cache


def _logits(model: nn.Module, split: Split) -> Tensor:
    """(N, 10) on the CPU, in evaluation mode."""
    _check_split(split)
    device = next(model.parameters()).device
    with _evaluation_mode(model):
        batches = split.images.split(EVALUATION_BATCH)
        return torch.cat([model(images.to(device)) for images in batches]).cpu()


def evaluate(model: nn.Module, split: Split) -> Metrics:
    """Loss and accuracy over a split in evaluation mode: no dropout, batch normalization by
    its running statistics. The mode that the model was in is restored afterwards.

    Raises ValueError, as predict and confusion_matrix, for a split of other shapes, types or
    labels.
    """
    logits, labels = _logits(model, split), split.labels.cpu()
    loss = F.cross_entropy(logits.double(), labels).item()
    return Metrics(loss, (logits.argmax(1) == labels).sum().item() / len(labels))


def predict(model: nn.Module, split: Split) -> Tensor:
    """Class probabilities (N, 10) on the CPU, in evaluation mode."""
    return _logits(model, split).softmax(1)


def confusion_matrix(model: nn.Module, split: Split) -> pd.DataFrame:
    """Counts of images, (10, 10): rows are true classes, columns are predicted ones."""
    pairs = split.labels.cpu() * len(CLASSES) + _logits(model, split).argmax(1)
    counts = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    return pd.DataFrame(counts.numpy(), index=CLASSES, columns=CLASSES)


# ------------------------------------------------------------------------------ training

HISTORY_COLUMNS = ["epoch", "split", "loss", "accuracy"]


@dataclass
class Checkpoint:
    """A trained model with everything that explains it.

    model: in evaluation mode, with the weights after epoch `epoch`, the best on validation.
    history: tidy DataFrame of epoch, split, loss, accuracy, one row per epoch and split.
    metrics: split name to Metrics of the kept model. seconds: of training and measuring.
    Of a bare state_dict only model and setting are known; the rest is None or empty.
    """

    model: LeNet5
    setting: Setting
    config: TrainConfig | None = None
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    epoch: int | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    seconds: float | None = None


def make_optimizer(model: nn.Module, setting: Setting, config: TrainConfig):
    """The optimizer, with the L2 penalty on weights alone or, with decay_all, on everything."""
    decayed, exempt = [], []
    for parameter in model.parameters():
        (decayed if setting.decay_all or parameter.ndim > 1 else exempt).append(parameter)
    groups = [{"params": decayed, "weight_decay": setting.weight_decay}, {"params": exempt}]
    return OPTIMIZERS[config.optimizer](groups, lr=setting.lr)


def _check_training(setting: Setting, splits: dict[str, Split], config: TrainConfig) -> None:
    for split in splits.values():
        _check_split(split)
    size, count = config.batch_size, len(splits["train"].labels)
    _require(size <= count, f"batch_size is {size}; expected at most the {count} images there are")
    normalizes_units = setting.batch_norm and setting.norm_layers == "all"
    _require(
        not normalizes_units or 1 not in (size, count % size),
        f"batch_size {size} leaves a batch of one image, which batch normalization cannot use; "
        "choose another",
    )


@contextlib.contextmanager
def _reproducibly(device: torch.device):
    """One thread, and random numbers that leave the CPU's global generator alone: the same
    bits whatever the number of cores, and no crowding among workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)


_TRAINING = threading.Lock()  # the generator and the number of threads belong to the process


def train(
    setting: Setting,
    splits: dict[str, Split],
    config: TrainConfig,
    *,
    device: str | torch.device | None = None,
    measure: tuple[str, ...] | None = None,
    progress: Callable[[], None] | None = None,
) -> Checkpoint:
    """Train one setting from scratch and keep the first epoch of highest validation accuracy.

    splits must hold "train" and "val". After every epoch all of them, or those named in measure,
    val among them, are measured in evaluation mode, and no others are touched. device: by
    default the one of find_device. progress is called without arguments after every epoch.
    On the CPU training runs on one thread and gives the same bits every time, unless another
    thread draws from torch's generator meanwhile; calls from several threads wait for each other.
    Raises ValueError for splits, a batch size or a device that cannot be trained on, and after
    the first epoch whose validation loss is not finite.
    """
    device = find_device(device)
    measure = tuple(splits) if measure is None else measure
    needed = dict.fromkeys(("train", "val", *measure))
    sentence = f"expected splits named {', '.join(needed)}; found {', '.join(splits)}"
    _require(needed.keys() <= splits.keys(), sentence)
    _require("val" in measure, f"measure is {', '.join(measure)}; expected val among them")
    splits = {name: splits[name].to(device) for name in needed}
    _check_training(setting, splits, config)
    rows, kept = [], None
    with _TRAINING, _reproducibly(device):
        start = time.perf_counter()
        model = build_model(setting, config.seed).to(device)
        optimizer = make_optimizer(model, setting, config)
        steps = config.epochs * math.ceil(len(splits["train"].labels) / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: SCHEDULES[config.schedule](step / steps)
        )
        batch_order = torch.Generator().manual_seed(_seed_of("batches", config.seed))
        torch.manual_seed(_seed_of("dropout", config.seed))
        for epoch in range(1, config.epochs + 1):
            model.train()
            for images, labels in minibatches(splits["train"], config.batch_size, batch_order):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                schedule.step()
            metrics = {name: evaluate(model, splits[name]) for name in measure}
            rows += [(epoch, name, *values) for name, values in metrics.items()]
            _require(
                math.isfinite(metrics["val"].loss),
                f"training diverged in epoch {epoch}: the validation loss is "
                f"{metrics['val'].loss}; choose a lower learning rate",
            )
            if kept is None or metrics["val"].accuracy > kept.metrics["val"].accuracy:
                best = copy.deepcopy(model).eval()
                kept = Checkpoint(best, setting, config, epoch=epoch, metrics=metrics)
            if progress:
                progress()
    kept.history = pd.DataFrame(rows, columns=HISTORY_COLUMNS)
    kept.seconds = round(time.perf_counter() - start, 1)
    return kept


# --------------------------------------------------------------------------- checkpoints

CHECKPOINT_KIND = {"format": "EX1 LeNet-5 checkpoint", "version": 1}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a file that cannot be written where it should go."""


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, overwrite: bool = False) -> None:
    """Write a checkpoint of plain types, whole or not at all.

    Raises CheckpointError where the file exists and overwrite is off, or cannot be written, or
    where the checkpoint could not be read again, as that of a bare state_dict.
    """
    if checkpoint.config is None:
        raise CheckpointError("a bare state_dict has no history to save; use torch.save for it")
    if os.path.exists(path) and not overwrite:
        raise CheckpointError(f"{path} exists already; name another file or allow overwriting")
    try:
        _from_bytes(data := _to_bytes(checkpoint))
    except Exception as error:  # of a field, a type or a tensor
        reason = f"{path} is not written, as it could not be read again: {error}"
        raise CheckpointError(reason) from error
    _write_atomically(Path(path), data)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint to a device, whichever one it was trained on, running no code from it.

    A bare state_dict is read as of this LeNet-5 with the default activation, pooling and place
    of batch norm; its keys tell whether it has batch norm.
    Raises FileNotFoundError where there is no file, CheckpointError where it is not a
    checkpoint of this program, is damaged, or holds values out of range, ValueError for a
    device that this machine cannot use.
    """
    device = find_device(device)
    try:
        checkpoint = _from_bytes(Path(path).read_bytes())
    except FileNotFoundError as error:
        reason = f"{path} does not exist; expected a checkpoint that train saved"
        raise FileNotFoundError(reason) from error
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}); expected a checkpoint file"
        raise CheckpointError(reason) from error
    except Exception as error:  # whatever it is, the file is not what it should be
        said = " ".join(str(error).split())  # in one line
        reason = f"{path} is not a usable checkpoint: {said}; train it again, with overwriting"
        raise CheckpointError(reason) from error
    checkpoint.model.to(device)
    return checkpoint


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    payload = {
        **CHECKPOINT_KIND,
        "setting": asdict(checkpoint.setting),
        "config": asdict(checkpoint.config),
        "history": checkpoint.history.to_dict("list"),
        "epoch": checkpoint.epoch,
        "metrics": {name: list(metrics) for name, metrics in checkpoint.metrics.items()},
        "seconds": checkpoint.seconds,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "state_dict": {key: value.cpu() for key, value in checkpoint.model.state_dict().items()},
    }
    payload["sha256"] = _digest(payload)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def _digest(payload: dict) -> str:
    """SHA-256 of everything in a payload but the digest itself."""
    plain = {key: payload[key] for key in payload if key not in ("state_dict", "sha256")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, tensor in sorted(payload["state_dict"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_bytes(data: bytes) -> Checkpoint:
    try:
        payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise ValueError("it cannot be read as plain tensors") from error
    _require(isinstance(payload, dict), f"it holds a {type(payload).__name__}, not a checkpoint")
    if payload and all(isinstance(value, Tensor) for value in payload.values()):
        norms = [key for key in ("norm1", "norm3") if f"layers.{key}.weight" in payload]
        layers = "conv" if norms == ["norm1"] else "all"
        bare = Setting("state_dict", "Weights", batch_norm=bool(norms), norm_layers=layers)
        return Checkpoint(_load_model(bare, payload), bare)
    kind = {key: payload.get(key) for key in CHECKPOINT_KIND}
    _require(kind == CHECKPOINT_KIND, f"it is of {kind}; this program reads {CHECKPOINT_KIND}")
    parts = {"setting", "config", "history", "epoch", "metrics", "seconds", "state_dict", "sha256"}
    missing = ", ".join(sorted(parts - payload.keys()))
    _require(not missing, f"it lacks {missing}")
    setting, config = Setting(**payload["setting"]), TrainConfig(**payload["config"])
    whole = [payload["setting"], payload["config"]] == [asdict(setting), asdict(config)]
    _require(whole, "its setting or its config lacks fields")
    model = _load_model(setting, payload["state_dict"])
    _require(_digest(payload) == payload["sha256"], "its contents do not match its checksum")
    history = pd.DataFrame(payload["history"])
    _require(list(history) == HISTORY_COLUMNS, "its history lacks columns or has others")
    metrics = {name: Metrics(*map(float, pair)) for name, pair in payload["metrics"].items()}
    epoch, seconds = int(payload["epoch"]), float(payload["seconds"])
    return Checkpoint(model, setting, config, history, epoch, metrics, seconds)


def _load_model(setting: Setting, weights: dict[str, Tensor]) -> LeNet5:
    with torch.device("meta"):  # draws nothing: another thread may be drawing dropout masks
        model = _network(setting)
    model.to_empty(device="cpu").load_state_dict(weights)  # raises for other names or shapes
    for key, tensor in model.state_dict().items():
        found = getattr(weights.get(key), "dtype", None)
        _require(found == tensor.dtype, f"{key} is of type {found}; expected {tensor.dtype}")
        _require(bool(tensor.isfinite().all()), f"{key} holds NaN or infinite values")
        right = not key.endswith("running_var") or bool((tensor >= 0).all())
        _require(right, f"{key} holds negative variances")
    return model.to(memory_format=torch.channels_last).eval()


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file beside path, flush it to disk, and rename it to path."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror}); free space or name another file"
        raise CheckpointError(reason) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def reevaluate(checkpoint: Checkpoint, splits: dict[str, Split], recorded=None) -> pd.DataFrame:
    """Measure a checkpoint again: one row per split with the images in it, the accuracy that
    was recorded (split to fraction; by default the checkpoint's own), the one measured now,
    and whether they agree: at most one image differs, as rounding may on another processor.
    Where nothing was recorded they do not.
    """
    if recorded is None:
        recorded = {name: metrics.accuracy for name, metrics in checkpoint.metrics.items()}
    rows = []
    for name, split in splits.items():
        accuracy = evaluate(checkpoint.model, split).accuracy
        rows.append((name, len(split.labels), recorded.get(name, math.nan), accuracy))
    table = pd.DataFrame(rows, columns=["split", "images", "recorded", "measured"])
    table["agrees"] = (table.recorded - table.measured).abs() * table.images < 1.5
    return table


# ------------------------------------------------------------------ tables and many runs

ACCURACIES = {"train_accuracy": "train", "val_accuracy": "val", "test_accuracy": "test"}
RUN = ["setting", "seed"]  # what tells the runs in results.csv and history.csv apart


def add_rows(path: str | Path, rows: pd.DataFrame, keys: list[str]) -> None:
    """Add rows to a CSV file in place of those with the same keys; a file that has them as they
    are stays as it is.

    Safe against other processes that add to the same file, and against interruption.
    Raises ValueError where the file is no table or lacks the keys, CheckpointError or OSError
    where it cannot be written.
    """
    path = Path(path)
    with FileLock(path.parent / f".{path.name}.lock"):
        if path.exists():
            old = read_table(path, keys)
            there = old.set_index(keys).index.isin(rows.set_index(keys).index)
            same = old[there].reindex(columns=rows.columns).reset_index(drop=True)
            if same.equals(rows.reset_index(drop=True)):
                return
            rows = pd.concat([old[~there], rows], ignore_index=True)
        _write_atomically(path, rows.to_csv(index=False).encode())


def read_table(path: str | Path, columns=()) -> pd.DataFrame:
    """Read a CSV file of add_rows, floats to the last digit.

    Raises FileNotFoundError where there is none, ValueError where it is no table, lacks
    columns, or holds a value of the wrong type.
    """
    types = {"setting": str} | dict.fromkeys(ACCURACIES, float)
    types |= {key: kind for key, (kind, *_) in RANGES.items()}
    types |= {key: bool for key, allowed in CHOICES.items() if True in allowed}
    options = {"keep_default_na": False, "na_values": [""], "float_precision": "round_trip"}
    mend = "move it out of the way, or name another file"
    try:
        table = pd.read_csv(path, dtype=types, **options)
    except FileNotFoundError as error:
        reason = f"{path} does not exist; expected a table that this program wrote"
        raise FileNotFoundError(reason) from error
    except (OSError, ValueError, OverflowError) as error:  # a folder, empty, ragged, binary
        reason = getattr(error, "strerror", None) or str(error).strip()
        raise ValueError(f"{path} is not a table ({reason}); {mend}") from error
    missing = ", ".join(column for column in columns if column not in table)
    _require(not missing, f"{path} lacks the columns {missing}; {mend}")
    return table


def train_many(
    jobs: Iterable[tuple[Setting, TrainConfig]],
    executor: Executor | None = None,
    *,
    splits: dict[str, Split] | None = None,
    root: str | Path = "data",
    measure: tuple[str, ...] | None = None,
    workers: int | None = None,
    on_finish: Callable[[Checkpoint], None] | None = None,
) -> list[Checkpoint | Exception]:
    """Train independent (setting, config) jobs in parallel, with one progress bar.

    executor: any concurrent.futures.Executor; by default processes of this machine.
    workers: how many of these; by default as many as there are cores, one on a GPU.
    splits: the data; by default each worker reads Fashion-MNIST from root, once while the
        split_seed of its jobs stays the same.
    measure: as in train; training then sees no other splits than these and train.
    on_finish: called in this process with each Checkpoint as soon as it is there; what it raises
        is a failure of the job.

    Returns the checkpoints in the order of jobs. A job that fails is reported at once, the
    others go on, and its place in the list holds the exception. A process of this machine that
    is killed ends all jobs that are not finished; a second call of train_and_save goes on.
    Processes are spawned: a script calls this under if __name__ == "__main__". An interrupt
    cancels the jobs not yet begun, and ends those that processes of this machine run.
    Raises ValueError for workers below 1 and, with the processes of this machine, what
    load_fashion_mnist raises; with another executor that is a failure of the jobs.
    """
    _require(workers is None or workers >= 1, f"workers is {workers}; expected 1 or more")
    jobs, results, epochs_file = list(jobs), {}, None
    if not jobs:
        return []
    total = sum(config.epochs for _, config in jobs)
    with contextlib.ExitStack() as stack:
        if executor is None:
            if splits is None:
                load_fashion_mnist(root)  # one download, or one error, not one in each worker
            cores = os.cpu_count() if find_device().type == "cpu" else 1
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            epochs_file = os.path.join(stack.enter_context(folder), "epochs")
            executor = stack.enter_context(_processes(min(len(jobs), workers or cores)))
        bar = stack.enter_context(tqdm(total=total, unit="epoch", disable=None))
        pending = {}
        # Where an exception leaves, what has not begun does not begin.
        stack.callback(lambda: [future.cancel() for future in pending])
        for index, job in enumerate(jobs):
            future = executor.submit(_run_job, job, splits, str(root), measure, epochs_file)
            pending[future] = index
        while pending:
            for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                index = pending.pop(future)
                try:
                    results[index] = _from_bytes(future.result())
                    if on_finish:
                        on_finish(results[index])
                except Exception as error:
                    results[index] = error
                    setting, config = jobs[index]
                    bar.write(f"{setting.name}, seed {config.seed}, failed: {error}", sys.stderr)
            done = sum(jobs[index][1].epochs for index in results)
            if epochs_file and os.path.exists(epochs_file):
                done = max(done, os.path.getsize(epochs_file))
            bar.update(done - bar.n)
    return [results[index] for index in range(len(jobs))]


_load_once = functools.lru_cache(maxsize=1)(load_fashion_mnist)


def _run_job(job, splits, root, measure, epochs_file) -> bytes:
    setting, config = job  # bytes come back from any process or machine as they went

    def progress():
        if epochs_file:
            with open(epochs_file, "ab") as file:
                file.write(b".")  # one byte per epoch: its size is the progress

    if splits is None:
        splits = _load_once(root, config.split_seed)
    return _to_bytes(train(setting, splits, config, measure=measure, progress=progress))


@contextlib.contextmanager
def _processes(workers: int):
    """A pool of spawned processes that ends with this one, however this one ends."""
    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        try:
            for _ in range(workers):
                pool.submit(int)  # starts a process, which inherits to be deaf to Ctrl-C
        finally:
            if main:
                signal.signal(signal.SIGINT, handler)
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join(5)
        raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def checkpoint_path(folder: str | Path, name: str, seed: int = 0) -> Path:
    """Where a run of a setting is saved: the first seed under the setting's own name."""
    return Path(folder) / (f"{name}.pt" if seed == 0 else f"{name}-seed{seed}.pt")


def result_row(checkpoint: Checkpoint) -> dict:
    """The row of results.csv: setting, seed, kept epoch, accuracies as fractions, seconds."""
    run = {"setting": checkpoint.setting.name, "seed": checkpoint.config.seed}
    found = {f"{name}_accuracy": value.accuracy for name, value in checkpoint.metrics.items()}
    return {**run, "epoch": checkpoint.epoch, **found, "seconds": checkpoint.seconds}


def _require_writable(folder: Path) -> None:
    """Make the folder, and find out before hours of training that nothing can be saved in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{folder} cannot be written to ({error.strerror}); choose another folder"
        raise ValueError(reason) from error


def train_and_save(
    jobs, folder: str | Path = "runs", overwrite: bool = False, **options
) -> list[Checkpoint | Exception]:
    """train_many into a folder: each run, as soon as it is finished, gives a checkpoint, a row
    of results.csv and its epochs in history.csv. options go to train_many.

    A job whose checkpoint is there is not trained again, so that a second call goes on after
    an interruption; with overwrite all are. Returns the results in the order of jobs.
    Raises, before any training, ValueError where the folder cannot be written to, its tables
    cannot be read or two different jobs would write the same file, and CheckpointError where a
    file in it is damaged, or of other hyperparameters, and overwrite is off; and what
    train_many raises.
    """
    folder, jobs, runs = Path(folder), list(jobs), {}
    paths = {job: checkpoint_path(folder, job[0].name, job[1].seed) for job in jobs}
    unique = len(paths) == len(set(paths.values()))
    _require(unique, "two different jobs would write the same file")
    _require_writable(folder)
    for name in ("results.csv", "history.csv"):
        if (folder / name).exists():
            read_table(folder / name, RUN)

    def record(run: Checkpoint) -> None:
        row = result_row(run)
        history = run.history.assign(**{key: row[key] for key in RUN})
        add_rows(folder / "history.csv", history[RUN + HISTORY_COLUMNS], RUN)
        add_rows(folder / "results.csv", pd.DataFrame([row]), RUN)

    def save(run: Checkpoint) -> None:
        save_checkpoint(paths[run.setting, run.config], run, overwrite)
        record(run)

    for job, path in paths.items():
        if path.exists() and not overwrite:
            runs[job] = old = load_checkpoint(path)
            if (old.setting, old.config) != job:
                found = old.setting, old.config or TrainConfig()
                now, then = ({**vars(a), **vars(b)} for a, b in (job, found))
                other = [key for key in now if key != "label" and now[key] != then[key]]
                pairs = ", ".join(f"{key} {then[key]}, not {now[key]}" for key in other)
                raise CheckpointError(
                    f"{path} exists already, trained with other hyperparameters ({pairs}); choose "
                    "another folder, delete it, or allow overwriting (--overwrite)"
                )
    for run in runs.values():
        record(run)  # its rows may be missing
    missing = [job for job in paths if job not in runs]
    runs.update(zip(missing, train_many(missing, on_finish=save, **options)))
    return [runs[job] for job in jobs]


# -------------------------------------------------------------------------------- search

SEARCH_FILE = "weights/search.csv"
QUESTIONS = {  # what is on the axis of the panel, and what tells its lines apart
    "Activation and pooling": ("lr", ["activation", "pooling"]),
    "Batch size": ("lr", ["batch_size", "optimizer"]),
    "Optimizer and schedule": ("lr", ["setting", "optimizer"]),
    "Place of batch normalization": ("norm_place", ["norm_layers"]),
    "Learning rate": ("lr", ["setting"]),
    "Number of epochs": ("epochs", ["setting"]),
    "Dropout probability": ("dropout", ["epochs"]),
    "L2 coefficient": ("weight_decay", ["epochs", "decay_all"]),
    "All three together": ("weight_decay", ["epochs", "dropout", "decay_all"]),
}
SEARCH_COLUMNS = ["setting", *(f.name for f in (*fields(Setting)[2:], *fields(TrainConfig)))]
SEARCH_COLUMNS.remove("split_seed")  # it is the same in all of the search


def _search_row(setting: Setting, config: TrainConfig) -> dict:
    row = {"setting": setting.name, **asdict(setting), **asdict(config)}
    return {key: row[key] for key in SEARCH_COLUMNS}


def _search_job(row: dict) -> tuple[Setting, TrainConfig]:
    row = row | {"name": row["setting"], "label": row["setting"], "split_seed": 0}
    kinds = Setting, TrainConfig
    return tuple(kind(**{f.name: row[f.name] for f in fields(kind)}) for kind in kinds)


def search(
    path: str | Path = SEARCH_FILE, plan: str | Path = SEARCH_FILE, executor=None, **options
) -> pd.DataFrame:
    """Run what is missing of the search and add each finished run to the table at path.

    plan: a table with the same columns, one row for each run to make: the questions that it
    helps to answer (keys of QUESTIONS, joined by "; "), and SEARCH_COLUMNS. A run is missing
    where path has no val_accuracy (of the best epoch) for it. Only the train and val splits
    reach training. options go to train_many. Returns the table.
    Raises FileNotFoundError where there is no plan; ValueError, before any run, where the folder
    cannot be written to or a table cannot be read or used, and at the end if a run failed (the
    others are in the table); and what train_many raises.
    """
    done = set()
    if Path(path).exists():
        table = read_table(path, [*SEARCH_COLUMNS, "val_accuracy"])
        done = {_search_job(row) for row in table.dropna(subset="val_accuracy").to_dict("records")}
    rows = read_table(plan, ["questions", *SEARCH_COLUMNS]).to_dict("records")
    for row in rows:
        known = row["setting"] in SETTINGS and {*str(row["questions"]).split("; ")} <= {*QUESTIONS}
        pair = f"{row['questions']!r}, {row['setting']!r}"
        _require(known, f"{plan} has a row of {pair}; expected keys of QUESTIONS and of SETTINGS")
    questions = {_search_job(row): row["questions"] for row in rows}
    _require_writable(Path(path).parent)

    def record(run: Checkpoint) -> None:
        job = run.setting, run.config
        row = {"questions": questions[job], **_search_row(*job)}
        row |= {"val_accuracy": run.metrics["val"].accuracy, "seconds": run.seconds}
        add_rows(path, pd.DataFrame([row]), SEARCH_COLUMNS)

    missing = [job for job in questions if job not in done]
    runs = train_many(missing, executor, measure=("val",), on_finish=record, **options)
    failed = sum(isinstance(run, Exception) for run in runs)
    _require(not failed, f"{failed} of {len(runs)} runs failed; the others are in {path}")
    return read_table(path, SEARCH_COLUMNS)


# -------------------------------------------------------------------------------- theory


def batch_norm_gradients(
    x: Tensor, gamma: Tensor, upstream: Tensor, eps: float
) -> dict[str, Tensor]:
    """The six answers to question 3 (theory.md), for the layer of Ioffe and Szegedy (2015).

    x and upstream, which is df/dy, are (m,); gamma is a scalar; eps is added to the variance.
    Returns df/d of gamma, beta, x_hat (m,), variance, mean and x (m,).
    """
    m, mean = len(x), x.mean()
    variance = (x - mean).square().mean()
    root = (variance + eps).sqrt()
    x_hat = (x - mean) / root
    d_gamma, d_beta, d_x_hat = (upstream * x_hat).sum(), upstream.sum(), gamma * upstream
    return {
        "gamma": d_gamma,
        "beta": d_beta,
        "x_hat": d_x_hat,
        "variance": -(d_x_hat * (x - mean)).sum() / (2 * root**3),
        "mean": -d_x_hat.sum() / root,
        "x": gamma / (m * root) * (m * upstream - d_beta - x_hat * d_gamma),
    }


def check_batch_norm_gradients(m: int = 32, eps: float = 1e-5, seed: int = 0) -> pd.DataFrame:
    """Each formula of batch_norm_gradients against autograd, in float64 on a random batch of m.

    Returns one row per gradient: its name, number of elements, largest absolute difference.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    x, gamma, beta, upstream = draw(m), draw(()), draw(()), draw(m)
    for tensor in (x, gamma, beta):
        tensor.requires_grad_()
    mean = x.mean()
    variance = (x - mean).square().mean()
    x_hat = (x - mean) / (variance + eps).sqrt()
    y = gamma * x_hat + beta
    expected = torch.autograd.grad(y, (gamma, beta, x_hat, variance, mean, x), upstream)
    found = batch_norm_gradients(x.detach(), gamma.detach(), upstream, eps)
    rows = []
    for (name, gradient), right in zip(found.items(), expected):
        rows.append((name, gradient.numel(), float((gradient - right).abs().max())))
    return pd.DataFrame(rows, columns=["gradient", "elements", "largest difference"])


# -------------------------------------------------------------------------------- report

# Told apart by colour-blind readers (Okabe and Ito 2008).
PALETTE = ("#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#D55E00")
COLORS = dict(zip(SETTINGS, itertools.cycle(PALETTE)))
# Of lines that are not settings: scheme "muted" of P. Tol, and markers to tell them in grey.
MUTED = "#332288 #CC6677 #999933 #44AA99 #882255 #88CCEE #117733 #DDCC77"
OTHER_STYLES = tuple(zip(MUTED.split(), "os^Dv*PX"))
# 97.5 % quantile of Student's t for 1 to 9 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MEASURES = {**ACCURACIES, "gap": "gap"}  # columns of results.csv, and train minus test


class Table(NamedTuple):
    """A table with its caption above it: HTML in Jupyter and on GitHub, LaTeX in the PDF."""

    frame: pd.DataFrame
    caption: str

    def _text(self) -> pd.DataFrame:
        forms = {float: ".2g", int: ","}
        return self.frame.map(lambda value: format(value, forms.get(type(value), "")))

    def _repr_html_(self) -> str:
        head, body = self._text().to_html(index=False, border=0, justify="left").split("\n", 1)
        style = "text-align: left; white-space: nowrap; font-weight: bold"
        caption = f"<caption style='{style}'>{self.caption}</caption>"
        return f"{head}\n{caption}\n{body}"

    def _repr_latex_(self) -> str:
        columns = "l" + "r" * (self.frame.shape[1] - 1)
        body = self._text().to_latex(index=False, escape=True, column_format=columns)
        caption = self.caption.replace("%", r"\%").replace("_", r"\_")
        return (
            r"\noindent\begin{minipage}{\linewidth}\medskip\centering"
            f"\n\\textbf{{{caption}}}\\par\\smallskip\n{body}\\medskip\\end{{minipage}}\n"
        )


def percent(fraction: float) -> str:
    """An accuracy as tables print it: percent with two decimals."""
    return f"{100 * fraction:.2f}"


def _with_spread(mean: float, spread: float, form: str = ".2f") -> str:
    mean = float(f"{mean:{form}}") + 0.0  # rounded, and no minus before a zero
    mean = f"{mean:{form}}".replace("-", "−")
    return mean + ("" if math.isnan(spread) else f" ± {spread:{form.lstrip('+')}}")


def _runs_by_setting(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each setting, by seed, with the gap between train and test added."""
    results = results.assign(gap=results.train_accuracy - results.test_accuracy)
    runs = {name: rows.set_index("seed") for name, rows in results.groupby("setting")}
    return {name: runs[name] for name in SETTINGS if name in runs}


def settings_table() -> pd.DataFrame:
    """The hyperparameters that differ between the settings, and their names in the code."""
    rows = []
    for setting in SETTINGS.values():
        row = {"setting": setting.label, "name": setting.name}
        row["dropout p"] = f"{setting.dropout:g}" if setting.dropout else "off"
        row["L2 coefficient"] = f"{setting.weight_decay:g}" if setting.weight_decay else "off"
        row["batch norm"] = "on" if setting.batch_norm else "off"
        rows.append(row | {"learning rate": f"{setting.lr:g}"})
    return pd.DataFrame(rows)


def summary_table(results: pd.DataFrame, seed: int = 0, names=tuple(SETTINGS)) -> pd.DataFrame:
    """The final train and test accuracy of one seed of each setting in names, in percent.
    Raises ValueError where one of them has runs, but not of that seed."""
    rows = []
    for name, runs in _runs_by_setting(results).items():
        if name in names:
            _require(seed in runs.index, f"{name} has no run of seed {seed}")
            row = {"setting": SETTINGS[name].label, "train %": percent(runs.train_accuracy[seed])}
            rows.append(row | {"test %": percent(runs.test_accuracy[seed])})
    return pd.DataFrame(rows)


def seed_table(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds: accuracies in percent, the gap between train
    and test in points, the kept epoch."""
    rows = []
    for name, runs in _runs_by_setting(results).items():
        row = {"setting": SETTINGS[name].label}
        for column, label in MEASURES.items():
            row[label if column == "gap" else f"{label} %"] = _with_spread(
                100 * runs[column].mean(), 100 * runs[column].std()
            )
        row["kept epoch"] = _with_spread(runs.epoch.mean(), runs.epoch.std(), ".1f")
        rows.append(row)
    return pd.DataFrame(rows)


def paired_difference(
    results: pd.DataFrame, setting: str, other: str = "baseline", column: str = "test_accuracy"
) -> tuple[float, float]:
    """Mean over the seeds of the difference between two settings, and the half width of its
    95 % interval by Student's t (NaN for one seed), both as fractions. For more than 10 seeds
    the interval is that of 9 degrees of freedom, a little too wide. Raises ValueError where
    results lack one of the two."""
    runs = _runs_by_setting(results)
    known = {setting, other} <= runs.keys()
    _require(known, f"expected runs of {setting} and {other}; found {', '.join(runs)}")
    pairs = (runs[setting][column] - runs[other][column]).dropna()
    count = len(pairs)
    half = T_975[min(count, 10) - 2] * pairs.std() / math.sqrt(count) if count > 1 else math.nan
    return float(pairs.mean()), float(half)


def difference_table(results: pd.DataFrame) -> pd.DataFrame:
    """Differences of every setting to no regularization, paired by seed, in points with 95 %
    intervals."""
    rows = []
    for name in _runs_by_setting(results):
        if name != "baseline":
            row = {"setting": SETTINGS[name].label}
            for column, label in MEASURES.items():
                mean, half = paired_difference(results, name, column=column)
                row[label] = _with_spread(100 * mean, 100 * half, "+.2f")
            rows.append(row)
    return pd.DataFrame(rows)


def describe_machine() -> str:
    """Versions and hardware, in one line."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores, device {find_device()}"
    )


def _panels(axes, count: int, columns: int, height: float, **options):
    """The figure and count axes of it: those that were given, or new ones, height inches a row."""
    from matplotlib.figure import Figure

    if axes is None:
        rows, columns = max(1, math.ceil(count / columns)), max(1, min(columns, count))
        figure = Figure(figsize=(7, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    axes = [axes] if hasattr(axes, "plot") else list(getattr(axes, "flat", axes))
    _require(len(axes) >= count, f"found {len(axes)} axes; expected one for each of {count} panels")
    for ax in axes[count:]:
        ax.set_axis_off()
    return axes[0].figure, axes[:count]


def _label(ax, title: str, x: str, y: str, size: int = 10) -> None:
    ax.set_title(title, fontsize=size)
    ax.set_xlabel(x, fontsize=size)
    ax.set_ylabel(y, fontsize=size)


def _epoch_ticks(ax, last: int) -> None:
    ax.set_xticks(sorted({1, *range(4, last + 1, 4)}))
    ax.grid(alpha=0.3)


def _show_image(ax, image: Tensor, title: str) -> None:
    ax.imshow(image[0].cpu().numpy() * STD + MEAN, cmap="gray_r", vmin=0, vmax=1)
    ax.set_title(title, fontsize=8)
    ax.set_axis_off()


def plot_examples(split: Split, axes=None):
    """The first image of each class, on ten axes. Returns the figure, as all plots do, and
    raises ValueError for too few axes, as all plots do, or a class without an image."""
    figure, axes = _panels(axes, len(CLASSES), 5, 1.4)
    for label, ax in enumerate(axes):
        _require(label in split.labels, f"the split has no image of class {label}")
        first = int((split.labels == label).nonzero()[0])
        _show_image(ax, split.images[first], f"{label} {CLASSES[label]}")
    return figure


def plot_architecture(model: LeNet5, axes=None):
    """The layers that change the shape of what passes through, to scale: maps as squares, units
    as bars, below them what computes them and with how many parameters."""
    from matplotlib.patches import Rectangle

    figure, (ax, *_) = _panels(axes, 1, 1, 2.05)
    names = {"conv": "convolution\n5 × 5", "pool": "pooling\n2 × 2", "fc": "fully\nconnected"}
    stages, shape = [("image", (1, 28, 28), 0)], (1, 28, 28)
    for layer, output, parameters in layer_summary(model).itertuples(index=False):
        if output[1:] != shape and layer != "flatten":
            shape = output[1:]
            stages.append((names[layer.rstrip("12345")], shape, parameters))
    x = 0.0
    for name, shape, parameters in stages:
        count, height = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0] / 3)
        width = height if len(shape) == 3 else 3
        step = 10 / max(count, 8)  # from one map to the next
        for k in range(count):
            place = (x + step * k, -height / 2 - step * (k - (count - 1) / 2))
            ax.add_patch(Rectangle(place, width, height, fc="#DCE9F5", ec="#0072B2", lw=0.4))
        middle = x + (width + step * (count - 1)) / 2
        size = f"{count} maps\n{height} × {height}" if len(shape) == 3 else f"{shape[0]}\nunits"
        below = f"{name}\n{parameters:,}\nparameters" if parameters else name
        ax.text(middle, 23, size.replace("1 maps", "1 map"), ha="center", va="bottom", fontsize=8)
        ax.text(middle, -23, below, ha="center", va="top", fontsize=7)
        x += max(width + step * (count - 1), 14) + 10
    ax.set(xlim=(-1, x - 9), ylim=(-42, 32), aspect="equal")
    ax.set_axis_off()
    return figure


def _names_in(history: pd.DataFrame, names=None) -> list[str]:
    """The settings to show, by default all there are, checked to be in history."""
    names = names or [name for name in SETTINGS if name in set(history.setting)]
    missing = {*names} - {*history.setting} | {"train", "val", "test"} - {*history.split}
    _require(not missing, f"the history lacks {', '.join(sorted(missing))}")
    return names


def plot_convergence(history: pd.DataFrame, axes=None, names=None):
    """Train and test accuracy after each epoch, one panel per setting: the first seed as a
    line, all seeds from least to greatest as a band, the epoch kept by validation as a dot.

    history: the table history.csv. names: of the settings to show, by default all there are.
    Raises ValueError where history lacks a setting or a split.
    """
    names = _names_in(history, names)
    figure, axes = _panels(axes, len(names), 2, 2.1, sharex=True, sharey=True)
    for ax, name in zip(axes, names):
        epochs = history[history.setting == name]
        wide = epochs.pivot(index="epoch", columns=["split", "seed"], values="accuracy")
        seed, color = epochs.seed.min(), COLORS[name]
        kept = wide["val"][seed].idxmax()
        for split, style in {"train": "--", "test": "-"}.items():
            runs = 100 * wide[split]
            ax.plot(runs.index, runs[seed], style, color=color, label=split)
            least, greatest = runs.min(axis=1), runs.max(axis=1)
            ax.fill_between(runs.index, least, greatest, color=color, alpha=0.25, lw=0)
            ax.plot(kept, runs[seed][kept], "o", color=color, ms=5)
        _label(ax, f"{SETTINGS[name].label}: accuracy by epoch", "epoch", "accuracy (%)")
        ax.tick_params(labelbottom=True, labelleft=True)
        _epoch_ticks(ax, max(epochs.epoch))
        ax.locator_params(axis="y", nbins=5)
        ax.legend(loc="lower right", fontsize=8)
    return figure


def plot_means(history: pd.DataFrame, axes=None):
    """Means over the seeds after each epoch, all settings together: test accuracy, and the loss
    on test (solid) and train (dashed), on two axes.

    history: the table history.csv. Raises ValueError where it lacks a split.
    """
    figure, axes = _panels(axes, 2, 2, 2.6)
    means = history.groupby(["setting", "split", "epoch"])[["accuracy", "loss"]].mean()
    for name in _names_in(history):
        test, style = means.loc[name, "test"], {"color": COLORS[name], "lw": 1.2}
        axes[0].plot(100 * test.accuracy, label=SETTINGS[name].label, **style)
        axes[1].plot(test.loss, **style)
        axes[1].plot(means.loc[name, "train"].loss, "--", **style)
    late = means.index.get_level_values("epoch") >= max(history.epoch) // 4
    settled = 100 * means[late].accuracy.xs("test", level="split").min()
    axes[0].set_ylim(bottom=math.floor(settled))  # the first epochs would leave it little room
    axes[1].set_ylim(bottom=0)
    below = {"loc": "outside lower center", "ncols": len(COLORS), "frameon": False}
    figure.legend(handles=list(axes[0].lines), fontsize=8, handlelength=1.4, **below)
    for split, style in {"train": "--", "test": "-"}.items():
        axes[1].plot([], [], style, color="gray", label=split)
    axes[1].legend(fontsize=8)
    _label(axes[0], "Mean test accuracy", "epoch", "accuracy (%)")
    _label(axes[1], "Mean loss", "epoch", "loss (nats)")
    for ax in axes:
        _epoch_ticks(ax, max(history.epoch))
    return figure


def _words(key: str, value) -> str:
    """A value of a hyperparameter in a legend; empty where it goes without saying."""
    if key == "setting":
        return SETTINGS[value].label
    words = {
        "relu": "ReLU", "sgd": "SGD", "adam": "Adam", "one_cycle": "one-cycle",
        "all": "all hidden layers", "conv": "convolutions only", True: "L2 on all", False: "",
    }  # fmt: skip
    forms = {"epochs": "{} epochs", "batch_size": "batches of {}", "dropout": "p = {:g}"}
    return forms[key].format(value) if key in forms else words.get(value, value)


def _search_ticks(ax, key: str, values: list) -> dict:
    """Set the ticks for the values of a hyperparameter. Returns where on the axis each is."""
    if key == "norm_place":
        labels = [place.replace("_", "\n") for place in BLOCK_ORDERS]
        ax.set_xticks(range(len(labels)), labels)
        return {place: at for at, place in enumerate(BLOCK_ORDERS)}
    ax.set_xscale("log", base=2)
    close = {low for low, high in itertools.pairwise(values) if high < 1.2 * low}  # no room
    ticks = [value for value in values if value not in close]
    crowded = len(values) > 5 or values[-1] > 50 * values[0]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=90 if crowded else 0)
    return {value: value for value in values}


def _plot_question(ax, runs: pd.DataFrame, x: str, names: list[str]) -> None:
    """One panel of plot_search: a line for each combination of names and schedule."""
    at = _search_ticks(ax, x, sorted(set(runs[x])))
    lines = runs.groupby([*names, "schedule"], sort=False)
    for ((*values, schedule), line), (color, marker) in zip(lines, itertools.cycle(OTHER_STYLES)):
        schedules = runs[(runs[names] == values).all(axis=1)].schedule.nunique()
        words = [*map(_words, names, values), _words("schedule", schedule) * (schedules > 1)]
        label = textwrap.fill(", ".join(filter(None, words)), 20, break_on_hyphens=False)
        color = COLORS[values[0]] if "setting" in names else color
        style = "-" if schedule == TrainConfig().schedule else "--"
        look = {"color": color, "marker": marker, "ms": 3, "lw": 1, "ls": style}
        means = 100 * line.groupby(x).val_accuracy.mean()
        ax.plot([], [], label=label, **look)
        ax.plot(means.index.map(at), means, **look | {"marker": "_", "ms": 7})
        ax.plot(line[x].map(at), 100 * line.val_accuracy, **look | {"ls": ""})
        chosen = _search_row(SETTINGS[line.setting.iloc[0]], TrainConfig())
        # Places of batch norm were compared with another schedule than the one chosen.
        same = names if x == "norm_place" else [*names, "schedule"]
        if all(chosen[key] == line[key].iloc[0] for key in same) and chosen[x] in means.index:
            ax.plot(at[chosen[x]], means[chosen[x]], "o", mfc="none", mec="black", ms=9, mew=0.7)
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1.05)}  # beside the panel
    ax.legend(fontsize=7, handlelength=2.2, labelspacing=0.25, frameon=False, **place)


def plot_search(table: pd.DataFrame, questions=tuple(QUESTIONS), axes=None):
    """Validation accuracy against what was varied, one panel for each of the questions:
    a point for each run, a line through the means over the seeds (solid with the schedule that
    was chosen, dashed with another), a ring around the mean where what the panel varies has its
    chosen values.

    table: search.csv, finished or not.
    """
    axis = {"lr": "learning rate", "norm_place": "place in the block"}
    axis |= {"weight_decay": "L2 coefficient", "dropout": "dropout probability"}
    order = {"key": lambda c: c.map(list(SETTINGS).index) if c.name == "setting" else c}
    figure, axes = _panels(axes, len(questions), 2, 1.58)
    for ax, question in zip(axes, questions):
        x, names = QUESTIONS[question]
        _label(ax, question, axis.get(x, x), "val accuracy (%)", size=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
        runs = table[
            table.questions.str.contains(question, regex=False) & table.val_accuracy.notna()
        ]
        if not runs.empty:
            _plot_question(ax, runs.sort_values(names, kind="stable", **order), x, names)
    return figure


def plot_confusion(matrix: pd.DataFrame, axes=None):
    """A confusion matrix, (10, 10), in percent of each true class."""
    figure, (ax, *_) = _panels(axes, 1, 1, 2.8)
    shares = (100 * matrix.div(matrix.sum(axis=1), axis=0)).to_numpy()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=30, aspect="auto")  # errors are below 30 %
    for row, column in itertools.product(range(len(CLASSES)), repeat=2):
        if (share := shares[row, column]) >= 0.05:
            color = "white" if share > 18 else "black"
            ax.text(column, row, f"{share:.1f}", ha="center", va="center", color=color, fontsize=8)
    ax.set_xticks(range(len(CLASSES)), matrix.columns, rotation=45, ha="right")
    ax.set_yticks(range(len(CLASSES)), matrix.index)
    title = "Predicted classes in percent of each true class"
    _label(ax, title, "predicted class", "true class")
    return figure


def plot_mistakes(model: nn.Module, split: Split, axes=None):
    """The ten mistakes made with the highest probability: true class, predicted class, percent."""
    confidence, predicted = predict(model, split).max(1)
    wrong = (predicted != split.labels.cpu()).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:10].tolist()
    figure, axes = _panels(axes, len(worst), 5, 1.15)
    for index, ax in zip(worst, axes):
        truth, guess = (CLASSES[int(labels[index])] for labels in (split.labels, predicted))
        title = f"{truth}, taken for\n{guess} ({100 * confidence[index]:.1f} %)"
        _show_image(ax, split.images[index], title)
    return figure


# -------------------------------------------------------------------------- command line

EXAMPLES = """\
  python dl_utils.py train dropout                 one setting, from scratch, into runs/
  python dl_utils.py train all --seeds 0 1 2 3 4   every run of the report
  python dl_utils.py test weights/dropout.pt       accuracies of one saved file
  python dl_utils.py test                          the whole table, from the saved files
  python dl_utils.py search                        the hyperparameter search, resumable"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is in its `run`."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "LeNet-5 on Fashion-MNIST, with and without regularization."
    parser = argparse.ArgumentParser(
        "dl_utils.py", description=about, epilog=f"examples:\n{EXAMPLES}", **form
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # fmt: off
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", default="data", metavar="FOLDER",
                      help="where Fashion-MNIST is, or is downloaded to (%(default)s)")
    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument("--workers", type=int, metavar="N",
                         help="runs at a time, each of about 1 GB (one per core)")

    def add(run, name, text, *parents):
        examples = [line for line in EXAMPLES.splitlines() if f"dl_utils.py {name}" in line]
        epilog = "\n".join(["examples:", *examples])
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.",
                                      epilog=epilog, parents=parents, **form)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(_train_command, "train", "train settings from scratch", data, workers)
    option("settings", nargs="+", metavar="SETTING", help=f"{', '.join(SETTINGS)}, or all")
    option("--seeds", type=int, nargs="+", default=[0], metavar="N",
           help="train each setting once with each of these seeds (0)")
    option("--epochs", type=int, default=TrainConfig.epochs, metavar="N",
           help="length of training (%(default)s)")
    option("--batch-size", type=int, default=TrainConfig.batch_size, metavar="N",
           help="images per step (%(default)s)")
    option("--lr", type=float, metavar="X", help="highest learning rate (the setting's own)")
    option("--out", default="runs", metavar="FOLDER", help="where to write (%(default)s)")
    option("--overwrite", action="store_true", help="train again what is there already")
    text = "measure saved weights, and exit with 1 if accuracies differ from those recorded"
    option = add(_test_command, "test", text, data)
    option("path", nargs="?", default="weights",
           help="a .pt file, or a folder with results.csv and the files of seed 0 (%(default)s)")
    text = "run what is missing of the hyperparameter search"
    option = add(_search_command, "search", text, data, workers)
    option("--out", default=SEARCH_FILE, metavar="FILE", help="the table to add to (%(default)s)")
    # fmt: on
    return parser


def _train_command(args) -> int:
    chosen = [get_setting(name) for name in args.settings if name != "all"]
    settings = SETTINGS.values() if "all" in args.settings else chosen
    if args.lr is not None:
        settings = [replace(setting, lr=args.lr) for setting in settings]
    size = {"epochs": args.epochs, "batch_size": args.batch_size}
    configs = [TrainConfig(seed=seed, **size) for seed in args.seeds]
    jobs = [(setting, config) for config in configs for setting in settings]
    paths = [checkpoint_path(args.out, setting.name, config.seed) for setting, config in jobs]
    kept = {path for path in paths if path.exists() and not args.overwrite}
    options = {"root": args.data, "workers": args.workers}
    runs = train_and_save(jobs, args.out, args.overwrite, **options)
    for path, run in zip(paths, runs):
        if isinstance(run, Checkpoint):
            there = "was there already (--overwrite trains it again), " if path in kept else ""
            accuracies = ", ".join(f"{k} {percent(v.accuracy)} %" for k, v in run.metrics.items())
            print(f"{path}: {there}epoch {run.epoch} kept, {accuracies}, {run.seconds:.0f} s")
    return 2 if any(isinstance(run, Exception) for run in runs) else 0


def _test_command(args) -> int:
    path, recorded = Path(args.path), {Path(args.path): None}
    reference = f"what {path} recorded"
    if path.is_dir():
        reference = path / "results.csv"
        table = read_table(reference, [*RUN, *ACCURACIES])
        table = table[table.seed == 0].set_index("setting")[[*ACCURACIES]]
        right = table.index.is_unique and set(table.index) & SETTINGS.keys()
        _require(right, f"{reference} should have one row of seed 0 for each setting to measure")
        known = table.rename(columns=ACCURACIES).to_dict("index")
        files = {name: checkpoint_path(path, name) for name in SETTINGS}
        names = [name for name in SETTINGS if name in known or files[name].exists()]
        recorded = {files[name]: known.get(name, {}) for name in names}
    load = functools.cache(functools.partial(load_fashion_mnist, args.data))
    rows, verdicts = [], []
    for file, accuracies in recorded.items():
        checkpoint = load_checkpoint(file)
        found = checkpoint.setting.name
        right = accuracies is None or found == file.stem
        _require(right, f"{file} holds the setting {found}; expected {file.stem}")
        bare = checkpoint.config is None
        split_seed = 0 if bare else checkpoint.config.split_seed
        table = reevaluate(checkpoint, load(split_seed), accuracies)
        measured = dict(zip(table.split + " %", table.measured.map(percent)))
        rows.append({"setting": checkpoint.setting.label, **measured})
        for row in table[~table.agrees].itertuples():
            pair = f"measured {percent(row.measured)} %, recorded {percent(row.recorded)} %"
            verdicts.append(f"{file}, {row.split}: {pair}")
    print(pd.DataFrame(rows).to_string(index=False))
    if bare:  # never in a folder, where a file holds the setting of its name
        print(
            f"{path} records nothing to compare with. Bare weights are taken for those of a "
            "network with ReLU, maximum pooling and batch norm, if any, after the activation."
        )
        return 0
    verdict = "DIFFER from" if verdicts else "equal"
    print(*verdicts, f"The measured accuracies {verdict} {reference}.", sep="\n")
    return 1 if verdicts else 0


def _search_command(args) -> int:
    table = search(args.out, root=args.data, workers=args.workers)
    print(f"{args.out}: {len(table)} runs")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 1 where accuracies differ from those recorded,
    2 for bad input or a failed run, which is said in one sentence on stderr, 130 for Ctrl-C.
    Raises SystemExit(2), as argparse does, for a command that does not parse."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"dl_utils.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dl_utils.py: interrupted; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
