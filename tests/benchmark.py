"""Times training and measuring against the loop that everyone copies, and the commands.

    python tests/benchmark.py            half an hour, on an idle machine

Not part of the tests. What is compared is run in turn, round after round, on one thread; a row
has the median of the rounds' ratios, and the least and the greatest of them.
"""

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import datasets, transforms  # noqa: E402

import dl_utils as dl  # noqa: E402


class Tutorial(nn.Module):
    """LeNet-5 as tutorials write it: the same function as the baseline."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def tutorial_train(loader):
    model = Tutorial()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def tutorial_measure(loaders):
    model, hits = Tutorial().eval(), 0
    with torch.no_grad():
        for loader in loaders:
            for images, labels in loader:
                hits += (model(images).argmax(1) == labels).sum().item()


def our_train(split):
    setting, config = dl.Setting("adam", "Adam", lr=1e-3), dl.TrainConfig(optimizer="adam")
    model = dl.build_model(setting, config)
    optimizer = dl.make_optimizer(model, setting, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    batches = dl.minibatches(split, config.batch_size, torch.Generator())
    dl.train_epoch(model, batches, optimizer, schedule)


def our_measure(splits):
    for split in splits:
        dl.evaluate(dl.build_model(dl.SETTINGS["baseline"]), split)


def product(size=2048):
    """Seconds for the multiply-adds of an epoch of 60,000 images as one large matrix product.
    Backward needs them twice more, but not for the inputs of the first layer."""
    first = 28 * 28 * 6 * 25
    forward = first + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    matrix = torch.randn(size, size)
    fastest = min(seconds(functools.partial(multiply, matrix)) for _ in range(4))
    return (3 * forward - first) * 60_000 / size**3 * fastest


def multiply(matrix):
    torch.mm(matrix, matrix)


def seconds(function):
    """What the function takes, or what it says."""
    start = time.perf_counter()
    said = function()
    return time.perf_counter() - start if said is None else said


def command(*arguments):
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def two_runs(workers):
    jobs = [(dl.SETTINGS["baseline"], dl.TrainConfig(8, seed=seed)) for seed in (0, 1)]
    dl.train_many(jobs, workers=workers, every_epoch=False, device="cpu")


def compare(name, rounds, one, other):
    """Print the ratio of the time that one takes to that of the other."""
    ratios = sorted(seconds(one) / seconds(other) for _ in range(rounds))
    spread = f"{ratios[0]:.1f} to {ratios[-1]:.1f}"
    print(f"| {name} | {statistics.median(ratios):.1f} | {spread} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    parts = [
        dl.Split((x.float() / 255 - dl.MEAN) / dl.STD, y.long())
        for x, y in dl.read_data_files().values()
    ]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for path in (ROOT / "data/FashionMNIST/raw").glob("*.gz"):
            (raw / path.name).symlink_to(path)  # torchvision unpacks beside them
        normalize = transforms.Normalize((dl.MEAN,), (dl.STD,))
        transform = transforms.Compose([transforms.ToTensor(), normalize])
        sets = [datasets.FashionMNIST(root, part, transform, download=True) for part in (1, 0)]
        train, test = (DataLoader(data, 128, shuffle=data.train) for data in sets)
        both = functools.partial
        cpu = torch.backends.cpu.get_cpu_capability()
        print(
            f"Python {platform.python_version()}, torch {torch.__version__}, {cpu}, "
            f"{os.cpu_count()} cores, {rounds} rounds\n"
        )
        print("| times, one thread | median ratio | least to greatest |\n|:--|--:|--:|")
        compare(
            "tutorial / ours, an epoch of training",
            rounds,
            both(tutorial_train, train),
            both(our_train, parts[0]),
        )
        compare(
            "tutorial / ours, measuring train and test",
            rounds,
            both(tutorial_measure, (train, test)),
            both(our_measure, parts),
        )
        compare(
            "tutorial / ours, both together",
            rounds,
            lambda: [tutorial_train(train), tutorial_measure((train, test))][0],
            lambda: [our_train(parts[0]), our_measure(parts)][0],
        )
        compare(
            "an epoch / its multiply-adds as a matrix product",
            rounds,
            both(our_train, parts[0]),
            product,
        )
        compare("two runs, one worker / two workers", rounds, both(two_runs, 1), both(two_runs, 2))
        imports = both(command, "-c", "import torch")
        compare(
            "`test` of one file / import of torch",
            rounds,
            both(command, "dl_utils.py", "test", "weights/dropout.pt"),
            imports,
        )
        notebook = ["--to", "notebook", "--execute", "--output-dir", folder, "EX1.ipynb"]
        compare(
            "the notebook / import of torch",
            rounds,
            both(command, "-m", "jupyter", "nbconvert", *notebook),
            imports,
        )


if __name__ == "__main__":
    main()
