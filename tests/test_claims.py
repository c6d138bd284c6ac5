"""The report says of its tables what they say: every number in its prose, every comparison.

A claim is a phrase of the report, with its numbers, and whether it is so.
"""

import re

import numpy as np
import pandas as pd
from conftest import ROOT
from test_notebook import PROSE

import dl_utils as dl

D, W, B = dl.TECHNIQUES
NONE, WB, ALL = "baseline", "weight_decay_batch_norm", "combined"
WORDS = {6: "six", 7: "seven", 8: "eight"}
EIGHT = dict([*dl.SETTINGS.items()][:8])  # a row of one's own comes behind them


def study_claims(study):
    noise = dl.noise_band(study)
    cells = study[study.part.isin(["A", "D"])].groupby(["setting", *dl.STRENGTHS, "lr"])
    val, fit = cells.val_accuracy.mean(), cells.train_accuracy.mean()
    none, norm = val[NONE, 0, 0], val[B, 0, 0]
    half = none.max() - val[D, 0.5, 0].max()
    plateau = val[W, 0].unstack("lr").loc[[0.0005, 0.001, 0.002], [0.04, 0.08, 0.16]]
    dropped = fit[D].droplevel("weight_decay").unstack("dropout").sub(fit[NONE, 0, 0], axis=0)
    closer = fit[B, 0, 0, 0.04] - fit[NONE, 0, 0, 0.04]
    length = dl.lengths(study).groupby(["setting", "epochs"])[dl.OUTCOME[:2]].mean()
    alike = np.interp(length.train_accuracy[W], *length.loc[NONE].to_numpy().T[::-1])
    above = (length.val_accuracy[W] - alike)[[16, 32]]
    short, middle, long = (length.val_accuracy.xs(n, level=1)[[NONE, W]] for n in (8, 16, 32))
    so = {f"difference between two cells, {100 * noise:.2f} points": noise < 0.01}
    so["accuracy falls on both sides of 0.04, and training fails"] = none.idxmax() == 0.04
    so["at 0.32. *Dropout* lowers the fit at every rate"] = (
        dropped.max(axis=None) < 0 and none[0.32] < 0.5
    )
    so["its best cells are within noise of the best"] = val[D].max() - none.max() < noise
    so[f"dropping half of the units costs {100 * half:.1f} points"] = half > noise
    so["over a factor of four in"] = plateau.min(axis=None) > val[W].max() - noise
    so["from 0.01 to 1.28; at 2.56 all"] = np.ptp(norm[:1.28]) < 0.006 and norm[2.56] < 0.2
    so[f"it fits {100 * closer:.1f} points closer"] = closer > 0.01
    so["validates the same"] = abs(norm[0.04] - none[0.04]) < 0.001
    so["by more than noise, so batches"] = dl.alternatives(study).mean(axis=1).max() < noise
    so["8 epochs are too few"] = (short < middle - noise).all()
    so["and 32 bring nothing"] = (long < middle).all()
    so["At 16 and at 32 epochs weight decay has higher"] = (above > noise).all()
    return so


def product_claims(study):
    runs = study[(study.setting == WB) & (study.epochs == 16)]
    runs = runs.assign(product=(runs.lr * runs.weight_decay).round(9))
    means = 100 * runs.groupby(["product", "weight_decay"])[dl.OUTCOME[:2]].mean()
    means = means[means.val_accuracy > 50]
    shared = means[means.groupby("product").transform("size") > 1].groupby("product")
    val, fit = (shared.max() - shared.min()).max()
    span = np.ptp(means.train_accuracy)
    new = 100 * study[study.part == "P"].groupby("lr")[dl.OUTCOME[:2]].mean()
    one, other = new.val_accuracy[0.16], new.val_accuracy[0.08]
    came = f"Train accuracy came out at {new.train_accuracy[0.08]:.1f} % for both"
    so = {
        f"their train accuracies differ by at most {fit:.1f} points, over a range of four": span > 4
    }
    so[f"and their validation accuracies by at most {val:.1f}"] = val < 100 * dl.noise_band(study)
    so[f"{came}, inside the predicted 96.2 ± 0.2"] = new.train_accuracy.between(96.0, 96.4).all()
    so[f"near 92.3 %; it is {one:.1f} and {other:.1f} %, lower but"] = other < one < 92.3
    return so


def result_claims(results, right):
    mean = 100 * results.groupby("setting").mean(numeric_only=True)
    test = mean.test_accuracy
    effects = 100 * dl.intervals(right, dl.contrasts())
    gain = effects.xs("", level=2).loc["difference"]
    main = effects.xs("", level=2).loc["main"]
    beside, clash = effects.loc["gain", D, W], effects.loc["interaction", D, W]
    pair = effects.loc["interaction", W, B]
    pairs = {
        "drop": {W: 1, D: -1},
        "norm": {W: 1, B: -1},
        "other": {B: 1, D: -1},
        "add": {WB: 1, W: -1},
    }
    over = 100 * dl.intervals(right, pd.DataFrame(pairs).fillna(0))
    unclear = over.effect.abs() < over.half_width
    below = mean.val_accuracy - test
    gaps = (results.train_accuracy - results.test_accuracy).groupby(results.setting).mean()
    narrow = {name for name in gaps.index if gaps[name] < gaps[NONE] - 0.005}
    decayed = {name for name, setting in EIGHT.items() if setting.weight_decay}
    single = [right.loc[name, 0] for name in EIGHT]
    error = np.mean([(a - b).std() / 100 for i, a in enumerate(single) for b in single[:i]])
    three = f"alone reaches {test[D]:.1f} %, weight decay {test[W]:.1f} %, batch normalization"
    so = {f"Mean test accuracy is {test[NONE]:.1f} % without": test.idxmin() == NONE}
    so[f"{three} {test[B]:.1f} %"] = test[D] < test[B] < test[W]
    so[f"weight decay with batch normalization, at {test[WB]:.1f} %"] = test.idxmax() == WB
    so["each bring nearly half a point"] = main.effect[[W, B]].between(0.4, 0.5).all()
    so["a full point above no regularization"] = round(gain.effect[WB], 1) == 1.0
    so["Weight decay alone brings half a point"] = round(gain.effect[W], 1) == 0.5
    so["The interval of batch normalization alone includes zero"] = (
        gain.effect[B] < gain.half_width[B]
    )
    so["Dropout alone changes nothing"] = abs(gain.effect[D]) < 0.05
    low, high = below.min(), below.max()
    so[f"lies {low:.1f} to {high:.1f} points below validation accuracy in every setting"] = low > 0
    so["has a narrower gap than no regularization. So has dropout"] = narrow == {D, *decayed}
    so["alone and beside dropout has the widest"] = {*gaps.nlargest(2).index} == {B, f"{D}_{B}"}
    so["each add nearly half a point"] = (main.effect > main.half_width)[[W, B]].all()
    so["and dropout nothing (dashed lines"] = abs(main.effect[D]) < main.half_width[D]
    cost = f"{-beside.effect:.2f} ± {beside.half_width:.2f}"
    so[f"Beside weight decay it costs {cost} points"] = -beside.effect > beside.half_width
    less = f"{-clash.effect:.2f} ± {clash.half_width:.2f}"
    so[f"together bring {less} points less than the sum"] = -clash.effect > clash.half_width
    more = f"{pair.effect:.2f} ± {pair.half_width:.2f}"
    so[f"the pair brings {more} more than the sum"] = abs(pair.effect) < pair.half_width
    beats = f"{over.effect['drop']:.2f} ± {over.half_width['drop']:.2f}"
    so[f"weight decay beats dropout by {beats} points"] = not unclear["drop"]
    so["batch normalization cannot be told from either"] = unclear[["norm", "other"]].all()
    adds = f"{over.effect['add']:.2f} ± {over.half_width['add']:.2f}"
    so[f"which brings {adds} more. Dropout as a third"] = test[ALL] < test[WB]
    so[f"a standard error of {100 * error:.2f} points from the test images"] = error < 0.005
    return so


def curve_claims(history):
    wide = history.pivot(index=["setting", "seed", "epoch"], columns="split", values="accuracy")
    test = 100 * wide.test.unstack("epoch")
    best = wide.test[wide.val.groupby(["setting", "seed"]).idxmax()].droplevel("epoch")
    kept = (100 * best - test[16]).groupby("setting").mean().abs().max()
    early, late = (
        test[[*range(a, b)]].mean(axis=1).unstack("setting") for a, b in ((4, 9), (13, 17))
    )
    slow, end = (phase.sub(phase[NONE], axis=0) for phase in (early, late))
    mean = test.groupby("setting").mean()
    lowest = [*mean.columns[mean.idxmin() == WB]]
    behind = (mean.loc[NONE] - mean.loc[WB])[4:].max()
    firsts = (test[16].unstack("setting").idxmax(axis=1) == WB).sum()
    jumps = test.diff(axis=1)[[*range(5, 13)]].abs().mean(axis=1).groupby("setting").mean()
    plain = [name for name, setting in EIGHT.items() if not setting.batch_norm]
    rise = wide.groupby(["setting", "epoch"]).mean().groupby("setting").diff(3).xs(16, level=1)
    lost = test.loc[(B, 7)]
    so = {f"change no mean test accuracy by more than {kept:.2f} points": kept < 0.2}
    so["below no regularization on test, in all eight seeds"] = (slow[[D, W]] < 0).all(axis=None)
    so["each lies about half a point"] = slow[[D, W]].mean().between(-0.6, -0.4).all()
    so["From epoch 13 on weight decay lies above it, in all eight"] = (end[W] > 0).all()
    so["dropout only catches up"] = abs(end[D].mean()) < 0.1
    so["level with no regularization from epoch 4 to 8"] = abs(slow[B].mean()) < 0.1
    so["a quarter of a point above it from epoch 13 on"] = 0.2 < end[B].mean() < 0.3
    so["seed 7, collapses in the third epoch"] = lost[3] < lost[2] - 10
    so[f"the run that collapsed recovers to {lost[16]:.1f} % only"] = lost[16] < mean.loc[NONE, 16]
    so["the last of all eight settings from epoch 4 to 13"] = lowest[-10:] == [*range(4, 14)]
    so[f"up to {behind:.1f} points behind no regularization"] = behind > 2
    so["From epoch 15 on it is the first"] = [*mean.columns[mean.idxmax() == WB]] == [15, 16]
    so[f"at the end, in {WORDS[firsts]} of eight seeds"] = firsts > 4
    so["jump twice as far as any without"] = jumps[WB] > 1.8 * jumps[plain].max()
    so["train accuracy rises faster than test accuracy"] = (rise.train > rise.test).all()
    return so


def bias_claims(study, results):
    """Final runs against those that chose their values."""
    shift = []
    for name, setting in EIGHT.items():
        keys = ["dropout", "weight_decay", "lr"]
        cell = (study[keys] == [getattr(setting, key) for key in keys]).all(axis=1)
        chose = study[cell & study.part.isin(["A", "D"]) & (study.setting == name)].val_accuracy
        shift.append(100 * (results[results.setting == name].val_accuracy.mean() - chose.mean()))
    return {f"to within {abs(np.mean(shift)):.2f} points on average": abs(np.mean(shift)) < 0.1}


def error_claims(model, split):
    matrix = dl.confusion_matrix(model, split).to_numpy()
    wrong = matrix - np.diag(np.diag(matrix))
    four = [dl.CLASSES.index(name) for name in ("T-shirt/top", "pullover", "coat", "shirt")]
    among = wrong[np.ix_(four, four)].sum()
    return {f"Of its {wrong.sum()} mistakes, {among} are confusions": among > wrong.sum() / 2}


def test_every_claim_is_so_and_has_the_numbers_of_the_prose(real_splits):
    study, runs = dl.read_study(), dl.load_runs(ROOT / "weights")
    results, history = dl.collect(runs)
    best = next(run.model for run in runs if run.setting.name == WB)
    hours = (results.seconds.sum() + study.seconds.sum()) / 3600
    count = sum(layer.numel() for layer in dl.LeNet5().parameters())
    claims = study_claims(study) | product_claims(study) | curve_claims(history)
    claims |= result_claims(results, dl.hits(runs, real_splits["test"]))
    claims |= error_claims(best, real_splits["test"]) | bias_claims(study, results)
    claims |= {
        f"{count:,} in all": count == 61_706,
        f"took {hours:.0f} hours of one core": hours < 24,
    }
    text = rest = PROSE.split("## References")[0]
    assert not [said for said in claims if said not in text], "these are not said"
    assert not [said for said, so in claims.items() if not so], "these are not so"
    for said in claims:
        rest = rest.replace(said, "")
    assert {*re.findall(r"\d+\.\d+", rest)} <= {"0.9", "0.04"}, "numbers that no claim has"
