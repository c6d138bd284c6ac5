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


def test_parameter_count_of_question_2_is_that_of_real_layers():
    layers = [nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 100), (100, 200), (200, 400))]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    for count in (*counts, sum(counts)):
        assert f"{count:,}" in THEORY
    images = torch.zeros(1, 3, 200, 300)
    for layer in layers:
        images = layer(images)
        assert rf"{images.shape[2]} \times {images.shape[3]}" in THEORY


PYTHON = {  # of what stands in the answers to question 3
    r"\\frac\{\\partial f\}\{\\partial y_[ij]\}": "upstream",
    r"\\frac\{\\partial f\}\{\\partial \\hat\{x\}_[ij]\}": "inner",
    r"\\hat\{x\}_[ij]": "x_hat",
    r"\(x_[ij] - \\mu\)": "deviation",
    r"\\sigma\^2": "variance",
    r"\\sqrt\{(.+?)\}": r"(\1)**(1/2)",
    r"\^\{(.+?)\}": r"**(\1)",
    r"\\frac\{(.+?)\}\{(.+?)\}": r"((\1)/(\2))",
    r"\\sum_[ij] ([\w ]+\w)": r"(\1).sum()",
    r"\\left|\\right|\\": "",
    r"(?<=[\w)]) +(?=[\w(])": "*",
}


def test_every_answer_as_it_is_written_is_right_and_holds_only_what_is_allowed():
    x, upstream = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gamma, epsilon = 0.75, 1e-3
    right = list(dl.batch_norm_gradients(x, torch.tensor(gamma), upstream, epsilon).values())
    deviation, variance = x - x.mean(), x.var(correction=0)
    given = {"upstream": upstream, "deviation": deviation, "variance": variance, "m": 9}
    given |= {"gamma": gamma, "epsilon": epsilon, "x_hat": deviation / (variance + epsilon).sqrt()}
    with_c = given | {"inner": gamma * upstream}
    parts = re.split(r"(?m)^\*\*[a-f]\.\*\*", THEORY.split("### Question 3")[1])[1:]
    for part, expected, letter in zip(parts, right, "abcdef", strict=True):
        answers = [text.split("=")[-1] for text in re.findall(r"\$\$(.+?)\$\$", part, flags=re.S)]
        allowed = [with_c, given] if letter in "de" else [given]
        for answer, names in zip(answers[-len(allowed) :], allowed, strict=True):
            for pattern, python in PYTHON.items():
                answer = re.sub(pattern, python, " ".join(answer.split()))
            torch.testing.assert_close(eval(answer, names), expected, msg=f"{letter}: {answer}")
