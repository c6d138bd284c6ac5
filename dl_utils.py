"""LeNet-5 on Fashion-MNIST: no regularization, dropout, weight decay, batch normalization.

Test accuracy in %, mean ± standard deviation over five seeds, 16 epochs on a CPU:
no regularization 90.88 ± 0.26, dropout 90.97 ± 0.17, weight decay 91.41 ± 0.21,
batch normalization 91.42 ± 0.28, all three 91.80 ± 0.11.

The lesson comes first: settings, data, model, evaluation, training. What serves it follows:
files, checkpoints, many runs, the study, theory, command line. Accuracies are fractions,
losses are in nats per image, images are (N, 1, 28, 28) float32.

    python dl_utils.py train dropout             one setting, from scratch, into runs/
    python dl_utils.py test weights/dropout.pt   accuracies of saved files
    python dl_utils.py test                      the whole table, from the saved files
    python dl_utils.py search                    the rows of the study that lack an accuracy
    python dl_utils.py collect runs              runs/results.csv, from the files in runs/
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import math
import multiprocessing
import os
import pickle
import platform
import re
import signal
import sys
import threading
import time
import traceback
import urllib.request
import uuid
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

# ------------------------------------------------------------------------------ settings


def _number(default, least, below=math.inf):
    """A field for a number of the default's type, at least least and below below."""
    kind = "a whole number" if isinstance(default, int) else "a number"
    limit = f" and < {below}" if below < math.inf else ""
    words, allowed = f"{kind} >= {least}{limit}", lambda x: least <= x < below
    return field(default=default, metadata={"words": words, "allowed": allowed})


def _choice(*values):
    """A field for one of these values, by default the first."""
    words, allowed = f"one of {', '.join(map(str, values))}", values.__contains__
    return field(default=values[0], metadata={"words": words, "allowed": allowed})


def _check_fields(record) -> None:
    """Refuse values that their fields do not allow, and make NumPy's numbers Python's."""
    for entry in fields(record):
        if entry.metadata:
            value = getattr(record, entry.name)
            try:
                plain = entry.type(value)
                allowed = plain == value and entry.metadata["allowed"](plain)
            except (TypeError, ValueError, OverflowError):
                allowed = False
            if not allowed:
                raise ValueError(f"{entry.name} is {value!r}; expected {entry.metadata['words']}")
            object.__setattr__(record, entry.name, plain)


@dataclass(frozen=True)
class Setting:
    """What is compared: techniques, their strength, and the learning rate that suits them.

    Raises ValueError for a value that is not allowed.
    """

    name: str = field(  # in the code, and of its files
        metadata={"words": "letters, digits, _ and -", "allowed": re.compile(r"[\w-]+").fullmatch}
    )
    label: str = field(compare=False)  # in tables and figures
    # Probability of dropping a hidden fully connected unit (Srivastava et al. 2014).
    dropout: float = _number(0.0, 0, 1)
    # Lambda of the penalty lambda / 2 * ||w||^2 on the weights (Krogh and Hertz 1991).
    weight_decay: float = _number(0.0, 0)
    # Normalize the four hidden layers (Ioffe and Szegedy 2015).
    batch_norm: bool = _choice(False, True)
    lr: float = _number(0.08, 1e-6)  # the highest learning rate of the schedule

    __post_init__ = _check_fields


@dataclass(frozen=True)
class TrainConfig:
    """What all settings share. Raises ValueError for a value that is not allowed."""

    epochs: int = _number(16, 1)
    batch_size: int = _number(128, 1)
    # Draws validation images, initial weights, order of batches and dropout masks.
    seed: int = _number(0, 0, 2**32 // 3)  # a run uses three, and torch takes 32 bits of one
    optimizer: str = _choice("sgd", "adam")
    activation: str = _choice("relu", "tanh")
    pooling: str = _choice("max", "average")
    norm_place: str = _choice("after_activation", "before_activation")

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

# fmt: off
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle boot")
# fmt: on
MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, scaled to 0..1


class Split(NamedTuple):
    """Images (N, 1, 28, 28), float32 and standardized, and their labels (N,), int64, 0..9."""

    images: Tensor
    labels: Tensor


def load_fashion_mnist(root: str | Path | None = None, seed: int = 0) -> dict[str, Split]:
    """Fashion-MNIST (Xiao et al. 2017), downloaded to root where it is missing.

    Returns "train" (55,000 images) and "val" (5,000), which seed draws from the 60,000 training
    images, and "test" (10,000). root: by default the folder data/ beside this file.
    Raises OSError where a file is missing and cannot be downloaded or written, ValueError where
    one does not hold what Fashion-MNIST holds.
    """
    pixels, labels, test_pixels, test_labels = read_data_files(root)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    val, train = order.tensor_split([len(labels) // 12])

    def split(pixels: Tensor, labels: Tensor) -> Split:
        return Split(pixels.float().div_(255).sub_(MEAN).div_(STD), labels.long())

    return {
        "train": split(pixels[train], labels[train]),
        "val": split(pixels[val], labels[val]),
        "test": split(test_pixels, test_labels),
    }


def minibatches(split: Split, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
    """The split in batches of batch_size, the last one ragged, in an order that generator (on
    the CPU) draws."""
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
    so that every variant has the same layer names. Pooling before ReLU or tanh gives what it
    gives after them (maxima), on a quarter of the elements.
    """

    def __init__(
        self, dropout=0.0, batch_norm=False, activation="relu",
        pooling="max", norm_place="after_activation",
    ):  # fmt: skip
        super().__init__()
        act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
        pool = {"max": MaxPool, "average": nn.AvgPool2d}[pooling]
        norm2d = nn.BatchNorm2d if batch_norm else nn.Identity
        norm1d = nn.BatchNorm1d if batch_norm else nn.Identity

        def block(number, norm, **pooling):
            layers = {**pooling, "act": act()}
            if norm_place == "after_activation":
                layers = {**layers, "norm": norm}
            else:
                layers = {"norm": norm, **layers}
            return {f"{name}{number}": layer for name, layer in layers.items()}

        layers = {
            "conv1": nn.Conv2d(1, 6, kernel_size=5, padding=2),  # 6 x 28 x 28
            **block(1, norm2d(6), pool=pool(2)),  # 6 x 14 x 14
            "conv2": nn.Conv2d(6, 16, kernel_size=5),  # 16 x 10 x 10
            **block(2, norm2d(16), pool=pool(2)),  # 16 x 5 x 5
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


def _network(setting: Setting, config: TrainConfig) -> LeNet5:
    return LeNet5(
        setting.dropout, setting.batch_norm, config.activation, config.pooling, config.norm_place
    )


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


def confusion_matrix(model: nn.Module, split: Split) -> pd.DataFrame:
    """Counts of images, (10, 10): rows are true classes, columns are predicted ones."""
    pairs = split.labels.cpu() * len(CLASSES) + compute_logits(model, split.images).argmax(1)
    counts = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    return pd.DataFrame(counts.numpy(), index=CLASSES, columns=CLASSES)


# ------------------------------------------------------------------------------ training


@dataclass
class Checkpoint:
    """A trained model, in evaluation mode, with everything that explains it.

    history: DataFrame of epoch, split, loss, accuracy. metrics: split name to Metrics of the
    model. seconds: processor time of the run. Of a bare state dict the last three are empty.
    """

    model: LeNet5
    setting: Setting
    config: TrainConfig
    history: pd.DataFrame
    metrics: dict[str, Metrics]
    seconds: float


class DivergedError(ValueError):
    """Training has left the finite numbers."""


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


_TRAINING = threading.Lock()  # the generator and the number of threads belong to the process


def train(
    setting: Setting,
    splits: dict[str, Split],
    config: TrainConfig | None = None,
    *,
    device: str | torch.device | None = None,
    every_epoch: bool = True,
    progress: Callable[[], object] | None = None,
) -> Checkpoint:
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
    with _TRAINING, _one_thread_and_own_random_numbers(device):
        start = time.process_time()
        model = build_model(setting, config).to(device)
        optimizer = make_optimizer(model, setting, config)
        steps = config.epochs * math.ceil(len(splits["train"].labels) / config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: warmup_cosine(i / steps))
        order = torch.Generator().manual_seed(3 * config.seed + 1)
        torch.manual_seed(3 * config.seed + 2)  # of dropout
        for epoch in range(1, config.epochs + 1):
            batches = minibatches(splits["train"], config.batch_size, order)
            if not math.isfinite(train_epoch(model, batches, optimizer, schedule)):
                raise DivergedError(f"diverged in epoch {epoch}: choose a lower learning rate")
            if every_epoch or epoch == config.epochs:
                metrics = {name: evaluate(model, split) for name, split in splits.items()}
                rows += [(epoch, name, *values) for name, values in metrics.items()]
            if progress:
                progress()
        seconds = round(time.process_time() - start, 1)
    history = pd.DataFrame(rows, columns=["epoch", "split", "loss", "accuracy"])
    return Checkpoint(model.eval(), setting, config, history, metrics, seconds)


@contextlib.contextmanager
def _one_thread_and_own_random_numbers(device: torch.device):
    """The same bits whatever the number of cores, no crowding among workers, and the CPU's
    global generator as it was afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(threads)


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; by default this machine's accelerator, else the CPU.

    Raises ValueError for a device that this machine cannot use.
    """
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device or best).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"this machine cannot use the device {device}; it has {best}") from error


# ---------------------------------------------------------------------------------- files

HERE = Path(__file__).resolve().parent
DATA_FILES = {  # name of the unpacked file: its SHA-256
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
TIMEOUT = 30  # seconds that a server may stay silent


def read_data_files(root: str | Path | None = None) -> list[Tensor]:
    """Images (N, 1, 28, 28) and labels (N,) of the train and of the test files, all uint8.

    A file may be packed (.gz) or not, in root/FashionMNIST/raw, where torchvision puts it, in
    root/raw, or in root. One that is there in neither form is downloaded. Raises as
    load_fashion_mnist.
    """
    root = HERE / "data" if root is None else Path(root)
    folders, tensors = [root / "FashionMNIST" / "raw", root / "raw", root], []
    paths = {name: [name, f"{name}.gz"] for name in DATA_FILES}
    anywhere = (
        f for f in folders if any((f / path).exists() for path in itertools.chain(*paths.values()))
    )
    folder = next(anywhere, folders[0])
    there = {name: [folder / p for p in paths[name] if (folder / p).exists()] for name in paths}
    missing = [f"{name}.gz" for name in paths if not there[name]]
    for name in DATA_FILES:
        contents = (_unpacked(path.read_bytes(), name) for path in there[name])
        content = next(filter(None, contents), None)
        if not content and there[name]:
            raise ValueError(
                f"{there[name][-1]} does not hold what Fashion-MNIST holds (damaged, or of another "
                "data set): put the original there, or move this one away, to have it downloaded"
            )
        content = content or _unpacked(_download(folder, f"{name}.gz", missing), name)
        shape = (-1, 1, 28, 28) if "images" in name else (-1,)
        header = 16 if "images" in name else 8  # bytes, of the IDX format
        tensors.append(torch.frombuffer(content, dtype=torch.uint8, offset=header).view(shape))
    return tensors


def _unpacked(content: bytes, name: str) -> bytearray | None:
    """The content of a data file; None where it is not what Fashion-MNIST holds."""
    if content[:2] == b"\x1f\x8b":  # gzip, whatever the file is called
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return None
    right = hashlib.sha256(content).hexdigest() == DATA_FILES[name]
    return bytearray(content) if right else None


def _download(folder: Path, file: str, missing: list[str]) -> bytes:
    """A packed data file from a server that torchvision knows, verified, then kept in folder."""
    try:
        from torchvision.datasets import FashionMNIST  # slow to import, and seldom needed
    except Exception as error:  # also RuntimeError, where it does not fit torch
        raise OSError(f"{folder / file} is missing, and torchvision fails: {error}") from error
    for mirror in FashionMNIST.mirrors:
        try:
            with urllib.request.urlopen(mirror + file, timeout=TIMEOUT) as answer:
                content = answer.read()
            if _unpacked(content, file.removesuffix(".gz")):
                break
            reason = "the server sent something else"
        except (OSError, http.client.HTTPException) as error:
            reason = error
    else:
        raise OSError(
            f"Fashion-MNIST is not complete in {folder} and cannot be downloaded ({reason}): "
            f"put {', '.join(missing)} there"
        )
    write_file(folder / file, content)
    return content


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place first, then renamed.

    Raises OSError, which names the file, where it cannot be written.
    """
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


# --------------------------------------------------------------------------- checkpoints

FORMAT = "EX1 LeNet-5 checkpoint"
VERSION = 2


def checkpoint_path(folder: str | Path, setting: Setting, config: TrainConfig) -> Path:
    """Where a run is saved: that of seed 0 under the setting's own name."""
    seed = f"-seed{config.seed}" if config.seed else ""
    return Path(folder) / f"{setting.name}{seed}.pt"


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint of plain types, whole or not at all. Raises OSError where it cannot."""
    write_file(path, _to_bytes(checkpoint))


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint to a device, running no code from it.

    A state dict of this network is read as well, plain or as other programs wrap it; then all
    that the file does not say has its default, and metrics is empty.
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


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "setting": asdict(checkpoint.setting),
        "config": asdict(checkpoint.config),
        "history": checkpoint.history.to_dict("list"),
        "metrics": {name: list(metrics) for name, metrics in checkpoint.metrics.items()},
        "seconds": checkpoint.seconds,
        "versions": {**versions, "cpu": torch.backends.cpu.get_cpu_capability()},
        "state_dict": {key: value.cpu() for key, value in checkpoint.model.state_dict().items()},
    }
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def _from_bytes(content: bytes) -> Checkpoint:
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load does not look
    except Exception as error:  # a damaged archive fails in any of a dozen ways
        raise ValueError("it is damaged, or was not written by torch.save") from error
    if damaged:
        raise ValueError(f"it is damaged: the checksum of its part {damaged} is wrong")
    try:
        payload = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        sentence = "it holds Python objects, whose code is not run; save a state_dict() instead"
        raise ValueError(sentence) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        return _from_state_dict(payload)
    if payload.get("version") != VERSION:
        raise ValueError(f"it has version {payload.get('version')} of its format, not {VERSION}")
    setting, config = Setting(**payload["setting"]), TrainConfig(**payload["config"])
    metrics = {name: Metrics(*pair) for name, pair in payload["metrics"].items()}
    model, history = _load_model(setting, config, payload["state_dict"]), payload["history"]
    return Checkpoint(model, setting, config, pd.DataFrame(history), metrics, payload["seconds"])


def _from_state_dict(state) -> Checkpoint:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise ValueError("it holds neither a checkpoint of this program nor a state dict")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): state[key] for key in state}
    setting = Setting("state_dict", "Weights", batch_norm="layers.norm1.weight" in state)
    model = _load_model(setting, TrainConfig(), state)
    return Checkpoint(model, setting, TrainConfig(), pd.DataFrame(), {}, math.nan)


def _load_model(setting: Setting, config: TrainConfig, state: dict[str, Tensor]) -> LeNet5:
    with torch.device("meta"):  # draws nothing: another thread may be drawing dropout masks
        model = _network(setting, config)
    try:
        model.to_empty(device="cpu").load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"its tensors are not those of this LeNet-5 ({reason})") from error
    return model.to(memory_format=torch.channels_last).eval()


# ------------------------------------------------------------------------------ many runs

RUN_MEMORY = 1.2e9  # bytes that a run needs


def usable_workers(root: str | Path = "/") -> int:
    """How many runs this process may train at once: by the CPUs that it may use (affinity, quota
    of its control group) and by memory. root: of the file system that says so on Linux."""

    def words(file: str) -> list[str]:
        try:
            return (Path(root) / file).read_text().split()
        except OSError:
            return []

    affinity = getattr(os, "sched_getaffinity", None)
    cpus, memory = [len(affinity(0)) if affinity else os.cpu_count() or 1], [math.inf]
    if "MemAvailable:" in (info := words("proc/meminfo")):
        memory.append(1024 * int(info[info.index("MemAvailable:") + 1]))
    group = next((w[4:] for w in words("proc/self/cgroup") if w.startswith("0::/")), "")
    for folder in (Path(group), *Path(group).parents):
        match words(f"sys/fs/cgroup/{folder}/cpu.max"):
            case [quota, period] if quota != "max":
                cpus.append(int(quota) / int(period))
        match words(f"sys/fs/cgroup/{folder}/memory.max"):
            case [limit] if limit != "max":
                memory.append(int(limit))
    return max(1, int(min(*cpus, *(size / RUN_MEMORY for size in memory))))


def train_many(
    jobs: Iterable[tuple[Setting, TrainConfig]],
    executor: Executor | None = None,
    *,
    root: str | Path | None = None,
    names: Iterable[str] = ("train", "val", "test"),
    every_epoch: bool = True,
    device: str | None = None,
    workers: int | None = None,
    on_finish: Callable[[int, Checkpoint], object] | None = None,
) -> list[Checkpoint | Exception]:
    """Train independent (setting, config) jobs in parallel, each on the data of its seed.

    executor: any concurrent.futures.Executor; by default processes of this machine, as many as
    workers or, without it, usable_workers. root: as in load_fashion_mnist. names: the splits
    that training gets. every_epoch, device: as in train. on_finish: called in this process with
    the index of a job and its checkpoint, as soon as it is there.

    Returns the checkpoints in the order of jobs. A job that fails (or whose on_finish does) is
    reported at once, the others go on, and its place holds the exception. An interrupt ends
    what processes of this machine run, and what other executors have not begun. Processes are
    spawned: a script calls this under if __name__ == "__main__".
    """
    jobs = list(jobs)
    results: list = [None] * len(jobs)
    total = sum(config.epochs for _, config in jobs)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit="epoch", disable=None))
        local = executor is None and bool(jobs)
        if local:
            load_fashion_mnist(root)  # one download, or one error, not one in each worker
            count = min(len(jobs), workers or usable_workers())
            executor = stack.enter_context(_processes(count, bar))
        with _no_interrupts():  # processes that start now inherit to be deaf to Ctrl-C
            options = None if root is None else str(root), tuple(names), every_epoch, device
            futures = {executor.submit(_run_job, job, *options): i for i, job in enumerate(jobs)}
        # Where an exception leaves, what has not begun does not begin.
        stack.callback(lambda: [future.cancel() for future in futures])
        for future in as_completed(futures):
            index = futures[future]
            try:
                results[index] = _from_bytes(future.result())
                if on_finish:
                    on_finish(index, results[index])
            except Exception as error:
                results[index] = error
            _report(*jobs[index], results[index])
            if not local:
                bar.update(jobs[index][1].epochs)
    if killed := sum(isinstance(result, BrokenProcessPool) for result in results):
        print(f"{killed} runs were not finished, as a worker was killed (short of memory? try "
              "fewer workers); the same command runs what is missing", file=sys.stderr)  # fmt: skip
    return results


def _report(setting: Setting, config: TrainConfig, result: Checkpoint | Exception) -> None:
    """A line as soon as a run is finished."""
    text = f"{setting.name}, seed {config.seed}"
    with tqdm.external_write_mode():
        if isinstance(result, Checkpoint):
            values = (f"{name} {m.accuracy:.2%}" for name, m in result.metrics.items())
            print(f"{text}: {', '.join(values)}, {result.seconds:.0f} s", flush=True)
        elif not isinstance(result, BrokenProcessPool):
            print(f"{text}, failed: {result}", file=sys.stderr, flush=True)


_load_once = functools.lru_cache(maxsize=1)(load_fashion_mnist)
_count_epoch = None  # in a worker of _processes: tells its parent that an epoch is over


def _run_job(job, root, names, every_epoch, device) -> bytes:
    setting, config = job  # bytes come back from any process or machine as they went
    data = _load_once(root, config.seed)
    splits = {name: data[name] for name in names}
    options = {"device": device, "every_epoch": every_epoch, "progress": _count_epoch}
    return _to_bytes(train(setting, splits, config, **options))


@contextlib.contextmanager
def _no_interrupts():
    """Ctrl-C has no effect meanwhile (only the main thread can see to that)."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _processes(count: int, bar: tqdm):
    """A pool of spawned processes. They hold one end of a pipe and exit when the other end is
    closed: by this process, after an exception, or by the system, however this process ends."""
    spawn = multiprocessing.get_context("spawn")
    lifeline, held = spawn.Pipe(duplex=False)
    epochs = spawn.SimpleQueue()
    pool = ProcessPoolExecutor(count, spawn, _start_worker, (lifeline, epochs))
    counter = threading.Thread(target=lambda: [bar.update() for _ in iter(epochs.get, None)])
    counter.start()
    try:
        yield pool
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        epochs.put(None)
        counter.join()
        for end in (lifeline, held, epochs):
            end.close()


def _start_worker(lifeline, epochs) -> None:
    global _count_epoch
    _count_epoch = functools.partial(epochs.put, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us

    def wait_for_the_end():
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv()
        os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def train_and_save(jobs, folder: str | Path = "runs", **options) -> list[Checkpoint | Exception]:
    """train_many, each run saved in folder as soon as it is finished. options go to train_many.

    A run whose file is there is not trained again: a second call goes on after an interruption.
    Returns the results in the order of jobs.
    Raises, before any training, OSError where the folder cannot be written to, and ValueError
    where a file holds another run than the job or two jobs would write one file.
    """
    folder, jobs, results = Path(folder), list(jobs), {}
    paths = {job: checkpoint_path(folder, *job) for job in jobs}
    if len(set(paths.values())) < len(paths):
        raise ValueError("two different jobs have the same name and seed, and so the same file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    for job, path in paths.items():
        if path.exists():
            results[job] = run = load_checkpoint(path)
            if (run.setting, run.config) != job:
                raise ValueError(
                    f"{path} holds another run ({run.setting}; {run.config}); choose another "
                    "folder, or move this file away"
                )
    todo = [job for job in paths if job not in results]

    def save(index: int, run: Checkpoint) -> None:
        save_checkpoint(paths[todo[index]], run)

    results.update(zip(todo, train_many(todo, on_finish=save, **options)))
    return [results[job] for job in jobs]


class Tables(NamedTuple):
    """What the runs of a folder measured. results: one row a run, with setting, label, seed,
    accuracy and loss of each split, seconds. history: setting, seed, epoch, split, loss,
    accuracy."""

    results: pd.DataFrame
    history: pd.DataFrame


def load_runs(folder: str | Path) -> list[Checkpoint]:
    """All checkpoints of a folder, in the order of SETTINGS, others behind them, then of seeds.

    Raises FileNotFoundError where there is none, and ValueError where one does not have the name
    that train_and_save would give it, and so might stand for another, or is not usable.
    """
    runs = []
    for path in sorted(Path(folder).glob("*.pt")):
        run = load_checkpoint(path)
        if (expected := checkpoint_path(folder, run.setting, run.config)).name != path.name:
            raise ValueError(f"{path} holds what should be called {expected.name}; rename it")
        runs.append(run)
    if not runs:
        raise FileNotFoundError(f"{folder} holds no checkpoints (*.pt)")
    known = list(SETTINGS)

    def place(run: Checkpoint) -> tuple[int, str, int]:
        name = run.setting.name
        return known.index(name) if name in known else len(known), name, run.config.seed

    return sorted(runs, key=place)


def collect(folder: str | Path) -> Tables:
    """The tables of a folder, from its checkpoints. Raises as load_runs."""
    rows, histories = [], []
    for run in load_runs(folder):
        key = {"setting": run.setting.name, "seed": run.config.seed}
        row = {"setting": run.setting.name, "label": run.setting.label, "seed": run.config.seed}
        for name, metrics in run.metrics.items():
            row |= {f"{name}_accuracy": metrics.accuracy, f"{name}_loss": metrics.loss}
        rows.append({**row, "seconds": run.seconds})
        histories.append(run.history.assign(**key)[[*key, *run.history.columns]])
    return Tables(pd.DataFrame(rows), pd.concat(histories, ignore_index=True))


# ---------------------------------------------------------------------------------- study

# weights/study.csv is the plan and the record of the study: a row is a run, and one without an
# accuracy is a run to do. Rows are added, never taken out. All runs have 16 epochs, batches of
# 128, SGD, ReLU, maximum pooling and batch norm after the activation, where no part says
# otherwise, and three seeds, 101 to 103, each with its own validation images. Strength and
# learning rate of a technique are tuned together. Windows come from runs of seed 100.
#
#   A  no regularization and batch norm: rates; dropout, weight decay: strengths x rates.
#   B  fixed choices, one changed at a time, at three rates: tanh, average pooling, batches of
#      64 and of 256, Adam (no regularization); norm before the activation (batch norm).
#   C  length: the settings of A and all three, as chosen, with 8 and with 32 epochs.
#   D  combinations: the strengths of A, and all of them halved, x three rates: the best of A,
#      of two techniques the higher and of three the middle one, half of it and twice it.
#   E  is the final runs: the settings as chosen, seeds 0 to 7, in weights/. They choose nothing.
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
FIELDS = [entry.name for entry in (*fields(Setting)[2:], *fields(TrainConfig))]
CELL = [name for name in FIELDS if name != "seed"]  # what the seeds of a configuration share
OUTCOME = ["val_accuracy", "train_accuracy", "seconds"]  # of the last epoch; of the processor


def read_study(path: str | Path = STUDY) -> pd.DataFrame:
    """The table of a study: part, setting, FIELDS, OUTCOME.

    Raises OSError where it cannot be read, ValueError where it is no such table.
    """
    try:
        table = pd.read_csv(path)
        table = table.astype(dict.fromkeys(OUTCOME, float))
        return table[["part", "setting", *FIELDS, *OUTCOME]]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no table of a study: {error}") from error


def search(path: str | Path = STUDY, executor: Executor | None = None, **options) -> pd.DataFrame:
    """Run the rows of a study that lack an accuracy. Each finished run is written at once.

    Training gets the splits train and val alone. options go to train_many. Returns the table.
    A run that failed is still without. Raises as read_study and, before any run, ValueError for
    a row that cannot be run, OSError where another search is running.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(f"{path}.lock", timeout=0))
        except Timeout as error:
            raise OSError(f"another search is running on {path}") from error
        table = read_study(path)
        todo = table.index[table.val_accuracy.isna()]
        jobs = []
        for index, row in table.loc[todo].iterrows():
            try:
                given = {"name": row.setting, "label": row.setting, **row}
                jobs.append(tuple(
                    kind(**{entry.name: given[entry.name] for entry in fields(kind)})
                    for kind in (Setting, TrainConfig)
                ))  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{path}, row {index + 1}: {error}") from error

        def record(index: int, run: Checkpoint | None) -> None:
            accuracies = (
                [run.metrics[name].accuracy for name in ("val", "train")] if run else [0.1] * 2
            )
            table.loc[todo[index], OUTCOME] = [*accuracies, run.seconds if run else 0.0]
            write_file(path, table.to_csv(index=False).encode())

        options |= {"names": ("train", "val"), "every_epoch": False, "on_finish": record}
        results = train_many(jobs, executor, **options)
        for index, result in enumerate(results):
            if isinstance(result, DivergedError):
                record(index, None)
    return table


def study_means(table: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration: part, setting, CELL, val_accuracy (mean over the seeds)."""
    done = table.dropna(subset="val_accuracy")
    means = done.groupby(["part", "setting", *CELL], as_index=False).val_accuracy.mean()
    return means.round({"val_accuracy": 9})  # equal means are equal


def best_cell(means: pd.DataFrame, part: str, setting: str) -> pd.Series:
    """The configuration that rule 1 chooses in a grid of A or D."""
    grid = means[(means.part == part) & (means.setting == setting)]
    order = {"val_accuracy": False, "dropout": True, "weight_decay": True, "lr": True}
    return grid.sort_values(list(order), ascending=list(order.values())).iloc[0]


def noise_band(table: pd.DataFrame) -> float:
    """The band of rule 2, from the residuals of a two-way table of cells and seeds."""
    cells = table[table.part == "A"].pivot(
        index=["setting", *CELL], columns="seed", values="val_accuracy"
    )
    means = cells.mean(axis=1)
    cells = cells[means >= means.groupby("setting").transform("max") - 0.01]
    rest = cells.sub(cells.mean(axis=1), axis=0) - cells.mean() + cells.mean().mean()
    freedom = (len(cells) - 1) * (cells.shape[1] - 1)
    variance = float((rest**2).to_numpy().sum()) / freedom
    return 2 * math.sqrt(2 * variance / cells.shape[1])


def chosen_settings(table: pd.DataFrame) -> dict[str, tuple[float, float, bool, float]]:
    """What rule 1 chooses for each setting of A and D: dropout, weight decay, batch norm, rate."""
    means = study_means(table[table.part.isin(["A", "D"])])
    cells = {s: best_cell(means, p, s) for p, s in zip(means.part, means.setting)}
    return {s: (c.dropout, c.weight_decay, bool(c.batch_norm), c.lr) for s, c in cells.items()}


# --------------------------------------------------------------------------------- theory


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


# --------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is in its `run`."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("dl_utils.py", description=__doc__, **form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", metavar="FOLDER", help="Fashion-MNIST (data/ beside this file)")
    shared.add_argument("--device", help="cpu, cuda, ... (this machine's accelerator, or cpu)")
    workers = argparse.ArgumentParser(add_help=False)
    text = "runs at a time (as many as processors and memory allow)"
    workers.add_argument("--workers", type=int, metavar="N", help=text)

    command = commands.add_parser("train", parents=[shared, workers], help="train settings")
    text = f"{', '.join(SETTINGS)}, or all"
    command.add_argument("settings", nargs="*", metavar="SETTING", help=text)
    command.add_argument("--seeds", nargs="+", default=["0"], metavar="N", help="(0)")
    config = TrainConfig()
    command.add_argument("--epochs", type=int, default=config.epochs, help="(%(default)s)")
    command.add_argument("--out", default="runs", metavar="FOLDER", help="(%(default)s)")
    command.set_defaults(run=_train_command)

    text = "measure saved files; exit with 1 if that differs from what they recorded"
    command = commands.add_parser("test", parents=[shared], help=text, description=text)
    text = "files, folders (of each setting the lowest seed) or names of settings (weights/)"
    command.add_argument("paths", nargs="*", metavar="PATH", help=text)
    command.set_defaults(run=_test_command)

    text = "run what a study lacks"
    command = commands.add_parser("search", parents=[shared, workers], help=text)
    command.add_argument("table", nargs="?", default=STUDY, help="(weights/study.csv)")
    command.set_defaults(run=_search_command)

    text = "write results.csv, derived from the checkpoints of a folder"
    command = commands.add_parser("collect", help=text, description=text)
    command.add_argument("folder")
    command.set_defaults(run=_collect_command)
    return parser


def _train_command(args) -> int:
    # `--seeds 0 1 dropout` gives --seeds the setting as well.
    names = [*args.settings, *(word for word in args.seeds if not word.isdecimal())]
    if unknown := [name for name in names if name not in (*SETTINGS, "all")]:
        raise ValueError(f"unknown setting {unknown[0]}; expected {', '.join(SETTINGS)}, or all")
    if not names:
        raise ValueError(f"no setting given; expected {', '.join(SETTINGS)}, or all")
    settings = [SETTINGS[name] for name in (SETTINGS if "all" in names else names)]
    seeds = [int(word) for word in args.seeds if word.isdecimal()] or [0]
    jobs = [
        (setting, TrainConfig(args.epochs, seed=seed)) for seed in seeds for setting in settings
    ]
    options = {"root": args.data, "device": args.device, "workers": args.workers}
    there = sum(checkpoint_path(args.out, *job).exists() for job in jobs)
    runs = train_and_save(jobs, args.out, **options)
    kept = f", {there} of which were there already" if there else ""
    failed = sum(isinstance(run, Exception) for run in runs)
    print(f"{args.out}: {len(runs) - failed} runs{kept}")
    return 2 if failed else 0


def _test_command(args) -> int:
    runs = {}
    for path in map(Path, args.paths or [HERE / "weights"]):
        if str(path) in SETTINGS and not path.exists():
            path = HERE / "weights" / f"{path}.pt"
        if path.is_dir():
            found = load_runs(path)[::-1]  # of the runs of a setting the last, the lowest seed
            lowest = {run.setting.name: run for run in found}
            runs |= {
                checkpoint_path(path, r.setting, r.config): r for r in list(lowest.values())[::-1]
            }
        else:
            runs[path] = load_checkpoint(path)
    device, load = find_device(args.device), functools.cache(load_fashion_mnist)
    rows, differing = [], []
    for path, run in runs.items():
        row = {"setting": run.setting.label}
        for name, split in load(args.data, run.config.seed).items():
            accuracy, count = evaluate(run.model.to(device), split).accuracy, len(split.labels)
            row[f"{name} %"] = f"{100 * accuracy:.2f}"
            images = round(count * (accuracy - run.metrics.get(name, (0, accuracy))[1]))
            if abs(images) > 1:  # rounding on another processor may change one
                differing.append(f"{path}, {name}: {images:+} of {count} images right")
        rows.append(row)
    print(pd.DataFrame(rows).to_string(index=False))
    if bare := [str(path) for path, run in runs.items() if not run.metrics]:
        print(f"{', '.join(bare)}: weights alone, which record nothing to compare with; taken "
              "for a network with ReLU, maximum pooling and norm after the activation")  # fmt: skip
    verdict = "DIFFER from" if differing else "equal"
    print(*differing, f"The measured accuracies {verdict} what the files recorded.", sep="\n")
    return 1 if differing else 0


def _search_command(args) -> int:
    options = {"root": args.data, "device": args.device, "workers": args.workers}
    table = search(args.table, **options)
    failed = int(table.val_accuracy.isna().sum())
    print(f"{args.table}: {len(table) - failed} of {len(table)} runs")
    return 2 if failed else 0


def _collect_command(args) -> int:
    results = collect(args.folder).results
    write_file(Path(args.folder) / "results.csv", results.to_csv(index=False).encode())
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
    except (ValueError, OSError) as error:
        print(f"dl_utils.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("dl_utils.py: interrupted; finished runs are kept", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            print(
                "dl_utils.py: out of memory; close programs, or use fewer --workers",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
    return 2


if __name__ == "__main__":
    sys.exit(main())
