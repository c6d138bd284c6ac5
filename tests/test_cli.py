"""The command line: what a user types works, or is answered in one sentence and exit code 2."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, save
from test_notebook import README

import dl_utils as dl


@pytest.fixture
def here(one, tmp_path, monkeypatch):
    """The folder of the user, where a thread trains in place of processes."""
    monkeypatch.setattr(dl, "_processes", lambda *_: contextlib.nullcontext(one))
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = {
    "train dropuot": r"train dropuot: expected a setting \(dropout\)",
    "train": r"expected a setting \(baseline, dropout, .*, all\)",
    "train dropout --seeds 0,1,2": "train 0,1,2: expected .* --seeds as in 0 1 2",
    "train dropout --seeds -1": "train -1: expected .* --seeds as in 0 1 2",
    "train dropout --workers 0": "workers is 0; expected a whole number >= 1",
    "train dropout --out todo.csv": "todo.csv/.* cannot be written .File exists",
    "train dropout --epochs 0": "epochs is 0; expected a whole number >= 1",
    "train dropout --device tpu9": r"this machine cannot use the device tpu9 \(.*tpu9",
    "test run.pt --device cuda:99": r"this machine cannot use the device cuda:99 \(\w+",
    "test run.pt --device meta": r"this machine cannot use the device meta \(.*meta tensors",
    "search nowhere.csv": "No such file.*nowhere.csv",
    "search .": r"Is a directory: '\.'",
    "test nowhere.pt": "No such file.*nowhere.pt",
    "collect .": r"\. holds no checkpoints",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_sentence(command, tiny, here, trained, capsys):
    if command.startswith("test run.pt"):
        dl.save_checkpoint("run.pt", trained["baseline"])
    Path("todo.csv").write_bytes(b"a study")
    files = {path: path.read_bytes() for path in here.iterdir()}
    data = [] if command.startswith("collect") else ["--data", str(tiny)]
    assert dl.main([*shlex.split(command), *data]) == 2
    err = capsys.readouterr().err
    assert re.search(BAD[command], err), err
    assert "Traceback" not in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == files


def test_words_come_in_any_order_and_lowest_seeds_are_shown(tiny, here, capsys):
    for words in ("baseline --seeds 4", "--seeds 4 2 dropout"):
        command = f"train {words} --epochs 1 --device cpu --data {tiny}"
        assert dl.main(command.split()) == 0
    capsys.readouterr()
    assert dl.main(["test", "runs", "--data", str(tiny)]) == 0
    table = capsys.readouterr().out
    assert "No regularization, seed 4" in table and "Dropout, seed 2" in table
    assert "Dropout, seed 4" not in table


def test_a_failed_run_is_said_and_keeps_the_rest(tiny, here, monkeypatch, capsys):
    monkeypatch.setitem(dl.SETTINGS, "dropout", replace(dl.SETTINGS["dropout"], lr=1e6))
    command = ["train", "dropout", "baseline", "--epochs", "1", "--data", str(tiny)]
    monkeypatch.setenv("HOME", str(here))
    assert dl.main([*command, "--out=~/own"]) == 2
    out, err = capsys.readouterr()
    said, sentence = err.splitlines()
    assert said == "dropout, seed 0, failed: diverged in epoch 1; choose a lower learning rate"
    assert sentence.startswith("dl_utils.py: dropout, seed 0 failed (diverged in epoch 1; choose a")
    assert "baseline, seed 0: train" in out
    assert [path.name for path in Path("own").iterdir()] == ["baseline.pt"], "~ is a folder"


def test_files_and_folders_are_tested_and_a_difference_is_said(tiny, here, trained, capsys):
    save("weights", trained["dropout"])
    save("runs", trained["baseline"])
    run = trained["combined"]
    loss, accuracy = run.metrics["test"]
    for images, code in ((-1, 0), (2, 1), (-7, 1)):  # one may be the rounding of a processor
        wrong = {"test": dl.Metrics(loss, accuracy - images / 150)}
        save(here, replace(run, metrics=run.metrics | wrong))
        assert dl.main(["test", "weights", "combined.pt", "runs", "--data", str(tiny)]) == code
        out = capsys.readouterr().out
        assert (f"combined.pt, test: {images:+} of 150 images right" in out) == bool(code)
        assert ("DIFFER from" if code else "equal, to within one image, what the files rec") in out
    for name in ("dropout", "combined", "baseline"):
        metrics = trained[name].metrics.values()
        values = " +".join(f"{100 * value.accuracy:.2f}" for value in metrics)
        assert re.search(f"{dl.SETTINGS[name].label} +{values}", out), out


def test_rows_come_when_measured_and_what_lacks_is_said(tiny, here, trained, monkeypatch, capsys):
    some = {name: trained["dropout"].metrics[name] for name in ("train", "val")}
    save(here, trained["baseline"], replace(trained["dropout"], metrics=some))
    command = ["test", ".", "--data", str(tiny)]
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


def test_importing_is_quick_and_data_is_found_wherever_one_works(real_splits, here, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = "import sys, dl_utils as dl; slow = {'torchvision', 'matplotlib'} & {*sys.modules}; "
    code += "print(len(dl.read_data_files()['test'][1]), *slow)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.stdout, done.stderr) == (b"10000\n", b"") and not list(here.iterdir())


def test_a_console_that_cannot_show_a_path_is_no_error(here, trained, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    save("Läufe – 訓練", trained["baseline"])
    assert dl.main(["collect", "Läufe – 訓練"]) == 0


COMMANDS = re.findall(r"`python dl_utils.py (.+?)`", README)
SHIPPED = sorted(path.stem for path in ROOT.glob("weights/*.pt") if "-seed" not in path.stem)


def test_readme_has_commands_that_parse_and_train_and_test_each_setting():
    tests = {f"test weights/{name}.pt" for name in SHIPPED}
    assert tests == {command for command in COMMANDS if "weights/" in command}
    assert {f"train {name}" for name in SHIPPED} | {"test", "search"} < {*COMMANDS}
    for command in COMMANDS:
        args = dl.build_parser().parse_args(shlex.split(command))
        assert {*getattr(args, "settings", [])} <= {*dl.SETTINGS, "all"}, command


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_give_what_they_record(name, real_splits):
    checkpoint = dl.load_checkpoint(ROOT / f"weights/{name}.pt")
    assert vars(checkpoint.setting) == vars(dl.SETTINGS[name])  # and the label
    assert checkpoint.config == dl.TrainConfig()
    for split in ("val", "test"):  # .ci/run measures train as well
        recorded = checkpoint.metrics[split].accuracy
        found = dl.evaluate(checkpoint.model, real_splits[split]).accuracy
        assert abs(found - recorded) * len(real_splits[split].labels) < 1.5
