"""The command line: what it does, and that bad input ends in one sentence and exit code 2."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, make_split

import dl_utils as dl


@pytest.fixture
def small_data(splits, monkeypatch):
    """The small data in place of Fashion-MNIST, for commands that run in this process."""
    monkeypatch.setattr(dl, "load_fashion_mnist", lambda *_: splits)


@pytest.fixture
def folder(trained, tmp_path):
    """Saved runs of all settings, with their tables."""
    for run in trained.values():
        dl.save_checkpoint(dl.checkpoint_path(tmp_path, run.setting.name), run)
    jobs = [(run.setting, run.config) for run in trained.values()]
    dl.train_and_save(jobs, tmp_path)  # nothing to train: writes their tables
    return tmp_path


BAD = {
    "train dropuot": r"unknown setting 'dropuot'; did you mean dropout\? expected one of baseline",
    "train batchnorm": r"unknown setting 'batchnorm'; did you mean batch_norm\?",
    "train xyz": "unknown setting 'xyz'; expected one of baseline",
    "train dropout --epochs 0": "epochs is 0; expected a whole number >= 1",
    "train dropout --epochs -2": "epochs is -2; expected",
    "train dropout --batch-size 0": "batch_size is 0; expected",
    "train all dropuot": r"unknown setting 'dropuot'; did you mean dropout\?",
    "train dropout --lr 0": "lr is 0.0; expected a finite number >= 1e-06",
    "train dropout --lr nan": "lr is nan; expected",
    "train dropout --seeds -1": "seed is -1; expected",
    "train dropout --out /proc/runs": "/proc/runs cannot be written to .*; choose another folder",
    "search --out /proc/runs/search.csv": "/proc/runs cannot be written to .*; choose another",
    "search": "weights/search.csv does not exist; expected a table that this program wrote",
    "search --out .": r"\. is not a table \(Is a directory\); move it out of the way, or name",
    "test nowhere.pt": "nowhere.pt does not exist; expected a checkpoint",
    "test .": "results.csv does not exist; expected a table",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_sentence(command, small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT if command.startswith("search --out") else tmp_path)
    assert dl.main(shlex.split(command)) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.match(f"dl_utils.py: .*{BAD[command]}", err) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def no_space(_):
    raise OSError(28, "No space left on device")


FAILING = {
    "train dropout --epochs 1 --batch-size 400": "batch_size is 400; expected at most the 330",
    "train batch_norm --epochs 1 --batch-size 47": "batch_size 47 leaves a batch of one image",
    "train dropout --lr 1e6": r"training diverged in epoch 1: the validation loss is (nan|inf)",
    "train dropout --epochs 1": r"dropout.pt cannot be written \(No space left on device\); free",
}


@pytest.mark.parametrize("command", FAILING)
def test_a_run_that_fails_is_said_in_one_sentence_and_keeps_the_rest(
    command, small_data, splits, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(dl, "_processes", ThreadPoolExecutor)
    monkeypatch.setattr(dl, "_load_once", lambda *_: splits)
    out = ["--out", str(tmp_path)]
    assert dl.main(["train", "baseline", "--epochs", "1", *out]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    if "No space" in FAILING[command]:
        monkeypatch.setattr(os, "fsync", no_space)
    assert dl.main([*shlex.split(command), *out]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match(rf"\w+, seed 0, failed: .*{FAILING[command]}", err)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "command",
    [
        "",
        "tarin",
        "train",
        "train dropout --epochs many",
        "test --fast",
    ],
)
def test_a_command_that_does_not_parse_exits_with_2(command, capsys):
    with pytest.raises(SystemExit) as caught:
        dl.main(command.split())
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["--help", "train --help", "test --help", "search --help"])
def test_help_reads_well(command, capsys):
    with pytest.raises(SystemExit) as caught:
        dl.main(command.split())
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "usage: dl_utils.py" in text
    examples = [line.strip() for line in text.splitlines() if "  python dl_utils.py" in line]
    assert examples
    for example in examples:
        command = re.split(r"\s{2,}", example)[0]
        dl.build_parser().parse_args(shlex.split(command)[2:])


def test_a_run_that_is_there_is_not_trained_again(folder, small_data, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert dl.main(["train", "all", "--out", str(folder)]) == 2
    assert (
        "baseline.pt exists already, trained with other hyperparameters (epochs 3, not 16, "
        "batch_size 16, not 128); choose another folder, delete it, or allow"
        in capsys.readouterr().err
    )
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_there_is_said_to_have_been_there(folder, small_data, capsys):
    command = "train baseline --epochs 3 --batch-size 16 --out"
    assert dl.main([*command.split(), str(folder)]) == 0
    assert "baseline.pt: was there already (--overwrite trains it again), epoch" in (
        capsys.readouterr().out
    )


def test_table_equals_what_was_recorded(folder, small_data, trained, capsys):
    assert dl.main(["test", str(folder)]) == 0
    out = capsys.readouterr().out
    for run in trained.values():
        values = " +".join(dl.percent(metrics.accuracy) for metrics in run.metrics.values())
        assert re.search(f"{run.setting.label} +{values}", out)
    assert out.endswith(f"The measured accuracies equal {folder / 'results.csv'}.\n")


def test_table_that_differs_is_said_to_differ(folder, small_data, capsys):
    good = dl.read_table(folder / "results.csv")
    for value in (good.test_accuracy[3] - 2 / 150, None):  # None: nothing is recorded
        table = good.copy()
        table.loc[3, "test_accuracy"] = value
        table.to_csv(folder / "results.csv", index=False)
        assert dl.main(["test", str(folder)]) == 1
        *_, differing, verdict = capsys.readouterr().out.splitlines()
        assert verdict == f"The measured accuracies DIFFER from {folder / 'results.csv'}."
        recorded = dl.percent(table.test_accuracy[3])
        assert differing.startswith(f"{folder / (table.setting[3] + '.pt')}, test: measured ")
        assert differing.endswith(f"recorded {recorded} %")


def test_a_file_without_a_row_is_seen(folder, small_data, capsys):
    table = dl.read_table(folder / "results.csv")
    table[table.setting != "combined"].to_csv(folder / "results.csv", index=False)
    assert dl.main(["test", str(folder)]) == 1
    assert f"{folder / 'combined.pt'}, train: measured" in capsys.readouterr().out


def test_a_folder_is_measured_on_the_split_it_was_trained_on(tmp_path, monkeypatch, splits):
    other = {**splits, "val": make_split(100, 4)}
    monkeypatch.setattr(dl, "load_fashion_mnist", lambda root, seed=0: other if seed else splits)
    job = (dl.SETTINGS["baseline"], dl.TrainConfig(1, 16, split_seed=1))
    dl.train_and_save([job], tmp_path, splits=other, executor=ThreadPoolExecutor(1))
    assert dl.main(["test", str(tmp_path)]) == 0
    assert dl.main(["test", str(tmp_path / "baseline.pt")]) == 0


def swap(folder):
    (folder / "dropout.pt").write_bytes((folder / "baseline.pt").read_bytes())


def bare(folder):
    weights = dl.load_checkpoint(folder / "dropout.pt").model.state_dict()
    torch.save(weights, folder / "dropout.pt")


TABLES = {
    "no table": (lambda folder: (folder / "results.csv").unlink(), "results.csv does not exist"),
    "no columns": (
        lambda folder: (folder / "results.csv").write_text("a,b\n1,2\n"),
        "results.csv lacks the columns setting, seed",
    ),
    "an empty table": (
        lambda folder: (folder / "results.csv").write_text(""),
        "is not a table (No",
    ),
    "text for a number": (
        lambda folder: (folder / "results.csv").write_text(
            "setting,seed,train_accuracy,val_accuracy,test_accuracy\nbaseline,0,high,0.9,0.9\n"
        ),
        "results.csv is not a table (could not convert string to float: 'high')",
    ),
    "a number too large": (
        lambda folder: (folder / "results.csv").write_text(
            "setting,seed,train_accuracy,val_accuracy,test_accuracy\n"
            f"baseline,{10**30},0.9,0.9,0.9\n"
        ),
        "results.csv is not a table (",
    ),
    "no row of seed 0": (
        lambda folder: (folder / "results.csv").write_text(
            "setting,seed,train_accuracy,val_accuracy,test_accuracy\nbaseline,3,0.9,0.9,0.9\n"
        ),
        "results.csv should have one row of seed 0 for each setting to measure",
    ),
    "two rows of one run": (
        lambda folder: (folder / "results.csv").write_text(
            "setting,seed,train_accuracy,val_accuracy,test_accuracy\n"
            + 2 * "baseline,0,0.9,0.9,0.9\n"
        ),
        "results.csv should have one row of seed 0 for each setting to measure",
    ),
    "no row of a setting that there is": (
        lambda folder: (folder / "results.csv").write_text(
            "setting,seed,train_accuracy,val_accuracy,test_accuracy\nother,0,0.9,0.9,0.9\n"
        ),
        "results.csv should have one row of seed 0 for each setting to measure",
    ),
    "a file is missing": (lambda folder: (folder / "dropout.pt").unlink(), "dropout.pt does not"),
    "one file in place of another": (swap, "dropout.pt holds the setting baseline; expected drop"),
    "a bare state_dict": (bare, "dropout.pt holds the setting state_dict; expected dropout"),
}


@pytest.mark.parametrize("case", TABLES)
def test_table_needs_its_files(folder, small_data, capsys, case):
    spoil, sentence = TABLES[case]
    spoil(folder)
    assert dl.main(["test", str(folder)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_one_file_is_compared_with_what_it_recorded(folder, small_data, trained, capsys):
    path = folder / "batch_norm.pt"
    assert dl.main(["test", str(path)]) == 0
    assert f"The measured accuracies equal what {path} recorded." in capsys.readouterr().out
    torch.save(trained["dropout"].model.state_dict(), path)
    assert dl.main(["test", str(path)]) == 0
    out = capsys.readouterr().out
    assert dl.percent(trained["dropout"].metrics["test"].accuracy) in out
    assert "records nothing to compare with. Bare weights are taken for" in out


def test_nothing_happens_at_import():
    script = "import torch; s = torch.get_rng_state(); import dl_utils, sys; " \
        "assert torch.equal(s, torch.get_rng_state()); " \
        "assert not {'torchvision', 'matplotlib', 'IPython'} & set(sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ctrl_c_ends_training_cleanly(real_splits, tmp_path):
    out = tmp_path / "runs"
    command = [sys.executable, "dl_utils.py", "train", "baseline", "combined", "--out", out]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    while process.poll() is None and not out.exists():  # it is made before workers are
        time.sleep(0.05)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "dl_utils.py: interrupted; finished runs are kept"
    assert not [path for path in out.iterdir() if path.suffix in (".pt", ".part")]


def test_a_failed_run_gives_exit_code_2(monkeypatch):
    monkeypatch.setattr(dl, "train_and_save", lambda *_, **__: [ValueError("diverged")])
    assert dl.main(["train", "baseline"]) == 2


README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"`python dl_utils.py (.+?)`", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_parse(command):
    args = dl.build_parser().parse_args(shlex.split(command))
    if command.startswith("train"):
        assert all(name in dl.SETTINGS or name == "all" for name in args.settings)
    if command.startswith("test weights"):
        assert (ROOT / args.path).exists()


def test_readme_has_a_command_to_train_and_one_to_test_each_setting():
    for name in dl.SETTINGS:
        assert f"train {name}" in COMMANDS and f"test weights/{name}.pt" in COMMANDS
    assert "test" in COMMANDS and "search" in COMMANDS
    assert len(README.splitlines()) <= 110 + 2 * len(dl.SETTINGS)


# The weights that are shipped.


@pytest.fixture(scope="module")
def results():
    return dl.read_table(ROOT / "weights/results.csv")


@pytest.mark.parametrize("name", dl.SETTINGS)
def test_shipped_weights_give_their_row_of_the_results(name, results, real_splits):
    checkpoint = dl.load_checkpoint(dl.checkpoint_path(ROOT / "weights", name))
    assert asdict(checkpoint.setting) == asdict(dl.SETTINGS[name])  # the label as well
    assert checkpoint.config == dl.TrainConfig()
    row = results[(results.setting == name) & (results.seed == 0)].iloc[0]
    assert dl.result_row(checkpoint) == row.to_dict()
    fast = {name: real_splits[name] for name in ("val", "test")}  # .ci/run measures train as well
    table = dl.reevaluate(checkpoint, fast)
    assert table.agrees.all() and len(table) == 2


def test_shipped_weights_are_pairwise_different():
    models = [dl.load_checkpoint(ROOT / f"weights/{name}.pt").model for name in dl.SETTINGS]
    firsts = [model.layers.conv1.weight for model in models]
    for index, first in enumerate(firsts):
        assert not any(torch.equal(first, other) for other in firsts[:index])


def test_shipped_results_are_complete(results):
    history = dl.read_table(ROOT / "weights/history.csv")
    runs = list(results[["setting", "seed"]].itertuples(index=False, name=None))
    assert sorted(runs) == sorted((name, seed) for name in dl.SETTINGS for seed in range(5))
    for run in results.itertuples():
        epochs = history[(history.setting == run.setting) & (history.seed == run.seed)]
        wide = epochs.pivot(index="epoch", columns="split", values="accuracy")
        assert len(wide) == dl.TrainConfig().epochs and len(epochs) == 3 * len(wide)
        assert run.epoch == wide.val.idxmax(), "the kept epoch is the best on validation"
        kept = wide.loc[run.epoch]
        assert (run.train_accuracy, run.val_accuracy, run.test_accuracy) == (
            kept.train, kept.val, kept.test,
        )  # fmt: skip


def test_shipped_results_are_over_90_percent_on_test(results):
    assert (results.test_accuracy > 0.90).all()
