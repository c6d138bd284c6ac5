"""The command line: what a user types works, or is answered in one sentence and exit code 2."""

import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT, run

import dl_utils as dl


@pytest.fixture
def folder(trained, tmp_path):
    """Saved runs of all settings."""
    for checkpoint in trained.values():
        path = dl.checkpoint_path(tmp_path, checkpoint.setting, checkpoint.config)
        dl.save_checkpoint(path, checkpoint)
    return tmp_path


@pytest.fixture
def threads(monkeypatch):
    """One thread in place of processes."""

    @contextmanager
    def pool(*_):
        with ThreadPoolExecutor(1) as executor:
            yield executor

    monkeypatch.setattr(dl, "_processes", pool)


BAD = {
    "train dropuot": "settings are dropuot; expected baseline, dropout, .*, or all",
    "train": "settings are missing; expected baseline",
    "train all dropuot": "settings are all dropuot; expected",
    "train dropout --epochs 0": "epochs is 0; expected a whole number >= 1",
    "train dropout --seeds 9999999999": "seed is 9999999999; expected",
    "train dropout --device tpu9": "this machine cannot use the device tpu9",
    "test --device tpu9": "this machine cannot use the device tpu9",
    "train dropout --out /proc/runs": "/proc/runs",
    "search nowhere.csv": "nowhere.csv",
    "search .": "has an empty name|is not the table",
    "test nowhere.pt": "nowhere.pt does not exist",
    "test .": r"\. holds no checkpoints",
    "collect .": r"\. holds no checkpoints",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_sentence(command, tiny, threads, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = [] if command.startswith("collect") else ["--data", str(tiny)]
    assert dl.main([*shlex.split(command), *data]) == 2
    err = capsys.readouterr().err
    assert re.search(BAD[command], err), err
    assert "Traceback" not in err and err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path.is_file()]


@pytest.mark.parametrize("command", ["", "tarin", "train dropout --epochs many", "test --fast"])
def test_a_command_that_does_not_parse_exits_with_2(command, capsys):
    with pytest.raises(SystemExit) as caught:
        dl.main(command.split())
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["--help", "train --help", "test --help", "search --help"])
def test_help_names_what_there_is(command, capsys):
    with pytest.raises(SystemExit) as caught:
        dl.main(command.split())
    assert caught.value.code == 0 and "usage: dl_utils.py" in capsys.readouterr().out


def test_the_order_of_words_and_the_wish_for_a_device_do_not_matter(tiny, threads, tmp_path):
    words = "--seeds", "0", "1", "dropout", "--epochs", "1", "--device", "cpu"
    assert dl.main(["train", *words, "--data", str(tiny), "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dropout-seed1.pt", "dropout.pt"]


def test_a_failed_run_is_said_and_keeps_the_rest(tiny, threads, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(dl.SETTINGS, "dropout", replace(dl.SETTINGS["dropout"], lr=1e6))
    command = ["train", "dropout", "baseline", "--epochs", "1", "--data", str(tiny)]
    assert dl.main([*command, "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err == "dropout, seed 0, failed: diverged in epoch 1; choose a lower learning rate\n"
    assert "1 of 2 runs" in out and [p.name for p in tmp_path.iterdir()] == ["baseline.pt"]


def test_files_folders_and_names_are_tested_together(folder, tiny, trained, monkeypatch, capsys):
    monkeypatch.setattr(dl, "HERE", folder)
    (folder / "weights").mkdir()
    for name in ("baseline", "dropout"):
        (folder / f"{name}.pt").rename(folder / "weights" / f"{name}.pt")
    monkeypatch.chdir(folder)
    paths = ["dropout", "combined.pt", "weights"]
    assert dl.main(["test", *paths, "--data", str(tiny)]) == 0
    out = capsys.readouterr().out
    for name in ("dropout", "combined", "baseline"):
        metrics = trained[name].metrics.values()
        values = " +".join(f"{100 * value.accuracy:.2f}" for value in metrics)
        assert re.search(f"{dl.SETTINGS[name].label} +{values}", out), out
    assert out.endswith(
        "The measured accuracies equal, to within one image, what the files recorded.\n"
    )


def test_a_difference_is_said_in_images_with_exit_code_1(folder, tiny, trained, capsys):
    checkpoint, data = trained["batch_norm"], ["--data", str(tiny)]
    loss, accuracy = checkpoint.metrics["test"]
    for images, code in ((-1, 0), (2, 1), (-7, 1)):
        wrong = checkpoint.metrics | {"test": dl.Metrics(loss, accuracy - images / 150)}
        dl.save_checkpoint(folder / "batch_norm.pt", replace(checkpoint, metrics=wrong))
        assert dl.main(["test", str(folder), *data]) == code
        out = capsys.readouterr().out
        said = f"{folder / 'batch_norm.pt'}, test: {images:+} of 150 images right"
        assert (said in out) == bool(code) and ("DIFFER from" in out) == bool(code)


def test_the_lowest_seed_of_each_setting_is_the_one_that_a_folder_shows(
    tiny, threads, tmp_path, capsys
):
    command = ["train", "baseline", "dropout", "--epochs", "1", "--seeds", "4", "2", "--out"]
    assert dl.main([*command, str(tmp_path), "--data", str(tiny)]) == 0
    capsys.readouterr()
    assert dl.main(["test", str(tmp_path), "--data", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "No regularization, seed 2" in out and "Dropout, seed 2" in out and "seed 4" not in out


def raising(error):
    def command(_):
        raise error

    return command


def test_memory_is_a_sentence_and_a_fault_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    for error, sentence in (
        (MemoryError(), "dl_utils.py: out of memory; close other programs"),
        (memory, "dl_utils.py: out of memory; close other programs"),
        (ZeroDivisionError("oops"), "Traceback"),
    ):
        monkeypatch.setattr(dl, "_test_command", raising(error))
        monkeypatch.setattr(dl._test_command, "__name__", "_test_command")
        assert dl.main(["test"]) == 2, "1 means that accuracies differ"
        assert capsys.readouterr().err.startswith(sentence)


def test_a_path_that_the_console_cannot_show_is_no_error(tiny, tmp_path):
    path = tmp_path / "Läufe – 訓練"
    if sys.getfilesystemencoding() != "utf-8":
        pytest.skip("this file system cannot have such a name")
    command = "train", "baseline", "--epochs", "1", "--workers", "1", "--out", path
    code, out, err = run(tiny, *command, env={"PYTHONIOENCODING": "cp1252"}, encoding="cp1252")
    assert code == 0 and (path / "baseline.pt").exists(), err
    assert r"\u8a13\u7df4: 1 of 1 runs" in out


def test_importing_is_quick_and_changes_nothing(tmp_path):
    script = (
        "import torch; s = torch.get_rng_state(); import dl_utils, sys; "
        "assert torch.equal(s, torch.get_rng_state()); slow = {'torchvision', 'matplotlib', "
        "'IPython', 'PIL', 'scipy', 'distributed'} & set(sys.modules); assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_star_import_and_dir_show_the_api_alone():
    names = {}
    exec("from dl_utils import *", names)
    assert {"train", "SETTINGS", "evaluate", "load_checkpoint"} <= names.keys()
    assert not {"os", "torch", "nn", "pd", "np", "Path", "field", "_check_fields"} & names.keys()
    assert dir(dl) == dl.__all__
    for name in dl.__all__:
        member = getattr(dl, name)
        assert not callable(member) or member.__doc__, f"{name} has no docstring"


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
    for name in dl.SETTINGS:
        assert f"train {name}" in COMMANDS and f"test weights/{name}.pt" in COMMANDS
    assert "test" in COMMANDS and "search" in COMMANDS
    assert len(README.splitlines()) <= 130


# The weights that are shipped.


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


def test_shipped_weights_are_pairwise_different():
    models = [dl.load_checkpoint(path).model for path in ROOT.glob("weights/*.pt")]
    firsts = [model.layers.conv1.weight for model in models]
    for index, first in enumerate(firsts):
        assert not any(torch.equal(first, other) for other in firsts[:index])
