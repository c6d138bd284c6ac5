"""Checkpoints: whole or not at all, and nothing silently wrong comes out of one."""

import io
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dl_utils as dl


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained["combined"]


@pytest.fixture(scope="module")
def good(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pt"
    dl.save_checkpoint(path, checkpoint)
    return path.read_bytes()


@pytest.mark.parametrize("name", dl.SETTINGS)
def test_round_trip(trained, splits, tmp_path, name):
    run, path = trained[name], tmp_path / "new" / "run.pt"
    dl.save_checkpoint(path, run)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    again = dl.load_checkpoint(path)
    for key in ("setting", "config", "epoch", "metrics", "seconds"):
        assert getattr(again, key) == getattr(run, key)
    assert again.history.equals(run.history)
    assert not again.model.training
    assert dl.evaluate(again.model, splits["test"]) == run.metrics["test"]
    assert dl.reevaluate(again, splits).agrees.all()


def test_file_holds_plain_types_and_versions(good):
    payload = torch.load(io.BytesIO(good), weights_only=True)
    assert payload["versions"]["torch"] == str(torch.__version__)
    assert payload["config"]["split_seed"] == 0


def test_a_file_that_is_there_is_not_overwritten_unless_told(checkpoint, tmp_path):
    path = tmp_path / "run.pt"
    path.write_text("precious")
    with pytest.raises(dl.CheckpointError, match="run.pt exists already; name another file"):
        dl.save_checkpoint(path, checkpoint)
    assert path.read_text() == "precious"
    dl.save_checkpoint(path, checkpoint, overwrite=True)
    assert dl.load_checkpoint(path).epoch == checkpoint.epoch


def rewritten(data, change, sign=True):
    payload = torch.load(io.BytesIO(data), weights_only=True)
    change(payload)
    if sign:
        payload["sha256"] = dl._digest(payload)
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def weights(**change):
    """A change of a payload's tensors."""
    return lambda payload: payload["state_dict"].update(change)


FC5 = "layers.fc5.bias"
CASES = {
    "empty": (lambda good: b"", "cannot be read as plain tensors"),
    "truncated": (lambda good: good[: len(good) // 2], "cannot be read as plain tensors; train"),
    "text": (lambda good: b"accuracy: 99 %\n" * 50, "cannot be read as plain tensors"),
    "code": (lambda good: saved(Bomb()), "cannot be read as plain tensors"),
    "code, plain pickle": (lambda good: pickle.dumps(Bomb()), "cannot be read as plain tensors"),
    "whole model": (lambda good: saved(nn.Linear(2, 2)), "cannot be read as plain tensors"),
    "tensor": (lambda good: saved(torch.zeros(3)), "it holds a Tensor, not a checkpoint"),
    "list": (lambda good: saved([1, 2]), "it holds a list, not a checkpoint"),
    "empty dictionary": (lambda good: saved({}), "it is of .*None.*; this program reads .*EX1"),
    "other dictionary": (
        lambda good: saved({"epoch": 3}),
        "it is of .*None.*; this program reads .*EX1",
    ),
    "other version": (
        lambda good: rewritten(good, lambda p: p.update(version=2)),
        "it is of .*'version': 2}; this program reads .*'version': 1}",
    ),
    "no state_dict": (
        lambda good: rewritten(good, lambda p: p.pop("state_dict"), sign=False),
        "it lacks state_dict",
    ),
    "setting field unknown": (
        lambda good: rewritten(good, lambda p: p["setting"].update(mixup=1)),
        "Setting.*unexpected keyword argument 'mixup'",
    ),
    "setting field missing": (
        lambda good: rewritten(good, lambda p: p["setting"].pop("name")),
        "Setting.*missing.*'name'",
    ),
    "setting field left to its default": (
        lambda good: rewritten(good, lambda p: p["setting"].pop("lr")),
        "its setting or its config lacks fields",
    ),
    "setting no dictionary": (
        lambda good: rewritten(good, lambda p: p.update(setting=3)),
        r"Setting\(\) argument",
    ),
    "dropout 2.0": (
        lambda good: rewritten(good, lambda p: p["setting"].update(dropout=2.0)),
        "dropout is 2.0; expected a finite number >= 0 and < 1",
    ),
    "dropout text": (
        lambda good: rewritten(good, lambda p: p["setting"].update(dropout="much")),
        "dropout is 'much'; expected a finite number",
    ),
    "negative weight decay": (
        lambda good: rewritten(good, lambda p: p["setting"].update(weight_decay=-1.0)),
        "weight_decay is -1.0; expected",
    ),
    "epochs 0": (
        lambda good: rewritten(good, lambda p: p["config"].update(epochs=0)),
        "epochs is 0; expected",
    ),
    "tensor missing": (
        lambda good: rewritten(good, lambda p: p["state_dict"].pop(FC5)),
        f'for LeNet5: Missing key.*"{FC5}"',
    ),
    "tensor extra": (
        lambda good: rewritten(good, weights(extra=torch.zeros(1))),
        'for LeNet5: Unexpected key.*"extra"',
    ),
    "other shape": (
        lambda good: rewritten(good, weights(**{FC5: torch.zeros(11)})),
        rf"size mismatch for {FC5}: .*\[11\].*\[10\]",
    ),
    "other type": (
        lambda good: rewritten(good, weights(**{FC5: torch.zeros(10).half()})),
        rf"{FC5} is of type torch.float16; expected torch.float32",
    ),
    "no count of batches": (
        lambda good: rewritten(
            good, lambda p: p["state_dict"].pop("layers.norm1.num_batches_tracked")
        ),
        "layers.norm1.num_batches_tracked",
    ),
    "NaN": (
        lambda good: rewritten(good, weights(**{FC5: torch.full((10,), float("nan"))})),
        f"{FC5} holds NaN or infinite values",
    ),
    "infinity": (
        lambda good: rewritten(good, weights(**{FC5: torch.full((10,), float("inf"))})),
        f"{FC5} holds NaN or infinite values",
    ),
    "negative variance": (
        lambda good: rewritten(good, weights(**{"layers.norm1.running_var": -torch.ones(6)})),
        "layers.norm1.running_var holds negative variances",
    ),
    "no tensor": (
        lambda good: rewritten(good, weights(**{FC5: [0.0] * 10}), sign=False),
        f'"{FC5}", expected torch.Tensor .* received',
    ),
    "other network": (
        lambda good: saved(nn.Linear(784, 10).state_dict()),
        'for LeNet5: Missing key.*"layers.conv1.weight".*Unexpected key.*"bias"',
    ),
    "sparse tensor": (
        lambda good: rewritten(good, weights(**{FC5: torch.zeros(10).to_sparse()}), sign=False),
        "(cannot be read as plain tensors|for LeNet5: While copying)",
    ),
    "state_dict a list": (
        lambda good: rewritten(good, lambda p: p.update(state_dict=[1]), sign=False),
        "Expected state_dict to be dict-like, got .*list",
    ),
    "metrics text": (
        lambda good: rewritten(good, lambda p: p["metrics"].update(test=["a", "b"])),
        "could not convert string to float",
    ),
    "history of other columns": (
        lambda good: rewritten(good, lambda p: p.update(history={"a": [1]})),
        "its history lacks columns or has others",
    ),
    "weights altered": (
        lambda good: rewritten(good, weights(**{FC5: torch.zeros(10)}), sign=False),
        "its contents do not match its checksum",
    ),
    "accuracy altered": (
        lambda good: rewritten(good, lambda p: p["metrics"].update(test=[0.1, 0.99]), sign=False),
        "its contents do not match its checksum",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_unusable_files_end_in_one_sentence(good, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    make, sentence = CASES[case]
    path, data = tmp_path / "bad.pt", make(good)
    path.write_bytes(data)
    with pytest.raises(
        dl.CheckpointError, match=f"bad.pt is not a usable checkpoint: .*{sentence}"
    ) as caught:
        dl.load_checkpoint(path)
    said = str(caught.value)
    assert "\n" not in said and "\x1b" not in said and "torch.load" not in said
    assert said.endswith("; train it again, with overwriting")
    assert dl.main(["test", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dl_utils.py: ") and err.count("\n") == 1
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]  # no code ran, nothing was left


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt does not exist; expected a checkpoint"):
        dl.load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(dl.CheckpointError, match="cannot be read .*; expected a checkpoint file"):
        dl.load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["baseline", "batch_norm"])
@pytest.mark.parametrize("norm_layers", ["all", "conv"])
def test_a_bare_state_dict_is_accepted(splits, tmp_path, name, norm_layers):
    setting = replace(dl.SETTINGS[name], norm_layers=norm_layers)
    model = dl.build_model(setting, seed=3)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    bare = dl.load_checkpoint(tmp_path / "bare.pt")
    assert bare.setting.batch_norm == setting.batch_norm and bare.config is None
    assert dl.evaluate(bare.model, splits["val"]) == dl.evaluate(model, splits["val"])
    with pytest.raises(dl.CheckpointError, match="a bare state_dict has no history to save"):
        dl.save_checkpoint(tmp_path / "new.pt", bare)


@pytest.mark.parametrize(
    "change",
    [
        {"history": pd.DataFrame()},
        {"history": pd.DataFrame(columns=[*dl.HISTORY_COLUMNS, "lr"])},
        {"epoch": None},
        {"epoch": np.int64(2)},
        {"seconds": None},
        {"metrics": {"val": dl.Metrics(np.float64(0.1), object())}},
    ],
)
def test_what_could_not_be_read_again_is_not_written(checkpoint, tmp_path, change):
    with pytest.raises(dl.CheckpointError, match="run.pt is not written, as it could not be read"):
        dl.save_checkpoint(tmp_path / "run.pt", replace(checkpoint, **change))
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_said(checkpoint, tmp_path):
    for use in (dl.load_checkpoint, lambda path: dl.save_checkpoint(path, checkpoint)):
        with pytest.raises(dl.CheckpointError, match="File name too long"):
            use(tmp_path / ("x" * 300))


def test_loading_leaves_the_global_generator_alone(good, tmp_path):
    (tmp_path / "good.pt").write_bytes(good)
    before = torch.get_rng_state()
    loaded = dl.load_checkpoint(tmp_path / "good.pt")
    assert torch.equal(before, torch.get_rng_state())
    with mock.patch("torch.random.fork_rng", side_effect=AssertionError):  # seen by other threads
        dl.load_checkpoint(tmp_path / "good.pt")
    assert loaded.model.layers.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_give_a_wrong_accuracy(good, checkpoint, tmp_path_factory, data):
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flip") / "flipped.pt"
    path.write_bytes(damaged)
    try:
        loaded = dl.load_checkpoint(path)
    except dl.CheckpointError:
        return
    same = map(torch.equal, loaded.model.state_dict().values(),
               checkpoint.model.state_dict().values())  # fmt: skip
    assert all(same) and loaded.metrics == checkpoint.metrics


def test_a_full_disk_leaves_nothing_and_loses_nothing(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: dl.save_checkpoint(path, checkpoint, overwrite=True),
        lambda: dl.add_rows(tmp_path / "rows.csv", pd.DataFrame({"key": [1]}), ["key"]),
    ):
        with pytest.raises(
            dl.CheckpointError, match=r"(run.pt|rows.csv) cannot be written \(No sp"
        ):
            write()
        left = [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"]
        assert path.read_text() == "old" and left == ["run.pt"]


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, config):
    (tmp_path / "file").write_text("not a folder")
    jobs = [(dl.SETTINGS["baseline"], config)]
    for folder in (tmp_path / "file", "/proc/runs"):
        with pytest.raises(ValueError, match="cannot be written to"):
            dl.train_and_save(jobs, folder)


# What follows kills real processes. The children are forked by a process of their own, which
# has loaded torch once and holds no other threads.
KILLS = """
import os, random, signal, sys, time
import pandas as pd, torch, dl_utils as dl
torch.set_num_threads(1)  # those of OpenMP would not be in a forked child
good, folder, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = dl.load_checkpoint(good)
path, table = os.path.join(folder, "run.pt"), os.path.join(folder, "rows.csv")

def save(round, number):
    dl.save_checkpoint(path, checkpoint, overwrite=True)
    row = pd.DataFrame([{"round": round, "number": number}])
    dl.add_rows(table, row, ["round", "number"])

save(0, 0)  # the first time takes longer
start = time.perf_counter()
for number in range(1, 5):
    save(0, number)
once = (time.perf_counter() - start) / 4
random.seed(0)
added = 5
for round in range(1, rounds + 1):
    child = os.fork()
    if child == 0:
        for number in range(10**6):
            save(round, number)
    time.sleep(random.uniform(0.5, 4) * once)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    dl.load_checkpoint(path)
    rows = dl.read_table(table)
    for _, group in rows.groupby("round"):
        assert list(group.number) == list(range(len(group))), "a row is lost"
    assert len(rows) >= added, "rows are lost"
    added = len(rows)
assert added > 5 + rounds / 4, added
"""

APPENDS = """
import os, sys
import pandas as pd, dl_utils as dl
children = []
for process in range(4):
    child = os.fork()
    if child == 0:
        for number in range(15):
            dl.add_rows(sys.argv[1], pd.DataFrame([{"process": process, "number": number}]),
                        ["process", "number"])
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert len(dl.read_table(sys.argv[1])) == 60
"""


def run_script(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_any_moment_no_file_is_half_written(good, tmp_path):
    (tmp_path / "good.pt").write_bytes(good)
    run_script(KILLS, tmp_path / "good.pt", tmp_path, 30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_processes_that_add_at_once_lose_no_row(tmp_path):
    run_script(APPENDS, tmp_path / "rows.csv")


def test_added_rows_replace_those_of_the_same_keys_to_the_last_digit(tmp_path):
    path, value = tmp_path / "rows.csv", 0.1 + 0.2
    dl.add_rows(path, pd.DataFrame({"key": [1, 2], "value": [value, 1.0]}), ["key"])
    dl.add_rows(path, pd.DataFrame({"key": [2, 3], "value": [random.random(), 5.0]}), ["key"])
    table = dl.read_table(path)
    assert list(table.key) == [1, 2, 3] and table.value[0] == value and table.value[1] != 1.0


def test_rows_that_are_there_already_leave_the_table_as_it_is(tmp_path):
    path, rows = tmp_path / "rows.csv", pd.DataFrame({"key": ["a", "a", "b"], "value": [1, 2, 3]})
    dl.add_rows(path, rows, ["key"])
    dl.read_table(path).assign(note=["mine", "too", "kept"]).to_csv(path, index=False)
    before = path.read_bytes()
    dl.add_rows(path, rows[rows.key == "a"], ["key"])
    assert path.read_bytes() == before
    dl.add_rows(path, rows[rows.key == "a"].assign(value=7), ["key"])
    table = dl.read_table(path)
    assert list(table.key) == ["b", "a", "a"] and list(table.value) == [3, 7, 7]
    assert table.note[0] == "kept"
