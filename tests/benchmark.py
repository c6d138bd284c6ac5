"""Times training and evaluation against the loop that everyone copies, and against the bound.

Run by hand: python tests/benchmark.py. Takes about ten minutes on an idle machine. What is
compared is timed in turn, round after round; the table has medians, and the least and greatest
of the rounds.
"""

import argparse
import os
import platform
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

FORWARD = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
# Backward: once for the gradients of weights, once for those of inputs, where the images have none.
TRAINING = 3 * FORWARD - 28 * 28 * 6 * 25


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
    train, test = (
        datasets.FashionMNIST(ROOT / "data", part, transform, download=True)
        for part in (True, False)
    )
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def classic_train(loader):
    model = Classic()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    total = 0.0
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()


def classic_evaluate(loaders):
    model = Classic().eval()
    hits = 0
    with torch.no_grad():
        for loader in loaders:
            for images, labels in loader:
                hits += (model(images).argmax(1) == labels).sum().item()


def our_train(setting, split, batch_size):
    """One epoch of dl_utils.train; what it measures afterwards is cut down to ten images."""
    config = dl.TrainConfig(1, batch_size, optimizer="adam")
    splits = {"train": split, "val": dl.Split(*(part[:10] for part in split))}
    dl.train(replace(setting, lr=1e-3), splits, config, measure=("val",), device="cpu")


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def matrix_rate(size=2048):
    """Multiply-adds per second of one large matrix product."""
    matrix = torch.randn(size, size)
    matrix @ matrix
    return size**3 / min(seconds(torch.mm, matrix, matrix) for _ in range(5))


def interleaved(rounds, **functions):
    """Seconds of each function, a list for every round, the functions in turn."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def report(name, numerators, denominators, unit=""):
    ratios = sorted(a / b for a, b in zip(numerators, denominators))
    median = statistics.median(ratios)
    print(f"| {name} | {median:.1f}{unit} | {ratios[0]:.1f} to {ratios[-1]:.1f} |", flush=True)


def run_command(*command):
    """Seconds and peak memory in GB of a command, by the operating system's own account."""
    script = (
        "import resource, subprocess, sys, time; s = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(time.perf_counter() - s, u.ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, command)], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    elapsed, kilobytes = map(float, done.stdout.split()[-2:])
    return elapsed, kilobytes / 1e6


def workers_job(count):
    """Seconds for two jobs of one epoch each on count workers, start of the workers excluded."""
    jobs = [(dl.SETTINGS["baseline"], dl.TrainConfig(4, 128, seed=seed)) for seed in range(2)]
    starts = []
    dl.train_many(jobs, workers=count, root=ROOT / "data", measure=("val",),
                  on_finish=lambda run: starts.append(run.seconds))  # fmt: skip
    return sum(starts) if count == 1 else max(starts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    rounds, threads = (vars(parser.parse_args())[key] for key in ("rounds", "threads"))
    torch.set_num_threads(threads)
    splits = dl.load_fashion_mnist(ROOT / "data")
    whole = dl.Split(*(torch.cat(parts) for parts in zip(splits["train"], splits["val"])))
    base, norm = dl.SETTINGS["baseline"], dl.SETTINGS["batch_norm"]
    print(f"{dl.describe_machine()}, {platform.processor() or 'CPU'}; {threads} thread(s); "
          f"median of {rounds} rounds\n")  # fmt: skip
    print("| ratio | median | least to greatest |\n|:--|--:|--:|")
    for size in (64, 128):
        loaders = classic_loaders(size)
        times = interleaved(
            rounds,
            classic=lambda loaders=loaders: classic_train(loaders[0]),
            ours=lambda size=size: our_train(base, whole, size),
            classic_test=lambda loaders=loaders: classic_evaluate(loaders),
            ours_test=lambda: [
                dl.evaluate(dl.build_model(base), part) for part in (whole, splits["test"])
            ],
        )
        report(f"classic loop / ours, training epoch, batches of {size}",
               times["classic"], times["ours"], "x")  # fmt: skip
        report(f"classic loop / ours, train and test accuracy, batches of {size}",
               times["classic_test"], times["ours_test"], "x")  # fmt: skip
        both = [[a + b for a, b in zip(times[k], times[k + "_test"])] for k in ("classic", "ours")]
        report(f"classic loop / ours, both, batches of {size}", *both, "x")
    bounds, epochs = [], {"baseline": [], "batch norm": []}
    for _ in range(rounds):
        bounds.append(TRAINING * len(whole.labels) / matrix_rate())
        epochs["baseline"].append(seconds(our_train, base, whole, 128))
        epochs["batch norm"].append(seconds(our_train, norm, whole, 128))
    for name, times in epochs.items():
        report(f"training epoch / bound, {name}", times, bounds, "x")
    parts = {n: dl.Split(*(part[:n] for part in whole)) for n in (10_000, 20_000, 60_000)}
    times = interleaved(rounds, **{
        str(n): lambda part=part: our_train(base, part, 128) for n, part in parts.items()
    })  # fmt: skip
    report("60,000 images / 10,000 images, time", times["60000"], times["10000"], "x")
    report("20,000 images / 10,000 images, time", times["20000"], times["10000"], "x")
    times = {1: [], 2: []}
    for _ in range(max(1, rounds // 2)):
        for count in times:
            times[count].append(workers_job(count))
    report("throughput of 2 workers / 1 worker", times[1], times[2], "x")
    with tempfile.TemporaryDirectory() as folder:
        base_import = [run_command(sys.executable, "-c", "import torch")[0] for _ in range(rounds)]
        tests = [run_command(sys.executable, "dl_utils.py", "test", "weights/dropout.pt")
                 for _ in range(rounds)]  # fmt: skip
        report("test of one file / import of torch, time", [t for t, _ in tests], base_import, "x")
        memory = run_command(sys.executable, "dl_utils.py", "train", "baseline", "--epochs", "1",
                             "--out", folder)[1]  # fmt: skip
        print(f"| peak memory of test | {max(m for _, m in tests):.2f} GB | |")
        print(f"| peak memory of a training process | {memory:.2f} GB | |")
        notebook = run_command("jupyter", "nbconvert", "--to", "notebook", "--execute",
                               "--output-dir", folder, "EX1.ipynb")[0]  # fmt: skip
        print(f"| notebook from top to bottom | {notebook:.0f} s, {os.cpu_count()} cores | |")


if __name__ == "__main__":
    main()
