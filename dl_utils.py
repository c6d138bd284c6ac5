"""LeNet-5 on Fashion-MNIST: no regularization, dropout, weight decay, batch normalization.

Test accuracy in percent after 16 epochs, mean ± standard deviation of eight seeds, on two cores of
an AMD EPYC server (AVX-512, torch 2.15.0), 110 seconds of one core a run:

    no regularization  90.97 ± 0.27    weight decay + batch norm  92.00 ± 0.16
    dropout            90.99 ± 0.11    dropout + batch norm       91.62 ± 0.24
    weight decay       91.48 ± 0.15    dropout + weight decay     91.30 ± 0.19
    batch norm         91.24 ± 0.33    all three                  91.77 ± 0.24

The lesson comes first: settings, data, model, evaluation, training. What serves it follows.
Accuracies are fractions, losses are in nats per image, images are (N, 1, 28, 28) float32.

    python dl_utils.py train dropout             one setting, from scratch, into runs/
    python dl_utils.py test weights/dropout.pt   accuracies of saved files
    python dl_utils.py test                      the whole table, from the saved files
    python dl_utils.py search                    the rows of the study that lack an accuracy
    python dl_utils.py collect runs              runs/results.csv, from the files in runs/
"""

import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import http.client
import inspect
import io
import math
import multiprocessing
import os
import pickle
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
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate, combinations, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

# ------------------------------------------------------------------------------ settings


def _allow(words, rule, **options):
    """A field of a dataclass, with the values that it may have in words and as a rule."""
    return field(metadata={"words": words, "rule": rule}, **options)


def _one_of(*values):
    return _allow(f"one of {', '.join(map(str, values))}", values.__contains__, default=values[0])


def _check_fields(record) -> None:
    """Refuse values that their fields do not allow, and make NumPy's numbers Python's."""
    for entry in fields(record):
        value, allowed = getattr(record, entry.name), False
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

    name: str = _allow("letters, digits, - and _", re.compile(r"[\w-]+").fullmatch)  # of files
    label: str = _allow("a text", str.strip, compare=False)  # in tables and figures
    # Probability of dropping a hidden fully connected unit (Srivastava et al. 2014).
    dropout: float = _allow("a number >= 0 and < 1", lambda p: 0 <= p < 1, default=0.0)
    # Lambda of the penalty lambda / 2 * ||w||^2 on the weights (Krogh and Hertz 1991).
    weight_decay: float = _allow("a number >= 0", lambda x: 0 <= x < math.inf, default=0.0)
    batch_norm: bool = _one_of(False, True)  # of all hidden layers (Ioffe and Szegedy 2015)
    lr: float = _allow("a number > 0", lambda x: 0 < x < math.inf, default=0.08)  # the highest
    __post_init__ = _check_fields


@dataclass(frozen=True)
class TrainConfig:
    """What all settings share. Raises ValueError for a value that is not allowed."""

    epochs: int = _allow("a whole number >= 1", lambda n: n >= 1, default=16)
    batch_size: int = _allow("a whole number >= 1", lambda n: n >= 1, default=128)
    # Draws validation images, initial weights, order of batches and dropout masks.
    seed: int = _allow("a whole number, 0 to 2**30", lambda n: 0 <= n <= 2**30, default=0)
    optimizer: str = _one_of("sgd", "adam")
    __post_init__ = _check_fields


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("baseline", "No regularization", lr=0.04),
        Setting("dropout", "Dropout", dropout=0.1, lr=0.08),
        Setting("weight_decay", "Weight decay", weight_decay=0.001, lr=0.08),
        Setting("batch_norm", "Batch norm", batch_norm=True, lr=1.28),
        Setting("dropout_weight_decay", "Dropout + weight decay", 0.1, 0.001, lr=0.08),
        Setting("dropout_batch_norm", "Dropout + batch norm", 0.1, 0.0, True, lr=0.64),
        Setting("weight_decay_batch_norm", "Weight decay + batch norm", 0.0, 0.001, True, lr=0.32),
        Setting("combined", "All three", 0.2, 0.002, True, lr=0.04),
    )
}

# ---------------------------------------------------------------------------------- data

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, scaled to 0..1


class Split(NamedTuple):
    """Images (N, 1, 28, 28), float32 and standardized, and their labels (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor


def load_fashion_mnist(root=None, seed: int = 0) -> dict[str, Split]:
    """Fashion-MNIST (Xiao et al. 2017), downloaded where it is missing: "train" (55,000 images)
    and "val" (5,000), which seed draws from the 60,000 training images, and "test" (10,000).
    root: the folder, by default data/ beside this file. Raises as read_data_files."""
    pixels, labels, *test = read_data_files(root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    val, train = order.tensor_split([len(labels) // 12])
    parts = {
        "train": (pixels[train], labels[train]),
        "val": (pixels[val], labels[val]),
        "test": test,
    }
    return {
        name: Split(pixels.float().div_(255).sub_(MEAN).div_(STD), labels.long())
        for name, (pixels, labels) in parts.items()
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
            ("conv1", nn.Conv2d(1, 6, kernel_size=5, padding=2)),  # 6 x 28 x 28
            ("pool1", MaxPool()),  # 6 x 14 x 14
            ("relu1", nn.ReLU()),
            ("norm1", norm2d(6)),
            ("conv2", nn.Conv2d(6, 16, kernel_size=5)),  # 16 x 10 x 10
            ("pool2", MaxPool()),  # 16 x 5 x 5
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
    """2 x 2 maximum pooling of maps with even sides. Without gradients the maxima of columns,
    then of rows: the same bits, six times faster. With them torch's own, whose gradient is faster.
    """

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
    """A trained model, in evaluation mode, with everything that explains it: the history of its
    epochs (columns epoch, split, loss, accuracy), the Metrics of the model for each split, the
    processor time of the run, where it was made, and the norms of its layers by epoch, 0 being
    before the first step (columns epoch, layer, weight, bias; empty in files of version two)."""

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


def train(
    setting: Setting,
    splits: dict[str, Split],
    config: TrainConfig | None = None,
    *,
    device=None,
    every_epoch: bool = True,
    progress=None,
) -> Checkpoint:
    """Train one setting from scratch on splits["train"]; the last epoch is the model.

    All splits given are measured after every epoch or, without every_epoch, after the last.
    device: as in find_device. progress is called after every epoch. On the CPU a run takes one
    thread and gives the same bits every time; calls from several threads wait for each other.
    Raises DivergedError after the first epoch whose loss is not finite, and ValueError before
    the first step where batch norm would get a batch of one image."""
    config = config or TrainConfig()
    device = find_device(device)
    images = len(splits["train"].labels)
    if setting.batch_norm and (images - 1) % config.batch_size == 0:
        raise ValueError(
            f"batch norm cannot train on one image, the last batch of {images} images "
            f"in batches of {config.batch_size}; choose another batch_size"
        )
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
                raise DivergedError(f"diverged in epoch {epoch}; choose a lower learning rate")
            norms += [(epoch, *norm) for norm in layer_norms(model)]
            if progress:
                progress()
        seconds = round(time.process_time() - start, 1)
    history = pd.DataFrame(rows, columns=["epoch", "split", "loss", "accuracy"])
    versions = {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }
    norms = pd.DataFrame(norms, columns=["epoch", "layer", "weight", "bias"])
    return Checkpoint(model.eval(), setting, config, history, metrics, seconds, versions, norms)


class DivergedError(ValueError):
    """Training has left the finite numbers."""


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
    """The device asked for; by default this machine's accelerator, else the CPU. Raises
    ValueError for a device that this machine cannot use."""
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"this machine cannot use the device {device}") from error


# ---------------------------------------------------------------------- data from outside

HERE = Path(__file__).resolve().parent
DATA_FILES = {  # name of the unpacked file: its SHA-256
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
TIMEOUT = 30  # seconds that a server may stay silent


def read_data_files(root=None) -> list[Tensor]:
    """Images (N, 1, 28, 28) and labels (N,) of the train and of the test files, all uint8.
    A file may be packed (.gz) or not, in root/FashionMNIST/raw, where torchvision puts it, in
    root/raw or in root. Only what is there in neither form is downloaded. Raises OSError where
    that fails, ValueError where a file does not hold what Fashion-MNIST holds."""
    root, tensors = Path(root or HERE / "data"), []
    folders = [root / "FashionMNIST" / "raw", root / "raw", root]
    folder = next((f for f in folders if any(f.glob("*-idx?-ubyte*"))), folders[0])
    for name in DATA_FILES:
        paths = [*folder.glob(name), *folder.glob(f"{name}.gz")]
        content = next(filter(None, (_unpack(path.read_bytes(), name) for path in paths)), None)
        if paths and not content:
            raise ValueError(
                f"{paths[-1]} does not hold what Fashion-MNIST holds; put the "
                "original there, or move it away: it is downloaded again"
            )
        content = content or _download(folder, name)
        header, *shape = (16, 1, 28, 28) if "images" in name else (8,)  # bytes, of the IDX format
        tensors.append(torch.frombuffer(content, dtype=torch.uint8, offset=header).view(-1, *shape))
    return tensors


def _unpack(content: bytes, name: str) -> bytearray | None:
    """The content of a data file; None where it is not what Fashion-MNIST holds."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        if content.startswith(b"\x1f\x8b"):  # packed, whatever the file is called
            content = gzip.decompress(content)
    return bytearray(content) if hashlib.sha256(content).hexdigest() == DATA_FILES[name] else None


def _download(folder: Path, name: str) -> bytearray:
    """A data file from a server that torchvision knows, verified, kept packed in folder."""
    try:
        from torchvision.datasets import FashionMNIST  # slow to import, and seldom needed
    except Exception as error:  # ImportError, or RuntimeError where it does not fit torch
        raise OSError(f"{folder / name} is missing, and torchvision fails: {error}") from error
    for mirror in FashionMNIST.mirrors:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=TIMEOUT) as answer:
                packed, reason = answer.read(), "the server sent something else"
        except (OSError, http.client.HTTPException) as error:
            packed, reason = b"", error
        if content := _unpack(packed, name):
            write_file(folder / f"{name}.gz", packed)
            return content
    missing = [f"{name}.gz" for name in DATA_FILES if not any(folder.glob(f"{name}*"))]
    raise OSError(
        f"Fashion-MNIST is not complete in {folder} and cannot be downloaded ({reason}); "
        f"put {', '.join(missing)} there"
    )


def classify(model: nn.Module, picture) -> pd.Series:
    """Probabilities of the classes for one picture, the most probable first.
    picture: one item on a plain background of any colour, as an image file, a PIL image, or an
    array (H, W), (H, W, 3) or (H, W, 4) of 8 or 16 bits or of floats from 0 to 1. A transparent
    one is put on black and on white; the surer answer counts. Raises ValueError for an array that
    is no such picture (standardized images, a batch), and for a picture of one colour."""
    from PIL import Image, ImageOps  # slow to import

    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as file:
            return classify(model, file)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] not in "IF":  # 16 bits, or floats
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    pixels = np.asarray(picture).squeeze()
    kind, channels = pixels.dtype.kind, pixels.shape[2:]
    if pixels.ndim < 2 or not pixels.size or kind not in "buif" or channels not in ((), (3,), (4,)):
        raise ValueError("a picture is an array (H, W), (H, W, 3) or (H, W, 4)")
    white = 1 if kind in "bf" else 255 if pixels.max() <= 255 else 65535
    if not -0.001 * white <= pixels.min() <= pixels.max() <= 1.001 * white:
        raise ValueError("a picture is an array of 8 or 16 bits, or of floats from 0 to 1")
    step = max(pixels.shape[:2]) // 1000 + 1  # of ten million pixels, a million suffice
    pixels = np.atleast_3d(pixels[::step, ::step].astype("float32") / np.float32(white))
    if channels == (4,):
        colour, opacity = pixels[..., :3], pixels[..., 3:]
        items = [*_cut_out(colour * opacity), *_cut_out(colour * opacity + 1 - opacity)]
    else:
        items = _cut_out(pixels)
    if not items:
        raise ValueError("a picture shows an item, and this one has one colour")
    images = torch.tensor(np.stack(items), dtype=torch.float32).unsqueeze(1) / 255
    probabilities = compute_logits(model, (images - MEAN) / STD).softmax(1)
    surest = probabilities[probabilities.amax(1).argmax()]
    return pd.Series(surest.numpy(), CLASSES).sort_values(ascending=False)


def _cut_out(pixels: np.ndarray) -> list[np.ndarray]:
    """The item of a picture (H, W, channels) as the data set would have it (Xiao et al. 2017): what
    is far from the colour of the border, trimmed, its longer edge 28 pixels, grey and bright on
    black. Two versions where light and dark parts leave that open, none where there is no item."""
    from PIL import Image, ImageOps

    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    difference = pixels - np.median(border, axis=0)
    distance = np.abs(difference).max(axis=2)
    if distance.max() < 0.005:  # rounding
        return []
    distance /= distance.max()
    item = distance > 0.1
    rows, columns = (np.flatnonzero(item.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    distance[difference @ difference[item].sum(axis=0) < 0] *= -1  # most of the item is positive
    images = []
    for grey in [distance, -distance] if distance.min() < -0.4 else [distance]:
        grey = np.where(item, grey - grey.min(initial=0, where=item), 0)[box]
        image = Image.fromarray((grey * (255 / grey.max())).round().astype("uint8"))
        images.append(np.asarray(ImageOps.pad(image, (28, 28), Image.Resampling.LANCZOS)))
    return images


# --------------------------------------------------------------------------- checkpoints

FORMAT, VERSION = "EX1 LeNet-5 checkpoint", 2
LOST_OPTIONS = {"activation": "relu", "pooling": "max", "norm_place": "after_activation"}


def checkpoint_path(folder, setting: Setting, config: TrainConfig) -> Path:
    """Where a run is saved: that of seed 0 under the setting's own name."""
    return Path(folder) / f"{setting.name}{f'-seed{config.seed}' if config.seed else ''}.pt"


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
    """Write a checkpoint of plain types, whole or not at all. Raises OSError where it cannot."""
    write_file(path, _to_bytes(checkpoint))


def load_checkpoint(path, device="cpu") -> Checkpoint:
    """Read a checkpoint to a device, running no code from it. A state dict of this network is read
    as well, plain or as other programs wrap it, with defaults for what it does not say. Raises
    OSError where the file cannot be read, ValueError where it holds no such thing or is damaged."""
    device = find_device(device)
    try:
        checkpoint = _from_bytes(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not usable: {error}") from error
    checkpoint.model.to(device)
    return checkpoint


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    state = {key: value.cpu() for key, value in checkpoint.model.state_dict().items()}
    metrics = {name: list(metrics) for name, metrics in checkpoint.metrics.items()}
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "setting": asdict(checkpoint.setting),
        "config": asdict(checkpoint.config),
        "history": checkpoint.history.to_dict("list"),
        "metrics": metrics,
        "seconds": checkpoint.seconds,
        "versions": checkpoint.versions,
        "norms": checkpoint.norms.to_dict("list"),
        "state_dict": state,
    }
    torch.save(payload, buffer := io.BytesIO())
    return buffer.getvalue()


def _from_bytes(content: bytes) -> Checkpoint:
    try:
        if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():  # torch.load does not look
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds Python objects, whose code is not run; save a state_dict() instead"
        ) from error
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ValueError("it is damaged, or no zip file as torch.save writes") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        payload = _wrap_state_dict(payload)
    if payload["version"] != VERSION:
        raise ValueError(f"it has version {payload['version']} of its format, not {VERSION}")
    options = dict(payload["config"])
    for name, only in LOST_OPTIONS.items():
        if (value := options.pop(name, only)) != only:
            raise ValueError(f"its {name} is {value!r}, which only commit 9786df0 can build")
    setting, config = Setting(**payload["setting"]), TrainConfig(**options)
    with torch.device("meta"):  # draws nothing: another thread may be drawing dropout masks
        model = LeNet5(setting.dropout, setting.batch_norm)
    try:
        model.load_state_dict(payload["state_dict"], assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"its tensors are not those of this LeNet-5 ({reason})") from error
    model = model.float().to(memory_format=torch.channels_last).eval()
    metrics = {name: Metrics(*pair) for name, pair in payload["metrics"].items()}
    history, norms = (pd.DataFrame(payload.get(name, {})) for name in ("history", "norms"))
    rest = metrics, payload["seconds"], payload["versions"], norms
    return Checkpoint(model, setting, config, history, *rest)


def _wrap_state_dict(state) -> dict:
    """What a checkpoint would hold of a state dict that another program saved."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError("it holds neither a checkpoint of this program nor a state dict")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): state[key] for key in state}
    norm = "layers.norm1.weight" in state
    setting = {"name": "state_dict", "label": "Weights", "batch_norm": norm}
    return {
        "version": VERSION,
        "setting": setting,
        "config": {},
        "history": {},
        "metrics": {},
        "seconds": math.nan,
        "versions": {},
        "state_dict": state,
    }


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
    limits += [1024 * int(n) / RUN_MEMORY for n in find("proc/meminfo", r"MemAvailable:\s*(\d+)")]
    group = Path("sys/fs/cgroup", *find("proc/self/cgroup", r"(?m)^0::/(.+)$"))
    for folder in (group, *group.parents):
        limits += [int(n) / RUN_MEMORY for n in find(f"{folder}/memory.max", r"^\d+")]
        limits += [int(n) / int(of) for n, of in find(f"{folder}/cpu.max", r"^(\d+) (\d+)")]
    return max(1, int(min(limits)))


def train_many(
    jobs, executor: Executor | None = None, *, workers: int | None = None, on_finish=None, **options
) -> list[Checkpoint | Exception]:
    """Train independent jobs, (setting, config), in parallel, each on the data of its seed.
    Returns the checkpoints in the order of jobs.

    executor: any concurrent.futures.Executor (of processes: with the context "spawn"); by default
    workers processes of this machine (usable_workers, on a GPU one), which are spawned: a script
    calls this under if __name__ == "__main__". on_finish: called here with the index of a job and
    its checkpoint as soon as it is there. options: root, split_names; every_epoch, device of train.
    A job that fails (or whose on_finish does) is reported at once, the others go on, and its place
    holds the exception. An interrupt ends what runs here and what elsewhere has not begun."""
    jobs = list(jobs)
    results: list = [None] * len(jobs)
    total = sum(config.epochs for _, config in jobs)
    with tqdm(total=total, unit="epoch", disable=None) as bar, contextlib.ExitStack() as stack:
        if local := executor is None and bool(jobs):
            read_data_files(options.get("root"))  # one download or error, not one in each worker
            cpu = find_device(options.get("device")).type == "cpu"
            count = min(len(jobs), workers or (usable_workers() if cpu else 1))
            executor = stack.enter_context(_processes(count, bar))
        with _ignore_sigint() if local else contextlib.nullcontext():
            futures = {executor.submit(_run_job, job, **options): i for i, job in enumerate(jobs)}
        if not local:  # no effect on finished ones
            stack.callback(lambda: [future.cancel() for future in futures])
        for future in as_completed(futures):
            index = futures[future]
            setting, config = jobs[index]
            try:
                results[index] = run = _from_bytes(future.result())
                if on_finish:
                    on_finish(index, run)
                values = [f"{name} {metrics.accuracy:.2%}" for name, metrics in run.metrics.items()]
                outcome, file = f": {', '.join(values)}, {run.seconds:.0f} s", sys.stdout
            except Exception as error:
                results[index] = error
                outcome, file = f", failed: {str(error) or repr(error)}", sys.stderr
            if not isinstance(results[index], BrokenExecutor):
                with tqdm.external_write_mode():
                    print(f"{setting.name}, seed {config.seed}{outcome}", file=file, flush=True)
            bar.update(0 if local else config.epochs)
    if killed := sum(isinstance(result, BrokenExecutor) for result in results):
        print(
            f"not finished: {killed} runs, as a worker was killed (short of memory? try fewer "
            "workers) or could not start (a script needs if __name__ == '__main__')",
            file=sys.stderr,
        )
    return results


_load_once = functools.lru_cache(maxsize=1)(load_fashion_mnist)
_count_epoch = None  # in a worker of _processes: tells its parent that an epoch is over


def _run_job(job, root=None, split_names=("train", "val", "test"), **options) -> bytes:
    data = _load_once(root, job[1].seed)
    splits = {name: data[name] for name in split_names}  # bytes travel as they are to any machine
    return _to_bytes(train(job[0], splits, job[1], progress=_count_epoch, **options))


@contextlib.contextmanager
def _ignore_sigint():
    """Ctrl-C has no effect meanwhile, nor (but for Windows) on processes that start meanwhile."""
    main = threading.current_thread() is threading.main_thread()  # others cannot change this
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _processes(count: int, bar: tqdm):
    """A pool of spawned processes. They hold one end of a pipe and exit when the other end is
    closed: by this process, after an exception, or by the system, however this process ends.
    Through a second pipe they send a byte for each epoch (no queue: its lock may die with them)."""
    spawn = multiprocessing.get_context("spawn")
    (lifeline, held), (received, epochs) = spawn.Pipe(duplex=False), spawn.Pipe(duplex=False)

    def count_epochs():
        with contextlib.suppress(EOFError, OSError):  # when nobody is left to send
            while received.recv_bytes():
                bar.update()

    pool = ProcessPoolExecutor(count, spawn, _start_worker, (lifeline, epochs))
    counter = threading.Thread(target=count_epochs, daemon=True)
    counter.start()
    try:
        yield pool
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        epochs.close()
        counter.join()


def _start_worker(lifeline, epochs) -> None:
    global _count_epoch
    _count_epoch = functools.partial(epochs.send_bytes, b".")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # not inherited on Windows

    def wait_for_the_end():
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def train_and_save(jobs, folder="runs", **options) -> list[Checkpoint | Exception]:
    """train_many, each run saved in folder as soon as it is finished. options go to train_many.
    A run whose file is there is not trained again: a second call goes on after an interruption.
    Raises, before any training, OSError where the folder cannot be written to, and ValueError
    where a file holds another run than the job or two jobs would write one file."""
    folder, jobs, results = Path(folder), list(jobs), {}
    paths = {job: checkpoint_path(folder, *job) for job in jobs}
    if len({str(path).lower() for path in paths.values()}) < len(paths):
        raise ValueError("two different jobs have the same name and seed, or would share a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    for job, path in paths.items():
        if path.exists():
            results[job] = run = load_checkpoint(path)
            if (run.setting, run.config) != job:
                there, asked = (vars(a) | vars(b) for a, b in ((run.setting, run.config), job))
                differ = [
                    f"{key} is {there[key]}, not {asked[key]}"
                    for key in FIELDS
                    if there[key] != asked[key]
                ]
                text = f"{path} holds another run: {', '.join(differ)}"
                raise ValueError(f"{text}; choose another folder")
    new = [job for job in paths if job not in results]
    runs = train_many(new, on_finish=lambda i, run: save_checkpoint(paths[new[i]], run), **options)
    results.update(zip(new, runs))
    return [results[job] for job in jobs]


def load_runs(folder) -> list[Checkpoint]:
    """All checkpoints of a folder, in the order of SETTINGS, others behind them, and of seeds.
    Raises FileNotFoundError where there is none, ValueError where one is not usable or does not
    have the name that train_and_save gives it, and so might stand for another run."""
    runs = []
    for path in sorted(Path(folder).glob("*.pt")):
        runs.append(run := load_checkpoint(path))
        if (expected := checkpoint_path(folder, run.setting, run.config).name) != path.name:
            raise ValueError(f"{path} holds the run of {expected}; move it to another folder")
    if not runs:
        raise FileNotFoundError(f"{folder} holds no checkpoints (*.pt)")
    names = [*SETTINGS, *(run.setting.name for run in runs)]
    return sorted(runs, key=lambda run: (names.index(run.setting.name), run.config.seed))


def collect(folder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a folder, from its checkpoints. results has a row for each run: setting,
    label, seed, accuracy and loss of each split, seconds. history has one for each of its epochs
    and splits: loss and accuracy. Raises as load_runs."""
    rows, histories = [], []
    for run in load_runs(folder):
        key = {"setting": run.setting.name, "label": run.setting.label, "seed": run.config.seed}
        measured = {
            f"{split}_{measure}": value
            for split, metrics in run.metrics.items()
            for measure, value in metrics._asdict().items()
        }
        rows.append({**key, **measured, "seconds": run.seconds})
        histories.append(run.history.assign(**key))
    return pd.DataFrame(rows), pd.concat(histories, ignore_index=True)


# ---------------------------------------------------------------------------------- study

# weights/search.csv is plan and record of the study: a row is a run, and one without an accuracy
# is a run to do. Rows are added and not taken out, but for those of a network that is gone (tanh,
# average pooling, norm before the activation: commit 9786df0 has them). All runs have 16 epochs,
# batches of 128 and SGD, where no part says otherwise, and the seeds 101, 102 and 103, each with
# validation images of its own. Seed 100, a pilot, gave the first windows of the grids.
#
#   A  no regularization, batch norm: rates; dropout, weight decay: strengths x rates.
#   B  fixed choices, one changed at a time: batches of 64 and of 256, Adam (no regularization).
#   C  length: 8 and 32 epochs of chosen settings.
#   D  combinations: rates.
#   E  is the final runs, in weights/: all settings, seeds 0 and 8 to 14. They choose nothing.
#   P  a prediction: weight decay + batch norm depends on rate x lambda alone. For lambda 0.002 at
#      0.16 and 0.004 at 0.08 it says, before their runs: train accuracy 96.2 %, to within 0.2
#      points, and validation accuracy near 92.3 %, as at the products equal to theirs, 0.00032.
#
# Rules. They replace those of commit 9786df0, whose final runs had been seen on test, and were
# written before the first run that they added; what they choose from the older rows was known.
# 1. The score of a cell is the mean of its own mean validation accuracy and those of the cells
#    beside it: half and twice the rate and, where strengths are tuned, the next weaker and the
#    next stronger (p: 0.05, 0.1, 0.2, 0.5; lambda: factors of two), rounded to nine digits. A run
#    that diverges counts as 0.1. No regularization is beside the weakest strength and never a
#    candidate in the grid of a technique; a cell that lacks a neighbour is no candidate. A grid
#    grows: once, each cell whose own mean is within noise of the grid's best gets the neighbours
#    that it lacks; then the cells of the highest own mean get theirs, until they have them. A
#    cell whose runs all diverged gets none. The highest score wins, ties go to the smaller
#    strength, then to the smaller rate.
# 2. Combinations take the strengths that their techniques have alone; their rate is by rule 1.
#    (Rows of other strengths are from the older rules.)
# 3. Noise is two standard errors of a paired difference of means of three, pooled over the cells
#    of A within one point of their grid's best. An alternative of B, at its best rate, replaces a
#    fixed choice if it is better by more.
# 4. Length is not tuned; C shows what others would do.

STUDY = HERE / "weights" / "search.csv"
STRENGTHS = ("dropout", "weight_decay")  # hyperparameters, and the settings that tune them
DROPOUTS = (0.05, 0.1, 0.2, 0.5)
FIELDS = [*STRENGTHS, "batch_norm", "lr", *(entry.name for entry in fields(TrainConfig))]
CELL = [name for name in FIELDS if name != "seed"]  # what the seeds of a configuration share
OUTCOME = ["val_accuracy", "train_accuracy", "seconds"]  # of the last epoch; of the processor
RUN = ["part", "setting", *FIELDS]  # what a row is known by


def read_study(path=STUDY) -> pd.DataFrame:
    """The table of a study, with the columns RUN and OUTCOME. Raises OSError where it cannot be
    read, ValueError, naming row and column, where it is no such table."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is not the table of a study: {error}") from error
    if [*table] != [*RUN, *OUTCOME]:
        raise ValueError(
            f"{path} has the columns {', '.join(table)}; expected, between commas, "
            f"{', '.join([*RUN, *OUTCOME])}"
        )
    for column in [*FIELDS, *OUTCOME]:
        if column in ("batch_norm", "optimizer"):
            continue  # words, which Setting and TrainConfig check
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = table.index[numbers.isna() & (table[column].notna() | (column in FIELDS))]
        if len(wrong):
            value = table[column][wrong[0]]
            raise ValueError(f"{path}, row {wrong[0] + 2}: {column} is {value!r}, not a number")
    if doubled := [*table.index[table.duplicated(RUN)]]:
        raise ValueError(f"{path}, row {doubled[0] + 2}: an earlier row has the same run")
    return table


def search(path=STUDY, executor: Executor | None = None, **options) -> pd.DataFrame:
    """Run the rows of a study that lack an accuracy, on the splits train and val alone. Each
    finished run is written at once, one that diverged too, into the file as it is then: rows may
    be added meanwhile. options go to train_many. Returns the table, where a run that failed lacks
    its accuracy. Raises as read_study, and OSError where another search is running on the file or
    it cannot be written."""
    path = Path(path)
    with contextlib.ExitStack() as stack:
        if path.is_file():  # the lock would make its folder
            try:
                stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=0))
            except Timeout as error:
                raise OSError(f"another search is running on {path}") from error
        table = read_study(path)
        todo = table[table.val_accuracy.isna()]
        jobs = []
        for index, row in todo.iterrows():
            try:
                setting = Setting(row.setting, row.setting, **row[FIELDS[:4]])
                jobs.append((setting, TrainConfig(**row[FIELDS[4:]])))
            except ValueError as error:
                raise ValueError(f"{path}, row {index + 2}: {error}") from error

        def record(number: int, run: Checkpoint | None) -> None:
            outcome = [0.1, 0.1, 0.0]  # of a run that diverged
            if run:
                outcome = [run.metrics["val"].accuracy, run.metrics["train"].accuracy, run.seconds]
            table = read_study(path)
            table.loc[(table[RUN] == todo.iloc[number][RUN]).all(axis=1), OUTCOME] = outcome
            write_file(path, table.to_csv(index=False, lineterminator="\n").encode())

        given = {"split_names": ("train", "val"), "every_epoch": False, "on_finish": record}
        for number, result in enumerate(train_many(jobs, executor, **given, **options)):
            if isinstance(result, DivergedError):
                record(number, None)
        return read_study(path)


def accuracy_grid(table: pd.DataFrame, name: str, strengths=()) -> pd.DataFrame:
    """What rule 1 looks at for a setting of A or D: mean validation accuracies, a row for each
    strength, the weakest first, a column for each rate, NaN where nothing was run. Beyond what
    was run there is a rate at each end and the next stronger strength, if the list has one.
    strengths: pairs of a name and the value that combinations take, by rule 2."""
    runs = table[table.part.isin(["A", "D"])]
    own = runs[runs.setting == name]
    for key, value in strengths:
        own = own[own[key].isin([0, value])]
    key, levels = "batch_norm", own.batch_norm.unique()  # one level
    if name in STRENGTHS:
        key = name
        levels = DROPOUTS if name == "dropout" else _doublings(own[name].min(), 2 * own[name].max())
        own = pd.concat([runs[runs.setting == "baseline"], own])
        levels = [0, *levels]
    means = own.groupby([key, "lr"]).val_accuracy.mean().round(9).unstack()
    return means.reindex(levels).reindex(columns=_doublings(own.lr.min() / 2, 2 * own.lr.max()))


def _doublings(low: float, high: float) -> list[float]:
    values = [low]
    while values[-1] < high:
        values.append(2 * values[-1])
    return values


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
    strengths, rows = {}, {}
    for name in table.setting[table.part == "A"].unique().tolist() + (
        table.setting[table.part == "D"].unique().tolist()
    ):
        strength, lr = best_cell(accuracy_grid(table, name, strengths.items()))
        runs = table[table.part.isin(["A", "D"]) & (table.setting == name) & (table.lr == lr)]
        if name in STRENGTHS:
            strengths[name] = strength
        for key, value in strengths.items():
            runs = runs[runs[key].isin([0, value])]
        rows[name] = runs.iloc[0][CELL]
    return pd.DataFrame(rows).T.infer_objects()


def noise_band(table: pd.DataFrame) -> float:
    """The noise of rule 3."""
    part = table[table.part == "A"]
    cells = part.pivot(index="seed", columns=["setting", *CELL], values="val_accuracy")
    best = cells.mean().groupby("setting").transform("max")
    cells = cells.loc[:, cells.mean() >= best - 0.01]
    residuals = cells.sub(cells.mean(axis=1), axis=0) - cells.mean() + cells.mean(axis=None)
    freedom = (len(cells) - 1) * (cells.shape[1] - 1)
    variance = float((residuals**2).to_numpy().sum()) / freedom
    return 2 * math.sqrt(2 / len(cells) * variance)


def alternatives(table: pd.DataFrame) -> pd.DataFrame:
    """What rule 3 compares: validation accuracy of each alternative of B at its best rate, minus
    that of the fixed choice at the chosen one. A row for each alternative, by what it changes
    (optimizer, batch_size), a column for each seed."""
    chosen = table[table.part == "A"].merge(choices(table).loc[["baseline"]])
    default = chosen.set_index("seed").val_accuracy
    rows = {}
    for changed, runs in table[table.part == "B"].groupby(["optimizer", "batch_size"]):
        rates = runs.pivot(index="lr", columns="seed", values="val_accuracy")
        rows[changed] = rates.loc[rates.mean(axis=1).idxmax()] - default
    return pd.DataFrame(rows).T.rename_axis(["optimizer", "batch_size"])


def lengths(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of C, with those of A and D that they are to be compared with."""
    chosen = choices(table).rename_axis("setting").reset_index().drop(columns="epochs")
    runs = table.merge(chosen)
    return runs[runs.setting.isin(table.setting[table.part == "C"])]


# ----------------------------------------------------------------------------- statistics

# One rule for all measures: runs are paired by seed, and what setting and seed leave open (the
# residuals of a two-way table) gives one standard deviation, pooled over all settings.
TECHNIQUES = ("dropout", "weight_decay", "batch_norm")


def _residual_std(table: pd.DataFrame) -> tuple[float, int]:
    """Standard deviation of the residuals, and their degrees of freedom; rows are seeds. NaN
    where there are none, as with one seed."""
    residuals = table.sub(table.mean(axis=1), axis=0) - table.mean() + table.mean().mean()
    freedom = (len(table) - 1) * (table.shape[1] - 1)
    return math.sqrt(float((residuals**2).to_numpy().sum()) / (freedom or math.nan)), freedom


def tukey_hsd(results: pd.DataFrame, measure: str = "test_accuracy") -> float:
    """Settings whose means differ by more do differ: Tukey's honestly significant difference,
    95 % for all pairs together. NaN with one seed. results: as collect gives them; seeds or
    settings that are incomplete are left out."""
    from scipy.stats import studentized_range  # slow to import

    table = results.pivot(index="seed", columns="setting", values=measure)
    table = max(table.dropna(axis=1), table.dropna(), key=lambda part: _residual_std(part)[1])
    spread, freedom = _residual_std(table)
    return studentized_range.ppf(0.95, table.shape[1], freedom) * spread / math.sqrt(len(table))


def effects(results: pd.DataFrame, measure: str = "test_accuracy") -> pd.DataFrame:
    """What techniques do in the factorial of eight settings, named by SETTINGS: columns effect
    and half_width, of its own 95 % interval (Student's t; NaN with one seed).

    Rows: each technique, the settings with it minus those without; each pair, how much more one
    brings where the other is on; "dropout over weight_decay" and the like, what one adds to a
    setting; "sum of single gains"; "gain of all three". Raises KeyError where results lack one of
    the eight, ValueError where SETTINGS do."""
    from scipy.stats import t

    table = results.pivot(index="seed", columns="setting", values=measure)
    on = pd.DataFrame(SETTINGS.values(), [*SETTINGS])[[*TECHNIQUES]].astype(bool).drop_duplicates()
    if len(on) < 8:
        raise ValueError(f"SETTINGS have {len(on)} combinations of the techniques; expected all 8")
    table, sign, count = table[on.index].dropna(), 2.0 * on - 1, on.sum(axis=1)
    weights = sign / 4
    for one, other in combinations(TECHNIQUES, 2):
        weights[f"{one} and {other}"] = sign[one] * sign[other] / 2
    for technique in TECHNIQUES:
        rest = on.drop(columns=technique)
        for name in on.index[~on[technique]]:
            pair = (rest == rest.loc[name]).all(axis=1)  # the setting and that with it
            weights[f"{technique} over {name}"] = sign[technique] * pair
    weights["sum of single gains"] = (count == 1) - 3.0 * (count == 0)
    weights["gain of all three"] = (count == 3) - 1.0 * (count == 0)
    spread, freedom = _residual_std(table)
    half = t.ppf(0.975, freedom) * spread / math.sqrt(len(table)) * (weights**2).sum() ** 0.5
    return pd.DataFrame({"effect": table.mean() @ weights, "half_width": half})


def equal_fit(history: pd.DataFrame) -> tuple[float, pd.Series]:
    """Test accuracy where all runs fit the train split equally well: the highest whole percent
    of train accuracy that every run reaches, and by setting and seed the test accuracy where a
    run first crosses it, on the line between two epochs. history: as collect gives it."""
    wide = history.pivot(index=["setting", "seed", "epoch"], columns="split", values="accuracy")
    runs = wide.groupby(["setting", "seed"])
    level, found = math.floor(100 * runs.train.max().min()) / 100, {}
    for key, run in runs:
        after = int((run.train >= level).to_numpy().argmax())
        now, before = run.iloc[after], run.iloc[max(after - 1, 0)]
        share = (level - before.train) / (now.train - before.train) if after else 1.0
        found[key] = before.test + share * (now.test - before.test)
    return level, pd.Series(found).rename_axis(["setting", "seed"])


# --------------------------------------------------------------------- report and theory


def confusion_matrix(model: nn.Module, split: Split) -> pd.DataFrame:
    """Counts of images, (10, 10): rows are true classes, columns are predicted ones."""
    pairs = split.labels.cpu() * len(CLASSES) + compute_logits(model, split.images).argmax(1)
    counts = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    return pd.DataFrame(counts.numpy(), index=CLASSES, columns=CLASSES)


def layer_summary(model: LeNet5) -> pd.DataFrame:
    """One row for each layer that does something: name, output shape, number of parameters."""
    rows, values = [], torch.zeros(1, 1, 28, 28)
    model = copy.deepcopy(model).cpu().eval()
    with torch.inference_mode():
        for name, layer in model.layers.named_children():
            values = layer(values)
            if not isinstance(layer, nn.Identity) and getattr(layer, "p", 1) > 0:  # of dropout
                count = sum(parameter.numel() for parameter in layer.parameters())
                rows.append((name, tuple(values.shape), count))
    return pd.DataFrame(rows, columns=["layer", "output shape", "parameters"])


def batch_norm_gradients(x: Tensor, gamma: Tensor, upstream: Tensor, eps: float) -> dict:
    """The six answers to question 3 (theory.md), for the layer of Ioffe and Szegedy (2015).
    x and upstream, which is df/dy, are (m,); gamma is a scalar; eps is added to the variance.
    Returns df/d of gamma, beta, x_hat (m,), variance, mean and x (m,)."""
    m, mean = len(x), x.mean()
    root = ((x - mean).square().mean() + eps).sqrt()
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


# ---------------------------------------------------------------------- tables and figures

# Colours of settings; the first eight are for colour-blind readers (after Okabe and Ito).
PALETTE = (
    "#000000",
    "#E69F00",
    "#009E73",
    "#0072B2",
    "#8C6D1F",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#7F7F7F",
    "#A50026",
    "#5E3C99",
    "#1B7837",
)


def prepare_notebook() -> None:
    """Figures as PNG and PDF, in one style, with the same bytes in every run."""
    import matplotlib
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    matplotlib.set_loglevel("error")  # of font caches
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # in place of the time at which a PDF is made
    set_matplotlib_formats("png", "pdf")
    style = {"font.size": 8, "axes.titlesize": 8.5, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    matplotlib.rcParams.update(style | {"lines.linewidth": 1.3, "savefig.dpi": 150})


def show_table(table: pd.DataFrame, caption: str):
    """A table in a notebook, as Markdown, its caption at the head of the first column."""
    from IPython.display import Markdown

    rows = [[f"**{caption}**", *table.columns[1:]], *table.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows)]  # which pandoc keeps
    rule = [":" + "-" * widths[0], *("-" * width + ":" for width in widths[1:])]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])))


def show_source(*functions):
    """The source of functions or classes in a notebook, highlighted."""
    from IPython.display import Markdown

    source = "\n".join(f"```python\n{inspect.getsource(item)}```\n" for item in functions)
    # nbconvert's HTML gives code in an output the font of what is around it
    return Markdown(f'<div style="font-family: monospace">\n\n{source}\n</div>')


def summary_table(results: pd.DataFrame) -> pd.DataFrame:
    """Final accuracies in percent: of the lowest seed of all, and mean ± standard deviation."""
    seed, rows, columns = results.seed.min(), [], ["train_accuracy", "test_accuracy"]
    for name, (label, _) in _styles(results).items():
        runs = 100 * results[results.setting == name].set_index("seed")[columns]
        spread = "" if len(runs) == 1 else " ± " + runs.std().map("{:.2f}".format)
        means = runs.mean().map("{:.2f}".format) + spread
        first = runs.reindex([seed]).iloc[0].map(lambda value: f"{value:.2f}" if value > 0 else "")
        rows.append([label, *first, *means])
    names = [f"train, seed {seed}", f"test, seed {seed}", "train, mean", "test, mean"]
    return pd.DataFrame(rows, columns=["setting", *names])


def _styles(table: pd.DataFrame, names=None) -> dict[str, tuple[str, str]]:
    """Label and colour of each setting in a table, or of those in names: the same everywhere."""
    labels = dict(zip(table.setting, table.label))
    if missing := {*(names or ())} - {*labels}:
        raise ValueError(f"the table lacks {', '.join(sorted(missing))}")
    colors = dict(zip(dict.fromkeys([*SETTINGS, *labels]), cycle(PALETTE)))
    return {name: (labels[name], colors[name]) for name in names or labels}


def _panels(axes, *rows: tuple[list[int], float], **options):
    """A figure and its axes: those given or, as wide as a page, new ones in rows, each with the
    widths of its axes and its height in inches."""
    from matplotlib.figure import Figure

    if axes is None:
        heights = [height for _, height in rows]
        figure, axes = Figure(figsize=(6.4, sum(heights)), layout="constrained"), []
        parts = np.ravel(figure.subfigures(len(rows), height_ratios=heights))
        for part, (widths, _) in zip(parts, rows):
            axes.extend(np.ravel(part.subplots(1, len(widths), width_ratios=widths, **options)))
    axes = list(np.ravel(axes))
    return axes[0].figure.figure, axes


def _label_ends(ax, ends: list[tuple]) -> None:
    """Write labels beside the ends of lines, each (y, label, colour), where they do not meet."""
    (_, right), (low, high), ends = ax.get_xlim(), ax.get_ylim(), sorted(ends)
    at = [*accumulate((y for y, *_ in ends), lambda last, y: max(y, last + (high - low) / 8))]
    lower = (sum(at) - sum(y for y, *_ in ends)) / len(ends)
    for y, (_, label, color) in zip(at, ends):
        ax.text(right, y - lower, label, color=color, fontsize=7, va="center")


def _dots(ax, values, y: float, color: str) -> None:
    """Seeds as dots, their mean as a bar."""
    ax.plot(values, [y] * len(values), "o", color=color, ms=3, alpha=0.6)
    ax.plot(values.mean(), y, "|", color=color, ms=13, mew=2)


def _show_image(ax, image: Tensor, title: str) -> None:
    ax.imshow(image[0].cpu().numpy() * STD + MEAN, cmap="gray_r", vmin=0, vmax=1)
    ax.set_title(title, fontsize=7)
    ax.set_axis_off()


def plot_examples(split: Split, axes=None):
    """The first image of each class. Returns the figure, as all plots do."""
    figure, axes = _panels(axes, (10 * [1], 0.85))
    for label, ax in enumerate(axes):
        first = int((split.labels == label).nonzero()[0])
        _show_image(ax, split.images[first], CLASSES[label])
    return figure


def plot_architecture(model: LeNet5, axes=None):
    """The layers that change the shape of what passes through, to scale: maps as squares, units
    as bars, below them what computes them and with how many parameters."""
    from matplotlib.patches import Rectangle

    figure, (ax,) = _panels(axes, ([1], 1.7))
    names = {"conv": "convolution\n5 × 5", "pool": "pooling\n2 × 2", "fc": "fully\nconnected"}
    stages, x = [("image", (1, 1, 28, 28), 0)], 0.0
    stages += [
        (names[layer[:-1]], *rest)
        for layer, *rest in layer_summary(model).to_numpy()
        if layer[:-1] in names
    ]
    for name, (_, *shape), parameters in stages:
        count, height, width = shape if len(shape) == 3 else (1, shape[0] / 3, 3)
        step = 10 / max(count, 8)  # from one map to the next
        for k in range(count):
            place = (x + step * k, -height / 2 - step * (k - (count - 1) / 2))
            ax.add_patch(Rectangle(place, width, height, fc="#DCE9F5", ec="#0072B2", lw=0.4))
        whole = width + step * (count - 1)
        size = f"{count} maps\n{height} × {height}" if len(shape) == 3 else f"{shape[0]}\nunits"
        text = {"x": x + whole / 2, "ha": "center", "fontsize": 7, "in_layout": False}
        ax.text(y=23, s=size.replace("1 maps", "1 map"), va="bottom", **text)
        ax.text(y=-23, s=f"{name}\n{parameters:,}" if parameters else name, va="top", **text)
        x += max(whole, 19) + 9
    ax.set(xlim=(-1, x - 9), ylim=(-40, 34), aspect="equal")
    ax.set_axis_off()
    return figure


def plot_grids(table: pd.DataFrame, axes=None):
    """What rule 1 saw in the study: mean validation accuracy in percent, a panel for each setting
    of A and D; the lowest row of A is no regularization. A thick frame is the cell that was
    chosen, a thin one is within the band of rule 2 of it."""
    from matplotlib.patches import Rectangle

    grids = table[table.part.isin(["A", "D"])]
    means = 100 * grids.groupby(["setting", *STRENGTHS]).val_accuracy.mean().round(9)
    best, band, wide = means.groupby("setting").max(), 100 * noise_band(table), {}
    chosen = [*best_cells(table).reset_index()[means.index.names].itertuples(False, None)]
    for name in [name for name in SETTINGS if name in best and name != "baseline"]:
        grid = means[["baseline", name] if name in TECHNIQUES else [name]].unstack("lr")
        wide[name] = grid[sorted(means[name].index.unique("lr"))]
    widths = [grid.shape[1] for grid in wide.values()]  # of A, then of D
    figure, axes = _panels(axes, *[(part, 1.75) for part in (widths[:3], widths[3:]) if part])
    for ax, (name, grid) in zip(axes, wide.items()):
        ax.imshow(grid, cmap="cividis", vmin=90, vmax=92.4, origin="lower", aspect="auto")
        for y, x in np.argwhere(grid.notna()):
            value = grid.iat[y, x]
            color = "black" if value > 91.4 else "white"
            ax.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
            if value >= best[grid.index[y][0]] - band:
                width = 1.8 if (*grid.index[y], grid.columns[x]) in chosen else 0.6
                ax.add_patch(Rectangle((x - 0.43, y - 0.43), 0.86, 0.86, fill=False, lw=width))
        levels = [
            "\n".join(f"{value:g}".lstrip("0") for value in strengths if value)
            or ("on" if norm else "off")
            for _, *strengths, norm in grid.index
        ]
        marks = {"p": SETTINGS[name].dropout, "λ": SETTINGS[name].weight_decay}
        rates = [f"{lr:g}".lstrip("0") for lr in grid]
        ax.set_xticks(range(len(rates)), rates)
        ax.set_yticks(range(len(levels)), levels, linespacing=1.1)
        title = SETTINGS[name].label.replace(" + ", "\n+ ")
        ylabel = ", ".join(mark for mark, strength in marks.items() if strength)
        ax.set(title=title, xlabel="learning rate", ylabel=ylabel, frame_on=False)
        ax.tick_params(length=0, labelsize=7, grid_alpha=0)
    return figure


def plot_choices(table: pd.DataFrame, axes=None):
    """What rules 2 and 3 saw in the study. Left: alternatives, in points: seeds as dots, means as
    bars, the band of noise in grey. Right: validation accuracy by the number of epochs."""
    figure, (left, right) = _panels(axes, ([1, 1], 2.25))
    differences, band = 100 * alternatives(table)[::-1], 100 * noise_band(table)
    left.axvspan(-band, band, color="0.85", lw=0)
    for y, row in enumerate(differences.to_numpy()):
        _dots(left, row, y, "black")
    left.set_yticks(range(len(differences)), differences.index)
    left.set(
        title="One choice changed",
        xlabel="validation accuracy, difference in points",
        ylim=(-0.6, len(differences) - 0.4),
    )
    ends, styles = [], _styles(table.assign(label=table.setting.map(lambda n: SETTINGS[n].label)))
    for name, runs in lengths(table).groupby("setting"):
        means = 100 * runs.groupby("epochs").val_accuracy.mean()
        label, color = styles[name]
        right.plot(runs.epochs, 100 * runs.val_accuracy, "o", color=color, ms=2, alpha=0.6)
        right.semilogx(means, color=color, base=2)
        ends.append((means.iloc[-1], label, color))
    right.set_xticks([8, 16, 32], [8, 16, 32])
    right.set(title="Length", xlabel="epochs", ylabel="validation accuracy (%)")
    _label_ends(right, ends)
    return figure


def plot_convergence(history: pd.DataFrame, names=None, axes=None):
    """Accuracy by epoch: a panel for each setting, train dashed and test solid, the mean of the
    seeds in a band from the least to the greatest; then the means on test together.
    history: as collect gives it. names: of the settings to show, by default all there are."""
    styles, ends = _styles(history, names), []
    curves = 100 * history.groupby(["setting", "split", "epoch"]).accuracy.agg(
        mean="mean", low="min", high="max"
    )
    epochs = {"xlabel": "epoch", "xticks": [1, *range(4, max(history.epoch) + 1, 4)]}
    bottom = min(78, curves.loc[[*styles], "mean"].groupby("setting").max().min() - 4)
    figure, axes = _panels(axes, *math.ceil((len(styles) + 1) / 3) * [([1, 1, 1], 1.5)])
    last = axes[len(styles)]
    for ax, (name, (label, color)) in zip(axes, styles.items()):
        for split, style in (("train", "--"), ("test", "-")):
            curve = curves.loc[name, split]
            line = {"color": color, "ls": style, "marker": "o" if len(curve) == 1 else None}
            ax.plot(curve["mean"], label=split, **line)
            ax.fill_between(curve.index, curve.low, curve.high, color=color, alpha=0.25, lw=0)
        last.plot(curve["mean"], **line)
        ends.append((curve["mean"].iloc[-1], label, color))
        ax.set(title=label, ylim=(bottom, 100), ylabel="accuracy (%)", **epochs)
        ax.legend(loc="lower right")
    last.set(title="Test, means", ylim=(min(ends)[0] - 4, max(ends)[0] + 0.6), **epochs)
    _label_ends(last, ends)
    for ax in axes[len(styles) + 1 :]:
        ax.set_axis_off()
    return figure


def plot_results(results: pd.DataFrame, axes=None):
    """Left: test accuracy of each run as a dot, of each setting as a mean with a bar; settings
    whose bars do not overlap differ (tukey_hsd). Right: from test to train, the gap.
    results: as collect gives them."""
    styles = _styles(results)
    figure, (left, right) = _panels(axes, ([3, 2], 0.6 + 0.27 * len(styles)), sharey=True)
    half = 50 * tukey_hsd(results)
    for y, (name, (_, color)) in enumerate(styles.items()):
        runs = 100 * results[results.setting == name][["test_accuracy", "train_accuracy"]]
        test, train = runs.mean()
        left.plot(runs.test_accuracy, [y - 0.17] * len(runs), "o", color=color, ms=3, alpha=0.6)
        left.errorbar(test, y + 0.17, xerr=half, fmt="|", color=color, elinewidth=2.5, ms=7)
        left.annotate(
            f"{test:.2f}",
            (test + np.nan_to_num(half), y + 0.17),
            (3, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
        )
        right.plot([test, train], [y, y], color=color, lw=3, alpha=0.5)
        right.plot(runs, [[y, y]] * len(runs), ".", color=color, ms=3)
        right.text((test + train) / 2, y - 0.12, f"{train - test:.1f}", fontsize=7, ha="center")
    left.set_yticks(range(len(styles)), [label for label, _ in styles.values()])
    left.set(title="Test accuracy (%)", ylim=(len(styles) - 0.4, -0.6))
    right.set(title="Test to train (%): the gap")
    left.locator_params(axis="x", nbins=5)
    left.margins(x=0.1)
    return figure


def plot_additivity(results: pd.DataFrame, axes=None):
    """Does a technique bring the same where others are on? A panel for each: what it adds to the
    test accuracy of each setting without it, in points, and as a line the mean of the four. Last,
    the sum of the single gains and the gain of all three. With the intervals of effects."""
    table = 100 * effects(results)
    on = {
        name: [SETTINGS[other].label[0] for other in TECHNIQUES if getattr(setting, other)]
        for name, setting in SETTINGS.items()
    }
    figure, axes = _panels(axes, ([4, 4, 4, 2], 1.9), sharey=True)
    for ax, technique in zip(axes, TECHNIQUES):
        rows = table[table.index.str.startswith(f"{technique} over ")]
        ticks = ["+".join(on[words.split()[-1]]) or "none" for words in rows.index]
        label, color = SETTINGS[technique].label, _styles(results)[technique][1]
        ax.axhline(table.effect[technique], color=color, lw=1)
        ax.errorbar(ticks, rows.effect, yerr=rows.half_width, fmt="o", color=color, ms=4)
        ax.set(title=f"{label} ({label[0]})", xlabel="others that are on", xlim=(-0.5, 3.5))
    rows = table.loc[["sum of single gains", "gain of all three"]]
    axes[3].errorbar(["sum", "all"], rows.effect, yerr=rows.half_width, fmt="o", color="0.3", ms=4)
    axes[3].set(title="Together", xlim=(-0.5, 1.5))
    axes[0].set_ylabel("gain on test (points)")
    for ax in axes:
        ax.axhline(0, color="black", lw=0.6)
    return figure


def examine(runs, split: Split) -> pd.DataFrame:
    """What is inside trained models: a row for each checkpoint with its setting, label, seed, the
    mean probability (confidence) that it gives to its wrong answers on the split, and the norm
    of each layer's weights, by the layer's name."""
    rows, labels = [], split.labels.cpu()
    for run in runs:
        probability, answer = compute_logits(run.model, split.images).softmax(1).max(1)
        row = {"setting": run.setting.name, "label": run.setting.label, "seed": run.config.seed}
        row["confidence"] = probability[answer != labels].mean().item()
        for name, layer in run.model.layers.named_children():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                row[name] = layer.weight.norm().item()
        rows.append(row)
    return pd.DataFrame(rows)


def plot_why(history, inside, table, names=None, axes=None):
    """Four looks at overfitting: losses, epoch by epoch, medians of the seeds; accuracies where the
    learning rate has come to zero and norms of weights, means; confidence in wrong answers.
    history: as collect gives it; inside: as examine does; table: the study."""
    styles = _styles(inside, names)
    figure, (losses, fits, norms, sure) = _panels(axes, ([1, 1], 1.9), ([1, 1], 1.9))
    curves = history.groupby(["setting", "split", "epoch"]).loss.median()  # one run may collapse
    length = 100 * lengths(table).groupby(["setting", "epochs"])[OUTCOME[:2]].mean()
    layers = inside.columns[inside.columns.get_loc("confidence") + 1 :]
    sure.set_yticks(range(len(styles)), [label for label, _ in styles.values()])
    for y, (name, (_, color)) in enumerate(styles.items()):
        train, test = curves[name, "train"], curves[name, "test"]
        losses.plot(train, test, color=color)
        losses.plot(train.iloc[-1], test.iloc[-1], "o", color=color, ms=4)
        if name in length.index:
            fits.plot(
                *length.loc[name, ["train_accuracy", "val_accuracy"]].T.to_numpy(),
                "o-",
                color=color,
                ms=4,
            )
        own = inside[inside.setting == name]
        norms.plot(layers, own[layers].mean(), "o-", color=color, ms=3)
        _dots(sure, 100 * own.confidence, y, color)
        sure.get_yticklabels()[y].set_color(color)
    right = 0.9 * curves.xs("train", level="split").min()
    losses.set(
        title="Test loss against train loss",
        xlabel="loss on train (falls to the right)",
        ylabel="loss on test",
        xscale="log",
        xlim=(0.45, right),
        ylim=(None, 0.42),
    )
    losses.set_xticks(ticks := [x for x in (0.4, 0.2, 0.1, 0.05, 0.025) if x > right], ticks)
    losses.minorticks_off()
    fits.set(
        title="At equal fit: 8, 16, 32 epochs",
        xlabel="train accuracy (%)",
        ylabel="validation accuracy (%)",
    )
    norms.set(title="Norm of each layer's weights", yscale="log")
    norms.set_yticks(ticks := [3, 10, 30, 100], ticks)
    norms.minorticks_off()
    sure.set(title="Confidence in wrong answers (%)", ylim=(len(styles) - 0.5, -0.5))
    return figure


def plot_errors(model: nn.Module, split: Split, axes=None):
    """Predicted classes in percent of each true class; the six mistakes made with the highest
    probability, the most confident first."""
    figure, (left, *axes) = _panels(axes, ([1], 2.2), (6 * [1], 1.0))
    matrix = confusion_matrix(model, split)
    shares = 100 * matrix.div(matrix.sum(axis=1), axis=0)
    left.imshow(shares, cmap="Blues", vmin=0, vmax=30, aspect="auto")  # errors are below 30 %
    for y, x in np.argwhere(shares > 0.5):
        color = "white" if shares.iat[y, x] > 18 else "black"
        left.text(
            x, y, f"{shares.iat[y, x]:.0f}", ha="center", va="center", fontsize=7, color=color
        )
    left.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right", fontsize=7)
    left.set_yticks(range(len(CLASSES)), CLASSES, fontsize=7)
    left.set(xlabel="predicted class", ylabel="true class")
    left.grid(False)
    probability, answer = compute_logits(model, split.images).softmax(1).max(1)
    wrong = (answer != split.labels.cpu()).nonzero()[:, 0]
    for index, ax in zip(wrong[probability[wrong].argsort(descending=True)].tolist(), axes):
        truth, guess = (CLASSES[int(labels[index])] for labels in (split.labels, answer))
        _show_image(ax, split.images[index], f"{truth}\nas {guess}\n{probability[index]:.1%}")
    return figure


# --------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is in its `run`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dl_utils.py", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    where, speed = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    where.add_argument("--data", metavar="FOLDER", help="of Fashion-MNIST (data/ beside this file)")
    where.add_argument("--device", help="cpu, cuda, ... (accelerator, else cpu; test: cpu)")
    speed.add_argument("--workers", type=int, metavar="N", help="runs at a time (what fits here)")

    def add(run, name: str, text: str, *parents: argparse.ArgumentParser):
        command = commands.add_parser(name, help=text, description=text, parents=parents)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(_train_command, "train", "train settings from scratch", where, speed)
    option("settings", nargs="*", metavar="SETTING", help=f"{', '.join(SETTINGS)}, or all")
    option("--seeds", nargs="+", default=["0"], metavar="N", help="one run for each (0)")
    option("--epochs", type=int, default=TrainConfig.epochs, metavar="N", help="(%(default)s)")
    option("--out", default="runs", metavar="FOLDER", help="where to save them (%(default)s)")
    option = add(_test_command, "test", "measure saved runs; exit code 1: not as recorded", where)
    option(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, names, or folders, of which the lowest seed counts (weights/)",
    )
    option = add(_search_command, "search", "run what a study lacks", where, speed)
    option("table", nargs="?", default=STUDY, help="a CSV file (weights/search.csv)")
    add(_collect_command, "collect", "write results.csv of a folder of runs")("folder")
    return parser


def _train_command(args) -> int:
    # --seeds 0 1 dropout gives --seeds the setting as well.
    names = [*args.settings, *(word for word in args.seeds if not word.isdecimal())]
    if not names or not {*names} <= {*SETTINGS, "all"}:
        expected = f"expected {', '.join(SETTINGS)}, or all, and seeds that are whole numbers >= 0"
        raise ValueError(f"settings are {' '.join(names) or 'missing'}; {expected}")
    seeds = [int(word) for word in args.seeds if word.isdecimal()] or [0]
    names = SETTINGS if "all" in names else names
    jobs = [(SETTINGS[name], TrainConfig(args.epochs, seed=n)) for n in seeds for name in names]
    there = sum(checkpoint_path(args.out, *job).exists() for job in jobs)
    runs = train_and_save(jobs, args.out, root=args.data, device=args.device, workers=args.workers)
    failed = sum(isinstance(run, Exception) for run in runs)
    print(f"{args.out}: {len(runs) - failed} of {len(runs)} runs ({there} were there already)")
    return 2 if failed else 0


def _test_command(args) -> int:
    runs, rows, differing = {}, [], []
    for path in map(Path, args.paths or [HERE / "weights"]):
        if not path.exists() and str(path) in SETTINGS:
            path = HERE / "weights" / f"{path}.pt"
        for run in load_runs(path) if path.is_dir() else [load_checkpoint(path)]:
            file = checkpoint_path(path, run.setting, run.config) if path.is_dir() else path
            runs.setdefault((path, run.setting.name), (file, run))  # the lowest seed comes first
    device = find_device(args.device or "cpu")
    for file, run in runs.values():
        seed = f", seed {run.config.seed}" if run.config.seed else ""
        row = {"setting": f"{run.setting.label}{seed}"}
        for name, split in _load_once(args.data, run.config.seed).items():
            accuracy, count = evaluate(run.model.to(device), split).accuracy, len(split.labels)
            row[f"{name} %"] = f"{100 * accuracy:.2f}"
            recorded = run.metrics.get(name, Metrics(math.nan, accuracy)).accuracy
            images = round(count * (accuracy - recorded))
            if abs(images) > 1:  # rounding on another processor may change one
                differing.append(f"{file}, {name}: {images:+} of {count} images right")
        rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False), *differing, sep="\n")
    if bare := [str(file) for file, run in runs.values() if not run.metrics]:
        print(
            f"{', '.join(bare)}: weights alone, which record nothing to compare with; taken for "
            "a network with ReLU, maximum pooling and norm after the activation."
        )
    if len(bare) < len(runs):
        verdict = "DIFFER from" if differing else "equal, to within one image,"
        print(f"The measured accuracies {verdict} what the files recorded.")
    return 1 if differing else 0


def _search_command(args) -> int:
    table = search(args.table, root=args.data, device=args.device, workers=args.workers)
    done = table.val_accuracy.count()
    print(f"{args.table}: {done} of {len(table)} runs")
    return 0 if done == len(table) else 2


def _collect_command(args) -> int:
    results, _ = collect(args.folder)
    content = results.to_csv(index=False, lineterminator="\n").encode()
    write_file(Path(args.folder) / "results.csv", content)
    print(f"{args.folder}/results.csv: {len(results)} runs")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0; 1 where accuracies differ from those recorded;
    2 for bad input, a failed run (one sentence on stderr) or an error of this program (with its
    traceback); 130 for Ctrl-C. Raises SystemExit(2) for a command that does not parse."""
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show is no error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("dl_utils.py: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    except Exception as error:
        full = isinstance(error, RuntimeError) and "alloc" in str(error)  # torch's words for it
        if isinstance(error, MemoryError) or full:
            error = OSError("out of memory; close other programs, or use fewer --workers")
        if isinstance(error, (ValueError, OSError)):
            print(f"dl_utils.py: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 2


if __name__ == "__main__":
    sys.exit(main())
