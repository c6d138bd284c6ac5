"""The search: it cannot see test data, it loses nothing, its choices are those of the report."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

import dl_utils as dl
from dl_utils import Setting, TrainConfig

RATES = (0.01, 0.012, 0.015, 0.02, 0.025, 0.03)
JOBS = [(Setting("dropout", "Dropout", 0.1, lr=lr), TrainConfig(5, 16)) for lr in RATES]


def planned(path, jobs=JOBS):
    """A plan of these jobs: a table without results."""
    rows = [{"questions": "Learning rate", **dl._search_row(*job)} for job in jobs]
    pd.DataFrame(rows).assign(val_accuracy=None, seconds=None).to_csv(path, index=False)
    return path


def test_search_needs_no_test_split_and_records_what_it_ran(splits, tmp_path):
    path, plan = tmp_path / "search.csv", planned(tmp_path / "plan.csv", JOBS[:3])
    without_test = {name: splits[name] for name in ("train", "val")}
    with ThreadPoolExecutor(1) as executor:
        table = dl.search(path, plan, executor, splits=without_test)
    assert list(table.columns) == ["questions", *dl.SEARCH_COLUMNS, "val_accuracy", "seconds"]
    assert [dl._search_job(row) for row in table.to_dict("records")] == JOBS[:3]
    alone = dl.train(JOBS[1][0], splits, JOBS[1][1])
    assert table.val_accuracy[1] == alone.metrics["val"].accuracy
    before = path.read_bytes()
    dl.search(path, plan, splits=without_test)  # nothing is missing
    assert path.read_bytes() == before
    ax = dl.plot_search(table, ["Learning rate"]).axes[0]
    assert ax.get_title() == "Learning rate" and len(ax.lines) >= 3


def test_a_row_without_an_accuracy_is_run_in_its_own_table(splits, tmp_path):
    path = planned(tmp_path / "search.csv", JOBS[:2])
    with ThreadPoolExecutor(1) as executor:
        table = dl.search(path, path, executor, splits=splits)
    assert len(table) == 2 and table.notna().all(axis=None)
    dl.search(path, path)  # nothing is missing


def test_a_plan_that_cannot_be_run_is_said_before_any_run(tmp_path):
    plan = planned(tmp_path / "plan.csv", JOBS[:1])
    text = plan.read_text()
    for old, new, sentence in (
        ("relu", "gelu", "activation is 'gelu'; expected one of relu, tanh"),
        ("questions", "question", "plan.csv lacks the columns questions; move it"),
        ("Learning rate", "Learning Rate", "plan.csv has a row of 'Learning Rate', 'dropout'; exp"),
        (
            "rate,dropout",
            "rate,droput",
            "plan.csv has a row of 'Learning rate', 'droput'; expected keys",
        ),
        (",16,", ",,", "plan.csv is not a table .Integer column has NA values"),
        (",False,", ",no,", "plan.csv is not a table "),
    ):
        plan.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=sentence):
            dl.search(tmp_path / "search.csv", plan)
    with pytest.raises(FileNotFoundError, match="gone.csv does not exist; expected a table"):
        dl.search(tmp_path / "search.csv", tmp_path / "gone.csv")


def test_a_search_that_has_just_begun_is_drawn(table):
    begun = table.assign(val_accuracy=table.val_accuracy.where(table.index < 10))
    for part in (begun, table[:10], table):
        figure = dl.plot_search(part)
        assert [ax.get_title() for ax in figure.axes[:9]] == list(dl.QUESTIONS)


class Guarded(dict):
    def __getitem__(self, name):
        assert name != "test", "the test split was touched"
        return super().__getitem__(name)


def test_search_touches_no_test_data(splits, tmp_path):
    guarded, plan = Guarded(splits), planned(tmp_path / "plan.csv", JOBS[:1])
    with ThreadPoolExecutor(1) as executor:
        table = dl.search(tmp_path / "search.csv", plan, executor, splits=guarded)
    assert len(table) == 1
    with pytest.raises(AssertionError, match="the test split was touched"):
        dl.train(JOBS[0][0], guarded, JOBS[0][1])


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import dl_utils as dl
from conftest import make_split

if __name__ == "__main__":
    data = dict(train=make_split(330, 1), val=make_split(100, 2))
    try:
        dl.search(sys.argv[1], {plan!r}, splits=data, workers=2)
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
    plan = planned(tmp_path / "plan.csv")
    script.write_text(SCRIPT.format(root=str(ROOT), plan=str(plan)))
    kept = {}

    def finished():
        rows = dl.read_table(path).set_index("lr")
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
        dl.search(path, plan, executor, splits=splits)
    assert len(finished()) == 6


# The recorded search, and what was chosen by it.

TABLE = ROOT / "weights/search.csv"


@pytest.fixture(scope="module")
def table():
    return dl.read_table(TABLE)


def test_recorded_search_can_be_run_again_and_is_complete(table, monkeypatch, capsys):
    jobs = [dl._search_job(row) for row in table.to_dict("records")]
    assert len(jobs) == len(set(jobs)) >= 60
    assert table.notna().all(axis=None)
    before = TABLE.read_bytes()
    monkeypatch.chdir(ROOT)
    assert dl.main(["search"]) == 0 and TABLE.read_bytes() == before  # nothing is missing
    assert capsys.readouterr().out == f"weights/search.csv: {len(table)} runs\n"
    assert {name for row in table.questions for name in row.split("; ")} == set(dl.QUESTIONS)


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
        assert len(runs) >= 3, f"weights/search.csv needs {setting.name} with its values, 3 seeds"
