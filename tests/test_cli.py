"""The command line: what a user types works, or is answered in one sentence and exit code 2."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pandas as pd
import pytest
from conftest import ROOT, save

import dl_utils as dl


@pytest.fixture
def thread(one, monkeypatch):
    monkeypatch.setattr(dl, "_processes", lambda *_: contextlib.nullcontext(one))


BAD = {
    "train dropuot": "settings are dropuot; expected baseline, dropout, .*, or all",
    "train": "settings are missing; expected baseline",
    "train dropout --epochs 0": "epochs is 0; expected a whole number >= 1",
    "train dropout --device tpu9": "this machine cannot use the device tpu9",
    "test --device cuda:99": "this machine cannot use the device cuda:99",
    "train dropout --out /proc/runs": "/proc/runs",
    "search nowhere.csv": "nowhere.csv is no file",
    "search .": r"\. is no file",
    "test nowhere.pt": "nowhere.pt does not exist",
    "collect .": r"\. holds no checkpoints",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_sentence(command, tiny, thread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [] if command.startswith("collect") else ["--data", str(tiny)]
    assert dl.main([*shlex.split(command), *data]) == 2
    err = capsys.readouterr().err
    assert re.search(BAD[command], err), err
    assert "Traceback" not in err and err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path.is_file()]


def test_words_come_in_any_order_and_lowest_seeds_are_shown(tiny, thread, tmp_path, capsys):
    data = ["--data", str(tiny)]
    for words in ("baseline --seeds 4", "--seeds 4 2 dropout"):
        words = ["train", *words.split(), "--epochs", "1", "--device", "cpu", *data]
        assert dl.main([*words, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert dl.main(["test", str(tmp_path), *data]) == 0
    table = capsys.readouterr().out
    assert "No regularization, seed 4" in table and "Dropout, seed 2" in table
    assert "Dropout, seed 4" not in table


def test_a_failed_run_is_said_and_keeps_the_rest(tiny, thread, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dl.SETTINGS, "dropout", replace(dl.SETTINGS["dropout"], lr=1e6))
    command = ["train", "dropout", "baseline", "--epochs", "1", "--data", str(tiny)]
    assert dl.main([*command, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err == "dropout, seed 0, failed: diverged in epoch 1; choose a lower learning rate\n"
    assert "1 of 2 runs" in out and [p.name for p in tmp_path.iterdir()] == ["baseline.pt"]


def test_files_folders_and_names_are_tested_and_a_difference_is_said_in_images(
    tiny, tmp_path, trained, monkeypatch, capsys
):
    save(tmp_path / "weights", trained["dropout"])
    save(tmp_path / "runs", trained["baseline"])
    monkeypatch.setattr(dl, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    loss, accuracy = trained["combined"].metrics["test"]
    for images, code in ((-1, 0), (2, 1), (-7, 1)):  # one may be the rounding of a processor
        wrong = {"test": dl.Metrics(loss, accuracy - images / 150)}
        wrong = replace(trained["combined"], metrics=trained["combined"].metrics | wrong)
        save(tmp_path, wrong)
        paths = "dropout", "combined.pt", "runs"
        assert dl.main(["test", *paths, "--data", str(tiny)]) == code
        out = capsys.readouterr().out
        assert (f"combined.pt, test: {images:+} of 150 images right" in out) == bool(code)
        assert ("DIFFER from" if code else "equal, to within one image, what the files rec") in out
    for name in ("dropout", "combined", "baseline"):
        metrics = trained[name].metrics.values()
        values = " +".join(f"{100 * value.accuracy:.2f}" for value in metrics)
        assert re.search(f"{dl.SETTINGS[name].label} +{values}", out), out


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "dl_utils.py: out of memory"),
        (MemoryError(), "dl_utils.py: out of memory; close"),
        (ZeroDivisionError(), "Traceback"),
    ],
)
def test_memory_is_a_sentence_and_a_fault_keeps_its_traceback(error, start, monkeypatch, capsys):
    monkeypatch.setattr(dl, "_test_command", mock.Mock(side_effect=error))
    assert dl.main(["test"]) == 2, "1 means that accuracies differ"
    assert capsys.readouterr().err.startswith(start)


def test_a_path_that_the_console_cannot_show_is_no_error(trained, tmp_path, monkeypatch):
    save(tmp_path / "Läufe – 訓練", trained["baseline"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert dl.main(["collect", str(tmp_path / "Läufe – 訓練")]) == 0


def test_importing_is_quick_and_changes_nothing():
    script = (
        "import torch; s = torch.get_rng_state(); import dl_utils, sys; "
        "assert torch.equal(s, torch.get_rng_state()); slow = {'torchvision', 'matplotlib', "
        "'IPython', 'PIL', 'scipy', 'distributed'} & set(sys.modules); assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"`python dl_utils.py (.+?)`", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command):
    args = dl.build_parser().parse_args(shlex.split(command))
    if command.startswith("train"):
        assert all(name in dl.SETTINGS or name == "all" for name in args.settings)
    if command.startswith("test weights"):
        assert all((ROOT / path).exists() for path in args.paths)


def test_readme_has_a_command_to_train_and_one_to_test_each_setting():
    assert {f"train {name}" for name in dl.SETTINGS} < {*COMMANDS}
    assert {f"test weights/{name}.pt" for name in dl.SETTINGS} | {"test", "search"} < {*COMMANDS}


@pytest.mark.parametrize("name", dl.SETTINGS)
def test_shipped_weights_give_what_they_and_the_table_record(name, real_splits):
    checkpoint = dl.load_checkpoint(ROOT / f"weights/{name}.pt")
    assert checkpoint.setting == dl.SETTINGS[name] and checkpoint.config == dl.TrainConfig()
    assert checkpoint.setting.label == dl.SETTINGS[name].label
    results = pd.read_csv(ROOT / "weights/results.csv").set_index(["setting", "seed"])
    for split in ("val", "test"):  # .ci/run measures train as well
        recorded = checkpoint.metrics[split].accuracy
        assert results.loc[(name, 0), f"{split}_accuracy"] == recorded
        found = dl.evaluate(checkpoint.model, real_splits[split]).accuracy
        assert abs(found - recorded) * len(real_splits[split].labels) < 1.5
    assert checkpoint.metrics["test"].accuracy > 0.90
