"""The rules of the study, and the intervals of the report: each against an independent way."""

import numpy as np
import pandas as pd
import pytest
from conftest import study_rows

import dl_utils as dl

D, W, B = dl.TECHNIQUES
NAMES = {(0, 0, 0): "baseline", (1, 0, 0): D, (0, 1, 0): W, (0, 0, 1): B, (1, 1, 0): f"{D}_{W}"}
NAMES |= {(1, 0, 1): f"{D}_{B}", (0, 1, 1): f"{W}_{B}", (1, 1, 1): "combined"}


def table_of(part, setting, cells, **values):
    """Rows of a study, from a mean for each (strength, rate); seeds spread around it."""
    rows = []
    for (strength, lr), mean in cells.items():
        values |= {setting: strength} if setting in dl.STRENGTHS else {}
        rows += study_rows(mean + np.array([-0.001, 0, 0.001]), part, setting, lr=lr, **values)
    return pd.DataFrame(rows)


def grid_of(setting, cells, none=(), **values):
    part = "A" if setting in NAMES.values() else "D"
    tables = [table_of(part, setting, cells, **values)]
    if none:
        tables.append(table_of("A", "baseline", {(0, lr): mean for lr, mean in none.items()}))
    return dl.accuracy_grid(pd.concat(tables), setting, {})


def rates(*means, first=0.01):
    return {(0, first * 2.0**k): mean for k, mean in enumerate(means)}


def test_rule_1_takes_the_middle_of_a_plateau_not_a_lonely_peak_and_not_the_edge_of_a_cliff():
    peak = grid_of(B, rates(0.90, 0.925, 0.90, 0.915, 0.915, 0.915, 0.90), batch_norm=True)
    assert dl.best_cell(peak)[1] == pytest.approx(0.16)
    cliff = grid_of(B, rates(0.90, 0.91, 0.912, 0.913, 0.914, 0.1), batch_norm=True)
    assert dl.best_cell(cliff)[1] == 0.08, "a rate beside the cliff wins"
    tie = grid_of(B, rates(0.90, 0.91, 0.91, 0.91, 0.91, 0.90), batch_norm=True)
    assert dl.best_cell(tie)[1] == 0.04, "of two as good the smaller rate"
    none = {0.01: 0.90, 0.02: 0.90, 0.04: 0.90}
    middle = {0.05: 0.91, 0.1: 0.915, 0.2: 0.91, 0.5: 0.93}  # 0.5 has no stronger neighbour
    cells = {(p, lr): mean for p, mean in middle.items() for lr in none}
    assert dl.best_cell(grid_of(D, cells, none)) == (0.2, 0.02)
    cells[0.2, 0.04] = np.nan  # not run yet: its neighbours are no candidates
    assert dl.best_cell(grid_of(D, cells, none)) == (0.1, 0.02)


def test_a_grid_grows_once_within_noise_then_at_its_best_and_never_beside_what_fails():
    grid = grid_of(B, rates(0.913, 0.90, 0.914, first=0.04), batch_norm=True)
    assert dl.lacking(grid, 0.002) == [(True, 0.02), (True, 0.32)]
    assert dl.lacking(grid) == [(True, 0.32)]
    assert dl.lacking(grid_of(B, rates(0.90, 0.914, 0.1), batch_norm=True)) == []
    assert dl.lacking(grid_of(B, rates(0.1, 0.1), batch_norm=True)) == []
    cells = {(0.001, lr): 0.914 for lr in (0.04, 0.08)} | {(0.002, 0.04): 0.90}
    found = dl.lacking(grid_of(W, cells, {0.04: 0.99, 0.08: 0.90}))
    assert found == [(0.001, 0.02), (0.001, 0.16), (0.002, 0.08)], "none is beside the weakest"


def test_combinations_take_the_strengths_of_their_techniques():
    means = {0.05: 0.90, 0.1: 0.92, 0.2: 0.91, 0.5: 0.90}
    plateau = {(p, lr): mean for p, mean in means.items() for lr in (0.01, 0.02, 0.04)}
    tables = [table_of("A", "baseline", rates(0.90, 0.91, 0.90)), table_of("A", D, plateau)]
    for p, best in ((0.1, 0.915), (0.2, 0.99)):
        cells = rates(0.90, best, 0.90, first=0.08)
        tables.append(table_of("D", f"{D}_{B}", cells, dropout=p, batch_norm=True))
    chosen = dl.choices(pd.concat(tables))
    assert list(chosen.loc[D, ["dropout", "lr"]]) == [0.1, 0.02]
    assert list(chosen.loc[f"{D}_{B}", ["dropout", "batch_norm", "lr"]]) == [0.1, True, 0.16]


def test_noise_is_two_standard_errors_of_a_paired_difference_of_good_cells():
    cells = {0.1: (0.90, 0.92, 0.91), 0.2: (0.91, 0.91, 0.91), 0.4: (0.5, 0.6, 0.7)}
    rows = [row for lr, accuracies in cells.items() for row in study_rows(accuracies, lr=lr)]
    # Of two cells, the residuals are half of the differences' deviations: -0.01, 0.01, 0.
    variance = 4 * 0.005**2 / 2
    assert dl.noise_band(pd.DataFrame(rows)) == pytest.approx(2 * (2 * variance / 3) ** 0.5)


def test_contrasts_are_differences_of_means_in_the_factorial_beside_own_rows(monkeypatch):
    monkeypatch.setitem(dl.SETTINGS, "strong", dl.Setting("strong", "Strong", dropout=0.5))
    truth = {name: 0.9 + 0.01 * i**2 for i, name in enumerate(NAMES.values())}
    weights = dl.contrasts()
    found = pd.Series(truth)[weights.index] @ weights
    for k, name in enumerate(dl.TECHNIQUES):
        on, off = ([truth[NAMES[f]] for f in NAMES if f[k] == level] for level in (1, 0))
        assert found["main", name, ""] == pytest.approx(np.mean(on) - np.mean(off))
        for before, after in zip(off, on):
            setting = next(n for n in truth if truth[n] == before)
            assert found["gain", name, setting] == pytest.approx(after - before)
    gains = found["gain", W]
    more = (gains[B] + gains[f"{D}_{B}"] - gains["baseline"] - gains[D]) / 2
    assert found["interaction", W, B] == pytest.approx(more)
    assert found["difference", "combined", ""] == pytest.approx(truth["combined"] - 0.9)
    monkeypatch.delitem(dl.SETTINGS, "combined")
    with pytest.raises(ValueError, match="expected all 8"):
        dl.contrasts()


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    weights = pd.DataFrame({"gain": {"one": 1.0, "other": -1.0}})
    images, covered = 400, 0
    seeds_std, image_std, both_std = 0.0035, 0.012, 0.04  # of the difference; sizes as found
    index = pd.MultiIndex.from_product([["one", "other"], range(8)])
    for _ in range(1000):
        by_seed, by_image = rng.normal(0, seeds_std, (8, 1)), rng.normal(0, image_std, images)
        gain = 0.01 + by_seed + by_image + rng.normal(0, both_std, (8, images))
        right = pd.DataFrame(np.vstack([gain, 0 * gain]), index)
        effect, half = dl.intervals(right, weights).loc["gain"]
        covered += abs(effect - 0.01) <= half
    assert 930 <= covered <= 970


def test_intervals_have_a_degree_of_freedom_less_than_seeds_and_need_partners():
    steady = pd.DataFrame(np.outer([0.9, 0.8, 0.7], np.ones(4)), [["one"] * 3, [0, 1, 2]])
    effect, half = dl.intervals(steady, pd.DataFrame({"d": {"one": 1}})).loc["d"]
    assert (effect, half) == pytest.approx((0.8, 4.303 * 0.1 / 3**0.5))
    index = pd.MultiIndex.from_tuples([("one", 0), ("one", 1), ("other", 0)])
    right = pd.DataFrame([[1.0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], index)
    effect, half = dl.intervals(right, pd.DataFrame({"d": {"one": 1, "other": -1}})).loc["d"]
    assert effect == 0.25 and np.isnan(half)


def test_hits_are_what_each_run_gets_right(trained, splits):
    runs = [trained["dropout"], trained["combined"]]
    right = dl.hits(runs, splits["test"])
    assert list(right.index) == [("dropout", 0), ("combined", 0)]
    for run, row in zip(runs, right.to_numpy(), strict=True):
        answers = run.model(splits["test"].images).argmax(1)
        assert row.tolist() == (answers == splits["test"].labels).double().tolist()
