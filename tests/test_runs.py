"""Folders of runs and tables of a study: what is finished stays, what lacks is run, whatever
is killed meanwhile."""

import contextlib
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
from conftest import SETTINGS, save, start, study_rows, weights_equal

import dl_utils as dl
from dl_utils import Setting, TrainConfig, train


def test_own_settings_and_configs_are_saved_collected_and_tested(tiny, tmp_path, one, capsys):
    strong = Setting("strong_dropout", "Dropout 0.5", dropout=0.5)
    classic = TrainConfig(2, 16, seed=3, activation="tanh", pooling="average")
    jobs = [(strong, classic), (SETTINGS["dropout"], TrainConfig(2, 16)), (strong, classic)]
    runs = dl.train_and_save(jobs, tmp_path, executor=one, root=tiny)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert runs[0] is runs[2] and names == ["dropout.pt", "strong_dropout-seed3.pt"]
    results, history = dl.collect(tmp_path)
    assert list(results.label) == ["Dropout", "Dropout 0.5"] and list(results.seed) == [0, 3]
    assert results.test_accuracy[1] == runs[0].metrics["test"].accuracy
    assert results.train_loss[1] == runs[0].metrics["train"].loss
    assert len(history) == 2 * 2 * 3 and set(history.setting) == {"dropout", "strong_dropout"}
    assert dl.main(["test", str(tmp_path), "--data", str(tiny)]) == 0
    assert "Dropout 0.5, seed 3" in capsys.readouterr().out
    assert dl.main(["collect", str(tmp_path)]) == 0
    assert pd.read_csv(tmp_path / "results.csv").equals(results)


def test_a_run_that_is_there_is_loaded_and_what_cannot_be_right_is_said_before_training(
    config, tmp_path, trained, monkeypatch
):
    save(tmp_path, trained["baseline"])
    before = (tmp_path / "baseline.pt").read_bytes()
    setting = replace(SETTINGS["baseline"], label="Plain")  # a label does not make another run
    (found,) = dl.train_and_save([(setting, config)], tmp_path, root="nowhere")
    assert weights_equal(found, trained["baseline"])
    for job in ((setting, replace(config, epochs=9)), (replace(setting, lr=0.5), config)):
        with pytest.raises(
            ValueError, match="another run: (epochs is 3, not 9|lr is .*, not 0.5);"
        ):
            dl.train_and_save([job], tmp_path)
    assert (tmp_path / "baseline.pt").read_bytes() == before
    with pytest.raises(ValueError, match="two different jobs have the same name and seed"):
        dl.train_and_save([(setting, TrainConfig(epochs)) for epochs in (1, 2)], tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="cannot be written to"):
        dl.train_and_save([(setting, config)], tmp_path / "new")
    (tmp_path / "baseline.pt").rename(tmp_path / "dropout.pt")
    with pytest.raises(ValueError, match=r"dropout.pt holds the run of baseline.pt; move"):
        dl.collect(tmp_path)


def processes(session):
    """Processes of a session that still run, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = path.read_text().rsplit(")", 1)[1].split()[:4]
            found += [path.parent] if int(sid) == session and state != "Z" else []
    return found


def wait_until_gone(process):
    deadline = time.monotonic() + 10
    while processes(process.pid):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
MANY = "train", "baseline", "--seeds", *range(6), "--epochs", 15, "--workers", 2, "--out"


def kill_after_a_run(process):
    assert ", seed " in process.stdout.readline()  # at once, though it is a pipe
    process.kill()
    process.communicate(timeout=20)
    wait_until_gone(process)


@needs_proc
def test_killed_training_loses_no_finished_run_and_leaves_no_worker(tiny, tmp_path):
    kill_after_a_run(start(tiny, *MANY, tmp_path))
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert 1 <= len(kept) < 6
    out, err = start(tiny, *MANY, tmp_path).communicate(timeout=100)
    assert f"6 of 6 runs ({len(kept)} were there already)" in out, err
    assert kept.items() <= {path: path.read_bytes() for path in tmp_path.glob("*.pt")}.items()
    assert len(dl.load_runs(tmp_path)) == 6


@needs_proc
def test_a_killed_worker_is_said_with_what_to_do_and_the_rest_is_kept(tiny, tmp_path):
    process = start(tiny, *MANY, tmp_path)
    process.stdout.readline()
    workers = [
        path for path in processes(process.pid) if b"spawn_main" in (path / "cmdline").read_bytes()
    ]
    os.kill(int(workers[0].name), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert re.search(r"not finished: \d runs, as a worker was killed \(short of memory\?", err)
    assert 1 <= len(dl.load_runs(tmp_path)) < 6
    wait_until_gone(process)


@needs_proc
@pytest.mark.parametrize("when", ["workers start", "a run is finished"])
def test_ctrl_c_ends_training_cleanly(tiny, tmp_path, when):
    endless = [] if when == "a run is finished" else ["--epochs", 99_999]
    process = start(tiny, *MANY, tmp_path, *endless)
    while endless and len(processes(process.pid)) < 4:  # with multiprocessing's resource tracker
        time.sleep(0.02)
    time.sleep(1) if endless else process.stdout.readline()  # Python still imports there
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "dl_utils.py: interrupted; finished runs are kept"
    assert not list(tmp_path.glob("*.part"))
    wait_until_gone(process)


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
        ("relu", "gelu", "activation is 'gelu'; expected one of relu, tanh"),
        (",8,", ",,", "epochs is nan"),
        ("val_accuracy", "accuracy", "val_accuracy"),
    ],
)
def test_a_plan_that_cannot_be_run_or_runs_elsewhere_is_said(tmp_path, old, new, sentence):
    path = plan(tmp_path / "plan.csv", 0.01, 0.02)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan.csv is not the table of a study: .*{sentence}"):
        dl.search(path)
    lock, failure = dl.FileLock(path.with_suffix(".lock")), pytest.raises(OSError, match="another")
    with lock, failure:
        dl.search(path)


@needs_proc
def test_a_killed_search_goes_on_with_what_is_missing(tiny, tmp_path):
    path = plan(tmp_path / "plan.csv", 0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
    kill_after_a_run(start(tiny, "search", path, "--workers", 2))
    kept = pd.read_csv(path).dropna()
    assert 1 <= len(kept) < 6
    out, err = start(tiny, "search", path, "--workers", 2).communicate(timeout=100)
    assert f"{path}: 6 of 6 runs" in out, err
    assert pd.read_csv(path).loc[kept.index].equals(kept), "a finished row changed"
    assert len(re.findall("dropout, seed 101: train", out)) == 6 - len(kept), "one ran again"


def test_rule_1_chooses_the_highest_mean_then_the_weaker_then_the_slower():
    def chosen(*cells):
        rows = [
            row
            for lr, dropout, accuracies in cells
            for row in study_rows(accuracies, lr=lr, dropout=dropout)
        ]
        best = dl.best_cells(pd.DataFrame(rows)).loc["baseline"]
        return best.lr, best.dropout

    low, high = (0.1, 0.2, 0.3), (0.2, 0.2, 0.5)
    assert chosen((0.01, 0.1, low), (0.02, 0.5, high)) == (0.02, 0.5)
    assert chosen((0.01, 0.5, low), (0.02, 0.1, low[::-1])) == (0.02, 0.1)
    assert chosen((0.02, 0.5, low), (0.01, 0.5, low[::-1])) == (0.01, 0.5)


def test_the_noise_band_is_two_standard_errors_of_a_paired_difference():
    cells = {0.1: (0.90, 0.92, 0.91), 0.2: (0.91, 0.91, 0.91), 0.4: (0.5, 0.6, 0.7)}
    rows = [row for lr, accuracies in cells.items() for row in study_rows(accuracies, lr=lr)]
    # Of two cells, the residuals are half of the differences' deviations: -0.01, 0.01, 0.
    variance = 4 * 0.005**2 / 2
    assert dl.noise_band(pd.DataFrame(rows)) == pytest.approx(2 * (2 * variance / 3) ** 0.5)
