"""Checkpoints: whole or not at all, and nothing silently wrong comes out of one."""

import io
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from conftest import ROOT, SETTINGS, weights_equal
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
def test_what_is_saved_comes_back(trained, splits, tmp_path, name):
    run, path = trained[name], tmp_path / "new" / "run.pt"
    dl.save_checkpoint(path, run)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    again = dl.load_checkpoint(path)
    for key in ("setting", "config", "metrics", "seconds", "versions"):
        assert getattr(again, key) == getattr(run, key)
    assert again.history.equals(run.history) and not again.model.training
    assert dl.evaluate(again.model, splits["test"]) == run.metrics["test"]
    assert again.model.layers.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_file_holds_plain_types_and_says_where_it_was_made(good):
    payload = torch.load(io.BytesIO(good), weights_only=True)
    assert payload["versions"]["torch"] == str(torch.__version__)
    assert payload["versions"]["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert payload["setting"] == asdict(SETTINGS["combined"])


def saved(thing):
    torch.save(thing, buffer := io.BytesIO())
    return buffer.getvalue()


def altered(data, **change):
    return saved(torch.load(io.BytesIO(data), weights_only=True) | change)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


CASES = {
    "empty": (lambda good: b"", "is damaged, or no zip file as torch.save writes"),
    "truncated": (lambda good: good[: len(good) // 2], "is damaged, or no zip file"),
    "text": (lambda good: b"accuracy: 99 %\n" * 50, "is damaged, or no zip file"),
    "code": (lambda good: saved(Bomb()), "holds Python objects, whose code is not run"),
    "pickle": (lambda good: pickle.dumps(Bomb()), "is damaged, or no zip file"),
    "whole model": (lambda good: saved(nn.Linear(2, 2)), "holds Python objects, .*state_dict"),
    "tensor": (lambda good: saved(torch.zeros(3)), "neither a checkpoint .* nor a state dict"),
    "results": (lambda good: saved({"epoch": 3}), "neither a checkpoint .* nor a state dict"),
    "no tensors": (lambda good: saved({"model": {}}), "neither a checkpoint .* nor a state"),
    "version 1": (lambda good: altered(good, version=1), "has version 1 of its format, not 2"),
    "other network": (
        lambda good: saved(nn.Linear(784, 10).state_dict()),
        r"its tensors are not those of this LeNet-5 \(.*Missing key.*conv1",
    ),
    "field out of range": (
        lambda good: altered(good, config={"epochs": 0}),
        "epochs is 0; expected a whole number >= 1",
    ),
    "field of a later version": (lambda good: altered(good, setting={"mixup": 1}), "mixup"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unusable_file_ends_in_one_sentence_with_its_cause_and_is_kept(
    good, tmp_path, monkeypatch, capsys, case
):
    monkeypatch.chdir(tmp_path)
    make, sentence = CASES[case]
    path, data = tmp_path / "bad.pt", make(good)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.pt is not usable: .*{sentence}"):
        dl.load_checkpoint(path)
    assert dl.main(["test", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dl_utils.py: ") and err.count("\n") == 1
    assert not {"delete", "overwrit", "remove"} & {*err.split()}
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]  # no code ran, nothing was left


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
    except ValueError:
        return
    assert weights_equal(loaded, checkpoint) and loaded.metrics == checkpoint.metrics


@pytest.mark.parametrize("name", ["baseline", "batch_norm"])
def test_a_state_dict_from_elsewhere_is_measured(tiny, splits, trained, tmp_path, capsys, name):
    model, path = trained[name].model, tmp_path / "foreign.pt"
    state = model.state_dict()
    for foreign in (
        state,
        {"module." + key: value for key, value in state.items()},
        {"_orig_mod." + key: value for key, value in state.items()},
        {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}},
        {"state_dict": {"module._orig_mod." + key: value for key, value in state.items()}},
        {"model": state},
    ):
        torch.save(foreign, path)
        loaded = dl.load_checkpoint(path)
        assert dl.evaluate(loaded.model, splits["val"]) == dl.evaluate(model, splits["val"])
    assert dl.main(["test", str(path), "--data", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert f"{100 * trained[name].metrics['test'].accuracy:.2f}" in out
    assert "record nothing to compare with" in out


def test_loading_does_not_touch_the_generator_that_another_thread_draws_from(good, tmp_path):
    (tmp_path / "good.pt").write_bytes(good)
    before = torch.get_rng_state()
    with mock.patch("torch.random.fork_rng", side_effect=AssertionError):  # seen by other threads
        dl.load_checkpoint(tmp_path / "good.pt")
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_file_and_a_folder_are_called_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.pt does not exist"):
        dl.load_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(OSError, match="directory|Permission"):
        dl.load_checkpoint(tmp_path)


def test_a_full_disk_names_the_file_and_loses_nothing(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    path.write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"run.pt cannot be written \(No space left on device\)"):
        dl.save_checkpoint(path, checkpoint)
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


# The children are forked by a process of its own, which has loaded torch once and holds no
# other threads.
KILLS = """
import os, random, signal, sys, time
import torch, dl_utils as dl
torch.set_num_threads(1)  # those of OpenMP would not be in a forked child
good, folder, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
checkpoint = dl.load_checkpoint(good)
path = os.path.join(folder, "run.pt")
dl.save_checkpoint(path, checkpoint)  # the first time takes longer
start, written = time.perf_counter(), 0
for _ in range(4):
    dl.save_checkpoint(path, checkpoint)
once = (time.perf_counter() - start) / 4
random.seed(0)
for _ in range(rounds):
    os.utime(path, (1, 1))
    child = os.fork()
    if child == 0:
        while True:
            dl.save_checkpoint(path, checkpoint)
    time.sleep(random.uniform(0.5, 9) * once)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    dl.load_checkpoint(path)
    written += os.stat(path).st_mtime > 1
assert written > rounds / 4, written
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_any_moment_no_file_is_half_written(good, tmp_path):
    (tmp_path / "good.pt").write_bytes(good)
    command = [sys.executable, "-c", KILLS, tmp_path / "good.pt", tmp_path, "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
