"""LeNet-5 on Fashion-MNIST: no regularization, dropout, weight decay, batch normalization.

Test accuracy in percent after 16 epochs, mean ± standard deviation of eight seeds, on two cores of
an AMD EPYC server (AVX2, torch 2.15.0), 199 seconds of one core a run:

    no regularization  91.06 ± 0.23    weight decay + batch norm  92.00 ± 0.21
    dropout            91.14 ± 0.20    dropout + batch norm       91.67 ± 0.18
    weight decay       91.56 ± 0.14    dropout + weight decay     91.41 ± 0.23
    batch norm         91.33 ± 0.26    all three                  91.84 ± 0.23

The lesson comes first: settings, data, model, evaluation, training. What serves it follows.
Accuracies are fractions, losses are in nats per image, images are (N, 1, 28, 28) float32.
"""

import argparse
import contextlib
import copy
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import accumulate, combinations, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

# ------------------------------------------------------------------------------ settings


def _field(default, words: str, rule):
    """A field of a dataclass: its default, and what it may be, in words and as a rule."""
    return field(default=default, metadata={"words": words, "rule": rule})


def _check_fields(record) -> None:
    """Refuse values that their fields do not allow, and make NumPy's numbers Python's. The types
    of fields are called here: no `from __future__ import annotations` in this file."""
    for entry in fields(record):
        value = getattr(record, entry.name)
        allowed = False
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            plain = entry.type(value)
            allowed = plain == value and entry.metadata["rule"](plain)
        if not allowed:
            raise ValueError(f"{entry.name} is {value!r}; expected {entry.metadata['words']}")
        object.__setattr__(record, entry.name, plain)


@dataclass(frozen=True)
class Setting:
    """What is compared: techniques, their strength, and the learning rate that suits them.
    Raises ValueError for a value that is not allowed."""

    # Of files, and in tables and figures. A label does not make another setting.
    name: str = _field(MISSING, "letters, digits, - and _", re.compile(r"[\w-]+").fullmatch)
    label: str = field(compare=False, metadata={"words": "a text", "rule": str.strip})
    # Probability of dropping a hidden fully connected unit (Srivastava et al. 2014).
    dropout: float = _field(0.0, "a number >= 0 and < 1", lambda p: 0 <= p < 1)
    # Lambda of the penalty lambda / 2 * ||w||^2 on the weights (Krogh and Hertz 1991).
    weight_decay: float = _field(0.0, "a number >= 0", lambda x: 0 <= x < math.inf)
    # Of all hidden layers (Ioffe and Szegedy 2015).
    batch_norm: bool = _field(False, "True or False", lambda _: True)
    # Peak of the schedule.
    lr: float = _field(0.08, "a number > 0", lambda x: 0 < x < math.inf)
    __post_init__ = _check_fields


@dataclass(frozen=True)
class TrainConfig:
    """What all settings share. Raises ValueError for a value that is not allowed."""

    epochs: int = _field(16, "a whole number >= 1", lambda n: n >= 1)
    batch_size: int = _field(128, "a whole number >= 1", lambda n: n >= 1)
    # Four streams of random numbers (with seed 0 the first two start alike): a generator with seed
    # itself draws the validation images, one with 3 seed the initial weights, 3 seed + 1 the order
    # of batches, 3 seed + 2 the dropout masks.
    seed: int = _field(0, "a whole number, 0 to 2**30", lambda n: 0 <= n <= 2**30)
    optimizer: str = _field("sgd", "sgd or adam", ("sgd", "adam").__contains__)
    __post_init__ = _check_fields


# A technique has one strength, in every setting that uses it.
P = {"dropout": 0.1}
LAMBDA = {"weight_decay": 0.001}
NORM = {"batch_norm": True}
_ROWS = (
    Setting("baseline", "No regularization", lr=0.04),
    Setting("dropout", "Dropout", **P, lr=0.04),
    Setting("weight_decay", "Weight decay", **LAMBDA, lr=0.08),
    Setting("batch_norm", "Batch norm", **NORM, lr=0.64),
    Setting("dropout_weight_decay", "Dropout + weight decay", **P, **LAMBDA, lr=0.08),
    Setting("dropout_batch_norm", "Dropout + batch norm", **P, **NORM, lr=0.32),
    Setting("weight_decay_batch_norm", "Weight decay + batch norm", **LAMBDA, **NORM, lr=0.16),
    Setting("combined", "All three", **P, **LAMBDA, **NORM, lr=0.16),
)
SETTINGS = {setting.name: setting for setting in _ROWS}

# ---------------------------------------------------------------------------------- data

CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat")
CLASSES += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, scaled to 0..1


class Split(NamedTuple):
    """Images (N, 1, 28, 28), float32 and standardized, and their labels (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor


def load_fashion_mnist(root=None, seed: int = 0) -> dict[str, Split]:
    """Fashion-MNIST (Xiao et al. 2017): "train" (55,000 images) and "val" (5,000), which seed draws
    from the 60,000 training images, and "test" (10,000). root and errors: as read_data_files."""
    files = read_data_files(root)
    images, labels = files["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    val, train = order.tensor_split([len(labels) // 12])  # 5,000 of 60,000
    parts = {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
    return {
        name: Split(images.float().div_(255).sub_(MEAN).div_(STD), labels.long())
        for name, (images, labels) in (parts | {"test": files["test"]}).items()
    }


def minibatches(split: Split, batch_size: int, generator: torch.Generator):
    """Yield the split in batches, the last one ragged, in an order drawn from generator."""
    order = torch.randperm(len(split.labels), generator=generator)
    for index in order.to(split.labels.device).split(batch_size):
        yield Split(split.images[index], split.labels[index])


# --------------------------------------------------------------------------------- model


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998): (N, 1, 28, 28) to logits (N, 10).

    61,706 parameters, 452 more with batch normalization. A technique that
    is off leaves an identity, so that all variants have the same layers.
    """

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        norm2d = nn.BatchNorm2d if batch_norm else nn.Identity
        norm1d = nn.BatchNorm1d if batch_norm else nn.Identity
        layers = [
            ("conv1", nn.Conv2d(1, 6, kernel_size=5, padding=2)),  # 6x28x28
            ("pool1", MaxPool()),  # 6x14x14
            ("relu1", nn.ReLU()),
            ("norm1", norm2d(6)),
            ("conv2", nn.Conv2d(6, 16, kernel_size=5)),  # 16x10x10
            ("pool2", MaxPool()),  # 16x5x5
            ("relu2", nn.ReLU()),
            ("norm2", norm2d(16)),
            ("flatten", nn.Flatten()),  # 400
            ("fc3", nn.Linear(400, 120)),  # 120
            ("relu3", nn.ReLU()),
            ("norm3", norm1d(120)),
            ("drop3", nn.Dropout(dropout)),
            ("fc4", nn.Linear(120, 84)),  # 84
            ("relu4", nn.ReLU()),
            ("norm4", norm1d(84)),
            ("drop4", nn.Dropout(dropout)),
            ("fc5", nn.Linear(84, 10)),  # 10 logits
        ]
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class MaxPool(nn.Module):
    """2 x 2 maximum pooling of maps with even sides. Without gradients the maxima of columns, then
    of rows: the same bits, six times faster. With them torch's own: its gradient is faster."""

    def forward(self, maps: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.max_pool2d(maps, 2)
        maps = torch.maximum(maps[..., ::2], maps[..., 1::2])
        return torch.maximum(maps[..., ::2, :], maps[..., 1::2, :])


def build_model(setting: Setting, config: TrainConfig | None = None) -> LeNet5:
    """LeNet-5 as setting wants it. One seed of config gives all settings the same weights."""
    config = config or TrainConfig()
    with reproducible():
        torch.manual_seed(3 * config.seed)
        model = LeNet5(setting.dropout, setting.batch_norm)
    return model.to(memory_format=torch.channels_last)  # faster, the same function


# ---------------------------------------------------------------------------- evaluation


class Metrics(NamedTuple):
    """Mean cross-entropy in nats per image, and the fraction of images classified right."""

    loss: float
    accuracy: float


def compute_logits(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """(N, 10) on the CPU, in evaluation mode: no dropout, batch normalization by its running
    statistics. The mode that the model was in is restored afterwards."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with reproducible(device), torch.no_grad():
            return torch.cat([model(part.to(device)) for part in images.split(batch_size)]).cpu()
    finally:
        model.train(training)


def evaluate(model: nn.Module, split: Split) -> Metrics:
    """Loss and accuracy over a split, in evaluation mode."""
    logits, labels = compute_logits(model, split.images), split.labels.cpu()
    loss = F.cross_entropy(logits.double(), labels).item()
    return Metrics(loss, (logits.argmax(1) == labels).sum().item() / len(labels))


# ------------------------------------------------------------------------------ training


@dataclass
class Checkpoint:
    """A trained model, in evaluation mode, and what explains it: history (columns epoch, split,
    loss, accuracy), Metrics of each split, processor time, versions, and norms by epoch, 0 being
    before the first step (columns epoch, layer, weight, bias; empty in older files)."""

    model: LeNet5
    setting: Setting
    config: TrainConfig
    history: pd.DataFrame
    metrics: dict[str, Metrics]
    seconds: float
    versions: dict[str, str]
    norms: pd.DataFrame = field(default_factory=pd.DataFrame)


def make_optimizer(model: nn.Module, setting: Setting, config: TrainConfig):
    """SGD with Nesterov momentum, or Adam; the L2 penalty acts on weights, not on biases and
    not on the parameters of batch normalization."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": setting.weight_decay}, {"params": others}]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=setting.lr)
    return torch.optim.SGD(groups, lr=setting.lr, momentum=0.9, nesterov=True)


def warmup_cosine(t: float) -> float:
    """Factor of the learning rate after a fraction t of all steps: a linear rise in the first
    fifth (after Smith and Topin 2019), then half a cosine to 0 (Loshchilov and Hutter 2017)."""
    return t / 0.2 if t < 0.2 else 0.5 * (1 + math.cos(math.pi * (t - 0.2) / 0.8))


def train_epoch(model, batches, optimizer, schedule) -> float:
    """One step for each batch. Returns the loss of the last one."""
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def layer_norms(model: LeNet5) -> list[tuple[str, float, float]]:
    """Name, norm of the weights and norm of the biases of each layer that has them."""
    layers = [pair for pair in model.layers.named_children() if hasattr(pair[1], "weight")]
    return [(name, layer.weight.norm().item(), layer.bias.norm().item()) for name, layer in layers]


def train(setting: Setting, splits, config=None, *, device=None, every_epoch=True) -> Checkpoint:
    """Train one setting from scratch on splits["train"]; the last epoch is the model.

    splits: a dict of Splits; all are measured after every epoch or, without every_epoch, after the
    last. config: a TrainConfig; device: as in find_device. On the CPU a run takes one thread and
    gives the same bits every time; calls from several threads wait for each other. Raises
    FloatingPointError after the first epoch whose loss is not finite, and ValueError before the
    first step where batch norm would get a batch of one image."""
    config = config or TrainConfig()
    device = find_device(device)
    images = len(splits["train"].labels)
    if setting.batch_norm and (images - 1) % config.batch_size == 0:
        sizes = f"{images} images in batches of {config.batch_size}"
        raise ValueError(f"batch norm cannot train on a last batch of one image, as of {sizes}")
    splits = {name: Split(*(part.to(device) for part in split)) for name, split in splits.items()}
    rows = []
    with reproducible(device):
        start = time.process_time()
        model = build_model(setting, config).to(device)
        norms = [(0, *norm) for norm in layer_norms(model)]
        optimizer = make_optimizer(model, setting, config)
        steps = config.epochs * math.ceil(images / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_cosine(i / steps))
        order = torch.Generator().manual_seed(3 * config.seed + 1)
        torch.manual_seed(3 * config.seed + 2)  # of dropout
        for epoch in range(1, config.epochs + 1):
            batches = minibatches(splits["train"], config.batch_size, order)
            losses = [train_epoch(model, batches, optimizer, schedule)]
            if every_epoch or epoch == config.epochs:  # the last epoch is always measured
                metrics = {name: evaluate(model, split) for name, split in splits.items()}
                rows += [(epoch, name, *values) for name, values in metrics.items()]
                losses += [measured.loss for measured in metrics.values()]
            if not all(map(math.isfinite, losses)):
                raise FloatingPointError(f"diverged in epoch {epoch}; choose a lower learning rate")
            norms += [(epoch, *norm) for norm in layer_norms(model)]
        seconds = round(time.process_time() - start, 1)
    history = pd.DataFrame(rows, columns=["epoch", "split", "loss", "accuracy"])
    norms = pd.DataFrame(norms, columns=["epoch", "layer", "weight", "bias"])
    made_with = versions(device)
    return Checkpoint(model.eval(), setting, config, history, metrics, seconds, made_with, norms)


def versions(device="cpu") -> dict[str, str]:
    """What decides the last bits of a run."""
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }


_ONE_AT_A_TIME = threading.RLock()  # what reproducible sets belongs to the process


@contextlib.contextmanager
def reproducible(device="cpu"):
    """The same bits whatever this process does besides: one thread (which also keeps workers
    from crowding), float32, no autocast, and generators that are afterwards as they were before.
    Threads that need this wait for each other."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    kind = torch.device(device).type
    with _ONE_AT_A_TIME, torch.random.fork_rng(gpus), torch.autocast(kind, enabled=False):
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


def find_device(device=None) -> torch.device:
    """The device asked for; by default this machine's accelerator if it computes, else the CPU.
    Raises ValueError for a device that cannot compute here."""
    wanted = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        ones = torch.ones(1, device=wanted)
        ones.sum().item()  # runs a kernel, which this torch may lack for an old GPU
        return ones.device
    except (RuntimeError, AssertionError, ImportError) as error:
        if not device:
            return torch.device("cpu")
        reason = str(error).partition("\n")[0]
        raise ValueError(f"this machine cannot use the device {device} ({reason})") from error


# ---------------------------------------------------------------------- data from outside

HERE = Path(__file__).resolve().parent
DATA_FILES = {  # name of the unpacked file: its SHA-256
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SERVER = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"  # of the data's makers
TIMEOUT = 30  # seconds that the server may stay silent


def read_data_files(root=None) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (N, 1, 28, 28) and labels (N,), uint8, of the "train" and of the "test" files, packed
    (.gz) or not, in root/FashionMNIST/raw, root/raw or root, by default data/ beside this file.
    What is missing is downloaded. Raises OSError where that fails, ValueError for wrong content."""
    root = Path(root or HERE / "data")
    folders = [root / "FashionMNIST" / "raw", root / "raw", root]
    folder = next((f for f in folders if any(f.glob("[!.]*-idx?-ubyte*"))), folders[0])
    tensors = []
    for name in DATA_FILES:
        paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        contents = (_unpack(path.read_bytes(), name) for path in paths)
        content = next(filter(None, contents), None)  # of the first that is intact
        if paths and not content:
            text = "does not hold what Fashion-MNIST holds; move it away to download it again"
            raise ValueError(f"{paths[0]} {text}")
        content = content or _download(folder, name)
        values = torch.frombuffer(content, dtype=torch.uint8)
        # The header of the IDX format has 16 bytes before images, 8 before labels.
        tensors.append(values[16:].view(-1, 1, 28, 28) if "images" in name else values[8:])
    return {"train": tuple(tensors[:2]), "test": tuple(tensors[2:])}


def _unpack(content: bytes, name: str) -> bytearray | None:
    """The content of a data file; None where it is not what Fashion-MNIST holds."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        if content.startswith(b"\x1f\x8b"):  # packed, whatever the file is called
            content = gzip.decompress(content)
    return bytearray(content) if hashlib.sha256(content).hexdigest() == DATA_FILES[name] else None


def _download(folder: Path, name: str) -> bytearray:
    """A data file from the server, verified, kept packed in folder."""
    packed = b""
    reason = "the server sent something else"
    try:
        with urllib.request.urlopen(f"{SERVER}/{name}.gz", timeout=TIMEOUT) as answer:
            packed = answer.read()
    except (OSError, http.client.HTTPException) as error:
        reason = error
    if content := _unpack(packed, name):
        write_file(folder / f"{name}.gz", packed)
        return content
    text = f"{name}.gz is missing in {folder} and cannot be downloaded ({reason})"
    raise OSError(f"{text}; put {', '.join(DATA_FILES)} there, packed (.gz) or not")


def classify(model: nn.Module, picture) -> pd.Series:
    """Probabilities of the classes for one picture, the most probable first. picture: one item on a
    plain background of any colour, as an image file, a PIL image, or an array (H, W), (H, W, 3) or
    (H, W, 4) of 8 or 16 bits or floats from 0 to 1. The item is what differs from the border; as in
    the data set (Xiao et al. 2017) it is cropped, scaled, grey, bright on black. Transparent ones
    are tried on black and on white: the surest answer counts. Raises OSError for unreadable files,
    ValueError for standardized images, a batch, a single colour."""
    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as file:
            return classify(model, file)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] not in "IF":  # 16 bits, or floats
            picture = picture.convert("RGBA")
    pixels = np.asarray(picture).squeeze()
    kind = pixels.dtype.kind
    flat = pixels.ndim > 1 and pixels.shape[2:] in ((), (3,), (4,))
    fits = kind in "buif" and flat and pixels.size > 0
    white = 1 if kind in "bf" else 255 if fits and pixels.max() <= 255 else 65535
    if not fits or not -0.001 * white <= pixels.min() <= pixels.max() <= 1.001 * white:
        text = "a picture is an array (H, W), (H, W, 3) or (H, W, 4)"
        raise ValueError(f"{text} of 8 or 16 bits, or of floats from 0 to 1")
    step = max(pixels.shape[:2]) // 1000 + 1  # of ten million pixels, a million suffice
    pixels = np.atleast_3d(pixels[::step, ::step].astype("float32") / np.float32(white))
    colour, opacity = np.split(pixels, [3], axis=2) if pixels.shape[2] == 4 else (pixels, 1)
    items = []
    for background in (0, 1):
        shown = colour * opacity + background * (1 - opacity)
        border = np.concatenate([shown[0], shown[-1], shown[:, 0], shown[:, -1]])
        difference = shown - np.median(border, axis=0)
        distance = np.abs(difference).max(axis=2)
        item = distance > max(0.1 * distance.max(), 0.005)  # less is rounding
        if not item.any():
            continue
        rows, columns = (np.flatnonzero(item.any(axis)) for axis in (1, 0))
        distance[difference @ difference[item].sum(axis=0) < 0] *= -1  # against most of it
        unclear = distance.min() < -0.4 * distance.max()  # light and dark parts
        for grey in [distance, -distance] if unclear else [distance]:
            grey = np.where(item, grey - grey.min(initial=0, where=item), 0)
            grey = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] * (255 / grey.max())
            image = Image.fromarray(grey.round().astype("uint8"))
            items.append(np.asarray(ImageOps.pad(image, (28, 28), Image.Resampling.LANCZOS)))
    if not items:
        raise ValueError("a picture shows an item, and this one has one colour")
    images = torch.tensor(np.stack(items), dtype=torch.float32).unsqueeze(1) / 255
    answers = compute_logits(model, (images - MEAN) / STD).softmax(1)
    surest = answers[answers.amax(1).argmax()].numpy()
    return pd.Series(surest, CLASSES).sort_values(ascending=False)


# --------------------------------------------------------------------------- checkpoints

FORMAT, VERSION = "EX1 LeNet-5 checkpoint", 2
LOST_OPTIONS = {"activation": "relu", "pooling": "max", "norm_place": "after_activation"}


def checkpoint_path(folder, setting: Setting, config: TrainConfig) -> Path:
    """Where a run is saved: that of seed 0 under the setting's own name."""
    seed = f"-seed{config.seed}" if config.seed else ""
    return Path(folder) / f"{setting.name}{seed}.pt"


def write_file(path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError, naming it, where it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{os.urandom(16).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_checkpoint(path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all. Raises OSError where that fails, and ValueError,
    before anything is written, for what load_checkpoint could not read."""
    _from_bytes(content := _to_bytes(checkpoint))  # raises for what could not be read again
    write_file(path, content)


def load_checkpoint(path, device="cpu") -> Checkpoint:
    """Read a checkpoint, or a state_dict() with defaults for what it does not say, running no code
    from it. Raises OSError where it cannot be read, ValueError where it is damaged or neither."""
    try:
        checkpoint = _from_bytes(Path(path).read_bytes())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not usable: {reason}") from error
    checkpoint.model.to(find_device(device))
    return checkpoint


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    """The content of a file: tensors and Python's own types alone."""
    model = checkpoint.model
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner  # without the wrappers of torch.compile, DataParallel and others
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "setting": asdict(checkpoint.setting),
        "config": asdict(checkpoint.config),
        "history": checkpoint.history.to_dict("list"),
        "metrics": {str(name): [*map(float, pair)] for name, pair in checkpoint.metrics.items()},
        "seconds": float(checkpoint.seconds),
        "versions": {str(name): str(value) for name, value in checkpoint.versions.items()},
        "norms": checkpoint.norms.to_dict("list"),
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
    }
    torch.save(payload, buffer := io.BytesIO())
    return buffer.getvalue()


def _from_bytes(content: bytes) -> Checkpoint:
    try:
        if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load does not look
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        if isinstance(error, MemoryError) or "allocate" in str(error):  # the file may be sound
            raise
        text = "it is damaged, or holds Python objects, whose code is not run"
        raise ValueError(f"{text}; torch.save(model.state_dict(), path) writes none") from error
    if not isinstance(payload, dict):
        raise ValueError("it holds neither a checkpoint nor a state_dict()")
    if payload.get("format") != FORMAT:  # a state dict of another program, which says no more
        norm = "layers.norm1.weight" in payload
        setting = {"name": "state_dict", "label": "Weights", "batch_norm": norm}
        payload = {"version": VERSION, "setting": setting, "config": {}, "state_dict": payload}
    if payload["version"] != VERSION:
        raise ValueError(f"it has version {payload['version']} of its format, not {VERSION}")
    setting = Setting(**payload["setting"])
    options = dict(payload["config"].items() - LOST_OPTIONS.items())
    if lost := options.keys() & LOST_OPTIONS.keys():
        raise ValueError(f"it has another {' and '.join(lost)}; commit 9786df0 of EX1 reads it")
    config = TrainConfig(**options)
    with torch.device("meta"):  # draws nothing: another thread may be drawing dropout masks
        model = LeNet5(setting.dropout, setting.batch_norm)
    try:
        model.load_state_dict(payload["state_dict"], assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"its tensors are not those of this LeNet-5 ({reason})") from error
    model = model.float().to(memory_format=torch.channels_last).eval()
    history, norms = (pd.DataFrame(payload.get(name, {})) for name in ("history", "norms"))
    metrics = {name: Metrics(*pair) for name, pair in payload.get("metrics", {}).items()}
    seconds = payload.get("seconds", math.nan)
    made_with = payload.get("versions", {})
    return Checkpoint(model, setting, config, history, metrics, seconds, made_with, norms)


# ------------------------------------------------------------------------------ many runs

RUN_MEMORY = 1.2e9  # bytes that a run needs


def usable_workers(root="/") -> int:
    """How many runs this process may train at once, by the CPUs (affinity, quota of its control
    group) and the memory that it may use. root: of the file system that says so on Linux."""

    def find(file: str, pattern: str) -> list[str]:
        with contextlib.suppress(OSError):
            return re.findall(pattern, (Path(root) / file).read_text(encoding="utf-8"))
        return []

    affinity = getattr(os, "sched_getaffinity", None)
    limits = [len(affinity(0)) if affinity else min(os.cpu_count() or 1, 61)]  # Windows' most
    limits.append(psutil.virtual_memory().available / RUN_MEMORY)
    group = Path("sys/fs/cgroup") / "".join(find("proc/self/cgroup", r"(?m)^0::/(.+)$"))
    for folder in (group, *group.parents):
        limits += [int(n) / RUN_MEMORY for n in find(f"{folder}/memory.max", r"^\d+")]
        limits += [int(n) / int(of) for n, of in find(f"{folder}/cpu.max", r"^(\d+) (\d+)")]
    return max(1, int(min(limits)))


def train_many(jobs, executor=None, *, workers=None, on_finish=None, **options) -> list:
    """Train independent jobs, (setting, config), in parallel, each on the data of its seed.
    Returns the checkpoints in the order of jobs, for a job that fails its exception.

    executor: any concurrent.futures.Executor that does not fork; by default workers processes of
    this machine (usable_workers, on a GPU one), which are spawned: a script calls this under
    if __name__ == "__main__". on_finish: called here with the index of a job and its checkpoint as
    soon as it has finished; if it fails, so does the job. options: root, split_names; every_epoch,
    device of train. An interrupt ends what runs here and what elsewhere has not begun."""
    jobs = list(jobs)
    results: list = [None] * len(jobs)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; expected a whole number >= 1")
    context = getattr(executor, "_mp_context", None)  # of a ProcessPoolExecutor
    if context and context.get_start_method() == "fork":
        raise ValueError('torch hangs in forked processes; give mp_context=get_context("spawn")')
    if not jobs:
        return results
    with contextlib.ExitStack() as stack:
        if executor is None:
            read_data_files(options.get("root"))  # one download or error, not one in each worker
            fit = usable_workers() if find_device(options.get("device")).type == "cpu" else 1
            executor = stack.enter_context(_processes(min(len(jobs), workers or fit)))
        bar = _progress_bar(stack, len(jobs))
        futures = {executor.submit(_run_job, job, **options): i for i, job in enumerate(jobs)}
        stack.callback(lambda: [future.cancel() for future in futures])
        for future in as_completed(futures):
            index = futures[future]
            setting, config = jobs[index]
            line = f"{setting.name}, seed {config.seed}"
            try:
                results[index] = run = _from_bytes(future.result())
                if on_finish:
                    on_finish(index, run)
                values = [f"{name} {metrics.accuracy:.2%}" for name, metrics in run.metrics.items()]
                with contextlib.suppress(OSError, ValueError):  # of a console, not of the run
                    bar.write(f"{line}: {', '.join(values)}, {run.seconds:.0f} s")
                    sys.stdout.flush()
            except BrokenExecutor:  # said once, by _raise_failures
                text = "a worker was killed (short of memory? try fewer workers) or could not start"
                results[index] = BrokenExecutor(text)
            except Exception as error:
                results[index] = error
                bar.write(f"{line}, failed: {str(error) or repr(error)}", sys.stderr)
            bar.update()
    return results


_load_once = functools.lru_cache(maxsize=1)(load_fashion_mnist)


def _run_job(job, root=None, split_names=("train", "val", "test"), **options) -> bytes:
    setting, config = job
    data = _load_once(root, config.seed)
    splits = {name: data[name] for name in split_names}  # bytes travel as they are to any machine
    return _to_bytes(train(setting, splits, config, **options))


def _raise_failures(jobs, results) -> None:
    failed = {job: str(r) or repr(r) for job, r in zip(jobs, results) if isinstance(r, Exception)}
    if failed:
        names = " and ".join(f"{setting.name}, seed {config.seed}" for setting, config in failed)
        reasons = "; ".join(dict.fromkeys(failed.values()))
        raise ValueError(f"{names} failed ({reasons}); other runs are kept")


def _progress_bar(stack: contextlib.ExitStack, total: int) -> tqdm:
    """Of finished runs: in a terminal, or in the cell of a notebook, which is empty afterwards."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return stack.enter_context(tqdm(total=total, unit="run", disable=None))
    stack.callback(shell.display_pub.clear_output)
    return stack.enter_context(tqdm(total=total, unit="run", file=sys.stdout))


@contextlib.contextmanager
def _processes(count: int):
    """A pool of spawned processes. They hold one end of a pipe and exit when the other end is
    closed: by this process, after an exception, or by the system, however this process ends."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, spawn, _start_worker, (receiver,))
    try:
        with contextlib.ExitStack() as stack:
            if hasattr(signal, "pthread_sigmask"):  # Ctrl-C waits, and never reaches the processes
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            for _ in range(count):
                pool.submit(int)  # starts a process
        yield pool
    except BaseException:
        sender.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(receiver) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows

    def wait_for_the_end():
        with contextlib.suppress(EOFError, OSError):
            receiver.recv()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def train_and_save(jobs, folder="runs", **options) -> list[Checkpoint]:
    """train_many, each run saved in folder as soon as it has finished; what is there already is
    not trained again. options are those of train_many but on_finish. Raises, before any training,
    OSError where the folder cannot be written to, ValueError where a file holds another run than
    the job or two jobs would write one file; after it, ValueError that says which runs failed."""
    jobs = list(jobs)
    paths = {job: checkpoint_path(folder, *job) for job in jobs}
    if len({str(path).lower() for path in paths.values()}) < len(paths):
        raise ValueError("two different jobs have the same name and seed, or would share a file")
    results = {job: load_checkpoint(path) for job, path in paths.items() if path.exists()}
    for job, run in results.items():
        reasons = _differences(run, *job, ["name", *FIELDS])
        wanted = options.get("split_names", ("train", "val", "test"))
        reasons += [f"{name} is not measured" for name in wanted if name not in run.metrics]
        if reasons:
            text = f"{paths[job]} holds another run: {', '.join(reasons)}"
            raise ValueError(f"{text}; choose another folder")
    new = [job for job in paths if job not in results]
    if new:  # a folder that cannot be written to is refused before the first run
        write_file(probe := Path(folder) / ".writable", b"")
        probe.unlink(missing_ok=True)
    runs = train_many(new, on_finish=lambda i, run: save_checkpoint(paths[new[i]], run), **options)
    _raise_failures(new, runs)
    results.update(zip(new, runs))
    return [results[job] for job in jobs]


def _differences(run: Checkpoint, setting: Setting, config: TrainConfig, keys) -> list[str]:
    old, new = vars(run.setting) | vars(run.config), vars(setting) | vars(config)
    return [f"{key} is {old[key]}, not {new[key]}" for key in keys if old[key] != new[key]]


def load_runs(folder) -> list[Checkpoint]:
    """All checkpoints of a folder, in the order of SETTINGS, others behind them, and of seeds.
    Raises FileNotFoundError where there is none, ValueError where one is not usable or might stand
    for another run: by its name, or beside other seeds that were trained in another way."""
    runs = []
    first = {}
    for path in sorted(Path(folder).glob("[!.]*.pt")):
        runs.append(run := load_checkpoint(path))
        if (expected := checkpoint_path(folder, run.setting, run.config).name) != path.name:
            raise ValueError(f"{path} holds the run of {expected}; move it to another folder")
        other = first.setdefault(run.setting.name, run)
        if reasons := _differences(run, other.setting, other.config, CELL):
            raise ValueError(f"{path}, unlike another seed: {', '.join(reasons)}; move one away")
    if not runs:
        raise FileNotFoundError(f"{folder} holds no checkpoints (*.pt)")
    names = [*SETTINGS, *(run.setting.name for run in runs)]
    return sorted(runs, key=lambda run: (names.index(run.setting.name), run.config.seed))


def collect(runs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables of checkpoints, or of the folder that holds them. A row for each run: setting,
    label, seed, accuracy and loss of each split, seconds. A row for each epoch and split of a run:
    loss and accuracy. Raises as load_runs."""
    rows = []
    histories = []
    for run in load_runs(runs) if isinstance(runs, (str, os.PathLike)) else runs:
        row = {"setting": run.setting.name, "label": run.setting.label, "seed": run.config.seed}
        histories.append(run.history.assign(**row))
        for split, metrics in run.metrics.items():
            row |= {f"{split}_{name}": value for name, value in metrics._asdict().items()}
        rows.append({**row, "seconds": run.seconds})
    return pd.DataFrame(rows), pd.concat(histories, ignore_index=True)


# ---------------------------------------------------------------------------------- study

# weights/search.csv is plan and record: a row is a run, and one without an accuracy is to be done.
# Rows stay, but for those of a network that is gone (tanh, average pooling, norm before activation:
# in commit 9786df0). Where no part says otherwise, runs have 16 epochs, batches of 128, SGD, and
# the seeds 101 to 103, each with its validation images. A pilot, seed 100, gave the first windows.
#
#   A  no regularization, batch norm: rates; dropout, weight decay: strengths x rates.
#   B  fixed choices, one changed at a time: batches of 64 and of 256, Adam (no regularization).
#   C  length: 8 and 32 epochs of chosen settings.
#   D  combinations: rates.
#   E  the final runs, in weights/: all settings, seeds 0 and 8 to 14. They choose nothing.
#   P  a prediction: weight decay + batch norm depends on rate x lambda alone. For lambda 0.002 at
#      0.16 and 0.004 at 0.08 it says, before their runs: train accuracy 96.2 %, to within 0.2
#      points, and validation accuracy near 92.3 %, as at the products equal to theirs, 0.00032.
#
# Rules. They replace those of commit 9786df0, whose final runs had been seen on test, and were
# written before the first run that they added; what they choose from the older rows was known.
# 1. The score of a cell is the mean of its own mean validation accuracy and those of the cells
#    beside it: half and twice the rate and, where strengths are tuned, the next weaker and the
#    next stronger (p: 0.05, 0.1, 0.2, 0.5; lambda: factors of two), rounded to nine digits. A run
#    that diverges counts as 0.1. No regularization is beside the weakest strength, but never a
#    candidate; nor is a cell that lacks a neighbour. A grid grows: once, each cell whose own mean
#    is within noise of the grid's best gets the neighbours that it lacks; then the cells of the
#    highest own mean get theirs, until they have them. A cell whose runs all diverged gets none.
#    The highest score wins, ties go to the smaller strength, then to the smaller rate.
# 2. Combinations take the strengths that their techniques have alone, and a rate by rule 1 (rows
#    of other strengths are older).
# 3. Noise: two standard errors of a paired difference of means of three, pooled over the cells of A
#    within a point of their grid's best. An alternative of B, at its best rate, must win by more.
# 4. Length is not tuned; C shows what others would do.

STUDY = HERE / "weights" / "search.csv"
STRENGTHS = ("dropout", "weight_decay")  # hyperparameters, and the settings that tune them
DROPOUTS = (0.05, 0.1, 0.2, 0.5)
FIELDS = [*STRENGTHS, "batch_norm", "lr", *(entry.name for entry in fields(TrainConfig))]
CELL = [name for name in FIELDS if name != "seed"]  # what the seeds of a configuration share
OUTCOME = ["val_accuracy", "train_accuracy", "seconds"]  # of the last epoch; of the processor
RUN = ["part", "setting", *FIELDS]  # what a row is known by


def read_study(path=STUDY) -> pd.DataFrame:
    """The table of a study, columns RUN and OUTCOME. Raises OSError where it cannot be read, and
    ValueError, naming row and column, where it is no such table."""
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is not the table of a study: {error}") from error
    if [*table] != [*RUN, *OUTCOME] or not isinstance(table.index, pd.RangeIndex):
        expected = f"expected, between commas, {', '.join([*RUN, *OUTCOME])}"
        raise ValueError(f"{path} has the columns {', '.join(table)}; {expected}, and no more")
    for column, values in table.items():
        if column not in ("part", "setting", "batch_norm", "optimizer"):
            table[column] = pd.to_numeric(values, errors="coerce")
        wrong = table[column].isna() & ((column in RUN) | values.notna())
        wrong |= (column == "batch_norm") & ~values.astype(str).isin(["True", "False"])
        if wrong.any():
            row = wrong.idxmax()
            raise ValueError(f"{path}, row {row + 2}: {column} cannot be {values[row]}")
    if (doubled := table.duplicated(RUN)).any():
        raise ValueError(f"{path}, row {doubled.idxmax() + 2}: an earlier row has the same run")
    return table


def search(path=STUDY, executor: Executor | None = None, **options) -> pd.DataFrame:
    """Run the rows of a study that lack an accuracy, on the splits train and val alone. Each
    finished run is written at once, those that diverged at the end, into the file as it is then:
    rows may be added meanwhile. options go to train_many. Returns the table. Raises as read_study,
    OSError where another search has locked it, and at the end ValueError for what failed."""
    path = Path(path)
    table = read_study(path)
    todo = table[table.val_accuracy.isna()]
    jobs = []
    for index, row in todo.iterrows():
        try:
            setting = Setting(row.setting, row.setting, **row[FIELDS[:4]])  # up to lr
            jobs.append((setting, TrainConfig(**row[FIELDS[4:]])))
        except ValueError as error:
            raise ValueError(f"{path}, row {index + 2}: {error}") from error
    if not jobs:
        return table

    outcomes = {}

    def record(number: int, run: Checkpoint | None) -> None:
        metrics = run.metrics if run else {"val": Metrics(0, 0.1), "train": Metrics(0, 0.1)}
        accuracies = [metrics[name].accuracy for name in ("val", "train")]
        outcomes[number] = [*accuracies, run.seconds if run else 0.0]  # without a run: diverged
        current = read_study(path)
        for n, outcome in outcomes.items():  # those as well that could not be written before
            current.loc[(current[RUN] == todo.iloc[n][RUN]).all(axis=1), OUTCOME] = outcome
        write_file(path, current.to_csv(index=False, lineterminator="\n").encode())

    try:
        lock = FileLock(path.with_suffix(".lock")).acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"another search is running on {path}") from error
    with lock:
        options |= {"split_names": ("train", "val"), "every_epoch": False, "on_finish": record}
        runs = train_many(jobs, executor, **options)
        for number, run in enumerate(runs):
            if isinstance(run, FloatingPointError):
                runs[number] = record(number, None)
        _raise_failures(jobs, runs)
        return read_study(path)


def grid_runs(table: pd.DataFrame, name: str, strengths: dict) -> pd.DataFrame:
    """The runs of a setting in A and D, of a combination those at the given strengths (rule 2)."""
    runs = table[table.part.isin(["A", "D"]) & (table.setting == name)]
    for key, value in strengths.items():
        if name != key:
            runs = runs[runs[key].isin([0, value])]
    return runs


def accuracy_grid(table: pd.DataFrame, name: str, strengths: dict) -> pd.DataFrame:
    """What rule 1 looks at for a setting: mean validation accuracies, a row for each strength, the
    weakest first, a column for each rate, NaN where nothing was run: at one rate more at each end
    and at the next stronger strength, if the list has one."""
    runs = grid_runs(table, name, strengths)
    key = "batch_norm"  # one level: only the rate is tuned
    levels = runs.batch_norm.unique()
    if name in STRENGTHS:
        key = name
        stronger = _doublings(runs[name].min(), 2 * runs[name].max())
        levels = [0, *(DROPOUTS if name == "dropout" else stronger)]
        runs = pd.concat([grid_runs(table, "baseline", {}), runs])
    means = runs.groupby([key, "lr"]).val_accuracy.mean(skipna=False).round(9).unstack()
    rates = _doublings(runs.lr.min() / 2, 2 * runs.lr.max())
    return means.reindex(levels).reindex(columns=rates)


def _doublings(low: float, high: float) -> list[float]:
    return [low * 2.0**k for k in range(round(math.log2(high / low)) + 1)]


def _beside(grid: pd.DataFrame) -> list[pd.DataFrame]:
    """For each cell the values of its neighbours of rule 1, NaN where there is none."""
    moved = [grid.shift(1, axis=1), grid.shift(-1, axis=1)]
    return moved + ([grid.shift(1), grid.shift(-1)] if len(grid) > 1 else [])


def best_cell(grid: pd.DataFrame) -> tuple[float, float]:
    """Strength and rate of the cell that rule 1 chooses."""
    cells = [grid, *_beside(grid)]
    scores = (sum(cells) / len(cells)).round(9)  # NaN where a neighbour is missing
    return scores.stack().idxmax()  # the first: of the smaller strength, then the smaller rate


def lacking(grid: pd.DataFrame, margin: float = 0.0) -> list[tuple[float, float]]:
    """Strength and rate of the cells that a grid must still get by rule 1, beside those of the
    highest mean or, with the noise as margin, beside those within noise of it."""
    means = grid.iloc[1:] if len(grid) > 1 else grid  # without no regularization
    near = (means >= round(means.max(axis=None) - margin, 9)) & (means > 0.1)
    near = near.reindex(grid.index, fill_value=False).astype(float)
    wanted = sum(cells.fillna(0) for cells in _beside(near)) > 0
    cells = (wanted & grid.isna()).stack()
    return [*cells.index[cells]]


def choices(table: pd.DataFrame) -> pd.DataFrame:
    """What rules 1 and 2 choose: a row for each setting of A and D (the index), columns CELL."""
    grids = table[table.part.isin(["A", "D"])].sort_values("part", kind="stable")
    strengths = {}
    chosen = {}
    for name in grids.setting.unique():
        runs = grid_runs(table, name, strengths)
        strength, lr = best_cell(accuracy_grid(table, name, strengths))
        if name in STRENGTHS:
            strengths[name] = strength
            runs = runs[runs[name] == strength]
        chosen[name] = runs[runs.lr == lr].iloc[0][CELL]
    return pd.DataFrame(chosen).T.infer_objects()


def noise_band(table: pd.DataFrame) -> float:
    """The noise of rule 3, as a fraction of images."""
    part = table[table.part == "A"]
    cells = part.pivot(index="seed", columns=["setting", *CELL], values="val_accuracy")
    best = cells.mean().groupby("setting").transform("max")
    cells = cells.loc[:, cells.mean() >= best - 0.01]
    residuals = cells.sub(cells.mean(axis=1), axis=0) - cells.mean() + cells.mean(axis=None)
    freedom = (len(cells) - 1) * (cells.shape[1] - 1)
    variance = float((residuals**2).to_numpy().sum()) / freedom
    return 2 * math.sqrt(2 / len(cells) * variance)


def alternatives(table: pd.DataFrame) -> pd.DataFrame:
    """What rule 3 compares: validation accuracy of each alternative of B (a row, by optimizer and
    batch_size) at its best rate minus that of the fixed choice, for each seed (a column)."""
    chosen = table[table.part == "A"].merge(choices(table).loc[["baseline"]])
    default = chosen.set_index("seed").val_accuracy
    changed = ["optimizer", "batch_size"]
    runs = table[table.part == "B"]
    rates = runs.pivot(index=[*changed, "lr"], columns="seed", values="val_accuracy")
    best = rates.mean(axis=1).groupby(changed).idxmax()
    return rates.loc[best].droplevel("lr") - default


def lengths(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of C, with those of A and D that they are to be compared with."""
    chosen = choices(table).rename_axis("setting").reset_index().drop(columns="epochs")
    runs = table.merge(chosen)
    return runs[runs.setting.isin(table.setting[table.part == "C"])]


# ----------------------------------------------------------------------------- statistics

TECHNIQUES = ("dropout", "weight_decay", "batch_norm")
# 97.5 % quantiles of Student's t with 1 to 10 degrees of freedom (R. A. Fisher 1925)
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def hits(runs, split: Split) -> pd.DataFrame:
    """Which images runs classify right, as 1.0 or 0.0: a row for each (setting, seed)."""
    index = pd.MultiIndex.from_tuples((run.setting.name, run.config.seed) for run in runs)
    answers = torch.stack([compute_logits(run.model, split.images).argmax(1) for run in runs])
    return pd.DataFrame((answers == split.labels.cpu()).double().numpy(), index)


def contrasts() -> pd.DataFrame:
    """What the report asks of the eight settings, as weighted sums of their accuracies: a row for
    each setting, a column for each sum. "main", technique: mean of the settings with it minus mean
    of those without. "gain", technique, setting: what it adds to a setting. "interaction", two
    techniques: how much more one brings where the other is on. "difference", setting: to no
    regularization. Raises ValueError where SETTINGS lack one of the eight combinations."""
    on = pd.DataFrame(SETTINGS.values(), [*SETTINGS])[[*TECHNIQUES]].astype(bool).drop_duplicates()
    if len(on) < 8:
        raise ValueError(f"SETTINGS have {len(on)} combinations of the techniques; expected all 8")
    sign = 2.0 * on - 1
    weights = {}
    for technique in TECHNIQUES:
        weights["main", technique, ""] = sign[technique] / 4
        others = on.drop(columns=technique)
        for name in on.index[~on[technique]]:
            pair = (others == others.loc[name]).all(axis=1)  # the setting, and it with technique
            weights["gain", technique, name] = sign[technique] * pair
    for one, other in combinations(TECHNIQUES, 2):
        weights["interaction", one, other] = sign[one] * sign[other] / 2
    unit = pd.DataFrame(np.eye(8), on.index, on.index)
    for name in on.index[on.any(axis=1)]:
        weights["difference", name, ""] = unit[name] - unit[on.index[~on.any(axis=1)][0]]
    return pd.DataFrame(weights).sort_index(axis=1)


def intervals(right: pd.DataFrame, weights: pd.DataFrame) -> pd.DataFrame:
    """Weighted sums of settings' mean accuracies (effect) and the half_width of their 95 %
    intervals, for other seeds and other images of the same kind; a row for each column of weights.

    right: as hits gives it; seeds that lack a setting are left out. The variance is that of a mean
    over two crossed random factors (Searle, Casella, McCulloch 1992): of the means by seed, plus
    of the means by image, minus the residual, which both contain. Student's t has a degree of
    freedom less than there are seeds, at most 10; with one seed the half width is NaN."""
    rows = []
    for _, weight in weights.items():
        parts = [factor * right.loc[name] for name, factor in weight.items() if factor]
        values = sum(parts).dropna().to_numpy()
        seeds, images = values.shape
        half = math.nan
        if seeds > 1:
            by_seed = values.mean(axis=1, keepdims=True)
            by_image = values.mean(axis=0, keepdims=True)
            squares = (values - by_seed - by_image + values.mean()) ** 2
            residual = squares.sum() / (seeds - 1) / (images - 1)
            variance = by_seed.var(ddof=1) / seeds + by_image.var(ddof=1) / images
            variance -= residual / seeds / images
            quantile = STUDENT[min(seeds - 1, len(STUDENT)) - 1]
            half = quantile * math.sqrt(max(variance, 0.0))
        rows.append((values.mean(), half))
    return pd.DataFrame(rows, index=weights.columns, columns=["effect", "half_width"])


# --------------------------------------------------------------------------------- report


def confusion_matrix(model: nn.Module, split: Split) -> pd.DataFrame:
    """Counts of images, (10, 10): rows are true classes, columns are predicted ones."""
    pairs = split.labels.cpu() * len(CLASSES) + compute_logits(model, split.images).argmax(1)
    counts = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    return pd.DataFrame(counts.numpy(), index=CLASSES, columns=CLASSES)


def layer_summary(model: LeNet5) -> pd.DataFrame:
    """One row for each layer that does something: name, output shape, number of parameters."""
    rows = []
    values = torch.zeros(1, 1, 28, 28, dtype=torch.float32)
    model = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        for name, layer in model.layers.named_children():
            values = layer(values)
            if str(layer) not in ("Identity()", "Dropout(p=0.0, inplace=False)"):
                count = sum(parameter.numel() for parameter in layer.parameters())
                rows.append((name, tuple(values.shape), count))
    return pd.DataFrame(rows, columns=["layer", "output shape", "parameters"])


def batch_norm_gradients(x: Tensor, gamma: Tensor, upstream: Tensor, eps: float) -> dict:
    """The six answers to question 3 (theory.md), for the layer of Ioffe and Szegedy (2015).
    x and upstream, which is df/dy, are (m,); gamma is a scalar; eps is added to the variance.
    Returns df/d of gamma, beta, x_hat (m,), variance, mean and x (m,)."""
    m = len(x)
    mean = x.mean()
    root = ((x - mean).square().mean() + eps).sqrt()
    x_hat = (x - mean) / root
    d_gamma = (upstream * x_hat).sum()
    d_beta = upstream.sum()
    d_x_hat = gamma * upstream
    return {
        "gamma": d_gamma,
        "beta": d_beta,
        "x_hat": d_x_hat,
        "variance": -(d_x_hat * (x - mean)).sum() / (2 * root**3),
        "mean": -d_x_hat.sum() / root,
        "x": gamma / (m * root) * (m * upstream - d_beta - x_hat * d_gamma),
    }


# Colours of settings; the first eight are for colour-blind readers (after Okabe and Ito).
PALETTE = ["#000000", "#E69F00", "#009E73", "#0072B2", "#8C6D1F", "#D55E00", "#56B4E9", "#CC79A7"]
PALETTE += ["#7F7F7F", "#A50026", "#5E3C99", "#1B7837"]
MARKERS = dict(zip("osD^vP*X", "●■◆▲▼✚★✖"))


def prepare_notebook() -> None:
    """Figures as PNG and PDF, in one style, with the same bytes in every run."""
    import matplotlib
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    matplotlib.set_loglevel("error")  # of font caches
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # in place of the time at which a PDF is made
    matplotlib.rcdefaults()
    set_matplotlib_formats("png", "pdf")
    style = {"font.size": 8, "axes.titlesize": 8.5, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    matplotlib.rcParams.update(style | {"lines.linewidth": 1.3, "savefig.dpi": 150})


def show_table(table: pd.DataFrame, caption: str):
    """A table in a notebook, as Markdown, its caption at the head of the first column."""
    from IPython.display import Markdown

    cells = table.astype(str).map(lambda text: " ".join(text.replace("|", r"\|").split()))
    rows = [[f"**{caption}**", *table.columns[1:]], *cells.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows)]  # which pandoc keeps
    rule = [":" + "-" * widths[0], *("-" * width + ":" for width in widths[1:])]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])))


def summary_table(results: pd.DataFrame, splits=("train", "test")) -> pd.DataFrame:
    """Final accuracies in percent: mean ± standard deviation over the seeds, if there are several.
    results: as collect gives them."""
    values = 100 * results[[f"{split}_accuracy" for split in splits]]
    groups = values.groupby([results.setting, results.label], sort=False)
    spread = groups.std().map(" ± {:.2f}".format).where(groups.count() > 1, "")
    table = groups.mean().round(9).map("{:.2f}".format) + spread
    return table.set_axis([*splits], axis=1).droplevel(0).rename_axis("setting").reset_index()


def _styles(names, labels=()) -> dict[str, tuple[str, str, str]]:
    """Label, colour and marker of settings, the same everywhere. labels: pairs (name, label)."""
    known = {name: setting.label for name, setting in SETTINGS.items()} | dict(labels)
    order = dict.fromkeys([*SETTINGS, *names])
    looks = zip(order, cycle(PALETTE), cycle(MARKERS))
    styles = {name: (known.get(name, name), color, marker) for name, color, marker in looks}
    return {name: styles[name] for name in names}


def _short(name: str) -> str:
    """The letters of a setting's techniques; "none", "all"."""
    on = [SETTINGS[x].label[0] for x in TECHNIQUES if getattr(SETTINGS[name], x)]
    return {0: "none", 3: "all"}.get(len(on), "+".join(on))


def _figure(height: float):
    """A figure as wide as a page."""
    from matplotlib.figure import Figure

    return Figure(figsize=(6.4, height), layout="constrained")


def _label_ends(ax, x: float = 1.0, gap: float = 0.125) -> None:
    """Write marker and label of lines beside their ends, or where they leave the axes, from x on
    and at least gap apart, both as shares of the axes."""
    scale = ax.transScale.transform
    (_, low), (_, high) = scale([(1, y) for y in ax.get_ylim()])
    ends = []
    for line in ax.lines:
        heights = [(scale((1, y))[1] - low) / (high - low) for y in line.get_ydata()]
        inside = [y for y in heights if 0 <= y <= 1]
        if inside and not line.get_label().startswith("_"):
            label = f"{MARKERS.get(line.get_marker(), '')} {line.get_label()}"
            ends.append((inside[-1], label, line.get_color()))
    ends.sort(key=lambda end: end[0])
    at = [*accumulate((y for y, *_ in ends), lambda last, y: max(y, last + gap))]
    lower = max((sum(at) - sum(y for y, *_ in ends)) / len(at), at[-1] - 1) if at else 0
    for y, (_, label, color) in zip(at, ends):
        style = {"color": color, "fontsize": 7, "va": "center", "transform": ax.transAxes}
        ax.text(x, y - lower, f" {label}", **style)


def _show_image(ax, image: Tensor, title: str) -> None:
    ax.imshow(image[0].cpu().numpy() * STD + MEAN, cmap="gray_r", vmin=0, vmax=1, origin="upper")
    ax.set_title(title, fontsize=7)
    ax.set_axis_off()


def plot_examples(split: Split):
    """The first image of each class. Returns the figure, as all plots do."""
    figure = _figure(0.85)
    for label, ax in enumerate(figure.subplots(1, 10)):
        _show_image(ax, split.images[split.labels == label][0], CLASSES[label])
    return figure


def plot_architecture(model: LeNet5):
    """The data after each layer that changes their shape: maps as squares, areas to scale, units
    as bars. Below: the layer and its number of parameters. Above: what follows it."""
    figure = _figure(1.9)
    ax = figure.subplots()
    names = {"conv": "convolution\n5 × 5", "pool": "pooling\n2 × 2", "fc": "fully\nconnected"}
    marks = {"relu": "ReLU", "norm": "B", "drop": "D"}
    blocks = {"align": "edge", "fc": "#DCE9F5", "ec": "#0072B2", "lw": 0.4}
    stages = [["image", (1, 1, 28, 28), 0, ""]]
    for layer, shape, parameters in layer_summary(model).to_numpy():
        if layer[:-1] in names:
            stages.append([names[layer[:-1]], shape, parameters, ""])
        elif layer[:-1] in marks:
            stages[-1][3] += f" {marks[layer[:-1]]}"
    x = 0.0  # of the next stage
    for name, (_, *shape), parameters, after in stages:
        count, height, width = shape if len(shape) == 3 else (1, shape[0] / 3, 3)
        step = 10 / max(count, 8)  # from one map to the next
        for k in range(count):
            bottom = step * (count - 1) / 2 - step * k - height / 2
            ax.bar(x + step * k, height, width, bottom, **blocks)
        whole = width + step * (count - 1)
        size = f"{count} maps\n{height} × {height}" if len(shape) == 3 else f"{shape[0]}\nunits"
        text = {"x": x + whole / 2, "ha": "center", "fontsize": 7, "in_layout": False}
        ax.text(y=23, s=size.replace("1 maps", "1 map"), va="bottom", **text)
        ax.text(y=-23, s=f"{name}\n{parameters:,}" if parameters else name, va="top", **text)
        ax.text(y=37, s=after.strip(), color=PALETTE[3], weight="bold", **text)
        x += max(whole, 21) + 10
    ax.set(xlim=(-1, x - 9), ylim=(-40, 44), aspect="equal")
    ax.set_axis_off()
    return figure


def plot_rates(table: pd.DataFrame):
    """Accuracy against learning rate in the study, means of three runs in percent: above on
    validation, below on train. A panel for each technique, a line for each strength, and one for
    combinations; no regularization in black in all of them. Rings are what the rules choose."""
    chosen = choices(table)
    strengths = {key: chosen[key][key] for key in STRENGTHS}
    pairs = [name for name in chosen.index if name not in ("baseline", *TECHNIQUES)]
    panels = {"Dropout: p": ["dropout"], "Weight decay: λ": ["weight_decay"]}
    panels |= {"Batch norm": ["batch_norm"], "Combinations": pairs}
    figure = _figure(3.7)
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row")
    for column, (title, names) in zip(axes.T, panels.items()):
        column[0].set_title(title)
        for ax, split, span in zip(column, ("val", "train"), (2.6, 11)):
            measure = f"{split}_accuracy"
            top = 100 * table.groupby(["setting", *CELL])[measure].mean().max()
            ax.set_ylim(top - span, top + 0.1 * span)
            for name, (_, color, marker) in _styles(["baseline", *names]).items():
                runs = grid_runs(table, name, strengths)
                levels = runs.groupby(name if name in STRENGTHS else "batch_norm")
                for k, (level, cells) in enumerate(levels):
                    curve = 100 * cells.groupby("lr")[measure].mean()
                    label = f"{level:g}" if name in STRENGTHS else _short(name)
                    style = {"label": "_" if name == "baseline" else label, "color": color, "ms": 3}
                    style["marker"] = [*MARKERS][k] if len(levels) > 1 else marker
                    ax.semilogx(curve, alpha=0.4 + 0.6 * (k + 1) / len(levels), **style)
                    if name not in STRENGTHS or level == strengths[name]:
                        rate = chosen.lr[name]
                        ax.plot(rate, curve[rate], "o", mfc="none", mec=color, ms=8)
            _label_ends(ax, 0.66 if names[0] in STRENGTHS else 1.0)
        column[1].set_xlabel("learning rate")
    axes[0, 0].set_ylabel("validation accuracy (%)")
    axes[1, 0].set_ylabel("train accuracy (%)")
    axes[0, 0].set_xticks([0.01, 0.04, 0.16, 0.64, 2.56], [".01", ".04", ".16", ".64", "2.56"])
    axes[0, 0].minorticks_off()
    return figure


def plot_choices(table: pd.DataFrame):
    """What rules 3 and 4 saw. Left: alternatives, in points: seeds as dots, means as bars, noise in
    grey. Right: train and validation accuracy after the number of epochs at each point."""
    figure = _figure(2.0)
    left, right = figure.subplots(1, 2)
    noise = 100 * noise_band(table)
    left.axvspan(-noise, noise, color="0.85", lw=0)
    for (optimizer, size), seeds in (100 * alternatives(table)).iterrows():
        label = "Adam" if optimizer == "adam" else f"batches of {size}"
        left.plot(seeds, [label] * len(seeds), "o", color="black", ms=3, alpha=0.6)
        left.plot(seeds.mean(), label, "|", color="black", ms=13, mew=2)
    left.set(title="One choice changed", xlabel="difference in validation accuracy (points)")
    left.margins(y=0.2)
    means = 100 * lengths(table).groupby(["setting", "epochs"])[OUTCOME[:2]].mean()
    number = {"size": 6.5, "ha": "center", "va": "center", "bbox": {"fc": "w", "lw": 0, "pad": 0.5}}
    for name, (_, color, _) in _styles(means.index.unique("setting")).items():
        line = means.loc[name]
        right.plot(line.train_accuracy, line.val_accuracy, color=color, label=_short(name))
        for epochs, (y, x) in line.iterrows():
            right.annotate(epochs, (x, y), color=color, **number)
    right.set(title="Length in epochs", xlabel="train accuracy (%)", ymargin=0.1)
    right.set_ylabel("validation accuracy (%)")
    _label_ends(right)
    return figure


def plot_convergence(history: pd.DataFrame, names, compared):
    """Accuracy by epoch (history: as collect gives it), a panel for each of names: train dashed,
    test solid, seeds thin, means thick; below, closer, means on test of those in compared."""
    styles = _styles([*names, *compared], zip(history.setting, history.label))
    columns = ["setting", "split", "seed"]
    wide = 100 * history.pivot(index="epoch", columns=columns, values="accuracy").sort_index(axis=1)
    ticks = [1, *range(4, wide.index[-1] + 1, 4)]
    rows = math.ceil(len(names) / 2)
    figure = _figure(1.5 * rows + 2.1)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.5 * rows, 2.1])
    axes = upper.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, name in zip(axes, names):
        label, color, _ = styles[name]
        for split, dashes in (("train", "--"), ("test", "-")):
            seeds = wide[name, split].dropna(how="all")
            mean = seeds.mean(axis=1)
            marker = "o" if len(mean) == 1 else ""
            ax.plot(seeds, color=color, ls=dashes, lw=0.4, alpha=0.5)
            ax.plot(mean, color=color, ls=dashes, lw=1.6, marker=marker, label=split)
            end = f" {mean.iloc[-1]:.1f}"
            ax.text(mean.index[-1], mean.iloc[-1], end, color=color, fontsize=7, va="center")
        ax.set(title=label, xticks=ticks, ylim=(min(80, wide.iloc[-1].min() - 10), 100))
    axes[0].legend(loc="upper left", ncols=2)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    upper.supylabel("accuracy (%) by epoch", fontsize=8)
    ax = lower.subplots()
    for name in compared:
        label, color, marker = styles[name]
        mean = wide[name, "test"].mean(axis=1).dropna()
        ax.plot(mean, color=color, marker=marker, ms=3, markevery=2, label=label)
    ax.set(title="Test, means of the seeds", xlabel="epoch", ylabel="accuracy (%)", xticks=ticks)
    ax.set_ylim(bottom=min(84, *(line.get_ydata()[-1] - 2 for line in ax.lines)))
    _label_ends(ax, gap=0.075)
    return figure


def plot_results(results: pd.DataFrame, effects: pd.DataFrame):
    """Left: test accuracy, runs as marks, means as bars. Middle: differences to no regularization
    with their intervals, in points. Right: the gap, from test to train accuracy.
    results: as collect gives them; effects: intervals of contrasts."""
    styles = _styles(results.setting, zip(results.setting, results.label))
    figure = _figure(0.6 + 0.19 * len(styles))
    grid = {"sharey": True, "width_ratios": [4, 4, 3], "subplot_kw": {"xmargin": 0.25}}
    left, middle, right = figure.subplots(1, 3, **grid)
    words = {"fontsize": 7, "va": "center"}
    for y, (name, (_, color, marker)) in enumerate(styles.items()):
        runs = 100 * results[results.setting == name][["test_accuracy", "train_accuracy"]]
        test, train = runs.mean()
        left.plot(runs.test_accuracy, [y] * len(runs), marker, color=color, ms=3, alpha=0.5)
        left.plot(test, y, "|", color=color, ms=12, mew=2)
        left.text(runs.test_accuracy.max(), y, f"  {round(test, 9):.2f}", **words)
        if ("difference", name, "") in effects.index:
            effect, half = 100 * effects.loc["difference", name, ""]
            middle.errorbar(effect, y, xerr=half, fmt=marker, color=color, ms=4)
            middle.text(effect + np.nan_to_num(half), y, f"  {effect:+.2f}", **words)
        right.plot([test, train], [y, y], color=color, lw=3, alpha=0.5)
        right.text(train, y, f"  {train - test:.1f}", **words)
    left.set_yticks(range(len(styles)), [label for label, *_ in styles.values()])
    left.set_ylim(len(styles) - 0.5, -0.5)
    left.set(title="Test accuracy", xlabel="%")
    middle.axvline(0, color="black", lw=0.6)
    middle.set(title="Minus no regularization", xlabel="points")
    right.set(title="Test to train: gap", xlabel="%")
    return figure


def plot_gains(effects: pd.DataFrame):
    """A panel for each technique: what it adds to the test accuracy of each setting without it, in
    points, with intervals; as a line the mean of the four. Last: what weight decay and batch norm
    add alone, the sum of these, and what the pair adds. effects: intervals of contrasts."""
    points = 100 * effects
    styles = _styles([*TECHNIQUES, "weight_decay_batch_norm"])
    figure = _figure(1.6)
    axes = figure.subplots(1, 4, sharey=True)
    for ax, technique in zip(axes, TECHNIQUES):
        label, color, _ = styles[technique]
        gains = points.loc["gain", technique].reindex(SETTINGS).dropna(how="all")
        ticks = [*map(_short, gains.index)]
        ax.errorbar(ticks, gains.effect, yerr=gains.half_width, fmt="o", color=color, ms=4)
        mean = points.effect["main", technique, ""]
        ax.axhline(mean, color=color, lw=1, ls="--")
        style = {"color": color, "fontsize": 7, "va": "center"}
        ax.text(1, mean, f" {mean:+.2f}", transform=ax.get_yaxis_transform(), **style)
        ax.set(title=f"{label} ({_short(technique)})", xlabel="others that are on")
    alone = points.loc[[("difference", name, "") for name in TECHNIQUES[1:]]]
    pair = points.loc["difference", "weight_decay_batch_norm", ""]
    heights = [*alone.effect, alone.effect.sum(), pair.effect]
    halves = [*alone.half_width, math.nan, pair.half_width]
    colors = ["0.8", "0.8", "0.8", styles["weight_decay_batch_norm"][1]]
    bars = {"color": colors, "ecolor": "0.3", "width": 0.5}
    axes[3].bar(["W", "B", "sum", "W+B"], heights, yerr=halves, **bars)
    axes[3].set(title="W and B together", xlabel="settings")
    axes[0].set_ylabel("gain on test (points)")
    for ax in axes:
        ax.axhline(0, color="black", lw=0.6)
    return figure


def norms_by_epoch(runs) -> pd.DataFrame:
    """The norms of all runs: columns setting, seed, epoch, layer, norm (of weights and biases
    together) and the effective rate, learning rate / norm², at the end of each epoch."""
    tables = []
    for run in (run for run in runs if len(run.norms)):
        table = run.norms.assign(setting=run.setting.name, seed=run.config.seed)
        rate = run.setting.lr * (table.epoch / run.config.epochs).map(warmup_cosine)
        table["norm"] = np.hypot(table.weight, table.bias)
        tables.append(table.assign(effective_rate=rate / table.norm**2))
    return pd.concat(tables, ignore_index=True)


def plot_story(history, norms, table, names, layer: str = "fc3"):
    """By epoch, means of the seeds: test accuracy, norm of a layer, its effective rate; and, from
    a study, W+B against rate x lambda, train hollow. history, norms: of collect, norms_by_epoch."""
    figure = _figure(3.3)
    (curves, sizes), (rates, product) = figure.subplots(2, 2)
    test = 100 * history[history.split == "test"].groupby(["setting", "epoch"]).accuracy.mean()
    means = norms[norms.layer == layer].groupby(["setting", "epoch"]).mean(numeric_only=True)
    panels = {curves: test, sizes: means.norm, rates: means.effective_rate}
    titles = ("Test accuracy (%)", f"Norm of {layer}", "Effective rate: rate / norm²")
    for (ax, lines), title in zip(panels.items(), titles):
        for name, (_, color, marker) in _styles(names).items():
            line = lines[name][lambda values: values > 0]  # rates begin and end at 0
            ax.plot(line, color=color, marker=marker, ms=3, markevery=3, label=_short(name))
        ax.set(title=title, xlabel="epoch", xticks=[*range(0, test.index[-1][1] + 1, 4)])
        ax.set_yscale("log" if ax is rates else "linear")
        if ax is curves:
            ax.set_ylim(bottom=min(84, test.groupby("setting").last().min() - 2))
        _label_ends(ax)
    runs = table[(table.setting == "weight_decay_batch_norm") & (table.epochs == 16)]
    runs = 100 * runs.groupby(["weight_decay", "lr"])[OUTCOME[:2]].mean()
    runs = runs[runs.val_accuracy > 50]  # where training did not fail
    color = _styles(["weight_decay_batch_norm"])["weight_decay_batch_norm"][1]
    for marker, (decay, cells) in zip(MARKERS, runs.groupby("weight_decay")):
        x = decay * cells.index.get_level_values("lr")
        style = {"marker": marker, "color": color, "ms": 4, "lw": 0.5}
        product.semilogx(x, cells.train_accuracy, mfc="none", ls=":", **style)
        product.semilogx(x, cells.val_accuracy, label=f"λ = {decay:g}", **style)
    product.set(title="W+B by rate × λ", xlabel="rate × λ", ylabel="accuracy (%)")
    product.legend(loc="center left", fontsize=7)
    return figure


def plot_errors(model: nn.Module, split: Split):
    """Left: predicted classes in percent of each true class, the colours up to 30 %. Right: the
    six mistakes made with the highest probability, the most confident first."""
    figure = _figure(2.3)
    left, right = figure.subfigures(1, 2, width_ratios=[3, 2])
    ax = left.subplots()
    matrix = confusion_matrix(model, split)
    shares = 100 * matrix.div(matrix.sum(axis=1), axis=0)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=30, aspect="auto", origin="upper")
    for y, x in np.argwhere(shares > 0.5):
        color = "white" if shares.iat[y, x] > 18 else "black"
        text = {"ha": "center", "va": "center", "fontsize": 7, "color": color}
        ax.text(x, y, f"{shares.iat[y, x]:.0f}", **text)
    ax.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right", fontsize=7)
    ax.set_yticks(range(len(CLASSES)), CLASSES, fontsize=7)
    ax.set(xlabel="predicted class", ylabel="true class")
    ax.grid(False)
    probability, answer = compute_logits(model, split.images).softmax(1).max(1)
    order = probability.argsort(descending=True)
    surest = order[(answer != split.labels.cpu())[order]].tolist()
    bare = {"frame_on": False, "xticks": [], "yticks": []}
    for ax, index in zip(right.subplots(2, 3, subplot_kw=bare).ravel(), surest):
        truth, guess = (CLASSES[int(labels[index])] for labels in (split.labels, answer))
        _show_image(ax, split.images[index], f"{truth}\nas {guess}\n{probability[index]:.1%}")
    return figure


# --------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is in its `run`."""
    parser = argparse.ArgumentParser("dl_utils.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    trainer = commands.add_parser("train", help="Train settings from scratch.")
    tester = commands.add_parser("test", help="Measure saved runs. Exit code 1: not as recorded.")
    searcher = commands.add_parser("search", help="Train the runs that a study lacks.")
    collector = commands.add_parser("collect", help="Write results.csv of a folder of runs.")
    trainer.set_defaults(run=_train_command)
    tester.set_defaults(run=_test_command)
    searcher.set_defaults(run=_search_command)
    collector.set_defaults(run=_collect_command)
    expand = os.path.expanduser  # which shells leave to us in --out=~/runs
    option = trainer.add_argument
    option("settings", nargs="*", metavar="SETTING", help=f"One of {', '.join(SETTINGS)}, all.")
    option("--seeds", nargs="+", default=["0"], metavar="N", help="Train it with each seed, not 0.")
    option("--epochs", type=int, default=16, metavar="N", help="Train for N epochs instead of 16.")
    option("--out", type=expand, default="runs", metavar="FOLDER", help="Save here, not in runs/.")
    text = "Measure a file, or each setting's lowest seed in a folder. Default: weights/."
    tester.add_argument("paths", nargs="*", type=expand, metavar="PATH", help=text)
    text = "The study is this CSV file. Default: weights/search.csv."
    searcher.add_argument("table", nargs="?", type=expand, default=STUDY, help=text)
    collector.add_argument("folder", type=expand, help="The folder holds runs and gets the table.")
    for option in (trainer.add_argument, tester.add_argument, searcher.add_argument):
        option("--data", type=expand, metavar="FOLDER", help="Fashion-MNIST is here, not in data/.")
        option("--device", help="Compute on cpu, cuda, ... Default: accelerator; of test, cpu.")
    for option in (trainer.add_argument, searcher.add_argument):
        option("--workers", type=int, metavar="N", help="Train N at a time, not what fits.")
    return parser


def _train_command(args) -> None:
    # --seeds 0 1 dropout gives --seeds the setting as well.
    names = [*args.settings, *(word for word in args.seeds if not word.isdecimal())]
    known = [*SETTINGS, "all"]
    for name in names or [""]:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, 1) or known)
            raise ValueError(f"train {name}: expected a setting ({near}) and --seeds as in 0 1 2")
    seeds = [int(word) for word in args.seeds if word.isdecimal()] or [0]
    names = SETTINGS if "all" in names else names
    jobs = [(SETTINGS[name], TrainConfig(args.epochs, seed=n)) for n in seeds for name in names]
    train_and_save(jobs, args.out, root=args.data, device=args.device, workers=args.workers)
    print(f"{args.out}: {len(jobs)} runs")


def _test_command(args) -> int:
    runs = {}
    for path in map(Path, args.paths or [HERE / "weights"]):
        for run in load_runs(path) if path.is_dir() else [load_checkpoint(path)]:
            file = checkpoint_path(path, run.setting, run.config) if path.is_dir() else path
            runs.setdefault((path, run.setting.name), (file, run))  # load_runs sorts by seed
    differing, notes = [], []
    print(f"{'setting':36}{'train %':>9}{'val %':>9}{'test %':>9}")
    for file, run in runs.values():
        seed = f", seed {run.config.seed}" if run.config.seed else ""
        row = f"{run.setting.label + seed:36}"
        for name, split in _load_once(args.data, run.config.seed).items():
            accuracy = evaluate(run.model.to(find_device(args.device or "cpu")), split).accuracy
            row += f"{100 * accuracy:9.2f}"
            if name not in run.metrics:
                notes.append(f"{file}, {name}: no accuracy was recorded")
                continue
            images = round(len(split.labels) * (accuracy - run.metrics[name].accuracy))
            if abs(images) > 1:  # rounding on another processor may change one
                differing.append(f"{file}, {name}: {images:+} of {len(split.labels)} images right")
        print(row, flush=True)
    verdict = "DIFFER from" if differing else "equal, to within one image,"
    if any(run.metrics for _, run in runs.values()):
        notes.append(f"The measured accuracies {verdict} what the files recorded.")
    print(*differing, *notes, sep="\n")
    return 1 if differing else 0


def _search_command(args) -> None:
    table = search(args.table, root=args.data, device=args.device, workers=args.workers)
    print(f"{args.table}: {table.val_accuracy.count()} of {len(table)} runs")


def _collect_command(args) -> None:
    results, _ = collect(args.folder)
    path = Path(args.folder) / "results.csv"
    write_file(path, results.to_csv(index=False, lineterminator="\n").encode())
    print(f"{path}: {len(results)} runs")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0; 1 where accuracies are not as recorded; 2 for bad
    input, a failed run (one sentence on stderr) or a fault of this program; 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show is no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("dl_utils.py: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    except Exception as error:
        torch_lacks = isinstance(error, RuntimeError) and "allocate" in str(error)
        if torch_lacks or isinstance(error, MemoryError):
            error = OSError("out of memory; close other programs, or train fewer runs at a time")
        if isinstance(error, (ValueError, OSError)):
            print(f"dl_utils.py: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 2


if __name__ == "__main__":
    sys.exit(main())
