"""The command line: what a user types works, or is answered in one sentence and exit code 2."""

import contextlib
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
from conftest import ROOT, save, study_rows

import dl_utils as dl


@pytest.fixture
def thread(one, monkeypatch):
    monkeypatch.setattr(dl, "_processes", lambda *_: contextlib.nullcontext(one))


BAD = {
    "train dropuot": r"train dropuot: expected a setting \(dropout\)",
    "train": r"expected a setting \(baseline, dropout, .*, all\)",
    "train dropout --seeds 0,1,2": "train 0,1,2: expected .* --seeds as in 0 1 2",
    "train dropout --seeds -1": "train -1: expected .* --seeds as in 0 1 2",
    "train dropout --workers 0": "workers is 0; expected a whole number >= 1",
    "search todo.csv --workers -1": "workers is -1; expected a whole number >= 1",
    "train dropout --out todo.csv": "todo.csv/.* cannot be written .File exists",
    "train dropout --epochs 0": "epochs is 0; expected a whole number >= 1",
    "train dropout --device tpu9": r"this machine cannot use the device tpu9 \(.*tpu9",
    "test run.pt --device cuda:99": r"this machine cannot use the device cuda:99 \(\w+",
    "test run.pt --device meta": r"this machine cannot use the device meta \(.*meta tensors",
    "search nowhere.csv": "No such file.*nowhere.csv",
    "search .": r"Is a directory: '\.'",
    "search results.csv": "results.csv has the columns setting, test_accuracy; expected, between",
    "test nowhere.pt": "No such file.*nowhere.pt",
    "collect .": r"\. holds no checkpoints",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_sentence(
    command, tiny, thread, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if command.startswith("test run.pt"):
        dl.save_checkpoint("run.pt", trained["baseline"])
    pd.DataFrame(study_rows([None])).to_csv("todo.csv", index=False)
    Path("results.csv").write_text("setting,test_accuracy\ndropout,0.9\n", encoding="utf-8")
    files = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    data = [] if command.startswith("collect") else ["--data", str(tiny)]
    assert dl.main([*shlex.split(command), *data]) == 2
    err = capsys.readouterr().err
    assert re.search(BAD[command], err), err
    assert "Traceback" not in err and err.count("\n") == 1
    found = [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path.is_file()]
    assert {path: path.read_bytes() for path in found} == files


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
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dl.main([*command, "--out=~/own"]) == 2
    out, err = capsys.readouterr()
    said, sentence = err.splitlines()
    assert said == "dropout, seed 0, failed: diverged in epoch 1; choose a lower learning rate"
    assert sentence.startswith("dl_utils.py: dropout, seed 0 failed (diverged in epoch 1; choose a")
    assert "baseline, seed 0: train" in out
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["baseline.pt"], "~ is a folder"


def test_files_and_folders_are_tested_and_a_difference_is_said_in_images(
    tiny, tmp_path, trained, monkeypatch, capsys
):
    save(tmp_path / "weights", trained["dropout"])
    save(tmp_path / "runs", trained["baseline"])
    monkeypatch.chdir(tmp_path)
    loss, accuracy = trained["combined"].metrics["test"]
    for images, code in ((-1, 0), (2, 1), (-7, 1)):  # one may be the rounding of a processor
        wrong = {"test": dl.Metrics(loss, accuracy - images / 150)}
        wrong = replace(trained["combined"], metrics=trained["combined"].metrics | wrong)
        save(tmp_path, wrong)
        paths = "weights", "combined.pt", "runs"
        assert dl.main(["test", *paths, "--data", str(tiny)]) == code
        out = capsys.readouterr().out
        assert (f"combined.pt, test: {images:+} of 150 images right" in out) == bool(code)
        assert ("DIFFER from" if code else "equal, to within one image, what the files rec") in out
    for name in ("dropout", "combined", "baseline"):
        metrics = trained[name].metrics.values()
        values = " +".join(f"{100 * value.accuracy:.2f}" for value in metrics)
        assert re.search(f"{dl.SETTINGS[name].label} +{values}", out), out


def test_test_shows_each_row_when_measured_and_claims_nothing_of_a_split_that_no_file_recorded(
    tiny, tmp_path, trained, monkeypatch, capsys
):
    run = trained["dropout"]
    some = {name: run.metrics[name] for name in ("train", "val")}
    save(tmp_path, trained["baseline"], replace(run, metrics=some))
    command = ["test", str(tmp_path), "--data", str(tiny)]
    assert dl.main(command) == 0
    assert "dropout.pt, test: no accuracy was recorded" in capsys.readouterr().out
    values = [*trained["baseline"].metrics.values(), KeyboardInterrupt]
    monkeypatch.setattr(dl, "evaluate", mock.Mock(side_effect=values))
    assert dl.main(command) == 130
    assert "No regularization" in capsys.readouterr().out


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(dl, "_test_command", mock.Mock(side_effect=ZeroDivisionError()))
    assert dl.main(["test"]) == 2, "1 means that accuracies differ"
    assert capsys.readouterr().err.startswith("Traceback")


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
SHIPPED = sorted(path.stem for path in ROOT.glob("weights/*.pt") if "-seed" not in path.stem)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command):
    args = dl.build_parser().parse_args(shlex.split(command))
    if command.startswith("train"):
        assert all(name in dl.SETTINGS or name == "all" for name in args.settings)
    if command.startswith("test weights"):
        assert all((ROOT / path).exists() for path in args.paths)


def test_readme_has_a_command_to_train_and_one_to_test_each_setting():
    assert {f"train {name}" for name in SHIPPED} < {*COMMANDS}
    assert {f"test weights/{name}.pt" for name in SHIPPED} | {"test", "search"} < {*COMMANDS}


@pytest.mark.parametrize("name", SHIPPED)
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
