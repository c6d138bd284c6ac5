"""The report says of its tables what they say: every number in its prose, every comparison.

A claim is a phrase of the report, whether it is so, and the numbers that stand in its braces.
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


def study_claims(study):
    noise = dl.noise_band(study)
    chosen = dl.choices(study)
    cells = study[study.part.isin(["A", "D"])].groupby(["setting", *dl.STRENGTHS, "lr"])
    val = cells.val_accuracy.mean()
    fit = cells.train_accuracy.mean()
    none = val[NONE, 0, 0]
    half = none.max() - val[D, 0.5, 0].max()
    plateau = val[W, 0].unstack("lr").loc[[0.0005, 0.001, 0.002], [0.04, 0.08, 0.16]]
    norm = val[B, 0, 0]
    dropped = fit[D].droplevel("weight_decay").unstack("dropout").sub(fit[NONE, 0, 0], axis=0)
    closer = fit[B, 0, 0, 0.04] - fit[NONE, 0, 0, 0.04]
    others = dl.alternatives(study).mean(axis=1)
    length = dl.lengths(study).groupby(["setting", "epochs"])[dl.OUTCOME[:2]].mean()
    alike = np.interp(length.train_accuracy[W], *length.loc[NONE].to_numpy().T[::-1])
    above = length.val_accuracy[W] - alike
    short, middle, long = (length.val_accuracy.xs(n, level=1)[[NONE, W]] for n in (8, 16, 32))
    return [
        (
            "8 epochs are too few, and 32 bring nothing",
            (short < middle - noise).all() and (long < middle).all(),
        ),
        ("At 16 and at 32 epochs weight decay has higher", (above[[16, 32]] > noise).all()),
        ("difference between two cells, {:.2f} points", noise > 0, 100 * noise),
        ("accuracy falls on both sides of 0.04", none.idxmax() == 0.04),
        ("training fails at 0.32", none[0.32] < 0.5),
        ("*Dropout* lowers the fit at every rate", dropped.max(axis=None) < 0),
        ("are within noise of the best without", val[D].max() - none.max() < noise),
        ("dropping half of the units costs {:.1f} points", half > noise, 100 * half),
        ("over a factor of four in", plateau.min(axis=None) > val[W].max() - noise),
        ("from 0.01 to 1.28; at 2.56 all three", np.ptp(norm[:1.28]) < 0.006 and norm[2.56] == 0.1),
        ("it fits {:.1f} points closer", closer > 0.01, 100 * closer),
        ("validates the same", abs(norm[0.04] - none[0.04]) < 0.001),
        ("by more than noise, so batches of 128 and SGD stay", others.max() < noise),
        ("The rings", chosen.lr[B] == 0.64),
    ]


def product_claims(study):
    runs = study[(study.setting == WB) & (study.epochs == 16)]
    runs = runs.assign(product=(runs.lr * runs.weight_decay).round(9))
    means = runs.groupby(["product", "weight_decay"])[dl.OUTCOME[:2]].mean()
    means = means[means.val_accuracy > 0.5]
    shared = means[means.groupby("product").transform("size") > 1].groupby("product")
    spread = 100 * (shared.max() - shared.min()).max()
    span = 100 * np.ptp(means.train_accuracy)
    return [
        ("their train accuracies differ by at most {:.1f} points", span > 3, spread.train_accuracy),
        ("their validation accuracies by at most {:.1f}", span > 3, spread.val_accuracy),
    ]


def result_claims(results, right):
    mean = 100 * results.groupby("setting").mean(numeric_only=True)
    test = mean.test_accuracy
    effects = 100 * dl.intervals(right, dl.contrasts())
    gain = effects.xs("", level=2).loc["difference"]
    main = effects.xs("", level=2).loc["main"]
    beside = effects.loc["gain", D]
    clash = effects.loc["interaction", D, W]
    pair = effects.loc["interaction", W, B]
    sure = gain.effect.abs() > gain.half_width
    over = 100 * dl.intervals(
        right,
        pd.DataFrame(
            {
                "dropout": {W: 1.0, D: -1.0},
                "norm": {W: 1.0, B: -1.0},
                "third": {B: 1.0, D: -1.0},
                "second": {WB: 1.0, W: -1.0},
            }
        ),
    )
    below = mean.val_accuracy - test
    gaps = (results.train_accuracy - results.test_accuracy).groupby(results.setting).mean()
    narrow = {name for name in gaps.index if gaps[name] < gaps[NONE] - 0.005}
    decayed = {name for name, setting in dl.SETTINGS.items() if setting.weight_decay}
    single = [right.loc[name, 0] for name in dl.SETTINGS]
    errors = [(a - b).std() for i, a in enumerate(single) for b in single[:i]]
    return [
        ("Mean test accuracy is {:.1f} % without", test.idxmin() == NONE, test[NONE]),
        (
            "alone reaches {:.1f} %, weight decay {:.1f} %, batch normalization {:.1f} %",
            test[D] < test[B] < test[W],
            test[D],
            test[W],
            test[B],
        ),
        (
            "The best setting is weight decay with batch normalization, at {:.1f} %",
            test.idxmax() == WB,
            test[WB],
        ),
        ("each bring nearly half a point", main.effect[[W, B]].between(0.4, 0.5).all()),
        (
            "highest mean is that of weight decay with batch normalization, {:+.2f} ± {:.2f}",
            sure[WB],
            *gain.loc[WB],
        ),
        ("Weight decay alone brings {:+.2f} ± {:.2f}", sure[W], *gain.loc[W]),
        ("includes zero, {:+.2f} ± {:.2f}", not sure[B], *gain.loc[B]),
        ("Dropout alone changes nothing, {:+.2f} ± {:.2f}", not sure[D], *gain.loc[D]),
        ("lies {:.1f} to {:.1f} points below validation", below.min() > 0, *below.quantile([0, 1])),
        ("has a narrower gap than no regularization. So has dropout", narrow == {D, *decayed}),
        (
            "Batch normalization alone and beside dropout has the widest gaps",
            {*gaps.nlargest(2).index} == {B, "dropout_batch_norm"},
        ),
        (
            "weight decay adds {:+.2f} ± {:.2f} points, batch normalization {:+.2f} ± {:.2f}",
            (main.effect > main.half_width)[[W, B]].all(),
            *main.loc[W],
            *main.loc[B],
        ),
        (
            "dropout nothing, {:.2f} ± {:.2f}",
            abs(main.effect[D]) < main.half_width[D],
            *main.loc[D],
        ),
        (
            "Beside weight decay it costs {:.2f} ± {:.2f}",
            -beside.effect[W] > beside.half_width[W],
            -beside.effect[W],
            beside.half_width[W],
        ),
        ("it seems to gain, {:+.2f} ± {:.2f}", beside.effect[B] > 0, *beside.loc[B]),
        (
            "bring {:.2f} ± {:.2f} points less than the sum",
            -clash.effect > clash.half_width,
            -clash.effect,
            clash.half_width,
        ),
        ("brings {:.2f} ± {:.2f} more than the sum", abs(pair.effect) < pair.half_width, *pair),
        (
            "weight decay beats dropout by {:.2f} ± {:.2f} points",
            over.effect["dropout"] > over.half_width["dropout"],
            *over.loc["dropout"],
        ),
        (
            "neither can be told from batch normalization",
            (over.effect.abs() < over.half_width)[["norm", "third"]].all(),
        ),
        (
            "brings {:.2f} ± {:.2f} more. Dropout as a third",
            test[ALL] < test[WB],
            *over.loc["second"],
        ),
        (
            "has a standard error of {:.2f} points from the test images alone",
            abs(single[0].mean() - single[1].mean()) < 0.01,
            sum(errors) / len(errors),
        ),
    ]


def curve_claims(history):
    wide = history.pivot(index=["setting", "seed", "epoch"], columns="split", values="accuracy")
    test = 100 * wide.test.unstack("epoch")
    last = wide.xs(16, level="epoch")
    best = wide.test[wide.val.groupby(["setting", "seed"]).idxmax()].droplevel("epoch")
    kept = 100 * (best - last.test).groupby("setting").mean().abs().max()
    early = test[[*range(4, 9)]].mean(axis=1).unstack("setting")
    late = test[[*range(13, 17)]].mean(axis=1).unstack("setting")
    slow = early.sub(early[NONE], axis=0)
    end = late.sub(late[NONE], axis=0)
    mean = test.groupby("setting").mean()
    lowest = [*mean.columns[mean.idxmin() == WB]]
    highest = [*mean.columns[mean.idxmax() == WB]]
    firsts = (test[16].unstack("setting").idxmax(axis=1) == WB).sum()
    jumps = test.diff(axis=1)[[*range(5, 13)]].abs().mean(axis=1).groupby("setting").mean()
    plain = [name for name, setting in dl.SETTINGS.items() if not setting.batch_norm]
    rise = wide.groupby(["setting", "epoch"]).mean().groupby("setting").diff(3)
    rise = rise.xs(16, level="epoch")
    return [
        ("change no mean test accuracy by more than {:.2f} points", kept < 0.2, kept),
        (
            "each lies about half a point below no regularization on test, in all eight seeds",
            (slow[[D, W]] < 0).all(axis=None) and slow[[D, W]].mean().between(-0.6, -0.4).all(),
        ),
        ("From epoch 13 on weight decay lies above it, in all eight seeds", (end[W] > 0).all()),
        ("dropout only catches up", abs(end[D].mean()) < 0.1),
        ("is level with no regularization from epoch 4 to 8", abs(slow[B].mean()) < 0.1),
        ("a quarter of a point above it from epoch 13 on", 0.2 < end[B].mean() < 0.3),
        (
            "one of its eight runs, seed 7, collapses in the third epoch",
            test.loc[(B, 7), 3] < test.loc[(B, 7), 2] - 10,
        ),
        ("the run that collapsed recovers to {:.1f} %", True, test.loc[(B, 7), 16]),
        ("the last of all eight settings from epoch 4 to 13", lowest[-10:] == [*range(4, 14)]),
        ("is up to {:.1f} points ahead", lowest, (mean.loc[NONE] - mean.loc[WB])[4:].max()),
        ("and the first from epoch 15 on", highest == [15, 16]),
        ("first in {} of eight seeds", firsts > 4, WORDS[firsts]),
        ("jump twice as far as any without", jumps[WB] > 1.8 * jumps[plain].max()),
        (
            "train accuracy rises faster than test accuracy to the end",
            (rise.train > rise.test).all(),
        ),
    ]


def error_claims(model, split):
    matrix = dl.confusion_matrix(model, split)
    wrong = matrix - np.diag(np.diag(matrix))
    four = ["T-shirt/top", "pullover", "coat", "shirt"]
    among = wrong.loc[four, four].to_numpy().sum()
    total = wrong.to_numpy().sum()
    return [("Of its {} mistakes, {} are confusions", among > total / 2, total, among)]


def test_every_claim_is_so_and_has_the_numbers_of_the_prose(real_splits):
    study = dl.read_study()
    runs = dl.load_runs(ROOT / "weights")
    results, history = dl.collect(runs)
    best = next(run.model for run in runs if run.setting.name == WB)
    count = sum(parameter.numel() for parameter in best.parameters())
    hours = (results.seconds.sum() + study.seconds.sum()) / 3600
    claims = [
        *study_claims(study),
        *product_claims(study),
        *result_claims(results, dl.hits(runs, real_splits["test"])),
        *curve_claims(history),
        *error_claims(best, real_splits["test"]),
        ("All runs took {:.0f} hours of one core", hours > 0, hours),
        ("61,706 in all", count == 61_706 + 452),
    ]
    text = rest = PROSE.split("## References")[0]
    for phrase, so, *numbers in claims:
        said = phrase.format(*numbers).replace("-", "−") if numbers else phrase
        assert said in text, f"not said: {said}"
        assert so, f"not so: {said}"
        rest = rest.replace(said, "")
    assert {*re.findall(r"\d+\.\d+", rest)} <= {"0.9", "0.04"}, "numbers that no claim has"
