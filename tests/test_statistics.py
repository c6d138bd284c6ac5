"""What the report says of differences: each number against an independent way to it."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import dl_utils as dl

D, W, B = dl.TECHNIQUES
NAMES = {
    (0, 0, 0): "baseline",
    (1, 0, 0): D,
    (0, 1, 0): W,
    (0, 0, 1): B,
    (1, 1, 0): f"{D}_{W}",
    (1, 0, 1): f"{D}_{B}",
    (0, 1, 1): f"{W}_{B}",
    (1, 1, 1): "combined",
}


@pytest.fixture(autouse=True)
def ninth(monkeypatch):
    """A setting beside the eight of the factorial."""
    monkeypatch.setitem(dl.SETTINGS, "strong", dl.Setting("strong", "Strong", dropout=0.5))


def results_of(table):
    """results of a table of accuracies, settings in columns, seeds in rows."""
    return (
        table.rename_axis(columns="setting", index="seed")
        .stack()
        .rename("test_accuracy")
        .reset_index()
    )


@pytest.fixture
def table():
    noise = np.random.default_rng(0).normal(0, 0.002, (8, 9))
    by_seed = np.random.default_rng(1).normal(0, 0.01, (8, 1))  # must not widen anything
    truth = [0.9 + 0.001 * d + 0.004 * w + 0.005 * b - 0.002 * w * b for d, w, b in NAMES]
    return pd.DataFrame(noise + by_seed + [*truth, 0.5], columns=[*NAMES.values(), "strong"])


def test_eight_settings_need_a_wider_difference_and_49_degrees_of_freedom(table):
    pairs = itertools.product(range(8), range(8))  # a two-way table by least squares
    design = np.array([[*np.eye(8)[seed], *np.eye(8)[name][1:]] for seed, name in pairs])
    rest = np.linalg.lstsq(design, table.drop(columns="strong").to_numpy().ravel(), rcond=None)[1]
    expected = stats.studentized_range.ppf(0.95, 8, 49) * math.sqrt(rest.item() / 49 / 8)
    results = results_of(table.drop(columns="strong"))
    for more in ([], [results.iloc[[0]].assign(seed=8)]):  # one setting may have more seeds
        assert dl.tukey_hsd(pd.concat([results, *more])) == pytest.approx(expected)


def test_effects_of_the_factorial_are_what_went_in_with_intervals_as_wide_as_their_means(table):
    found = dl.effects(results_of(table))
    effect, half = found.effect, found.half_width
    for k, name in enumerate(dl.TECHNIQUES):
        on, off = ([NAMES[f] for f in NAMES if f[k] == level] for level in (1, 0))
        assert effect[name] == pytest.approx((table[on].mean() - table[off].mean().array).mean())
        for before, after in zip(off, on):
            gain = table[after].mean() - table[before].mean()
            assert effect[f"{name} over {before}"] == pytest.approx(gain)
    total = effect[[f"{name} over baseline" for name in dl.TECHNIQUES]].sum()
    assert effect["sum of single gains"] == pytest.approx(total)
    assert effect["gain of all three"] == pytest.approx((table.combined - table.baseline).mean())
    more = [effect[f"{W} over {name}"] for name in (B, f"{D}_{B}", "baseline", D)]
    assert effect[f"{W} and {B}"] == pytest.approx((more[0] + more[1] - more[2] - more[3]) / 2)
    assert abs(effect[f"{W} and {B}"] + 0.002) < half[f"{W} and {B}"], "the truth is outside"
    # A main effect is a difference of two means of 32 runs, an interaction of 2 · 16 and 2 · 16.
    t = stats.t.ppf(0.975, 49) / stats.studentized_range.ppf(0.95, 8, 49) * math.sqrt(8)
    scale = t * dl.tukey_hsd(results_of(table.drop(columns="strong")))
    assert half[D] == pytest.approx(scale * math.sqrt(2 / 32))
    assert half[f"{D} and {B}"] == pytest.approx(2 * half[D])
    assert half["gain of all three"] == pytest.approx(scale * math.sqrt(2 / 8))
    assert half["sum of single gains"] == pytest.approx(scale * math.sqrt(12 / 8))


def test_effects_of_an_incomplete_factorial_are_refused(table, monkeypatch):
    with pytest.raises(KeyError, match="dropout_batch_norm"):
        dl.effects(results_of(table.drop(columns="dropout_batch_norm")))
    rest = {name: row for name, row in dl.SETTINGS.items() if name != "dropout_batch_norm"}
    monkeypatch.setattr(dl, "SETTINGS", rest)  # delitem would put the row back at the end
    with pytest.raises(ValueError, match="SETTINGS have 7 combinations of the techniques"):
        dl.effects(results_of(table))


def test_equal_fit_is_read_off_where_train_accuracy_first_crosses_the_level():
    def run(name, train, test):
        rows = [
            (name, 0, e, split, value)
            for split, values in (("train", train), ("test", test))
            for e, value in enumerate(values, 1)
        ]
        return pd.DataFrame(rows, columns=["setting", "seed", "epoch", "split", "accuracy"])

    first = run("a", (0.90, 0.94, 0.96, 0.97), (0.80, 0.84, 0.86, 0.85))
    dips = run("b", (0.951, 0.93, 0.9599), (0.70, 0.60, 0.90))
    level, found = dl.equal_fit(pd.concat([first, dips]))
    assert level == 0.95
    assert found["a", 0] == pytest.approx(0.85)  # half way from 0.84 to 0.86
    assert found["b", 0] == 0.70  # its first epoch is there already
