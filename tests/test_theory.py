"""The answers of theory.md against torch."""

import re

import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dl_utils as dl

NAMES = ["gamma", "beta", "x_hat", "variance", "mean", "x"]
THEORY = (ROOT / "theory.md").read_text(encoding="utf-8")


def differences(m, seed):
    """How far each formula is from autograd, in float64 on a random batch of m."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(2, m, dtype=torch.float64, generator=generator)
    gamma, beta = torch.randn(2, dtype=torch.float64, generator=generator)
    inputs = [part.clone().requires_grad_() for part in (gamma, beta, x)]
    mean = inputs[2].mean()
    variance = (inputs[2] - mean).square().mean()
    x_hat = (inputs[2] - mean) / (variance + 1e-3).sqrt()
    inputs[2:2] = [x_hat, variance, mean]
    y = inputs[0] * x_hat + inputs[1]
    theirs = F.batch_norm(x[:, None], None, None, gamma[None], beta[None], training=True, eps=1e-3)
    torch.testing.assert_close(y, theirs[:, 0])
    expected = torch.autograd.grad(y, inputs, upstream)
    found = dl.batch_norm_gradients(x, gamma, upstream, 1e-3)
    return {name: (found[name] - right).abs().max().item() for name, right in zip(NAMES, expected)}


@settings(max_examples=50, deadline=None)
@given(m=st.integers(2, 300), seed=st.integers(0, 2**31))
def test_gradients_equal_autograd_for_any_batch(m, seed):
    # float64 rounds at 1e-16; sums over m elements and 1 / sqrt(eps) enlarge it.
    assert max(differences(m, seed).values()) < 1e-9


def test_a_wrong_formula_would_be_seen(monkeypatch):
    right = dl.batch_norm_gradients
    monkeypatch.setattr(
        dl,
        "batch_norm_gradients",
        lambda *given: {name: value * (1 + 1e-6) for name, value in right(*given).items()},
    )
    assert min(differences(32, 0).values()) > 1e-9


def test_parameter_count_of_question_2_is_that_of_real_layers():
    layers = [nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 100), (100, 200), (200, 400))]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    for count in (*counts, sum(counts)):
        assert f"{count:,}" in THEORY
    images = torch.zeros(1, 3, 200, 300)
    for layer in layers:
        images = layer(images)
        assert rf"{images.shape[2]} \times {images.shape[3]}" in THEORY


def test_final_answers_hold_only_what_is_allowed():
    """Looks at what stands after the last equals sign of each answer."""
    parts = re.split(r"(?m)^\*\*([a-f])\.\*\*", THEORY.split("### Question 3")[1])[1:]
    for letter, part in zip(parts[::2], parts[1::2]):
        formulas = re.findall(r"\$\$(.+?)\$\$", part, flags=re.S)
        answer = formulas[-1 if letter == "f" else 0].split("=")[-1]
        found = set(re.findall(r"\\partial f}{\\partial (.+?)}[ \n$\\)]", answer + " "))
        allowed = {"y_i", "y_j"} | (set() if letter == "f" else {r"\hat{x}_i", r"\hat{x"})
        assert found and found <= allowed, letter
