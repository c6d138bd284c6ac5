"""Checkpoints: whole or not at all, and nothing silently wrong comes out of one."""

import os
import re
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from conftest import weights_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dl_utils as dl


@pytest.fixture(scope="module")
def good(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.pt"
    dl.save_checkpoint(path, trained["combined"])
    return path


@pytest.mark.parametrize("name", dl.SETTINGS)
def test_what_is_saved_comes_back_in_plain_types_and_draws_nothing(trained, splits, tmp_path, name):
    run, path, state = trained[name], tmp_path / "new" / "run.pt", torch.get_rng_state()
    dl.save_checkpoint(path, run)
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    again = dl.load_checkpoint(path)
    assert torch.equal(state, torch.get_rng_state()), "another thread may draw dropout masks"
    for key in ("setting", "config", "metrics", "seconds", "versions"):
        assert getattr(again, key) == getattr(run, key)
    assert again.history.equals(run.history) and not again.model.training
    assert dl.evaluate(again.model, splits["test"]) == run.metrics["test"]
    assert again.model.layers.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    payload = torch.load(path, weights_only=True)
    assert payload["setting"] == asdict(run.setting)
    assert payload["versions"]["torch"] == str(torch.__version__)
    assert payload["versions"]["cpu"] == torch.backends.cpu.get_cpu_capability()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code from the file was run",)


CASES = {
    "is damaged, or no zip file": lambda good: good.read_bytes()[:100_000],
    "is damaged, or no zip file as torch.save writes": lambda good: b"accuracy: 99 %\n" * 50,
    "holds Python objects, whose code is not run; .*state_dict": lambda good: Bomb(),
    "neither a checkpoint .* nor a state dict": lambda good: {"epoch": 3},
    "has version 1 of its format, not 2": lambda good: torch.load(good) | {"version": 1},
    r"not those of this LeNet-5 \(.*Missing key.*conv1": lambda good: nn.Linear(9, 9).state_dict(),
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
    assert not {"delete", "overwrite", "remove"} & {*err.split()}
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


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
def test_a_state_dict_from_elsewhere_is_measured(tiny, splits, trained, tmp_path, capsys, name):
    run, path = trained[name], tmp_path / "foreign.pt"
    state = run.model.state_dict()
    for foreign in (
        state,
        {"_orig_mod." + key: value for key, value in state.items()},
        {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}},
        {"state_dict": {"module._orig_mod." + key: value for key, value in state.items()}},
        {"model": state},
    ):
        torch.save(foreign, path)
        assert dl.evaluate(dl.load_checkpoint(path).model, splits["val"]) == run.metrics["val"]
    assert dl.main(["test", str(path), "--data", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert f"{100 * run.metrics['test'].accuracy:.2f}" in out
    assert "record nothing to compare with" in out


def test_a_full_disk_names_the_file_and_loses_nothing(trained, tmp_path, monkeypatch):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "run.pt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match=r"run.pt cannot be written \(No space left on device\)"):
        dl.save_checkpoint(path, trained["combined"])
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
