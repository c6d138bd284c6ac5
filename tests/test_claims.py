"""The report says of its tables what they say. A claim is a phrase of its prose, with its numbers,
and whether it is so."""

import re

import numpy as np
from conftest import ROOT
from test_notebook import PROSE, RESULTS, STUDY

import dl_utils as dl

D, W, B = dl.TECHNIQUES
NONE, _, _, _, DW, DB, WB, ALL = EIGHT = [*dl.SETTINGS][:8]  # a row of one's own comes behind


def study_claims():
    noise, chosen = dl.noise_band(STUDY), dl.choices(STUDY)[[*dl.STRENGTHS, "lr"]]
    cells = STUDY[STUDY.part.isin(["A", "D"])].groupby(["setting", *dl.STRENGTHS, "lr"])
    val, fit = cells.val_accuracy.mean(), cells.train_accuracy.mean()
    none, norm = val[NONE, 0, 0], val[B, 0, 0]
    plateau = val[W, 0].unstack("lr").loc[[0.0005, 0.001, 0.002], [0.04, 0.08, 0.16]]
    drop = fit[D].droplevel("weight_decay").unstack("dropout").sub(fit[NONE, 0, 0], axis=0)
    closer = fit[B, 0, 0, 0.04] - fit[NONE, 0, 0, 0.04]
    beside = [val[*row[:3], row.lr * side] for row in chosen.itertuples() for side in (0.5, 2)]
    length = dl.lengths(STUDY).groupby(["setting", "epochs"])[dl.OUTCOME[:2]].mean()
    curve = length.loc[NONE].to_numpy().T[::-1]  # of validation against train accuracy
    above = length.val_accuracy - np.interp(length.train_accuracy, *curve, np.nan, np.nan)
    change = length.val_accuracy.unstack().sub(length.val_accuracy[:, 16], axis=0)
    so = {f", {100 * noise:.2f} points": noise < 0.01}
    ends = [sorted(val[name].index.unique(name))[k] for name in (D, W) for k in (0, -1)]
    so["$p$ from {} to {}. Weight decay's has $\\lambda$ from {} to {}".format(*ends)] = ends[1] < 1
    so["accuracy falls on both sides of 0.04, and training"] = none.idxmax() == 0.04
    so["fails at 0.32. *Dropout* lowers the fit"] = none[0.32] < 0.5 and drop.max(axis=None) < 0
    so["its best cells are within noise of the best"] = val[D].max() - none.max() < noise
    so["over a factor of four in"] = plateau.min(axis=None) > val[W].max() - noise
    even = "from 0.01 to 1.28 validation accuracy stays within half a point; at 2.56 all"
    so[even] = np.ptp(norm[:1.28]) < 0.005 and norm[2.56] < 0.2
    so["Training never fails one step from a chosen"] = min(beside) > 0.9
    so[f"its train accuracy is {100 * closer:.1f} points higher"] = closer > 0.01
    so["and its validation accuracy the same"] = abs(norm[0.04] - none[0.04]) < 0.001
    so["by more than noise, so batches"] = dl.alternatives(STUDY).mean(axis=1).max() < noise
    so["Eight are too few without regularization"] = change[8][[NONE, D, W]].max() < -noise
    so["normalization they are within noise of 16"] = change[8][[B, WB, ALL]].min() > -noise
    so["Thirty-two bring nothing to any of"] = change[32].max() < 0 and len(change) == 6
    so["cost accuracy, by more"] = so["alone lose"] = change[32][[NONE, B]].max() < -noise
    so["where there is dropout or weight decay they"] = change[32][[D, W, WB, ALL]].min() > -noise
    so["with weight decay from 16 epochs on"] = above[W][[16, 32]].min() > noise > above[W][8]
    so["up to 16 epochs (after 32"] = above[B][[8, 16]].min() > noise and np.isnan(above[B][32])
    so["with both, and with all three, at every"] = above[[WB, ALL]].min() > noise
    so["Of dropout alone this cannot be"] = above[D].max() < noise
    return so


def by_product(name):
    """Mean accuracies by rate x lambda, and how far those at one product are apart."""
    runs = STUDY[(STUDY.setting == name) & (STUDY.epochs == 16)]
    runs = runs.assign(product=(runs.lr * runs.weight_decay).round(9))
    means = 100 * runs.groupby(["product", "weight_decay"])[dl.OUTCOME[:2]].mean()
    means = means[means.val_accuracy > 90]  # where training did not fail
    shared = means.groupby("product")
    return means, (shared.max() - shared.min()).max()


def product_claims():
    (means, apart), (_, control) = by_product(WB), by_product(W)
    new = 100 * STUDY[STUDY.part == "P"].groupby("lr")[dl.OUTCOME[:2]].mean()
    one, other = new.val_accuracy[0.16], new.val_accuracy[0.08]
    came = f"Train accuracy came out at {new.train_accuracy[0.08]:.1f} % for both"
    said = f"train accuracies differ by at most {apart.train_accuracy:.1f} points, over a range"
    so = {f"{said} of four": np.ptp(means.train_accuracy) > 4}
    so[f"validation accuracies by at most {apart.val_accuracy:.1f}"] = apart.val_accuracy < 0.4
    so[f"differ by up to {control.train_accuracy:.1f} points"] = control.train_accuracy > 2
    so["with twice the winner's product"] = 0.16 * 0.002 == 2 * 0.001 * dl.SETTINGS[WB].lr
    so[f"{came}, inside the predicted 96.2 ± 0.2"] = new.train_accuracy.between(96.0, 96.4).all()
    so[f"near 92.3 %; it is {one:.1f} and {other:.1f} %, lower but"] = other < one < 92.3
    return so


def result_claims(right):
    mean = 100 * RESULTS.groupby("setting").mean(numeric_only=True)
    test, fit = mean.test_accuracy, RESULTS.groupby("setting").train_accuracy
    gap = mean.train_accuracy - test
    draws = 100 * (RESULTS.val_accuracy - RESULTS.test_accuracy).groupby(RESULTS.seed).mean()
    weights = dl.contrasts()
    for one, other in ((W, D), (W, B), (B, D), (WB, W), (WB, ALL)):
        weights["over", one, other] = 1.0 * (weights.index == one) - (weights.index == other)
    effects = 100 * dl.intervals(right, weights.sort_index(axis=1))
    form = "{0.effect:.2f} ± {0.half_width:.2f}".format
    said, minus = effects.apply(form, axis=1), effects.mul([-1, 1]).apply(form, axis=1)
    gain, main = said["difference"].droplevel(1), said["main"].droplevel(1)
    sure = effects.effect.abs() > effects.half_width
    single = [right.loc[name, 0] for name in EIGHT]
    error = np.mean([(a - b).std() for i, a in enumerate(single) for b in single[:i]])
    narrow = [(gap[weights.index] @ dl.contrasts()["gain", name]).max() < 0 for name in (W, D)]
    three = f"alone reaches {test[D]:.1f} %, weight decay {test[W]:.1f} %, batch normalization"
    so = {f"Mean test accuracy is {test[NONE]:.1f} % without": test.idxmin() == NONE}
    so[f"{three} {test[B]:.1f} %"] = test[D] < test[[W, B]].min()
    so[f"weight decay with batch normalization, at {test[WB]:.1f} %"] = test.idxmax() == WB
    both = [effects.effect["main", name, ""] for name in (W, B)]
    brings = "weight decay brings {:.1f} points, batch normalization {:.1f}, and"
    so[brings.format(*both)] = min(both) > 0.3
    so[f"a standard error of {error:.2f} points"] = error < 0.5 / 2
    so[f"batch normalization, {gain[WB]} points above"] = sure["difference", WB, ""]
    alone = [sure["difference", name, ""] for name in (W, B, D)] == [True, False, False]
    so["Alone, weight decay is clearly above no regularization; batch"] = alone
    each = [round(effects.effect["main", name, ""], 1) for name in (W, B)] == [0.4, 0.4]
    so["add 0.4 points each, beyond their intervals"] = each and sure["main"][[W, B]].all()
    for name, gaps in ((D, "narrower"), (W, "narrower"), (B, "wider")):
        so[f"{gaps} gap; {main[name]} points on average"] = sure["main", name, ""] == (name != D)
    so[f"lies between {-draws.min():.1f} points below test accuracy"] = draws.min() < 0
    so[f"{draws.max():.1f} above it (in another)"] = draws.max() > 0
    so[f"it brings {said['gain', D, B]} points, in no"] = sure["gain", D, B]
    so[f"together bring {minus['interaction', D, W]} points less"] = sure["interaction", D, W]
    so[f"the pair brings {said['interaction', W, B]} points more"] = not sure["interaction", W, B]
    so[f"weight decay beats dropout by {said['over', W, D]} points"] = sure["over", W, D]
    so[f"{said['over', W, B]} below weight decay"] = not sure["over", W, B]
    so[f"{said['over', B, D]} above dropout, and cannot be told"] = not sure["over", B, D]
    so[f"batch normalization adds {said['over', WB, W]}, dropout"] = sure["over", WB, W]
    so["dropout then nothing"] = not effects.effect["gain", D, WB] > 0
    so[f"told from all three ({said['over', WB, ALL]} above"] = not sure["over", WB, ALL]
    only = [*sure["gain", D]] == [False, True, False, False]
    so["in no other place anything clear"] = so["gains only beside batch"] = only
    so["alone and beside dropout has the widest"] = {*gap.nlargest(2).index} == {B, DB}
    so["has a narrower gap than the same setting without it. So has every"] = all(narrow)
    so["No run ends more than a point below"] = (fit.median() - fit.min()).max() < 0.01
    return so


def curve_claims(history, norms):
    wide = 100 * history.set_index(["setting", "seed", "epoch", "split"]).accuracy.unstack()
    best = wide.test[wide.val.groupby(["setting", "seed"]).idxmax()].droplevel("epoch")
    kept = (best - wide.test.xs(16, level="epoch")).groupby("setting").mean().abs().max()
    means = wide.groupby(["setting", "epoch"]).mean()
    first = means.test.unstack("setting").idxmax(axis=1)
    rise = means.groupby("setting").diff(3).xs(16, level="epoch")
    jump = wide.test.groupby(["setting", "seed"]).diff().abs().unstack("epoch")[[*range(5, 13)]]
    jump = jump.mean(axis=1).groupby("setting").mean()
    jumps = [jump[one] / jump[other] for one, other in ((W, NONE), (WB, B), (ALL, DB), (DW, D))]
    phases = []
    for epochs in (range(4, 13), range(13, 17)):
        part = wide[wide.index.isin(epochs, level="epoch")].groupby(["setting", "seed"]).mean()
        phases.append(part.sub(part.loc[NONE], level="seed"))
    one, two = (phase.groupby("setting").mean() for phase in phases)
    up, later = ((phase.test > 0).groupby("setting").sum() for phase in phases)
    fc3 = norms[norms.layer == "fc3"].groupby(["setting", "epoch"]).mean(numeric_only=True)
    norm, rate, lr = fc3.norm, fc3.effective_rate, {name: s.lr for name, s in dl.SETTINGS.items()}
    so = {f"change no mean test accuracy by more than {kept:.2f} points": kept < 0.2}
    so[f"{-one.train[D]:.1f} points lower on train and {-one.test[D]:.1f} on"] = one.train[D] < -0.4
    so["level on test and a point lower on train"] = abs(two.test[D]) < 0.1
    so[f"is slower too: in the middle it lies {-one.test[W]:.1f} points lower"] = up[W] == 0
    so[f"At the end it lies {two.test[W]:.1f} points higher, in all eight"] = later[W] == 8
    so[f"is faster: {one.test[B]:.1f} points higher on test in the middle, in all"] = up[B] == 8
    so[f"and still {two.test[B]:.1f} at the end"] = two.test[B] < one.test[B]
    so[f"lies {-one.test[WB]:.1f} points below no regularization in the middle"] = up[WB] == 0
    so[f"and {one.test[B] - one.test[WB]:.1f} below batch norm"] = lr[B] == 4 * lr[WB]
    so["among the lowest curves for half of its training"] = WB in one.test.nsmallest(2).index
    so["From epoch 15 on it is the first of all"] = [*first.index[first == WB]] == [15, 16]
    so["with weight decay jumps farther than the same setting"] = min(jumps) > 1.3
    so["train accuracy rises faster than test accuracy"] = (rise.train > rise.test).all()
    so[f"norm of fc3 from {norm[B, 0]:.0f} to {norm[B, 16]:.0f}"] = norm[B].is_monotonic_increasing
    so["falls from the first epoch on, though"] = rate[B][1:].is_monotonic_decreasing
    so["it is a seventh of that after epoch 1"] = 6.5 < rate[B, 1] / rate[B, 8] < 7.5
    so[f"rises to {norm[WB].max():.0f} and shrinks to {norm[WB, 16]:.0f}"] = norm[WB].idxmax() < 7
    so[f"that is {rate[WB, 8] / rate[B, 8]:.0f} times the one of"] = rate[WB].idxmax() == 3
    return so


def test_every_claim_is_so_and_has_the_numbers_of_the_prose(real_splits):
    runs = dl.load_runs(ROOT / "weights")
    best = next(run.model for run in runs if run.setting.name == WB)
    hours = (RESULTS.seconds.sum() + STUDY.seconds.sum()) / 3600
    count = sum(layer.numel() for layer in dl.LeNet5().parameters())
    wrong = dl.confusion_matrix(best, real_splits["test"]) * (1 - np.eye(10, dtype=int))
    four = ["T-shirt/top", "pullover", "coat", "shirt"]
    mistakes, among = wrong.sum(axis=None), wrong.loc[four, four].sum(axis=None)
    claims = study_claims() | product_claims()
    claims[f"Of its {mistakes} mistakes, {among} are confusions"] = among > mistakes / 2
    claims |= curve_claims(dl.collect(runs)[1], dl.norms_by_epoch(runs))
    claims |= result_claims(dl.hits(runs, real_splits["test"]))
    claims |= {f"{count:,} in all": count == 61_706, f"took {hours:.0f} hours of one": hours < 24}
    text = rest = PROSE.split("## References")[0]
    assert not [said for said in claims if said not in text], "these are not said"
    assert not [said for said, so in claims.items() if not so], "these are not so"
    for said in claims:
        rest = rest.replace(said, "")
    found = {*re.findall(r"\d+\.\d+", rest)} - {"0.9", "0.04", "0.08", "0.16", "0.64"}
    assert found <= {"91.24", "91.77", "90.99"}, "numbers that no claim has"
