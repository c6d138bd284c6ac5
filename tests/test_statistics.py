"""What the report says of differences: each number against an independent way to it."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import dl_utils as dl

NAMES = {(0, 0, 0): "baseline", (1, 0, 0): "dropout", (0, 1, 0): "weight_decay",
         (0, 0, 1): "batch_norm", (1, 1, 0): "dropout_weight_decay",
         (1, 0, 1): "dropout_batch_norm", (0, 1, 1): "weight_decay_batch_norm",
         (1, 1, 1): "combined"}  # fmt: skip


@pytest.fixture
def eight(monkeypatch):
    """The eight settings of the factorial and a ninth that is none of them."""
    for (d, w, b), name in NAMES.items():
        row = dl.Setting(name, name, 0.1 * d, 0.001 * w, bool(b))
        monkeypatch.setitem(dl.SETTINGS, name, row)
    monkeypatch.setitem(dl.SETTINGS, "strong", dl.Setting("strong", "Strong", dropout=0.5))


def table_of(values):
    """results with a row for each setting and seed of {setting: accuracies by seed}."""
    return pd.DataFrame(
        [(name, seed, value) for name, row in values.items() for seed, value in enumerate(row)],
        columns=["setting", "seed", "test_accuracy"],
    )


def random_results(seed=0, runs=8):
    noise = np.random.default_rng(seed).normal(0, 0.002, (9, runs))
    by_seed = np.random.default_rng(seed + 1).normal(0, 0.01, runs)  # must not widen anything
    truth = {name: 0.9 + 0.001 * d + 0.004 * w + 0.005 * b - 0.002 * w * b
             for (d, w, b), name in NAMES.items()} | {"strong": 0.5}  # fmt: skip
    return {name: mean + noise[k] + by_seed for k, (name, mean) in enumerate(truth.items())}


def test_two_settings_differ_by_tukey_where_a_paired_t_test_says_so():
    values = {name: random_results()[name] for name in ("baseline", "dropout")}
    differences = values["dropout"] - values["baseline"]
    half = stats.t.ppf(0.975, 7) * differences.std(ddof=1) / math.sqrt(8)
    assert dl.least_difference(table_of(values)) == pytest.approx(half, rel=1e-4)


def test_eight_settings_need_a_wider_difference_and_49_degrees_of_freedom():
    values = random_results()
    values.pop("strong")
    table = pd.DataFrame(values)
    spread, freedom = dl._spread(table)
    model = sum(  # the same variance by least squares
        np.linalg.lstsq(design(8, 8), table.to_numpy().T.ravel(), rcond=None)[1]
    )
    assert freedom == 49 and spread == pytest.approx(math.sqrt(model / 49))
    quantile = stats.studentized_range.ppf(0.95, 8, 49)
    assert dl.least_difference(table_of(values)) == pytest.approx(quantile * spread / math.sqrt(8))


def design(settings, seeds):
    """The dummy variables of a two-way table, setting by setting."""
    pairs = itertools.product(range(settings), range(seeds))
    return np.array([[*np.eye(settings)[i], *np.eye(seeds)[j][1:]] for i, j in pairs])


def test_effects_of_the_factorial_are_what_went_in(eight):
    values = random_results()
    found = dl.effects(table_of(values))
    table = pd.DataFrame(values)
    on = {key: [name for flags, name in NAMES.items() if flags[k]] for k, key in enumerate(
        dl.TECHNIQUES)}  # fmt: skip
    for key in dl.TECHNIQUES:
        without = [name for name in NAMES.values() if name not in on[key]]
        differences = table[on[key]].mean(axis=1) - table[without].mean(axis=1)
        assert found.effect[key] == pytest.approx(differences.mean())
    single = {key: (table[key] - table.baseline).mean() for key in dl.TECHNIQUES}
    assert found.effect["sum of single gains"] == pytest.approx(sum(single.values()))
    gain = (table.combined - table.baseline).mean()
    assert found.effect["gain of all three"] == pytest.approx(gain)
    pair = "weight_decay and batch_norm"
    more = [
        (table[both] - table[norm]) - (table[decay] - table[none])
        for none, decay, norm, both in (
            ("baseline", "weight_decay", "batch_norm", "weight_decay_batch_norm"),
            ("dropout", "dropout_weight_decay", "dropout_batch_norm", "combined"),
        )
    ]
    assert found.effect[pair] == pytest.approx(sum(more).mean() / 2)
    assert abs(found.effect[pair] + 0.002) < found.half[pair], "the truth is in the interval"


def test_intervals_of_effects_are_as_wide_as_the_means_they_rest_on(eight):
    values = random_results()
    half = dl.effects(table_of(values)).half
    spread, _ = dl._spread(pd.DataFrame(values)[list(NAMES.values())])
    t = stats.t.ppf(0.975, 49)
    # A main effect is a difference of two means of 32 runs, an interaction of 2 · 16 and 2 · 16.
    assert half.dropout == pytest.approx(t * spread * math.sqrt(2 / 32))
    assert half["dropout and batch_norm"] == pytest.approx(2 * half.dropout)
    assert half["gain of all three"] == pytest.approx(t * spread * math.sqrt(2 / 8))
    assert half["sum of single gains"] == pytest.approx(t * spread * math.sqrt(12 / 8))


def test_effects_without_one_of_the_eight_are_refused(eight):
    values = random_results()
    values.pop("dropout_batch_norm")
    with pytest.raises(KeyError, match="dropout_batch_norm"):
        dl.effects(table_of(values))


def test_equal_fit_is_read_off_where_train_accuracy_first_crosses_the_level():
    def run(name, train, test):
        rows = [(name, 0, e, split, value) for split, values in (("train", train), ("test", test))
                for e, value in enumerate(values, 1)]  # fmt: skip
        return pd.DataFrame(rows, columns=["setting", "seed", "epoch", "split", "accuracy"])

    first = run("a", (0.90, 0.94, 0.96, 0.97), (0.80, 0.84, 0.86, 0.85))
    dips = run("b", (0.951, 0.93, 0.9599), (0.70, 0.60, 0.90))
    level, found = dl.equal_fit(pd.concat([first, dips]))
    assert level == 0.95
    assert found["a", 0] == pytest.approx(0.85)  # half way from 0.84 to 0.86
    assert found["b", 0] == 0.70  # its first epoch is there already


def test_effects_of_an_incomplete_factorial_are_refused(eight, monkeypatch):
    rows = {name: row for name, row in dl.SETTINGS.items() if name != "dropout_batch_norm"}
    monkeypatch.setattr(dl, "SETTINGS", rows)  # delitem would put the row back at the end
    with pytest.raises(ValueError, match="SETTINGS have 7 combinations of the techniques"):
        dl.effects(table_of(random_results()))
