"""The search: it cannot see test data, it loses nothing, its choices are those of the report."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

import dl_utils as dl


def study(seeds=(0, 1), epochs=2, lr=(0.01, 0.02)):
    grid = {"dropout": (0.1, 0.3), "lr": lr, "epochs": (epochs,), "batch_size": (32,)}
    return dl.Study("Learning rate", "dropout", seeds, **grid)


def test_a_study_is_every_combination_for_every_seed():
    jobs = study().jobs()
    assert len(jobs) == len(set(jobs)) == 8
    for setting, config in jobs:
        assert setting.name == "dropout" and setting.dropout in (0.1, 0.3)
        assert config.epochs == 2 and config.seed in (0, 1)


def test_search_needs_no_test_split_and_records_what_it_ran(splits, tmp_path, monkeypatch):
    path = tmp_path / "search.csv"
    plan = (study(seeds=(0,)),)
    without_test = {name: splits[name] for name in ("train", "val")}
    with ThreadPoolExecutor(1) as executor:
        table = dl.search(path, plan, executor, splits=without_test)
    assert list(table.columns) == [*dl.SEARCH_COLUMNS, "val_accuracy", "seconds"]
    assert len(table) == 4
    setting, config = plan[0].jobs()[0]
    alone = dl.train(setting, splits, config)
    row = table[(table.dropout == setting.dropout) & (table.lr == setting.lr)].iloc[0]
    assert row.val_accuracy == alone.metrics["val"].accuracy
    before = path.read_bytes()
    dl.search(path, plan, splits=without_test)  # nothing is missing
    assert path.read_bytes() == before
    monkeypatch.setitem(dl.QUESTIONS, "Learning rate", ("lr", ["dropout"]))
    ax = dl.plot_search(table, ["Learning rate"], plan).axes[0]
    assert ax.get_title() == "Learning rate" and len(ax.lines) >= 4


def test_a_search_that_has_just_begun_is_drawn(table):
    dl.plot_search(table, plan=dl.SEARCH[:2])
    figure = dl.plot_search(table[:10])
    assert [ax.get_title() for ax in figure.axes[:9]] == list(dl.QUESTIONS)


def test_a_study_has_a_panel():
    with pytest.raises(ValueError, match="no panel shows the question 'Momentum'"):
        dl.Study("Momentum", "baseline", lr=(0.1,))
    for key in ("split_seed", "seed", "lrr"):
        with pytest.raises(ValueError, match=f"a study cannot vary {key}"):
            dl.Study("Learning rate", "baseline", **{key: (0, 1)})


class Guarded(dict):
    def __getitem__(self, name):
        assert name != "test", "the test split was touched"
        return super().__getitem__(name)


def test_search_touches_no_test_data(splits, tmp_path):
    guarded = Guarded(splits)
    plan = (study(seeds=(0,), lr=(0.01,)),)
    with ThreadPoolExecutor(1) as executor:
        table = dl.search(tmp_path / "search.csv", plan, executor, splits=guarded)
    assert len(table) == 2
    with pytest.raises(AssertionError, match="the test split was touched"):
        dl.train(*plan[0].jobs()[0][:1], guarded, dl.TrainConfig(1, 32))


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import dl_utils as dl
from conftest import make_split

if __name__ == "__main__":
    grid = dict({grid})
    plan = [dl.Study("Learning rate", "baseline", **grid)]
    data = dict(train=make_split(330, 1), val=make_split(100, 2))
    try:
        dl.search(sys.argv[1], plan, splits=data, workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def session_processes(session):
    """Processes of a session that still run, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, sid = path.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state != "Z":
            found.append(path.parent.name)
    return found


TRAIN = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import dl_utils as dl
from conftest import make_split

if __name__ == "__main__":
    data = dict(train=make_split(330, 1), val=make_split(100, 2), test=make_split(150, 3))
    jobs = [(dl.SETTINGS["baseline"], dl.TrainConfig(4, 16, seed=seed)) for seed in range(4)]
    dl.train_and_save(jobs, sys.argv[1], splits=data, workers=1)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_killed_training_goes_on_with_what_is_missing(tmp_path, splits):
    script, folder = tmp_path / "run.py", tmp_path / "runs"
    script.write_text(TRAIN.format(root=str(ROOT)))
    process = subprocess.Popen([sys.executable, script, folder], start_new_session=True,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not list(folder.glob("*.pt")):
        time.sleep(0.02)
    process.kill()
    assert process.wait(100) == -signal.SIGKILL
    deadline = time.monotonic() + 100
    while session_processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_processes(process.pid), "workers are left"
    kept = {path: path.read_bytes() for path in folder.glob("*.pt")}
    jobs = [(dl.SETTINGS["baseline"], dl.TrainConfig(4, 16, seed=seed)) for seed in range(4)]
    with ThreadPoolExecutor(1) as executor:
        dl.train_and_save(jobs, folder, splits=splits, executor=executor)
    files = {path: path.read_bytes() for path in folder.glob("*.pt")}
    assert 1 <= len(kept) < len(files) == 4
    assert kept.items() <= files.items(), "a finished run is lost or was trained again"
    for path in files:
        dl.load_checkpoint(path)
    assert len(dl.read_table(folder / "results.csv")) == 4
    assert len(dl.read_table(folder / "history.csv")) == 4 * 4 * 3


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_interrupted_search_goes_on_with_what_is_missing(tmp_path, splits):
    script, path = tmp_path / "run.py", tmp_path / "search.csv"
    grid = {"epochs": (5,), "lr": (0.01, 0.012, 0.015, 0.02, 0.025, 0.03)}
    script.write_text(SCRIPT.format(root=str(ROOT), grid=grid))
    kept = {}

    def finished():
        rows = dl.read_table(path).set_index(dl.SEARCH_COLUMNS)
        for key, row in kept.items():
            assert tuple(rows.loc[key]) == row, "a finished run is lost or was run again"
        return {key: tuple(row) for key, row in rows.iterrows()}

    for blow in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([sys.executable, script, path], start_new_session=True,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and len(dl.read_table(path)) > len(kept):
                break
            time.sleep(0.02)
        if blow == signal.SIGKILL:
            process.kill()  # the parent alone: its workers have to notice
        else:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        _, err = process.communicate(timeout=100)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[blow]
        assert "Traceback" not in err
        while session_processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not session_processes(process.pid), "workers are left"
        kept = finished()
        assert 1 <= len(kept) < 6
    with ThreadPoolExecutor(1) as executor:
        plan = [dl.Study("Learning rate", "baseline", **grid)]
        dl.search(path, plan, executor, splits=splits)
    assert len(finished()) == 6


# The recorded search, and what was chosen by it.

TABLE = ROOT / "weights/search.csv"


@pytest.fixture(scope="module")
def table():
    return dl.read_table(TABLE)


def test_recorded_search_is_the_plan(table):
    planned = {tuple(dl._search_row(*job).values()) for study in dl.SEARCH for job in study.jobs()}
    recorded = dl._search_keys(table)
    assert len(recorded) == len(set(recorded)) >= 60
    assert set(recorded) == planned


def test_recorded_search_never_saw_test_data(table):
    assert not [column for column in table.columns if "test" in column]
    assert (table.val_accuracy * 5000 % 1 < 1e-6).all() or (
        (table.val_accuracy * 5000).round().div(5000).sub(table.val_accuracy).abs() < 1e-12
    ).all()


def test_what_was_chosen_was_searched(table):
    """Every setting of the report stands in the table with its chosen values, on three seeds."""
    for setting in dl.SETTINGS.values():
        keys = dl._search_row(setting, dl.TrainConfig())
        same = [key for key in keys if key != "seed"]
        runs = table[(table[same] == [keys[key] for key in same]).all(axis=1)]
        assert len(runs) >= 3, setting.name
