"""Checkpoints: whole or not at all, and nothing silently wrong comes out of one."""

import os
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import weights_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dl_utils as dl


@pytest.fixture(scope="module")
def good(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pt"
    dl.save_checkpoint(path, trained["combined"])
    return path


@pytest.mark.parametrize("name", dl.SETTINGS)
def test_what_is_saved_comes_back_and_draws_nothing(trained, splits, tmp_path, name):
    run, path, state = trained[name], tmp_path / "new" / "run.pt", torch.get_rng_state()
    dl.save_checkpoint(path, run)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    again = dl.load_checkpoint(path)
    assert torch.equal(state, torch.get_rng_state()), "another thread may draw dropout masks"
    assert vars(again.setting) == vars(run.setting) and again.config == run.config
    assert again.history.equals(run.history) and again.norms.equals(run.norms)
    assert (again.metrics, again.seconds, again.model.training) == (run.metrics, run.seconds, False)
    assert dl.evaluate(again.model, splits["test"]) == run.metrics["test"]
    assert again.model.layers.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert again.versions["torch"] == str(torch.__version__)
    assert again.versions["cpu"] == torch.backends.cpu.get_cpu_capability()


CASES = {
    "is damaged, or": lambda good: good.read_bytes()[:100_000],
    "is damaged": lambda good: b"accuracy: 99 %\n" * 50,
    "holds Python objects, whose code is not run; .*state_dict": lambda good: nn.Linear(1, 1),
    r"neither a checkpoint nor a state_dict\(\)": lambda good: [3],
    r"not those of this LeNet-5 .*Missing key.*conv1": lambda good: {"model": torch.load(good)},
    "it lacks 'setting'": lambda good: {"format": dl.FORMAT, "version": 2},
    "name is 5; exp": lambda good: torch.load(good) | {"setting": {"name": 5, "label": "?"}},
    "has version 1 of its format, not 2": lambda good: torch.load(good) | {"version": 1},
    "epochs is 0; expected a whole nu": lambda good: torch.load(good) | {"config": {"epochs": 0}},
    "mixup": lambda good: torch.load(good) | {"setting": {"mixup": 1}},  # of a later version
}


@pytest.mark.parametrize("sentence", CASES)
def test_an_unusable_file_is_named_with_its_cause_and_kept(good, tmp_path, capsys, sentence):
    path, bad = tmp_path / "bad.pt", CASES[sentence](good)
    path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
    data = path.read_bytes()
    assert dl.main(["test", str(path)]) == 2
    out, err = capsys.readouterr()
    assert re.match(f"dl_utils.py: .*bad.pt is not usable: .*{sentence}.*\n$", err) and not out
    assert path.read_bytes() == data


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_give_a_wrong_accuracy(good, trained, tmp_path_factory, data):
    damaged, run = bytearray(good.read_bytes()), trained["combined"]
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flip") / "flipped.pt"
    path.write_bytes(damaged)
    try:
        loaded = dl.load_checkpoint(path)
    except ValueError:
        return
    assert weights_equal(loaded, run) and loaded.metrics == run.metrics


@pytest.mark.parametrize("name", ["baseline", "batch_norm"])
def test_a_plain_state_dict_of_another_program_is_measured(tiny, trained, tmp_path, capsys, name):
    run, path = trained[name], tmp_path / "foreign.pt"
    torch.save(run.model.state_dict(), path)
    assert dl.main(["test", str(path), "--data", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert all(f"{100 * metrics.accuracy:.2f}" in out for metrics in run.metrics.values())
    assert "foreign.pt, test: no accuracy was recorded" in out and "equal" not in out


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_a_run_is_not_lost_by_a_wrapped_model_or_numbers_of_numpy(trained, tmp_path, wrap):
    run = trained["combined"]
    numbers = {name: dl.Metrics(*np.float64(pair)) for name, pair in run.metrics.items()}
    setting = replace(run.setting, lr=np.float64(0.06), batch_norm=np.bool_(True))
    config = replace(run.config, epochs=np.int64(3), batch_size=np.float64(16))
    own = replace(run, model=wrap(run.model), metrics=numbers, setting=setting, config=config)
    own.seconds, own.versions = np.float32(1.5), {np.str_("torch"): np.str_("2")}
    dl.save_checkpoint(tmp_path / "run.pt", own)
    again = dl.load_checkpoint(tmp_path / "run.pt")
    assert weights_equal(again, run) and again.metrics == run.metrics
    assert (again.setting, again.config) == (run.setting, run.config)
    assert again.history.equals(run.history) and again.versions == {"torch": "2"}
    with pytest.raises(ValueError, match="not those of this LeNet-5"):  # and so not written
        dl.save_checkpoint(tmp_path / "run.pt", replace(run, model=nn.Linear(9, 9)))
    assert weights_equal(dl.load_checkpoint(tmp_path / "run.pt"), run)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you tried to allocate 9 bytes")])
def test_a_sound_file_is_not_called_damaged_where_memory_lacks(good, monkeypatch, capsys, error):
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    assert dl.main(["test", str(good)]) == 2
    assert capsys.readouterr().err.startswith("dl_utils.py: out of memory; close other programs")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_names_the_file_and_loses_nothing(trained, tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, step, mock.Mock(side_effect=OSError(28, "No space left on device")))
    (tmp_path / "run.pt").write_bytes(b"old")
    with pytest.raises(OSError, match=r"run.pt cannot be written \(No space left on device\)"):
        dl.save_checkpoint(tmp_path / "run.pt", trained["combined"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"run.pt": b"old"}
