"""Folders of runs and tables of a study: what is finished stays, what lacks is run, whatever
is killed meanwhile."""

import multiprocessing
import os
import re
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nbformat
import pandas as pd
import psutil
import pytest
from conftest import ROOT, SETTINGS, save, start, study_rows, weights_equal
from nbclient import NotebookClient

import dl_utils as dl
from dl_utils import Setting, TrainConfig, train


def test_own_settings_and_configs_are_saved_collected_and_tested(tiny, tmp_path, one, capsys):
    strong = Setting("strong_dropout", "Dropout 0.5", dropout=0.5)
    adam = TrainConfig(2, 16, seed=3, optimizer="adam")
    jobs = [(strong, adam), (SETTINGS["dropout"], TrainConfig(2, 16)), (strong, adam)]
    runs = dl.train_and_save(jobs, tmp_path, executor=one, root=tiny)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert runs[0] is runs[2] and names == ["dropout.pt", "strong_dropout-seed3.pt"]
    results, history = dl.collect(tmp_path)
    assert list(results.label) == ["Dropout", "Dropout 0.5"] and list(results.seed) == [0, 3]
    assert results.test_accuracy[1] == runs[0].metrics["test"].accuracy
    assert results.train_loss[1] == runs[0].metrics["train"].loss
    assert len(history) == 2 * 2 * 3 and set(history.setting) == {"dropout", "strong_dropout"}
    for path in tmp_path.glob("*.pt"):  # as macOS leaves them on USB drives
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    assert dl.main(["test", str(tmp_path), "--data", str(tiny)]) == 0
    assert "Dropout 0.5, seed 3" in capsys.readouterr().out
    assert dl.main(["collect", str(tmp_path)]) == 0
    assert pd.read_csv(tmp_path / "results.csv").equals(results)


def test_finished_runs_are_shown_from_a_read_only_folder(config, tmp_path, trained, monkeypatch):
    save(tmp_path, trained["baseline"])
    fail = mock.Mock(side_effect=OSError(30, "Read-only file system"))
    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setattr(os, "replace", fail)
    jobs = [(replace(SETTINGS["baseline"], label="Plain"), config), (SETTINGS["dropout"], config)]
    (found,) = dl.train_and_save(jobs[:1], tmp_path)  # a label does not make another run
    assert weights_equal(found, trained["baseline"]) and len(dl.collect(tmp_path)[0]) == 1
    with pytest.raises(OSError, match="cannot be written .Read-only"):  # before any training
        dl.train_and_save(jobs, tmp_path, root="nowhere")


def test_no_run_is_taken_for_another_one(config, tmp_path, trained):
    run, path = trained["baseline"], tmp_path / "baseline.pt"
    save(tmp_path, run)
    before = path.read_bytes()
    sentence = "baseline.pt holds another run: lr is 0.06, not 0.5, epochs is 3, not 9; choose"
    with pytest.raises(ValueError, match=sentence):
        dl.train_and_save([(replace(run.setting, lr=0.5), replace(config, epochs=9))], tmp_path)
    with pytest.raises(ValueError, match="two different jobs have the same name and seed"):
        dl.train_and_save([(run.setting, TrainConfig(epochs)) for epochs in (1, 2)], tmp_path)
    assert path.read_bytes() == before
    save(tmp_path, replace(run, config=replace(config, seed=1, epochs=1)))  # a trial
    with pytest.raises(ValueError, match=r"baseline.pt, unlike another seed: epochs is 3, not 1; "):
        dl.collect(tmp_path)
    path.rename(tmp_path / "dropout.pt")
    with pytest.raises(ValueError, match=r"dropout.pt holds the run of baseline.pt; move"):
        dl.collect(tmp_path)
    with pytest.raises(ValueError, match="another run: name is baseline, not dropout"):
        dl.train_and_save([(replace(run.setting, name="dropout"), config)], tmp_path)
    save(tmp_path, replace(run, metrics={"train": run.metrics["train"]}))
    with pytest.raises(ValueError, match="another run: val is not measured, test is not measured"):
        dl.train_and_save([(run.setting, config)], tmp_path)
    assert dl.train_and_save([(run.setting, config)], tmp_path, split_names=["train"])


def test_an_executor_that_forks_is_refused_before_it_hangs(config):
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    with pytest.raises(ValueError, match="torch hangs in forked processes; give mp_context="):
        dl.train_many([(SETTINGS["baseline"], config)], executor)


NOTEBOOK = """
import tiny, dl_utils as dl
from concurrent.futures import ThreadPoolExecutor
jobs = [(dl.SETTINGS["baseline"], dl.TrainConfig(1, seed=seed)) for seed in range(2)]
runs = dl.train_many(jobs, ThreadPoolExecutor(1), root=tiny.os.environ["TINY"])
"""


@pytest.mark.filterwarnings("default")
def test_a_notebook_shows_how_far_training_is_and_keeps_nothing_of_it(tiny, monkeypatch):
    monkeypatch.setenv("TINY", str(tiny))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    client = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT / "tests")}})
    client.process_message = spy = mock.Mock(side_effect=client.process_message)
    client.execute()
    shown = "".join(call.args[0]["content"].get("text", "") for call in spy.call_args_list)
    assert "0/2" in shown and "baseline, seed 1: train" in shown and "2/2" in shown
    assert notebook.cells[0].outputs == []


# Workers hold the pipes that communicate reads to their ends: it returns when none is left.
MANY = "train", "baseline", "--seeds", *range(3), "--epochs", 10, "--workers", 1, "--out"


def test_killed_training_loses_no_run_leaves_no_worker_and_goes_on(tiny, tmp_path, one, capsys):
    process = start(tiny, *MANY, tmp_path, "--workers", 2)
    assert ", seed " in process.stdout.readline()  # at once, though it is a pipe
    process.kill()
    process.communicate(timeout=30)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert 1 <= len(kept) < 3
    jobs = [(dl.SETTINGS["baseline"], TrainConfig(10, seed=seed)) for seed in range(3)]
    assert len(dl.train_and_save(jobs, tmp_path, executor=one, root=tiny)) == 3
    assert capsys.readouterr().out.count(", seed ") == 3 - len(kept)
    assert kept.items() <= {path: path.read_bytes() for path in tmp_path.glob("*.pt")}.items()
    assert len(dl.load_runs(tmp_path)) == 3


def test_a_killed_worker_is_said_with_what_to_do_and_the_rest_is_kept(tiny, tmp_path):
    process = start(tiny, *MANY, tmp_path)
    process.stdout.readline()
    children = psutil.Process(process.pid).children()
    next(child for child in children if "spawn_main" in str(child.cmdline())).kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert re.search(r"baseline, seed 2 failed \(a worker was killed \(short of memory\?", err)
    assert 1 <= len(dl.load_runs(tmp_path)) < 3


@pytest.mark.skipif(os.name != "posix", reason="sends Ctrl-C to a session")
@pytest.mark.parametrize("when", ["workers start", "a run is finished"])
def test_ctrl_c_ends_training_cleanly(tiny, tmp_path, when):
    endless = [] if when == "a run is finished" else ["--epochs", 99_999]
    process = start(tiny, *MANY, tmp_path, *endless)
    while endless and len(psutil.Process(process.pid).children()) < 2:  # with a resource tracker
        time.sleep(0.02)
    time.sleep(1) if endless else process.stdout.readline()  # Python still imports there
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "dl_utils.py: interrupted; finished runs are kept"
    assert not list(tmp_path.glob("*.part"))


def plan(path, *rates):
    """A table of short runs without results."""
    short = {"setting": "dropout", "dropout": 0.1, "epochs": 8, "batch_size": 16}
    rows = [row for lr in rates for row in study_rows([None], lr=lr, **short)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_a_search_records_what_train_gives_and_has_no_test_split(tiny, tmp_path, one, monkeypatch):
    path = plan(tmp_path / "plan.csv", 0.01, 1e6)
    monkeypatch.setattr(dl, "train", spy := mock.Mock(side_effect=train))
    table = dl.search(path, one, root=tiny)
    given = [[*call.args[1]] for call in spy.call_args_list]
    assert given == 2 * [["train", "val"]], "a search can reach test data"
    splits, config = dl.load_fashion_mnist(tiny, 101), TrainConfig(8, 16, 101)
    alone = train(Setting("dropout", "d", 0.1, lr=0.01), splits, config)
    assert table.val_accuracy[0] == alone.metrics["val"].accuracy
    assert table.train_accuracy[0] == alone.metrics["train"].accuracy
    assert list(table.loc[1, dl.OUTCOME]) == [0.1, 0.1, 0.0], "a run that diverges counts as 0.1"
    assert pd.read_csv(path).equals(table)
    before = path.read_bytes()
    dl.search(path)  # nothing is missing
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("sgd", "sgdm", "row 2: optimizer is 'sgdm'; expected .*sgd"),
        (",8,", ",,", "row 2: epochs cannot be nan"),
        ("False", "no", "row 2: batch_norm cannot be no"),
        ("0.02,8,16,101,sgd,", "0.02,8,16,101,sgd,todo", "row 3: val_accuracy cannot be todo"),
        ("0.02,8", "0.01,8", "row 3: an earlier row has the same run"),
        ("\nA,", "\n,", "row 2: part cannot be nan"),
        ("\nA", "\npart,setting,dropout\nA", "row 2: dropout cannot be dropout"),  # a second header
        (",,\n", ",,,\n", "has the columns part, .*; expected, between commas, part, .* no more"),
        (",", ";", "has the columns part;setting;.*; expected, between commas, part, setting"),
    ],
)
def test_a_plan_that_cannot_be_run_is_said_and_kept(tmp_path, old, new, sentence):
    path = plan(tmp_path / "plan.csv", 0.01, 0.02)
    text = path.read_text(encoding="utf-8").replace(old, new)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan.csv.* {sentence}"):
        dl.search(path)
    assert path.read_text(encoding="utf-8") == text


def test_a_row_that_is_wrong_for_a_while_loses_no_outcome(tiny, tmp_path, one, monkeypatch):
    path = plan(tmp_path / "plan.csv", 0.01, 0.02)
    contents = iter([path.read_bytes() + b"A,dropout\n", path.read_bytes()])

    def train_and_write(*args, **options):
        run = train(*args, **options)
        path.write_bytes(next(contents))
        return run

    monkeypatch.setattr(dl, "train", train_and_write)
    with pytest.raises(ValueError, match="seed 101 failed .*plan.csv, row 4: dropout cannot be"):
        dl.search(path, one, root=tiny)
    assert pd.read_csv(path).val_accuracy.notna().all()


def test_rows_that_are_added_while_a_search_runs_are_kept(tiny, tmp_path, one, monkeypatch):
    path = plan(tmp_path / "plan.csv", 0.01)
    more = plan(tmp_path / "more.csv", 0.02).read_text(encoding="utf-8").split("\n", 1)[1]

    def add_rows_and_train(*args, **options):
        if len(pd.read_csv(path)) == 1:
            with open(path, "a", encoding="utf-8") as file:
                file.write(more)
        with pytest.raises(OSError, match="another search is running on"):
            dl.search(path)
        return train(*args, **options)

    monkeypatch.setattr(dl, "train", add_rows_and_train)
    table = dl.search(path, one, root=tiny)
    assert list(table.lr) == [0.01, 0.02] and list(table.val_accuracy.notna()) == [True, False]
