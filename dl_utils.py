"""LeNet-5 on Fashion-MNIST: no regularization, dropout, weight decay, batch normalization.

Test accuracy in %, mean ± standard deviation over five seeds, 16 epochs on a CPU:
no regularization 90.88 ± 0.26, dropout 90.97 ± 0.17, weight decay 91.41 ± 0.21,
batch normalization 91.42 ± 0.28, all three 91.80 ± 0.11.

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
import io
import itertools
import logging
import math
import multiprocessing
import os
import pickle
import platform
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import urllib.request
import uuid
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
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
    # The highest learning rate of the schedule.
    lr: float = _allow("a number > 0", lambda x: 0 < x < math.inf, default=0.08)

    __post_init__ = _check_fields

    def __str__(self):
        norm = ", batch norm" if self.batch_norm else ""
        strengths = f"dropout {self.dropout:g}, weight decay {self.weight_decay:g}{norm}"
        return f"{self.name} ({strengths}, learning rate {self.lr:g})"


@dataclass(frozen=True)
class TrainConfig:
    """What all settings share. Raises ValueError for a value that is not allowed."""

    epochs: int = _allow("a whole number >= 1", lambda n: n >= 1, default=16)
    batch_size: int = _allow("a whole number >= 1", lambda n: n >= 1, default=128)
    # Draws validation images, initial weights, order of batches and dropout masks.
    seed: int = _allow("a whole number, 0 to 2**30", lambda n: 0 <= n <= 2**30, default=0)
    optimizer: str = _one_of("sgd", "adam")
    activation: str = _one_of("relu", "tanh")
    pooling: str = _one_of("max", "average")
    norm_place: str = _one_of("after_activation", "before_activation")

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

# ---------------------------------------------------------------------------------- data

CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle boot")  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, scaled to 0..1


class Split(NamedTuple):
    """Images (N, 1, 28, 28), float32 and standardized, and their labels (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor


def load_fashion_mnist(root=None, seed: int = 0) -> dict[str, Split]:
    """Fashion-MNIST (Xiao et al. 2017), downloaded where it is missing.

    Returns "train" (55,000 images) and "val" (5,000), which seed draws from the 60,000 training
    images, and "test" (10,000). root: the folder, by default data/ beside this file.
    Raises OSError where a file is missing and cannot be downloaded, ValueError where one does
    not hold what Fashion-MNIST holds.
    """
    pixels, labels, test_pixels, test_labels = read_data_files(root)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    val, train = order.tensor_split([len(labels) // 12])

    def split(pixels: Tensor, labels: Tensor) -> Split:
        return Split(pixels.float().div_(255).sub_(MEAN).div_(STD), labels.long())

    return {
        "train": split(pixels[train], labels[train]),
        "val": split(pixels[val], labels[val]),
        "test": split(test_pixels, test_labels),
    }


def minibatches(split: Split, batch_size: int, generator: torch.Generator):
    """Yield the split in batches, the last one ragged, in an order drawn from generator."""
    order = torch.randperm(len(split.labels), generator=generator)
    for index in order.to(split.labels.device).split(batch_size):
        yield Split(split.images[index], split.labels[index])


# --------------------------------------------------------------------------------- model


class MaxPool(nn.MaxPool2d):
    """2 x 2 maximum pooling. Without gradients the maxima of columns, then of rows: the same
    bits, six times faster. With them torch's own, whose gradient is faster."""

    def forward(self, maps: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(maps)
        maps = torch.maximum(maps[..., ::2], maps[..., 1::2])
        return torch.maximum(maps[..., ::2, :], maps[..., 1::2, :])


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) for 28 x 28 images: (N, 1, 28, 28) to logits (N, 10).

    61,706 parameters; batch normalization adds 452. A technique that is off leaves an identity,
    so that every variant has the same layer names. Maximum pooling stands before the activation:
    the same function as after it, on a quarter of the elements.
    """

    def __init__(self, dropout=0.0, batch_norm=False, activation="relu",
                 pooling="max", norm_place="after_activation"):  # fmt: skip
        super().__init__()
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
        pool = {"max": MaxPool, "average": nn.AvgPool2d}[pooling]
        norm2d = nn.BatchNorm2d if batch_norm else nn.Identity
        norm1d = nn.BatchNorm1d if batch_norm else nn.Identity

        def block(number, norm, pooled=False):
            layers = [("pool", pool(2))] if pooled else []
            layers += [("act", act())]
            end = len(layers) if norm_place == "after_activation" else 0
            layers.insert(end, ("norm", norm))
            return {f"{name}{number}": layer for name, layer in layers}

        layers = {
            "conv1": nn.Conv2d(1, 6, kernel_size=5, padding=2),  # 6 x 28 x 28
            **block(1, norm2d(6), pooled=True),  # 6 x 14 x 14
            "conv2": nn.Conv2d(6, 16, kernel_size=5),  # 16 x 10 x 10
            **block(2, norm2d(16), pooled=True),  # 16 x 5 x 5
            "flatten": nn.Flatten(),  # 400
            "fc3": nn.Linear(400, 120),
            **block(3, norm1d(120)),
            "drop3": nn.Dropout(dropout),
            "fc4": nn.Linear(120, 84),
            **block(4, norm1d(84)),
            "drop4": nn.Dropout(dropout),
            "fc5": nn.Linear(84, 10),  # logits
        }
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def build_model(setting: Setting, config: TrainConfig | None = None) -> LeNet5:
    """LeNet-5 as setting and config want it. One seed gives all settings the same weights."""
    config = config or TrainConfig()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds a GPU as well: fork_rng would not restore that.
        torch.random.default_generator.manual_seed(3 * config.seed)
        model = _network(setting, config)
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
        with torch.inference_mode():
            batches = images.split(batch_size)
            return torch.cat([model(batch.to(device)) for batch in batches]).cpu()
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
    processor time of the run, where it was made. Of a bare state dict these four are empty."""

    model: LeNet5
    setting: Setting
    config: TrainConfig
    history: pd.DataFrame
    metrics: dict[str, Metrics]
    seconds: float
    versions: dict[str, str]


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


def train(
    setting: Setting, splits: dict[str, Split], config: TrainConfig | None = None,
    *, device=None, every_epoch: bool = True, progress=None,
) -> Checkpoint:  # fmt: skip
    """Train one setting from scratch on splits["train"]; the last epoch is the model.

    All splits given are measured after every epoch or, without every_epoch, after the last.
    config: by default TrainConfig(). device: by default that of find_device. progress is called
    after every epoch. On the CPU a run takes one thread and gives the same bits every time;
    calls from several threads wait for each other.
    Raises DivergedError after the first epoch whose loss is not finite, and ValueError for a
    device that this machine cannot use.
    """
    config, device, rows = config or TrainConfig(), find_device(device), []
    splits = {name: Split(*(part.to(device) for part in split)) for name, split in splits.items()}
    with _alone_on_one_thread(device):
        start = time.process_time()
        model = build_model(setting, config).to(device)
        optimizer = make_optimizer(model, setting, config)
        steps = config.epochs * math.ceil(len(splits["train"].labels) / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_cosine(i / steps))
        order = torch.Generator().manual_seed(3 * config.seed + 1)
        # Of dropout; torch.manual_seed would seed a GPU as well.
        generator = torch.random.default_generator if device.type == "cpu" else torch
        generator.manual_seed(3 * config.seed + 2)
        for epoch in range(1, config.epochs + 1):
            batches = minibatches(splits["train"], config.batch_size, order)
            if not math.isfinite(train_epoch(model, batches, optimizer, schedule)):
                raise DivergedError(
                    f"training diverged in epoch {epoch}; choose a lower learning rate"
                )
            if every_epoch or epoch == config.epochs:
                metrics = {name: evaluate(model, split) for name, split in splits.items()}
                rows += [(epoch, name, *values) for name, values in metrics.items()]
            if progress:
                progress()
        seconds = round(time.process_time() - start, 1)
    history = pd.DataFrame(rows, columns=["epoch", "split", "loss", "accuracy"])
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "cpu": torch.backends.cpu.get_cpu_capability(), "device": str(device)}  # fmt: skip
    return Checkpoint(model.eval(), setting, config, history, metrics, seconds, versions)


_TRAINING = threading.Lock()  # the generator and the number of threads belong to the process


@contextlib.contextmanager
def _alone_on_one_thread(device: torch.device):
    """The same bits whatever the number of cores, no crowding among workers, and the CPU's
    global generator afterwards as it was before."""
    cuda = [device] if device.type == "cuda" else []
    with _TRAINING, torch.random.fork_rng(cuda):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class DivergedError(ValueError):
    """Training has left the finite numbers."""


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
    root/raw or in root. Only what is there in neither form is downloaded.
    """
    root, tensors = Path(root or HERE / "data"), []
    folders = [root / "FashionMNIST" / "raw", root / "raw", root]
    folder = next((f for f in folders if any(f.glob("*-idx?-ubyte*"))), folders[0])
    found = {name: [*folder.glob(name), *folder.glob(f"{name}.gz")] for name in DATA_FILES}
    for name, paths in found.items():
        contents = (_unpack(path.read_bytes(), name) for path in paths)
        content = next(filter(None, contents), None)
        if paths and not content:
            raise ValueError(
                f"{paths[-1]} does not hold what Fashion-MNIST holds (damaged, or of another data "
                "set); put the original in its place, or move it away, and it is downloaded"
            )
        content = content or _download(folder, name)
        header, *shape = (16, 1, 28, 28) if "images" in name else (8,)  # bytes, of the IDX format
        data = torch.frombuffer(content, dtype=torch.uint8, offset=header)
        tensors.append(data.view(-1, *shape))
    return tensors


def _unpack(content: bytes, name: str) -> bytearray | None:
    """The content of a data file; None where it is not what Fashion-MNIST holds."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        if content.startswith(b"\x1f\x8b"):  # packed, whatever the file is called
            content = gzip.decompress(content)
    right = hashlib.sha256(content).hexdigest() == DATA_FILES[name]
    return bytearray(content) if right else None


def _download(folder: Path, name: str) -> bytearray:
    """A data file from a server that torchvision knows, verified, kept packed in folder."""
    try:
        from torchvision.datasets import FashionMNIST  # slow to import, and seldom needed
    except Exception as error:  # ImportError, or RuntimeError where it does not fit torch
        raise OSError(f"{folder / name} is missing, and torchvision fails: {error}") from error
    for mirror in FashionMNIST.mirrors:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=TIMEOUT) as answer:
                packed = answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = error
            continue
        if content := _unpack(packed, name):
            write_file(folder / f"{name}.gz", packed)
            return content
        reason = "the server sent something else"
    missing = [f"{name}.gz" for name in DATA_FILES if not any(folder.glob(f"{name}*"))]
    raise OSError(f"Fashion-MNIST is not complete in {folder} and cannot be downloaded ({reason}); "
                  f"put {', '.join(missing)} there")  # fmt: skip


def classify(model: nn.Module, picture) -> pd.Series:
    """Probabilities of the classes for one picture, the most probable first.

    picture: an image file, or an array (H, W) or (H, W, 3), uint8 or from 0 to 1. It is made what
    Fashion-MNIST has: grey, bright on black (inverted where its border is bright), 28 x 28.
    """
    from PIL import Image, ImageOps  # slow to import

    if isinstance(picture, (str, os.PathLike)):
        image = ImageOps.exif_transpose(Image.open(picture)).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(picture).squeeze()
    pixels = (pixels * (255 if pixels.dtype.kind == "f" else 1)).astype("uint8")
    pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean() > 127:
        pixels = 255 - pixels
    pixels = torch.tensor(np.asarray(ImageOps.pad(Image.fromarray(pixels), (28, 28))))
    logits = compute_logits(model, (pixels.view(1, 1, 28, 28) / 255 - MEAN) / STD)
    return pd.Series(logits[0].softmax(0).numpy(), CLASSES).sort_values(ascending=False)


# --------------------------------------------------------------------------- checkpoints

FORMAT, VERSION = "EX1 LeNet-5 checkpoint", 2


def checkpoint_path(folder, setting: Setting, config: TrainConfig) -> Path:
    """Where a run is saved: that of seed 0 under the setting's own name."""
    seed = f"-seed{config.seed}" if config.seed else ""
    return Path(folder) / f"{setting.name}{seed}.pt"


def write_file(path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError, naming it, where it cannot be written."""
    path = Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
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
    """Read a checkpoint to a device, running no code from it.

    A state dict of this network is read as well, plain or as other programs wrap it; then what
    the file does not say has its default, and metrics is empty.
    Raises OSError where the file cannot be read, ValueError where it holds no such thing or is
    damaged, and for a device that this machine cannot use.
    """
    device = find_device(device)
    try:
        checkpoint = _from_bytes(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not usable: {error}") from error
    checkpoint.model.to(device)
    return checkpoint


def _network(setting: Setting, config: TrainConfig) -> LeNet5:
    return LeNet5(
        setting.dropout, setting.batch_norm, config.activation, config.pooling, config.norm_place
    )


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "setting": asdict(checkpoint.setting),
        "config": asdict(checkpoint.config),
        "history": checkpoint.history.to_dict("list"),
        "metrics": {name: list(metrics) for name, metrics in checkpoint.metrics.items()},
        "seconds": checkpoint.seconds,
        "versions": checkpoint.versions,
        "state_dict": {key: value.cpu() for key, value in checkpoint.model.state_dict().items()},
    }
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> Checkpoint:
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load does not look
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ValueError("it is damaged, or no zip file as torch.save writes") from error
    if damaged:
        raise ValueError(f"it is damaged: the checksum of its part {damaged} is wrong")
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        code = isinstance(error, pickle.UnpicklingError)
        raise ValueError(
            "it holds Python objects, whose code is not run; save a state_dict() instead"
            if code else "it was not written by torch.save"
        ) from error  # fmt: skip
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        payload = _wrap_state_dict(payload)
    if payload["version"] != VERSION:
        raise ValueError(f"it has version {payload['version']} of its format, not {VERSION}")
    setting, config = Setting(**payload["setting"]), TrainConfig(**payload["config"])
    with torch.device("meta"):  # draws nothing: another thread may be drawing dropout masks
        model = _network(setting, config)
    try:
        model.to_empty(device="cpu").load_state_dict(payload["state_dict"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"its tensors are not those of this LeNet-5 ({reason})") from error
    model = model.to(memory_format=torch.channels_last).eval()
    metrics = {name: Metrics(*pair) for name, pair in payload["metrics"].items()}
    rest = metrics, payload["seconds"], payload["versions"]
    return Checkpoint(model, setting, config, pd.DataFrame(payload["history"]), *rest)


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
    empty = {key: {} for key in ("config", "history", "metrics", "versions")}
    rest = {"version": VERSION, "setting": setting, "state_dict": state, "seconds": math.nan}
    return {**empty, **rest}


# ------------------------------------------------------------------------------ many runs

RUN_MEMORY = 1.2e9  # bytes that a run needs


def usable_workers(root="/") -> int:
    """How many runs this process may train at once: by the CPUs that it may use (affinity, quota
    of its control group) and by memory. root: of the file system that says so on Linux."""

    def find(file: str, pattern: str) -> list[str]:
        try:
            return re.findall(pattern, (Path(root) / file).read_text(encoding="utf-8"))
        except OSError:
            return []

    affinity = getattr(os, "sched_getaffinity", None)
    limits = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    limits += [61] if os.name == "nt" else []  # more than concurrent.futures starts there
    limits += [1024 * int(n) / RUN_MEMORY for n in find("proc/meminfo", r"MemAvailable:\s*(\d+)")]
    group = Path("sys/fs/cgroup", *find("proc/self/cgroup", r"(?m)^0::/(.+)$"))
    for folder in (group, *group.parents):
        limits += [int(n) / RUN_MEMORY for n in find(f"{folder}/memory.max", r"^\d+")]
        limits += [int(n) / int(of) for n, of in find(f"{folder}/cpu.max", r"^(\d+) (\d+)")]
    return max(1, int(min(limits)))


def train_many(jobs, executor: Executor | None = None, *, workers: int | None = None,
               on_finish=None, **options) -> list[Checkpoint | Exception]:  # fmt: skip
    """Train independent jobs, (setting, config), in parallel, each on the data of its seed.

    executor: any concurrent.futures.Executor (of processes, with the context "spawn"); by default
    processes of this machine, as many as workers or, without it, usable_workers, on a GPU one.
    on_finish: called in this process with the index of
    a job and its checkpoint, as soon as it is there. options: root of the data, split_names of
    what training gets, and every_epoch and device as in train.

    Returns the checkpoints in the order of jobs. A job that fails (or whose on_finish does) is
    reported at once, the others go on, and its place holds the exception. An interrupt ends
    what processes of this machine run and what other executors have not begun. Processes are
    spawned: a script calls this under if __name__ == "__main__".
    """
    jobs = list(jobs)
    results: list = [None] * len(jobs)
    total = sum(config.epochs for _, config in jobs)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit="epoch", disable=None))
        if local := executor is None and bool(jobs):
            read_data_files(options.get("root"))  # one download or error, not one in each worker
            cpu = find_device(options.get("device")).type == "cpu"
            count = min(len(jobs), workers or (usable_workers() if cpu else 1))
            executor = stack.enter_context(_processes(count, bar))
        with _ignore_sigint() if local else contextlib.nullcontext():
            futures = {executor.submit(_run_job, job, **options): i for i, job in enumerate(jobs)}
        if not local:  # after an exception
            stack.callback(lambda: [future.cancel() for future in futures])
        for future in as_completed(futures):
            index = futures[future]
            try:
                results[index] = _from_bytes(future.result())
                if on_finish:
                    on_finish(index, results[index])
            except Exception as error:
                results[index] = error
            with tqdm.external_write_mode():
                _print_result(*jobs[index], results[index])
            bar.update(0 if local else jobs[index][1].epochs)
    if killed := sum(isinstance(result, BrokenProcessPool) for result in results):
        print(f"{killed} runs are not finished, as a worker was killed (short of memory? try fewer "
              "workers) or could not start (a script needs if __name__ == '__main__')",
              file=sys.stderr)  # fmt: skip
    return results


def _print_result(setting: Setting, config: TrainConfig, result: Checkpoint | Exception) -> None:
    run = f"{setting.name}, seed {config.seed}"
    if isinstance(result, Checkpoint):
        values = [f"{name} {metrics.accuracy:.2%}" for name, metrics in result.metrics.items()]
        print(f"{run}: {', '.join(values)}, {result.seconds:.0f} s", flush=True)
    elif not isinstance(result, BrokenProcessPool):
        reason = str(result) or type(result).__name__
        print(f"{run}, failed: {reason}", file=sys.stderr, flush=True)


_load_once = functools.lru_cache(maxsize=1)(load_fashion_mnist)
_count_epoch = None  # in a worker of _processes: tells its parent that an epoch is over


def _run_job(job, root=None, split_names=("train", "val", "test"), **options) -> bytes:
    setting, config = job  # bytes come back from any process or machine as they went
    data = _load_once(root, config.seed)
    splits = {name: data[name] for name in split_names}
    return _to_bytes(train(setting, splits, config, progress=_count_epoch, **options))


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
    Returns the results in the order of jobs.
    Raises, before any training, OSError where the folder cannot be written to, and ValueError
    where a file holds another run than the job or two jobs would write one file.
    """
    folder, jobs, results = Path(folder), list(jobs), {}
    paths = {job: checkpoint_path(folder, *job) for job in jobs}
    if len({str(path).lower() for path in paths.values()}) < len(paths):
        raise ValueError("two different jobs have the same name and seed, and so the same file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    for job, path in paths.items():
        if path.exists():
            results[job] = run = load_checkpoint(path)
            if (run.setting, run.config) != job:
                raise ValueError(f"{path} holds another run, {run.setting}, {run.config}; choose "
                                 "another folder, or move this file away")  # fmt: skip
    todo = [job for job in paths if job not in results]

    def save(index: int, run: Checkpoint) -> None:
        save_checkpoint(paths[todo[index]], run)

    results.update(zip(todo, train_many(todo, on_finish=save, **options)))
    return [results[job] for job in jobs]


def load_runs(folder) -> list[Checkpoint]:
    """All checkpoints of a folder, in the order of SETTINGS, others behind them, and of seeds.

    Raises FileNotFoundError where there is none, and ValueError where one is not usable or does
    not have the name that train_and_save gives it, and so might stand for another run.
    """
    runs = []
    for path in sorted(Path(folder).glob("*.pt")):
        runs.append(run := load_checkpoint(path))
        if (expected := checkpoint_path(folder, run.setting, run.config).name) != path.name:
            raise ValueError(f"{path} holds what should be called {expected}; rename it")
    if not runs:
        raise FileNotFoundError(f"{folder} holds no checkpoints (*.pt)")
    names = [*SETTINGS, *(run.setting.name for run in runs)]
    return sorted(runs, key=lambda run: (names.index(run.setting.name), run.config.seed))


def collect(folder) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of a folder, from its checkpoints. Raises as load_runs.

    results has a row for each run: setting, label, seed, accuracy and loss of each split,
    seconds. history has one for each of its epochs and splits: loss and accuracy.
    """
    rows, histories = [], []
    for run in load_runs(folder):
        key = {"setting": run.setting.name, "label": run.setting.label, "seed": run.config.seed}
        measured = {f"{split}_{measure}": value for split, metrics in run.metrics.items()
                    for measure, value in metrics._asdict().items()}  # fmt: skip
        rows.append({**key, **measured, "seconds": run.seconds})
        histories.append(pd.DataFrame({**key, **run.history}, run.history.index))
    return pd.DataFrame(rows), pd.concat(histories, ignore_index=True)


# ---------------------------------------------------------------------------------- study

# weights/study.csv is plan and record of the study: a row is a run, and one without an accuracy
# is a run to do. Rows are added, never taken out. All runs have 16 epochs, batches of 128, SGD,
# ReLU, maximum pooling and batch norm after the activation, where no part says otherwise, and
# the seeds 101, 102 and 103, each with validation images of its own. Strength and learning rate
# of a technique are tuned together. The windows come from runs of seed 100.
#
#   A  no regularization and batch norm: rates; dropout, weight decay: strengths x rates.
#   B  fixed choices, one changed at a time, at three rates: tanh, average pooling, batches of
#      64 and of 256, Adam (no regularization); norm before the activation (batch norm).
#   D  combinations: the strengths of A, and all of them halved, x three rates: the best of A (of
#      two techniques the higher, of three the middle one), half of it and twice it.
#   C  length: the settings of A and all three, as chosen, with 8 and with 32 epochs.
#   E  is the final runs, in weights/: settings as chosen, seeds 0 to 7. They choose nothing.
#
# Rules, fixed before the first run:
# 1. In each grid of A and D the highest mean validation accuracy of three seeds wins, ties go to
#    the smaller strength, then to the smaller rate. A best cell on an edge gets one level more
#    (a factor of two) at the winner and its two neighbours on the other axis, at most twice. No
#    regularization is the level below the least strength, so that is no edge. Edges of B grow
#    in the same way. A run that diverges counts as an accuracy of 0.1.
# 2. The noise band is two standard errors of a paired difference of means of three, pooled over
#    the cells of A within one point of their grid's best. A fixed choice stays unless an
#    alternative, at its best rate, beats it by more than the band.
# 3. Length is not tuned; C shows what others would do.

STUDY = HERE / "weights" / "study.csv"
STRENGTHS = [entry.name for entry in fields(Setting)[2:]]
SHARED = [entry.name for entry in fields(TrainConfig)]
FIELDS = [*STRENGTHS, *SHARED]
CELL = [name for name in FIELDS if name != "seed"]  # what the seeds of a configuration share
OUTCOME = ["val_accuracy", "train_accuracy", "seconds"]  # of the last epoch; of the processor


def search(path=STUDY, executor: Executor | None = None, **options) -> pd.DataFrame:
    """Run the rows of a study that lack an accuracy. Each finished run is written at once, one
    that diverged at the end.

    A row: part, setting (a name), FIELDS, OUTCOME. Training gets the splits train and val alone.
    options go to train_many. Returns the table, where a run that failed lacks its accuracy.
    Raises OSError where the table cannot be read or written or another search is running on it,
    and, before any run, ValueError where it is no such table.
    """
    path = Path(path)
    if not path.exists():  # the lock would make its folder
        raise FileNotFoundError(f"{path} does not exist")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=0))
            table = pd.read_csv(path)
            todo = table.index[table.val_accuracy.isna()]
            jobs = [(Setting(row.setting, row.setting, *row[STRENGTHS]), TrainConfig(*row[SHARED]))
                    for _, row in table.loc[todo].iterrows()]  # fmt: skip
        except Timeout as error:
            raise OSError(f"another search is running on {path}") from error
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not the table of a study: {error}") from error

        def record(index: int, run: Checkpoint | None = None) -> None:
            outcome = [0.1, 0.1, 0.0]  # of a run that diverged
            if run:
                outcome = [run.metrics["val"].accuracy, run.metrics["train"].accuracy, run.seconds]
            table.loc[todo[index], OUTCOME] = outcome
            write_file(path, table.to_csv(index=False, lineterminator="\n").encode())

        given = {"split_names": ("train", "val"), "every_epoch": False, "on_finish": record}
        for index, result in enumerate(train_many(jobs, executor, **given, **options)):
            if isinstance(result, DivergedError):
                record(index)
            elif isinstance(result, Exception):
                table.loc[todo[index], OUTCOME] = math.nan  # it may have failed in being written
    return table


def best_cells(table: pd.DataFrame) -> pd.DataFrame:
    """What rule 1 chooses in each grid of A and D: setting (the index), part, CELL, mean
    validation accuracy."""
    grids = table[table.part.isin(["A", "D"])].groupby(["part", "setting", *CELL], as_index=False)
    means = grids.val_accuracy.mean().round({"val_accuracy": 9})  # equal means are equal
    order = ["val_accuracy", "dropout", "weight_decay", "lr"]
    return means.sort_values(order, ascending=[False, True, True, True]).groupby("setting").first()


def noise_band(table: pd.DataFrame) -> float:
    """The band of rule 2."""
    part = table[table.part == "A"]
    cells = part.pivot(index="seed", columns=["setting", *CELL], values="val_accuracy")
    best = cells.mean().groupby("setting").transform("max")
    cells = cells.loc[:, cells.mean() >= best - 0.01]
    return 2 * math.sqrt(2 / len(cells)) * _spread(cells)[0]


# ----------------------------------------------------------------------------- statistics

# One rule for all measures: runs are paired by seed, and what setting and seed leave open (the
# residuals of a two-way table) gives one standard deviation, pooled over all settings.
TECHNIQUES = ("dropout", "weight_decay", "batch_norm")


def _spread(table: pd.DataFrame) -> tuple[float, int]:
    """Standard deviation of the residuals, and their degrees of freedom; rows are seeds."""
    rest = table.sub(table.mean(axis=1), axis=0) - table.mean() + table.mean().mean()
    freedom = (len(table) - 1) * (table.shape[1] - 1)
    return math.sqrt(float((rest**2).to_numpy().sum()) / freedom), freedom


def least_difference(results: pd.DataFrame, measure: str = "test_accuracy") -> float:
    """Settings whose means differ by more do differ: Tukey's, 95 % for all pairs together.
    results: as collect gives them. Needs two seeds or more of two settings or more."""
    from scipy.stats import studentized_range  # slow to import

    table = results.pivot(index="seed", columns="setting", values=measure)
    spread, freedom = _spread(table)
    return studentized_range.ppf(0.95, table.shape[1], freedom) * spread / math.sqrt(len(table))


def effects(results: pd.DataFrame, measure: str = "test_accuracy") -> pd.DataFrame:
    """What techniques do in the factorial of eight settings, named by SETTINGS: columns effect
    and half, the half width of its own 95 % interval (Student's t).

    Rows: each technique, the mean over the settings with it minus those without; each pair, how
    much more one brings where the other is on; the sum of the gains of single techniques, and
    the gain of all three. Raises KeyError where results lack one of the eight, ValueError where
    SETTINGS do.
    """
    from scipy.stats import t

    table = results.pivot(index="seed", columns="setting", values=measure)
    on = pd.DataFrame([*SETTINGS.values()]).set_index("name")[[*TECHNIQUES]].astype(bool)
    on = on.drop_duplicates()
    if len(on) < 8:
        raise ValueError(f"SETTINGS have {len(on)} combinations of the techniques; expected all 8")
    table, sign, count = table[on.index], 2.0 * on - 1, on.sum(axis=1)
    weights = sign / 4
    for one, other in combinations(TECHNIQUES, 2):
        weights[f"{one} and {other}"] = sign[one] * sign[other] / 2
    weights["sum of single gains"] = (count == 1) - 3.0 * (count == 0)
    weights["gain of all three"] = (count == 3) - 1.0 * (count == 0)
    spread, freedom = _spread(table)
    scale = t.ppf(0.975, freedom) * spread / math.sqrt(len(table))
    half = scale * (weights**2).sum() ** 0.5
    return pd.DataFrame({"effect": table.mean() @ weights, "half": half})


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


def layer_summary(model: nn.Module, input_shape=(1, 1, 28, 28)) -> pd.DataFrame:
    """Send one input through the layers of a Sequential or a LeNet5. Returns one row for each
    that does something: its name, output shape, number of parameters."""
    rows, values = [], torch.zeros(input_shape)
    model = copy.deepcopy(model).cpu().eval()
    with torch.inference_mode():
        for name, layer in getattr(model, "layers", model).named_children():
            values = layer(values)
            off = isinstance(layer, nn.Dropout) and layer.p == 0
            if not off and not isinstance(layer, nn.Identity):
                count = sum(parameter.numel() for parameter in layer.parameters())
                rows.append((name, tuple(values.shape), count))
    return pd.DataFrame(rows, columns=["layer", "output shape", "parameters"])


def batch_norm_gradients(x: Tensor, gamma: Tensor, upstream: Tensor, eps: float) -> dict:
    """The six answers to question 3 (theory.md), for the layer of Ioffe and Szegedy (2015).

    x and upstream, which is df/dy, are (m,); gamma is a scalar; eps is added to the variance.
    Returns df/d of gamma, beta, x_hat (m,), variance, mean and x (m,).
    """
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


# --------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is in its `run`."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("dl_utils.py", description=__doc__, **form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    where, speed = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    text = "the folder of Fashion-MNIST (data/ beside this file)"
    where.add_argument("--data", metavar="FOLDER", help=text)
    where.add_argument("--device", help="cpu, cuda, ... (this machine's accelerator, else cpu)")
    text = "runs at a time (what processors and memory allow)"
    speed.add_argument("--workers", type=int, metavar="N", help=text)

    def add(run, name: str, text: str, *parents: argparse.ArgumentParser):
        command = commands.add_parser(name, help=text, description=text, parents=parents)
        command.set_defaults(run=run)
        return command.add_argument

    option = add(_train_command, "train", "train settings from scratch", where, speed)
    option("settings", nargs="*", metavar="SETTING", help=f"{', '.join(SETTINGS)}, or all")
    option("--seeds", nargs="+", default=["0"], metavar="N", help="one run for each (0)")
    option("--epochs", type=int, default=TrainConfig.epochs, metavar="N", help="(%(default)s)")
    option("--out", default="runs", metavar="FOLDER", help="where to save them (%(default)s)")
    text = "measure saved runs, and exit with 1 where that is not what they recorded"
    option = add(_test_command, "test", text, where)
    text = "files, names of settings in weights/, or folders, of which the lowest seed counts"
    option("paths", nargs="*", metavar="PATH", help=f"{text} (weights/)")
    option = add(_search_command, "search", "run what a study lacks", where, speed)
    option("table", nargs="?", default=STUDY, help="a CSV file (weights/study.csv)")
    text = "write results.csv of a folder, from its checkpoints"
    add(_collect_command, "collect", text)("folder")
    return parser


def _train_command(args) -> int:
    # --seeds 0 1 dropout gives --seeds the setting as well.
    names = [*args.settings, *(word for word in args.seeds if not word.isdecimal())]
    if not names or not {*names} <= {*SETTINGS, "all"}:
        expected = f"expected {', '.join(SETTINGS)}, or all"
        raise ValueError(f"settings are {' '.join(names) or 'missing'}; {expected}")
    seeds = [int(word) for word in args.seeds if word.isdecimal()] or [0]
    configs = [TrainConfig(args.epochs, seed=seed) for seed in seeds]
    names = SETTINGS if "all" in names else names
    jobs = [(SETTINGS[name], config) for config in configs for name in names]
    there = sum(checkpoint_path(args.out, *job).exists() for job in jobs)
    options = {"root": args.data, "device": args.device, "workers": args.workers}
    runs = train_and_save(jobs, args.out, **options)
    failed = sum(isinstance(run, Exception) for run in runs)
    print(f"{args.out}: {len(runs) - failed} of {len(runs)} runs ({there} were there already)")
    return 2 if failed else 0


def _test_command(args) -> int:
    files = {}
    for path in map(Path, args.paths or [HERE / "weights"]):
        if not path.exists() and str(path) in SETTINGS:
            path = HERE / "weights" / f"{path}.pt"
        lowest = {}  # seeds, which come first
        for run in load_runs(path) if path.is_dir() else [load_checkpoint(path)]:
            lowest.setdefault(run.setting.name, run)
        for run in lowest.values():
            file = checkpoint_path(path, run.setting, run.config) if path.is_dir() else path
            files[file] = run
    device, rows, differing = find_device(args.device or "cpu"), [], []
    for path, run in files.items():
        seed = f", seed {run.config.seed}" if run.config.seed else ""
        row = {"setting": f"{run.setting.label}{seed}"}
        for name, split in _load_once(args.data, run.config.seed).items():
            accuracy, count = evaluate(run.model.to(device), split).accuracy, len(split.labels)
            row[f"{name} %"] = f"{100 * accuracy:.2f}"
            recorded = run.metrics.get(name)
            images = round(count * (accuracy - recorded.accuracy)) if recorded else 0
            if abs(images) > 1:  # rounding on another processor may change one
                differing.append(f"{path}, {name}: {images:+} of {count} images right")
        rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False), *differing, sep="\n")
    if bare := [str(path) for path, run in files.items() if not run.metrics]:
        print(f"{', '.join(bare)}: weights alone, which record nothing to compare with; taken for "
              "a network with ReLU, maximum pooling and norm after the activation.")  # fmt: skip
    if len(bare) < len(files):
        verdict = "DIFFER from" if differing else "equal, to within one image,"
        print(f"The measured accuracies {verdict} what the files recorded.")
    return 1 if differing else 0


def _search_command(args) -> int:
    options = {"root": args.data, "device": args.device, "workers": args.workers}
    table = search(args.table, **options)
    done = int(table.val_accuracy.notna().sum())
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


# ----------------------------------------------------------------- report of version one
# What EX1.ipynb calls until the report of the new study replaces it, and this section with it.

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
BLOCK_ORDERS = ("before_pooling", "after_pooling", "after_activation")
ACCURACIES = {"train_accuracy": "train", "val_accuracy": "val", "test_accuracy": "test"}
# Told apart by colour-blind readers (Okabe and Ito 2008).
PALETTE = ("#000000", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#D55E00")
# Of lines that are not settings: scheme "muted" of P. Tol, and markers to tell them in grey.
MUTED = "#332288 #CC6677 #999933 #44AA99 #882255 #88CCEE #117733 #DDCC77"
OTHER_STYLES = tuple(zip(MUTED.split(), "os^Dv*PX"))
# 97.5 % quantile of Student's t for 1 to 9 degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MEASURES = {**ACCURACIES, "gap": "gap"}  # columns of results.csv, and train minus test


class Table(NamedTuple):
    """A table with its caption above it: Markdown in Jupyter and HTML, LaTeX in the PDF, where
    it stays whole. Text is left-aligned, numbers are right-aligned."""

    frame: pd.DataFrame
    caption: str

    def _text(self) -> pd.DataFrame:
        forms = {float: ".2g", int: ","}
        return self.frame.map(lambda value: format(value, forms.get(type(value), "")))

    def _repr_markdown_(self) -> str:
        rule = ["--:"] * self.frame.shape[1]
        rows = [self.frame.columns, [":--", *rule[1:]], *self._text().to_numpy()]
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"**{self.caption}**\n\n{lines}\n"

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


def _labels(table: pd.DataFrame) -> dict[str, str]:
    """Names and labels of the settings in a table, those of SETTINGS first."""
    labels = dict(zip(table.setting, table.get("label", table.setting)))
    own = {name: setting.label for name, setting in SETTINGS.items() if name in labels}
    return own | {name: label for name, label in labels.items() if name not in own}


def _color(name: str, others=()) -> str:
    """The colour of a setting, the same everywhere; those of one's own come after SETTINGS."""
    names = [*SETTINGS, *(other for other in others if other not in SETTINGS)]
    return PALETTE[names.index(name) % len(PALETTE)]


def _runs_by_setting(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each setting, by seed, with the gap between train and test added."""
    results = results.assign(gap=results.train_accuracy - results.test_accuracy)
    runs = {name: rows.set_index("seed") for name, rows in results.groupby("setting")}
    return {name: runs[name] for name in _labels(results)}


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


def summary_table(results: pd.DataFrame, seed: int = 0, names=None) -> pd.DataFrame:
    """The final train and test accuracy of one seed of each setting, or those in names, in
    percent. Raises ValueError where one of them has runs, but not of that seed."""
    rows = []
    for name, runs in _runs_by_setting(results).items():
        if names is None or name in names:
            if seed not in runs.index:
                raise ValueError(f"{name} has no run of seed {seed}")
            row = {"setting": _labels(results)[name], "train %": percent(runs.train_accuracy[seed])}
            rows.append(row | {"test %": percent(runs.test_accuracy[seed])})
    return pd.DataFrame(rows)


def seed_table(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds: accuracies in percent, the gap between train
    and test in points, the kept epoch."""
    rows = []
    for name, runs in _runs_by_setting(results).items():
        row = {"setting": _labels(results)[name]}
        for column, label in MEASURES.items():
            row[label if column == "gap" else f"{label} %"] = _with_spread(
                100 * runs[column].mean(), 100 * runs[column].std()
            )
        if "epoch" in runs:
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
    if not {setting, other} <= runs.keys():
        raise ValueError(f"expected runs of {setting} and {other}; found {', '.join(runs)}")
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
            row = {"setting": _labels(results)[name]}
            for column, label in MEASURES.items():
                mean, half = paired_difference(results, name, column=column)
                row[label] = _with_spread(100 * mean, 100 * half, "+.2f")
            rows.append(row)
    return pd.DataFrame(rows)


def prepare_notebook() -> None:
    """Figures as PNG and PDF, with the same bytes in every run; no messages of font caches."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # in place of the time at which a PDF is made
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("png", "pdf")


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
    if len(axes) < count:
        raise ValueError(f"found {len(axes)} axes; expected one for each of {count} panels")
    for ax in axes[count:]:
        ax.set_axis_off()
    return axes[0].figure, axes[:count]


def _label(ax, title: str, x: str, y: str, size: int = 10) -> None:
    ax.set_title(title, fontsize=size)
    ax.set_xlabel(x, fontsize=size)
    ax.set_ylabel(y, fontsize=size)


def _epoch_ticks(ax, last: int) -> None:
    for line in ax.lines if last == 1 else ():
        line.set_marker("o")  # a line of one point would be invisible
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
        if label not in split.labels:
            raise ValueError(f"the split has no image of class {label}")
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
    names = names or list(_labels(history))
    missing = {*names} - {*history.setting} | {"train", "val", "test"} - {*history.split}
    if missing:
        raise ValueError(f"the history lacks {', '.join(sorted(missing))}")
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
        seed, color = epochs.seed.min(), _color(name, names)
        kept = wide["val"][seed].idxmax()
        for split, style in {"train": "--", "test": "-"}.items():
            runs = 100 * wide[split]
            ax.plot(runs.index, runs[seed], style, color=color, label=split)
            least, greatest = runs.min(axis=1), runs.max(axis=1)
            ax.fill_between(runs.index, least, greatest, color=color, alpha=0.25, lw=0)
            ax.plot(kept, runs[seed][kept], "o", color=color, ms=5)
        _label(ax, f"{_labels(history)[name]}: accuracy by epoch", "epoch", "accuracy (%)")
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
    for name in (names := _names_in(history)):
        test, style = means.loc[name, "test"], {"color": _color(name, names), "lw": 1.2}
        axes[0].plot(100 * test.accuracy, label=_labels(history)[name], **style)
        axes[1].plot(test.loss, **style)
        axes[1].plot(means.loc[name, "train"].loss, "--", **style)
    late = means.index.get_level_values("epoch") >= max(history.epoch) // 4
    settled = 100 * means[late].accuracy.xs("test", level="split").min()
    axes[0].set_ylim(bottom=math.floor(settled))  # the first epochs would leave it little room
    axes[1].set_ylim(bottom=0)
    below = {"loc": "outside lower center", "ncols": min(5, len(names)), "frameon": False}
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
        color = _color(values[0]) if "setting" in names else color
        style = "-" if schedule == "one_cycle" else "--"
        look = {"color": color, "marker": marker, "ms": 3, "lw": 1, "ls": style}
        means = 100 * line.groupby(x).val_accuracy.mean()
        ax.plot([], [], label=label, **look)
        ax.plot(means.index.map(at), means, **look | {"marker": "_", "ms": 7})
        ax.plot(line[x].map(at), 100 * line.val_accuracy, **look | {"ls": ""})
        chosen = asdict(SETTINGS[line.setting.iloc[0]]) | asdict(TrainConfig())
        chosen |= {"setting": chosen["name"], "norm_layers": "all", "decay_all": False}
        chosen["schedule"] = "one_cycle"
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
    confidence, predicted = compute_logits(model, split.images).softmax(1).max(1)
    wrong = (predicted != split.labels.cpu()).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:10].tolist()
    figure, axes = _panels(axes, len(worst), 5, 1.15)
    for index, ax in zip(worst, axes):
        truth, guess = (CLASSES[int(labels[index])] for labels in (split.labels, predicted))
        title = f"{truth}, taken for\n{guess} ({100 * confidence[index]:.1f} %)"
        _show_image(ax, split.images[index], title)
    return figure


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


def __dir__() -> list[str]:
    return __all__


# What is defined here, and not what is imported, is the interface.
__all__ = sorted(
    name
    for name, value in list(globals().items())
    if name[0] != "_"
    and ((name.isupper() and name != "F") or __name__ == getattr(value, "__module__", 0))
)

if __name__ == "__main__":
    sys.exit(main())
