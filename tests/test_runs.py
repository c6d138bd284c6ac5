"""Folders of runs and tables of a study: what is finished stays, what lacks is run, whatever
is killed meanwhile."""

import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import SETTINGS, run, start, weights_equal

import dl_utils as dl
from dl_utils import Setting, TrainConfig


@pytest.fixture
def one():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_own_settings_and_configs_are_saved_collected_and_tested(tiny, tmp_path, one, capsys):
    strong = Setting("strong_dropout", "Dropout 0.5", dropout=0.5)
    classic = TrainConfig(2, 16, seed=3, activation="tanh", pooling="average")
    jobs = [(strong, classic), (SETTINGS["dropout"], TrainConfig(2, 16))]
    runs = dl.train_and_save([*jobs, jobs[0]], tmp_path, executor=one, root=tiny)
    assert runs[0] is runs[2] and sorted(p.name for p in tmp_path.iterdir()) == [
        "dropout.pt",
        "strong_dropout-seed3.pt",
    ]
    results, history = dl.collect(tmp_path)
    assert list(results.label) == ["Dropout", "Dropout 0.5"] and list(results.seed) == [0, 3]
    assert results.test_accuracy[1] == runs[0].metrics["test"].accuracy
    assert results.train_loss[1] == runs[0].metrics["train"].loss
    assert len(history) == 2 * 2 * 3 and set(history.setting) == {"dropout", "strong_dropout"}
    assert dl.main(["test", str(tmp_path), "--data", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert (
        "Dropout 0.5, seed 3" in out
        and "equal, to within one image, what the files recorded" in out
    )
    assert dl.main(["collect", str(tmp_path)]) == 0
    assert pd.read_csv(tmp_path / "results.csv").equals(results)


def test_a_run_that_is_there_is_loaded_not_trained(tiny, config, tmp_path, trained, monkeypatch):
    dl.save_checkpoint(tmp_path / "baseline.pt", trained["baseline"])
    monkeypatch.setattr(dl, "train_many", lambda jobs, **_: [] if not jobs else pytest.fail())
    renamed = replace(SETTINGS["baseline"], label="Plain")  # a label does not make another run
    (found,) = dl.train_and_save([(renamed, config)], tmp_path)
    assert weights_equal(found, trained["baseline"])


def test_a_file_of_another_run_is_refused_and_kept(config, tmp_path, trained):
    dl.save_checkpoint(tmp_path / "baseline.pt", trained["baseline"])
    before = (tmp_path / "baseline.pt").read_bytes()
    for job in (
        (SETTINGS["baseline"], replace(config, epochs=9)),
        (replace(SETTINGS["baseline"], lr=0.5), config),
    ):
        with pytest.raises(
            ValueError, match=r"baseline.pt holds another run, Setting\(name='baseline'"
        ):
            dl.train_and_save([job], tmp_path)
    assert (tmp_path / "baseline.pt").read_bytes() == before
    jobs = [(SETTINGS["baseline"], TrainConfig(epochs)) for epochs in (1, 2)]
    with pytest.raises(ValueError, match="two different jobs have the same name and seed"):
        dl.train_and_save(jobs, tmp_path)


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, config, monkeypatch):
    (tmp_path / "file").write_text("")
    jobs = [(SETTINGS["baseline"], config)]
    for folder in (tmp_path / "file", "/proc/runs"):
        with pytest.raises(OSError, match=r"file|/proc/runs"):
            dl.train_and_save(jobs, folder)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="cannot be written to"):
        dl.train_and_save(jobs, tmp_path)


def test_a_swapped_or_copied_file_is_seen(tmp_path, trained):
    dl.save_checkpoint(tmp_path / "baseline.pt", trained["baseline"])
    shutil.copy(tmp_path / "baseline.pt", tmp_path / "dropout.pt")
    with pytest.raises(ValueError, match=r"dropout.pt holds what should be called baseline.pt"):
        dl.collect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoints"):
        dl.load_runs(tmp_path / "empty")


# Real processes, killed.


def processes(session):
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


def wait_until_gone(process):
    deadline = time.monotonic() + 10
    while processes(process.pid):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
MANY = "train", "baseline", "--seeds", *range(6), "--epochs", 15, "--workers", 2, "--out"


@needs_proc
def test_killed_training_loses_no_finished_run_and_leaves_no_worker(tiny, tmp_path):
    process = start(tiny, *MANY, tmp_path)
    assert "baseline, seed" in process.stdout.readline()  # at once, though it is a pipe
    process.kill()
    process.communicate(timeout=20)
    wait_until_gone(process)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert 1 <= len(kept) < 6
    code, out, err = run(tiny, *MANY, tmp_path)
    assert code == 0 and f"6 of 6 runs ({len(kept)} were there already)" in out, err
    assert kept.items() <= {path: path.read_bytes() for path in tmp_path.glob("*.pt")}.items()
    assert len(dl.load_runs(tmp_path)) == 6


@needs_proc
def test_a_killed_worker_is_said_with_what_to_do_and_the_rest_is_kept(tiny, tmp_path):
    process = start(tiny, *MANY, tmp_path)
    process.stdout.readline()
    workers = [pid for pid in processes(process.pid) if b"spawn_main" in cmdline(pid)]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    assert re.search(r"\d runs are not finished, as a worker was killed \(short of memory\?", err)
    assert 1 <= len(dl.load_runs(tmp_path)) < 6
    wait_until_gone(process)


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@needs_proc
@pytest.mark.parametrize("when", ["workers start", "a run is finished"])
def test_ctrl_c_ends_training_cleanly(tiny, tmp_path, when):
    process = start(tiny, *MANY, tmp_path)
    if when == "a run is finished":
        process.stdout.readline()
    else:
        while len(processes(process.pid)) < 4:  # with the resource tracker of multiprocessing
            time.sleep(0.02)
        time.sleep(1)  # Python still imports there
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "dl_utils.py: interrupted; finished runs are kept"
    assert not list(tmp_path.glob("*.part"))
    wait_until_gone(process)


# The study.


def plan(path, rates=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06), **values):
    """A table of runs without results."""
    defaults = {f.name: f.default for f in (*fields(Setting)[2:], *fields(TrainConfig))}
    row = {"part": "A", "setting": "dropout", **defaults, "dropout": 0.1, "batch_size": 16}
    rows = [{**row, "epochs": 8, "lr": lr, **values} for lr in rates]
    pd.DataFrame(rows).assign(**dict.fromkeys(dl.OUTCOME)).to_csv(path, index=False)
    return path


def test_a_search_records_what_train_gives_and_has_no_test_split(
    tiny, tmp_path, one, splits, monkeypatch
):
    path, given, train = plan(tmp_path / "plan.csv", (0.01, 1e6)), [], dl.train
    monkeypatch.setattr(
        dl, "train", lambda s, data, c, **o: given.append({*data}) or train(s, data, c, **o)
    )
    table = dl.search(path, one, root=tiny)
    assert given == 2 * [{"train", "val"}], "a search can reach test data"
    alone = train(Setting("dropout", "d", 0.1, lr=0.01), splits, TrainConfig(8, 16))
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
        ("lr,", "rate,", "'lr'"),
        (",8,", ",,", "epochs is nan"),
        ("val_accuracy", "accuracy", "val_accuracy"),
    ],
)
def test_a_plan_that_cannot_be_run_is_said_before_any_run(tmp_path, old, new, sentence):
    path = plan(tmp_path / "plan.csv")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan.csv is not the table of a study: .*{sentence}"):
        dl.search(path)


def test_two_searches_on_one_table_do_not_overwrite_each_other(tmp_path):
    path = plan(tmp_path / "plan.csv")
    with (
        dl.FileLock(path.with_suffix(".lock")),
        pytest.raises(OSError, match="another search is running on"),
    ):
        dl.search(path)


@needs_proc
def test_a_killed_search_goes_on_with_what_is_missing(tiny, tmp_path):
    path, kept = plan(tmp_path / "plan.csv"), pd.DataFrame()
    for code in (-signal.SIGKILL, 0):
        process = start(tiny, "search", path, "--workers", 2)
        process.stdout.readline()
        if code:
            process.kill()
        process.communicate(timeout=60)
        assert process.returncode == code
        wait_until_gone(process)
        table = pd.read_csv(path)
        done = table.dropna(subset="val_accuracy")
        assert len(kept) < len(done) and len(table) == 6
        assert kept.empty or done.loc[kept.index].equals(kept), "a finished row changed"
        kept = done
    assert len(kept) == 6


# The study that is recorded.


@pytest.fixture(scope="module")
def study():
    return pd.read_csv(dl.STUDY)


def test_the_recorded_study_has_three_seeds_of_every_configuration(study):
    assert list(study.columns) == ["part", "setting", *dl.FIELDS, *dl.OUTCOME]
    for _, cell in study.groupby(["part", *dl.CELL]):
        assert sorted(cell.seed) == [101, 102, 103]
    assert not study.duplicated(dl.FIELDS).any(), "a run stands twice"
    done = study.dropna()
    assert (done.val_accuracy.between(0.05, 1) & done.train_accuracy.between(0.05, 1)).all()
    hits = 5000 * done.val_accuracy
    assert ((hits - hits.round()).abs() < 1e-6).all(), "not an accuracy on 5,000 images"


def test_rule_1_chooses_the_highest_mean_then_the_weaker_then_the_slower():
    def row(lr, dropout, *accuracies):
        base = {f.name: f.default for f in (*fields(Setting)[2:], *fields(TrainConfig))}
        base |= {"part": "A", "setting": "dropout", "lr": lr, "dropout": dropout}
        return [base | {"seed": 101 + i, "val_accuracy": a} for i, a in enumerate(accuracies)]

    def chosen(*rows):
        cell = dl.best_cells(pd.DataFrame([row for cell in rows for row in cell])).loc["dropout"]
        return cell.lr, cell.dropout

    low, high = (0.1, 0.2, 0.3), (0.2, 0.2, 0.5)
    assert chosen(row(0.01, 0.1, *low), row(0.02, 0.5, *high)) == (0.02, 0.5)
    assert chosen(row(0.01, 0.5, *low), row(0.02, 0.1, *low[::-1])) == (0.02, 0.1)
    assert chosen(row(0.02, 0.5, *low), row(0.01, 0.5, *low[::-1])) == (0.01, 0.5)


def test_the_noise_band_is_two_standard_errors_of_a_paired_difference():
    rows = []
    base = {f.name: f.default for f in (*fields(Setting)[2:], *fields(TrainConfig))}
    for lr, accuracies in {
        0.1: (0.90, 0.92, 0.91),
        0.2: (0.91, 0.91, 0.91),
        0.4: (0.5, 0.6, 0.7),
    }.items():
        for seed, accuracy in zip((101, 102, 103), accuracies):
            rows.append(base | {"part": "A", "setting": "s", "lr": lr, "seed": seed,
                                "val_accuracy": accuracy})  # fmt: skip
    # Of two cells, the residuals are half of the differences' deviations: -0.01, 0.01, 0.
    variance = 4 * 0.005**2 / 2
    assert dl.noise_band(pd.DataFrame(rows)) == pytest.approx(2 * (2 * variance / 3) ** 0.5)
