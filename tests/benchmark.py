"""Times training and measuring against the loop that everyone copies, and against the bound.

    python tests/benchmark.py            half an hour, on an idle machine

Not part of the tests. What is compared is run in turn, round after round; a row has the median
of the rounds' ratios, and the least and the greatest of them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import dl_utils as dl  # noqa: E402

# Multiply-adds of one image. Backward: once more for the gradients of the weights and once more
# for those of the inputs, which the first layer does not need.
FIRST = 28 * 28 * 6 * 25
FORWARD = FIRST + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
TRAINING = 3 * FORWARD - FIRST


class Classic(nn.Module):
    """LeNet-5 as tutorials write it: the same function as the baseline."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def classic_loaders(batch_size):
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((dl.MEAN,), (dl.STD,))]
    )
    parts = [datasets.FashionMNIST(ROOT / "data", part, transform) for part in (True, False)]
    return [DataLoader(part, batch_size, shuffle=part.train) for part in parts]


def classic_train(loader):
    model = Classic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()


def classic_measure(loaders):
    model, hits = Classic().eval(), 0
    with torch.no_grad():
        for loader in loaders:
            for images, labels in loader:
                hits += (model(images).argmax(1) == labels).sum().item()


def our_train(setting, split, batch_size):
    """One epoch of dl_utils.train with Adam; what it measures then is ten images."""
    config = dl.TrainConfig(1, batch_size, optimizer="adam")
    splits = {"train": split, "val": first(10, split)}
    dl.train(replace(setting, lr=1e-3), splits, config, measure=("val",), device="cpu")


def our_measure(splits):
    for split in splits:
        dl.evaluate(dl.build_model(dl.SETTINGS["baseline"]), split)


def first(count, split):
    return dl.Split(*(part[:count] for part in split))


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def bound(size=2048):
    """Seconds for the multiply-adds of an epoch at the rate of one large matrix product."""
    matrix = torch.randn(size, size)
    fastest = min(seconds(torch.mm, matrix, matrix) for _ in range(4))
    return TRAINING * 60_000 / size**3 * fastest


def command(*arguments):
    """Seconds and peak memory (GB) of a command, by the operating system's own account."""
    script = (
        "import resource, subprocess, sys, time; start = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "usage = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(time.perf_counter() - start, usage.ru_maxrss)"
    )
    run = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    elapsed, kilobytes = map(float, done.stdout.split()[-2:])
    return elapsed, kilobytes / 1e6


def training_by_workers(workers):
    """Seconds of training of two jobs: their sum on one worker, the longer one on two."""
    jobs = [(dl.SETTINGS["baseline"], dl.TrainConfig(2, seed=seed)) for seed in (0, 1)]
    options = {"workers": workers, "root": ROOT / "data", "measure": ("val",)}
    spent = [run.seconds for run in dl.train_many(jobs, **options)]
    return sum(spent) if workers == 1 else max(spent)


def in_turn(rounds, **functions):
    """What each function gives, or else the seconds it takes: a list for every function."""
    results = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            value = function()
            results[name].append(time.perf_counter() - start if value is None else value)
    return results


def row(name, numerators, denominators, aim=""):
    ratios = sorted(a / b for a, b in zip(numerators, denominators))
    spread = f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
    print(f"| {name} | {statistics.median(ratios):.1f} | {spread} | {aim} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    splits = dl.load_fashion_mnist(ROOT / "data")
    whole = dl.Split(*(torch.cat(parts) for parts in zip(splits["train"], splits["val"])))
    base, norm = dl.SETTINGS["baseline"], dl.SETTINGS["batch_norm"]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{dl.describe_machine()}, {capability}; one thread, {rounds} rounds\n")
    print("| 60,000 images, ratio of times | median | least to greatest | aim |")
    print("|:--|--:|--:|--:|")
    for size in (64, 128):
        train_loader, test_loader = classic_loaders(size)
        times = in_turn(
            rounds,
            classic=lambda loader=train_loader: classic_train(loader),
            ours=lambda size=size: our_train(base, whole, size),
            classic_measure=lambda both=(train_loader, test_loader): classic_measure(both),
            measure=lambda: our_measure((whole, splits["test"])),
        )
        row(f"classic / ours, epoch of training, batches of {size}",
            times["classic"], times["ours"], "4.0 or more")  # fmt: skip
        row(f"classic / ours, train and test accuracy, batches of {size}",
            times["classic_measure"], times["measure"], "4.0 or more")  # fmt: skip
    times = in_turn(
        rounds, bound=bound,
        base=lambda: our_train(base, whole, 128), norm=lambda: our_train(norm, whole, 128),
    )  # fmt: skip
    row("epoch of training / bound, no regularization", times["base"], times["bound"], "up to 3.0")
    row("epoch of training / bound, batch norm", times["norm"], times["bound"], "up to 5.0")
    parts = {str(count): first(count, whole) for count in (10_000, 20_000, 60_000)}
    runs = {name: lambda part=part: our_train(base, part, 128) for name, part in parts.items()}
    times = in_turn(rounds, **runs)
    row("epoch of 20,000 / of 10,000 images", times["20000"], times["10000"], "2.0")
    row("epoch of 60,000 / of 10,000 images", times["60000"], times["10000"], "6.0")
    times = in_turn(
        rounds, one=lambda: training_by_workers(1), two=lambda: training_by_workers(2)
    )  # fmt: skip
    row("throughput of 2 workers / of 1", times["one"], times["two"], "1.7 or more")
    with tempfile.TemporaryDirectory() as folder:
        test = ["dl_utils.py", "test", "weights/dropout.pt"]
        runs = in_turn(
            rounds,
            torch=lambda: command(sys.executable, "-c", "import torch")[0],
            test=lambda: command(sys.executable, *test),
        )
        row(
            "`test` of one file, cold / import of torch",
            [s for s, _ in runs["test"]],
            runs["torch"],
        )
        train = ["dl_utils.py", "train", "combined", "--epochs", "1", "--out", folder]
        notebook = ["--to", "notebook", "--execute", "--output-dir", folder, "EX1.ipynb"]
        print("\n| whole commands | measured | aim |\n|:--|--:|--:|")
        print(f"| peak memory of `test` | {max(gb for _, gb in runs['test']):.2f} GB | |")
        print(f"| peak memory of training | {command(sys.executable, *train)[1]:.2f} GB | 1.5 GB |")
        time_of_test = statistics.median(s for s, _ in runs["test"])
        print(f"| time of `test` of one file, cold | {time_of_test:.1f} s | |")
        elapsed = command(sys.executable, "-m", "jupyter", "nbconvert", *notebook)[0]
        print(f"| time of the notebook, {os.cpu_count()} cores | {elapsed:.0f} s | |")


if __name__ == "__main__":
    main()
