"""The report says of its tables what they say: every number in its prose, every comparison."""
# ruff: noqa: E501

import re
from functools import partial

import numpy as np
import pandas as pd
import torch
from conftest import ROOT
from test_notebook import PROSE

import dl_utils as dl

NONE, DROPOUT, DECAY, NORM = "baseline", "dropout", "weight_decay", "batch_norm"
BOTH, ALL, WORDS = "weight_decay_batch_norm", "combined", {6: "six", 7: "seven", 8: "eight"}


def more(table, one, other, measure="test_accuracy"):
    """The mean of one is greater than that of the other by more than chance."""
    means = table.groupby("setting")[measure].mean()
    return means[one] - means[other] > dl.tukey_hsd(table, measure)


def alike(*args):
    return not more(*args) and not more(args[0], args[2], args[1], *args[3:])


def study_claims(study):  # what the report says, whether it is so
    band, best = dl.noise_band(study), dl.best_cells(study)
    grids = study[study.part.isin(["A", "D"])]
    cells = grids.groupby(["setting", *dl.CELL]).val_accuracy.mean()
    none, norm = cells[NONE].max(), cells[NORM].groupby("lr").mean()
    cost = f"{100 * (none - cells[DROPOUT].xs(0.5, level='dropout').max()):.1f} points"
    plateau = cells[DECAY][cells[DECAY] >= cells[DECAY].max() - band].unstack("lr").dropna(axis=1)
    rates, other = norm.index[norm >= norm.max() - band], dl.alternatives(study).mean(axis=1)
    slow = study[(study.lr == 0.32) & study.part.isin(["A", "D"]) & ~study.batch_norm].val_accuracy
    twice = study[study.lr == 2 * norm.idxmax()]
    failed = (twice.val_accuracy < 0.2).all() and {*twice.setting} == {BOTH, "dropout_batch_norm"}
    length = dl.lengths(study).groupby(["setting", "epochs"]).mean(numeric_only=True)
    val, fit = (length[f"{name}_accuracy"].unstack("epochs") for name in ("val", "train"))
    pooled = other["Average pooling"]
    worse = {n: {*val.index[val[n] < val[16] - band]} for n in (8, 32)}
    gain, above = (
        val[32] - val[32][NONE],
        (val - fit.apply(lambda x: np.interp(x, fit.loc[NONE], val.loc[NONE]))).T,
    )
    return {
        f"Differences below {100 * band:.2f} points, two standard errors": True,
        f"The study's {len(study)} runs": study.val_accuracy.notna().all(),
        "is nowhere better than the best of no regularization": cells[DROPOUT].max() < none + band,
        f"dropping half of the units costs {cost}": True,
        "over a factor of four in": plateau.shape == (3, 3),
        "at 0.32 most runs without it fail": (slow < 0.2).mean() > 0.5 and norm[0.32] > 0.9,
        f"from {rates[0]:g} to {rates[-1]:g} cannot be told": norm.idxmax() == rates[-1],
        "At twice that, both pairs with it fail": failed,
        "at twice that both pairs with it failed in the study": failed,
        "twice those strengths won": all(
            best.loc[ALL, x] == 2 * best.loc[x, x] for x in (DROPOUT, DECAY)
        ),
        f"only average pooling lies outside noise, {-100 * pooled:.1f} points below": pooled
        < -band,
        "So our choices stand": other.drop("Average pooling").abs().max() < band,
        "too few for all but batch normalization": worse[8] == {*val.index} - {NORM},
        "only no regularization and dropout lose more than noise": worse[32] == {NONE, DROPOUT},
        "At 16 and 32 epochs weight decay lies above the line": [*(above[DECAY] > band)]
        == [False, True, True],
        "Dropout lies on that line": above[DROPOUT].abs().max() < band,
        "fits as closely as no": abs(fit[32][NORM] - fit[32][NONE]) < 0.002,
        f"has {100 * gain[NORM]:.1f} points higher validation accuracy": gain[NORM] > band,
    }


def result_claims(runs):
    runs = runs.assign(gap=runs.train_accuracy - runs.test_accuracy)
    mean, by = runs.groupby("setting").mean(numeric_only=True), 100 * dl.effects(runs)
    test = {name: f"{100 * value:.1f} %" for name, value in mean.test_accuracy.items()}
    add = {row: f"{value:+.2f}".replace("-", "−") for row, value in by.effect.items()}
    half = {row: f"{value:.2f}" for row, value in by.half_width.items()}
    beyond, level = partial(more, runs), partial(alike, runs)
    lead, over = (
        mean.test_accuracy[BOTH] - mean.test_accuracy[NONE],
        (runs[runs.setting == NORM].test_accuracy > mean.test_accuracy[NONE]).sum(),
    )
    narrow = {name for name in mean.index if beyond(NONE, name, "gap")}
    decayed = {name for name, setting in dl.SETTINGS.items() if setting.weight_decay}
    pair, clash = "weight_decay and batch_norm", "dropout and weight_decay"
    helps = by[(by.effect > by.half_width) & by.index.str.startswith("dropout over")].index
    norms = runs.set_index(["setting", "seed"])[["conv1", "conv2", "fc3", "fc4", "fc5"]]
    return {
        f"Mean test accuracy is {test[NONE]} without": True,
        f"alone reaches {test[DROPOUT]}, weight decay {test[DECAY]}, batch normalization {test[NORM]}": True,
        f"batch normalization, at {test[BOTH]}; all three together reach {test[ALL]}": mean.test_accuracy.idxmax()
        == BOTH,
        f"batch normalization reach {test[BOTH]}, a full point": round(100 * lead) == 1
        and level(BOTH, ALL),
        "each bring nearly half a point and dropout nothing": by.effect[[DECAY, NORM]]
        .between(0.4, 0.5)
        .all(),
        f"Means that are over {100 * dl.tukey_hsd(runs):.2f} points apart differ by more": True,
        "Weight decay improves on no regularization; dropout does not": beyond(DECAY, NONE)
        and level(DROPOUT, NONE),
        f"falls short of that margin, although {WORDS[over]} of its eight": level(NORM, NONE),
        "Every setting with weight decay has a narrower": narrow == {DROPOUT, *decayed},
        f"adds {add[DECAY]} points and batch normalization {add[NORM]}": half[DECAY] == half[NORM],
        f"each ± {half[NORM]} (intervals of Figure 7). Dropout adds nothing, within that margin": abs(
            by.effect[DROPOUT]
        )
        < by.half_width[DROPOUT] / 2,
        f"no accuracy here**, to within {half[DROPOUT]} points": True,
        f"regularizes.** It adds {add[DECAY]} points": True,
        f"trains better.** It adds {add[NORM]} points": True,
        f"exceeds the sum of both by {add[pair][1:]} ± {half[pair]}": True,
        f"fall short of theirs by {add[clash][1:]} ± {half[clash]}": by.effect[clash]
        < -by.half_width[clash],
        "Dropout visibly improves only batch normalization": [*helps]
        == ["dropout over batch_norm"],
        "holds every layer down": all(
            (norms.loc[x] > norms.loc[y]).to_numpy().all() for x, y in ((NONE, DECAY), (NORM, BOTH))
        ),
        "grow several times larger": mean.fc3[NORM] > 4 * mean.fc3[NONE],
        "is on average the surest of its mistakes": beyond(NORM, NONE, "confidence")
        and mean.confidence.idxmax() == NORM,
        "test loss is the highest while its accuracy is not": mean.test_loss.idxmax()
        == NORM
        != mean.test_accuracy.idxmin(),
        "which is not normalized, has larger weights than in any other setting": mean.fc5.idxmax()
        == NORM,
        "All three together, at a strength and rate of their own, gain nothing": level(BOTH, ALL),
        "less sure, alone as well as beside": beyond(NONE, DECAY, "confidence")
        and beyond(NORM, BOTH, "confidence"),
        "beats dropout; its lead on batch normalization is within chance": beyond(DECAY, DROPOUT)
        and level(DECAY, NORM),
        "the wider gap, the higher test loss and the surer mistakes": all(
            beyond(NORM, DECAY, x) for x in ("gap", "test_loss", "confidence")
        ),
    }


def curve_claims(history):
    wide = history.pivot(
        index=["setting", "seed", "epoch"], columns="split", values=["accuracy", "loss"]
    )
    split, loss = wide.accuracy, wide.loss
    last, runs = split.xs(16, level="epoch"), ["setting", "seed"]
    kept = split.test[split.val.groupby(runs).idxmax()].droplevel("epoch") - last.test
    early = split.test[split.index.get_level_values("epoch") <= 8].groupby(runs).mean()
    faster, pace = early[NORM] > early[NONE], early.groupby("setting").mean() - early[NONE].mean()
    rise = (
        split.groupby(["setting", "epoch"]).mean().groupby("setting").diff(3).xs(16, level="epoch")
    )
    level, fit = dl.equal_fit(history)
    fit = fit.reset_index(name="fit")
    lead = 100 * (fit.groupby("setting").fit.mean() - fit[fit.setting == NONE].fit.mean())
    loss = (
        loss.sort_values("train")
        .groupby(runs)
        .apply(lambda run: np.interp(0.15, run.train, run.test))
        .reset_index(name="loss")
    )
    return {
        f"change no mean test accuracy by more than {100 * kept.groupby('setting').mean().abs().max():.2f} points": True,
        f"in {WORDS[faster.sum()]} of the eight seeds": [*faster.index[~faster]] == [7],
        f"collapses early and recovers to {100 * last.test[NORM, 7]:.1f} %": True,
        "seed 7, collapses in its third": split.test[NORM, 7, 3] < split.test[NORM, 7, 2] - 0.1,
        "ends with the lowest train accuracy of all": last.train.idxmin() == (NORM, 7),
        "change that average by less than 0.3 points": pace[[DROPOUT, DECAY]].abs().max() < 0.003,
        "train accuracy rises faster than test accuracy to the end": (rise.train > rise.test).all(),
        f"passes {100 * level:.0f} % (not plotted), weight decay is {lead[DECAY]:.1f} test points above no regularization and batch normalization {lead[NORM]:.1f}.": all(
            more(fit, x, NONE, "fit") for x in (DECAY, NORM)
        ),
        f"more than chance, {100 * dl.tukey_hsd(fit, 'fit'):.2f}; dropout": alike(
            fit, DROPOUT, NONE, "fit"
        ),
        "test loss is lower with weight decay, alone or beside": all(
            more(loss, NONE, x, "loss") for x in (DECAY, BOTH)
        ),
        "alone do not lower it": not any(more(loss, NONE, x, "loss") for x in (DROPOUT, NORM)),
    }


def image_claims(split):
    models = [dl.load_checkpoint(ROOT / f"weights/{name}.pt").model for name in dl.SETTINGS]
    hits = [
        (dl.compute_logits(model, split.images).argmax(1) == split.labels).double()
        for model in models
    ]
    errors = [(one - other).std() for i, one in enumerate(hits) for other in hits[:i]]
    matrix, four = (
        dl.confusion_matrix(models[-1], split),
        ["T-shirt/top", "pullover", "coat", "shirt"],
    )
    wrong = matrix - np.diag(np.diag(matrix))
    return {
        f"by a standard error of about {sum(errors) / len(errors):.2f} points": True,
        f"Of its {wrong.to_numpy().sum()} mistakes, {wrong.loc[four, four].to_numpy().sum()} are": True,
        f"In all there are {sum(p.numel() for p in models[0].parameters()):,}": True,
    }


def test_every_claim_is_so_and_has_the_numbers_of_the_prose(real_splits):
    study, (results, history) = pd.read_csv(dl.STUDY), dl.collect(ROOT / "weights")
    torch.set_num_threads(2)  # for 64 models
    inside = dl.examine(dl.load_runs(ROOT / "weights"), real_splits["test"])
    torch.set_num_threads(1)
    claims = study_claims(study) | result_claims(results.merge(inside.drop(columns="label")))
    claims |= curve_claims(history) | image_claims(real_splits["test"])
    claims[f"took {(results.seconds.sum() + study.seconds.sum()) / 3600:.0f} hours of one"] = True
    text = rest = PROSE.split("## References")[0]
    assert not [said for said in claims if said not in text], "these are not said"
    assert not [said for said, so in claims.items() if not so], "these are not so"
    for said in claims:
        rest = rest.replace(said, "")
    assert {*re.findall(r"\d+\.\d+", rest)} == {"0.9"}, "of momentum"
