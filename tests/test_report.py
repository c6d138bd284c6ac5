"""Tables and figures: what is drawn is what went in, at its place, under its name."""

import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import study_rows
from matplotlib.colors import to_hex

import dl_utils as dl

D, W, B = dl.TECHNIQUES
FOUR = ["baseline", D, W, B]
SIX = [*FOUR, f"{W}_{B}", "combined"]
EIGHT = dict([*dl.SETTINGS.items()][:8])  # of the report; a row of one's own comes behind them
LABELS = {name: setting.label for name, setting in EIGHT.items()}
SHORT = {"none": "baseline", "D": D, "W": W, "B": B, "W+B": f"{W}_{B}", "all": "combined"}


def tables_of(settings, seeds=(0, 8, 9), epochs=4):
    """results and history, as collect gives them, of runs in which no two numbers are equal."""
    results, history = [], []
    for i, setting in enumerate(settings):
        for seed in seeds:
            key = {"setting": setting.name, "label": setting.label, "seed": seed}
            level = {"train": 0.95, "val": 0.92, "test": 0.91}
            level = {split: x + i / 1000 + (i + 2) * seed / 1e5 for split, x in level.items()}
            results.append(key | {f"{split}_accuracy": x for split, x in level.items()})
            for epoch in range(1, epochs + 1):
                for split, x in level.items():
                    row = {"epoch": epoch, "split": split, "loss": 1 - x}
                    history.append(key | row | {"accuracy": x - 0.01 * (epochs - epoch)})
    return pd.DataFrame(results), pd.DataFrame(history)


RESULTS, HISTORY = tables_of(EIGHT.values())
# Intervals of contrasts, of which no two are equal.
EFFECTS = pd.DataFrame(index=dl.contrasts().columns)
EFFECTS["effect"] = 0.001 * np.arange(len(EFFECTS)) - 0.009
EFFECTS["half_width"] = 0.002 + 0.0001 * np.arange(len(EFFECTS))


@pytest.fixture(scope="module")
def study():
    """A study that is complete, each setting with a level of its own."""
    rows = []
    spread = np.array([-0.0004, 0.0001, 0.0003])
    scales = {0.25: -0.004, 0.5: -0.002, 1: 0.001, 2: 0.002, 4: -0.006}  # of the chosen rate
    for i, (name, setting) in enumerate(EIGHT.items()):
        part = "A" if name in FOUR else "D"
        levels = {D: (0.05, 0.1, 0.2), W: (0.0005, 0.001, 0.002)}.get(name, (0.0,))
        own = vars(setting) | {"setting": name}
        for k, level in enumerate(levels):
            base = own | ({name: level} if name in dl.STRENGTHS else {})
            for scale, more in scales.items():
                mean = 0.91 + 0.001 * i + more - 0.001 * (k != 1)
                accuracies = mean + np.roll(spread, len(rows) // 3)
                rows += study_rows(accuracies, part, **base | {"lr": scale * setting.lr})
        for epochs, accuracy in ((8, 0.90), (32, 0.92)) if name in SIX else ():
            rows += study_rows(accuracy + 0.001 * i + spread, "C", **own, epochs=epochs)
    rows += study_rows(0.905 + spread, "B", batch_size=64, lr=0.04)
    rows += study_rows(0.906 + spread, "B", batch_size=64, lr=0.02)
    rows += study_rows(0.907 + 2 * spread, "B", optimizer="adam", lr=0.001)
    return pd.DataFrame(rows)


def words(texts):  # without the markers of lines
    return [text.get_text().strip("".join(dl.MARKERS.values()) + " ") for text in texts]


def text_of(ax, word):
    return next(text for text in ax.texts if words([text]) == [word])


def line_named(ax, word):
    """The line of an axes that has the colour of a label at their ends, and its marker."""
    text = text_of(ax, word)
    (line,) = [line for line in ax.lines if to_hex(line.get_color()) == to_hex(text.get_color())]
    assert text.get_text().split()[0] == dl.MARKERS.get(line.get_marker(), word)
    return line


def check_ends(ax, ends):
    """Labels stand at the right in the order of the ends of their lines."""
    assert sorted(words(ax.texts)) == sorted(ends)
    height = [text_of(ax, word).get_position()[1] for word in sorted(ends, key=ends.get)]
    assert height == sorted(height) and len({*height}) == len(height)


def check_line(line, x, y):
    assert list(line.get_xdata()) == pytest.approx(list(x))
    assert list(line.get_ydata()) == pytest.approx(list(y))


def test_the_summary_has_mean_and_deviation_or_the_only_run():
    table = dl.summary_table(RESULTS, ("train", "val", "test")).set_index("setting")
    single = dl.summary_table(RESULTS[RESULTS.seed == 8], ["test"]).set_index("setting")
    for name, runs in RESULTS.groupby("setting"):
        for split in ("train", "val", "test"):
            own = 100 * runs[f"{split}_accuracy"]
            assert table[split][LABELS[name]] == f"{own.mean():.2f} ± {own.std():.2f}"
        assert single.test[LABELS[name]] == f"{own.iloc[1]:.2f}"  # of seed 8
    assert len(dl.summary_table(RESULTS.assign(label="Mine"))) == 8, "one label is not one setting"


def test_a_table_is_markdown_whose_cells_cannot_move_its_columns():
    frame = pd.DataFrame({"setting": ["a|b\nc", "All three"], "test": [90.5, 91]})
    rows = ["| **Table 9. Of it** | test |", "| :------------------ | ----: |"]
    rows += [r"| a\|b c | 90.5 |", "| All three | 91.0 |"]
    assert dl.show_table(frame, "Table 9. Of it").data.splitlines() == rows


def test_the_style_of_the_user_does_not_get_into_the_figures(monkeypatch):
    monkeypatch.setattr("matplotlib_inline.backend_inline.set_matplotlib_formats", print)
    with matplotlib.rc_context({"image.origin": "lower", "text.usetex": True}):
        matplotlib.rcParams.update({"axes.facecolor": "black", "lines.linewidth": 9})
        dl.prepare_notebook()
        found = [matplotlib.rcParams[key] for key in ("image.origin", "axes.facecolor")]
        assert found == ["upper", "white"] and not matplotlib.rcParams["text.usetex"]
        assert matplotlib.rcParams["lines.linewidth"] == 1.3


def test_examples_show_each_class_and_the_diagram_shapes_and_where_techniques_sit(splits):
    axes = dl.plot_examples(splits["train"]).axes
    assert [ax.get_title() for ax in axes] == [*dl.CLASSES]
    for label, ax in enumerate(axes):
        image = (torch.tensor(ax.images[0].get_array()) - dl.MEAN) / dl.STD
        first = splits["train"].labels.tolist().index(label)
        assert torch.allclose(splits["train"].images[first, 0], image, atol=1e-5)
        assert ax.images[0].get_cmap()(0.0)[:3] == (1, 1, 1), "black is white"
    ax = dl.plot_architecture(dl.build_model(dl.SETTINGS["combined"])).axes[0]
    found = words(ax.texts)
    sizes = ["1 map", *2 * ["6 maps"], *2 * ["16 maps"], "120 units", "84 units", "10 units"]
    stages = [word.replace("\n", " ") for word in found if "map" in word or "units" in word]
    assert [stage.startswith(size) for stage, size in zip(stages, sizes)] == [True] * 8
    assert any("48,120" in word for word in found)
    assert len(ax.patches) == 1 + 6 + 6 + 16 + 16 + 3
    assert [word for word in found if "ReLU" in word] == ["ReLU B"] * 2 + ["ReLU B D"] * 2
    plain = dl.plot_architecture(dl.build_model(dl.SETTINGS["baseline"])).axes[0]
    assert [word for word in words(plain.texts) if "ReLU" in word] == ["ReLU"] * 4


def test_rates_draw_each_strength_and_ring_what_the_rules_choose(study):
    axes = np.reshape(dl.plot_rates(study).axes, (2, 4))
    titles = [ax.get_title() for ax in axes[0]]
    assert titles == ["Dropout: p", "Weight decay: λ", "Batch norm", "Combinations"]
    grids = study[study.part.isin(["A", "D"])].groupby(["setting", *dl.STRENGTHS, "lr"])
    pairs = {"D+W": f"{D}_{W}", "D+B": f"{D}_{B}", "W+B": f"{W}_{B}", "all": "combined"}
    levels = {D: ["0.05", "0.1", "0.2"], W: ["0.0005", "0.001", "0.002"], B: ["B"]}
    for row, split in zip(axes, ("val", "train")):
        assert row[0].get_ylabel() == f"{split.replace('val', 'validation')} accuracy (%)"
        means = 100 * grids[f"{split}_accuracy"].mean()
        for ax, names in zip(row, ([D], [W], [B], [*pairs.values()])):
            lines = [line for line in ax.lines if len(line.get_xdata()) > 1]
            rings = [line for line in ax.lines if line.get_markersize() == 8]
            shown = means.loc[["baseline", *names]].groupby(level=[0, 1, 2], sort=False)
            for line, (_, curve) in zip(lines, shown, strict=True):
                check_line(line, curve.index.get_level_values("lr"), curve)
            assert to_hex(lines[0].get_color()) == "#000000"
            for ring, name in zip(rings, ["baseline", *names], strict=True):
                p, decay = 0.1 * (D in name), 0.001 * (W in name)
                p, decay = (0.1, 0.001) if name == "combined" else (p, decay)
                rate = dl.SETTINGS[name].lr
                check_line(ring, [rate], [means[name, p, decay, rate]])
            labels = levels.get(names[0]) or [*pairs]
            check_ends(ax, {x: line.get_ydata()[-1] for x, line in zip(labels, lines[1:])})
            shown = {text_of(ax, x).get_text().split()[0]: x for x in labels}
            assert [*shown] == [dl.MARKERS[line.get_marker()] for line in lines[1:]]


def test_choices_are_compared_at_their_best_rate_seed_by_seed(study):
    none = study[(study.part == "A") & (study.setting == "baseline")]
    default = none[none.lr == dl.SETTINGS["baseline"].lr].val_accuracy.to_numpy()
    left, right = dl.plot_choices(study).axes
    spread = np.array([-0.0004, 0.0001, 0.0003])
    expected = {"batches of 64": 0.906 + spread, "Adam": 0.907 + 2 * spread}
    ticks = [label.get_text() for label in left.get_yticklabels()]
    for dots, bar in zip(left.lines[::2], left.lines[1::2]):
        word = ticks[int(left.convert_yunits(dots.get_ydata()[0]))]
        assert list(dots.get_xdata()) == pytest.approx(list(100 * (expected[word] - default)))
        assert bar.get_xdata()[0] == pytest.approx(np.mean(dots.get_xdata()))
    width = left.patches[0].get_extents().width / left.transData.get_matrix()[0, 0]
    assert width == pytest.approx(200 * dl.noise_band(study)) and width > 0.01
    lengths = 100 * dl.lengths(study).groupby(["setting", "epochs"])[dl.OUTCOME[:2]].mean()
    marks = [text for text in right.texts if text.get_text() in ("8", "16", "32")]
    assert len(marks) == 3 * len(SHORT)
    for text in marks:
        near = np.isclose(lengths[["train_accuracy", "val_accuracy"]], text.xy).all(axis=1)
        assert lengths.index[near][0][1] == int(text.get_text()), "another number of epochs"
        text.remove()
    check_ends(right, {word: lengths.val_accuracy[SHORT[word], 32] for word in SHORT})
    for word, name in SHORT.items():
        line = line_named(right, word)
        check_line(line, lengths.train_accuracy[name], lengths.val_accuracy[name])


def test_convergence_draws_train_and_test_of_every_seed_under_the_right_name():
    *axes, last = dl.plot_convergence(HISTORY, FOUR, SIX).axes
    assert [ax.get_title() for ax in axes] == [LABELS[name] for name in FOUR]
    assert words(axes[0].get_legend().get_texts()) == ["train", "test"]
    handles = axes[0].get_legend().legend_handles
    assert [line.get_linestyle() for line in handles] == ["--", "-"]
    index = ["setting", "split", "epoch"]
    wide = 100 * HISTORY.pivot(index=index, columns="seed", values="accuracy")
    epochs = range(1, 5)
    for ax, name in zip(axes, FOUR):
        for split, style in (("train", "--"), ("test", "-")):
            curves = wide.loc[name, split]
            *thin, thick = [line for line in ax.lines if line.get_linestyle() == style]
            assert thick.get_linewidth() > 3 * thin[0].get_linewidth()
            check_line(thick, epochs, curves.mean(axis=1))
            for line, seed in zip(thin, curves, strict=True):
                check_line(line, epochs, curves[seed])
            end = text_of(ax, f"{curves.mean(axis=1).iloc[-1]:.1f}")
            assert end.get_position()[1] == pytest.approx(thick.get_ydata()[-1])
    means = wide.mean(axis=1)
    check_ends(last, {LABELS[name]: means[name, "test", 4] for name in SIX})
    for name in SIX:
        check_line(line_named(last, LABELS[name]), epochs, means[name, "test"])


def test_results_draw_runs_differences_with_intervals_and_gaps_beside_their_names():
    left, middle, right = dl.plot_results(RESULTS, EFFECTS).axes
    rows = words(left.get_yticklabels())
    assert rows == [*LABELS.values()]
    bars = [collection.get_segments()[0] for collection in middle.collections]
    middles = {round(bar[0, 1]): bar[:, 0] for bar in bars}
    for y, name in enumerate(EIGHT):
        runs = 100 * RESULTS[RESULTS.setting == name].select_dtypes("number")
        dots, bar = [line for line in left.lines if line.get_ydata()[0] == y]
        assert list(dots.get_xdata()) == list(runs.test_accuracy)
        assert bar.get_xdata()[0] == runs.test_accuracy.mean()
        text = text_of(left, f"{runs.test_accuracy.mean():.2f}")
        assert text.get_position() == (runs.test_accuracy.max(), y)
        gap = right.lines[y]
        assert list(gap.get_xdata()) == [runs.test_accuracy.mean(), runs.train_accuracy.mean()]
        assert words(right.texts)[y] == f"{np.diff(gap.get_xdata())[0]:.1f}"
        if name != "baseline":
            effect, half = 100 * EFFECTS.loc["difference", name, ""]
            assert list(middles[y]) == pytest.approx([effect - half, effect + half])


def test_gains_draw_each_effect_with_its_interval_over_its_setting():
    points, axes = 100 * EFFECTS, dl.plot_gains(EFFECTS).axes
    titles = [ax.get_title() for ax in axes[:3]]
    assert titles == ["Dropout (D)", "Weight decay (W)", "Batch norm (B)"]
    short = SHORT | {"D+W": f"{D}_{W}", "D+B": f"{D}_{B}"}
    for ax, technique in zip(axes, dl.TECHNIQUES):
        ticks = words(ax.get_xticklabels())
        assert ticks[0] == "none" and len(ticks) == 4
        for tick, bar in zip(ticks, ax.collections[0].get_segments()):
            effect, half = points.loc["gain", technique, short[tick]]
            assert list(bar[:, 1]) == pytest.approx([effect - half, effect + half])
        (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert dashed.get_ydata()[0] == points.effect["main", technique, ""]
        assert words(ax.texts) == [f"{dashed.get_ydata()[0]:+.2f}"]
    alone = [points.effect["difference", name, ""] for name in (W, B)]
    pair = points.effect["difference", f"{W}_{B}", ""]
    heights = [bar.get_height() for bar in axes[3].patches]
    assert heights == pytest.approx([*alone, sum(alone), pair])
    assert words(axes[3].get_xticklabels()) == ["W", "B", "sum", "W+B"]


def test_the_story_draws_norms_effective_rates_and_products_of_the_right_settings(study):
    runs = []
    for i, setting in enumerate(EIGHT.values()):
        table = pd.DataFrame({"epoch": [*range(5)] * 2, "layer": ["fc3"] * 5 + ["fc5"] * 5})
        table["weight"] = 3.0 * (i + 1) + table.epoch + 100 * (table.layer == "fc5")
        table["bias"] = 0.5 * table.weight
        config = dl.TrainConfig(epochs=4)
        runs.append(dl.Checkpoint(None, setting, config, HISTORY, {}, 1.0, {}, table))
    norms = dl.norms_by_epoch(runs)
    four = ["baseline", W, B, f"{W}_{B}"]
    curves, sizes, rates, product = dl.plot_story(HISTORY, norms, study, four).axes
    test = 100 * HISTORY[HISTORY.split == "test"].groupby(["setting", "epoch"]).accuracy.mean()
    number = [*EIGHT]
    for word, name in SHORT.items():
        if name in four:
            weight = 3.0 * (number.index(name) + 1) + np.arange(5)
            norm = np.sqrt(weight**2 + (0.5 * weight) ** 2)
            check_line(line_named(sizes, word), range(5), norm)
            decayed = [dl.SETTINGS[name].lr * dl.warmup_cosine(epoch / 4) for epoch in (1, 2, 3)]
            check_line(line_named(rates, word), range(1, 4), decayed / norm[1:4] ** 2)
            check_line(line_named(curves, word), range(1, 5), test[name])
    pair = study[(study.setting == f"{W}_{B}") & (study.epochs == 16)]
    means = 100 * pair.groupby("lr")[["train_accuracy", "val_accuracy"]].mean()
    assert words(product.get_legend().get_texts()) == ["λ = 0.001"]
    for line, measure in zip(product.lines, means):
        check_line(line, 0.001 * means.index, means[measure])


def first_pixel(_, images):
    """Logits for the class that the first pixel says; surer of brighter images."""
    return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10) * images[:, :, 1, 1] * 5


def test_errors_have_truth_in_rows_and_the_most_confident_mistakes_first(monkeypatch):
    monkeypatch.setattr(dl, "compute_logits", first_pixel)
    images = torch.zeros(8, 1, 28, 28)
    truths, guesses = [0, 0, 0, 1, 2, 2, 3, 9], [0, 1, 1, 1, 5, 2, 4, 8]
    images[:, 0, 0, 0] = torch.tensor(guesses)
    images[:, 0, 1, 1] = torch.tensor([1, 0.5, 0.6, 1, 0.9, 1, 0.8, 0.7])
    split = dl.Split(images, torch.tensor(truths))
    matrix = dl.confusion_matrix(None, split)
    assert matrix.iloc[0, 1] == 2 and matrix.iloc[1, 0] == 0 and matrix.iloc[2, 5] == 1
    with warnings.catch_warnings(action="ignore"):  # classes without an image
        grid, *axes = dl.plot_errors(None, split).axes
    shown = np.asarray(grid.images[0].get_array())
    assert shown[0, 1] == pytest.approx(200 / 3) and (shown[1, 0], shown[1, 1]) == (0, 100)
    assert (grid.get_xlabel(), grid.get_ylabel()) == ("predicted class", "true class")
    assert words(grid.get_xticklabels()) == words(grid.get_yticklabels()) == [*dl.CLASSES]
    titles = [" ".join(ax.get_title().split("\n")[:2]) for ax in axes]
    pairs = [(2, 5), (3, 4), (9, 8), (0, 1), (0, 1)]
    assert titles[:5] == [f"{dl.CLASSES[a]} as {dl.CLASSES[b]}" for a, b in pairs]
    assert not axes[5].get_frame_on() and not axes[5].images


def test_own_settings_and_a_ninth_row_are_drawn_too(monkeypatch):
    own = dl.Setting("strong", "Dropout 0.5", dropout=0.5)
    results, history = tables_of([*EIGHT.values(), own])
    for rows in ({}, {"strong": own}):
        monkeypatch.setattr(dl, "SETTINGS", EIGHT | rows)
        assert own.label in words(dl.plot_results(results, EFFECTS).axes[0].get_yticklabels())
        figure = dl.plot_convergence(history, [*LABELS, "strong"], ["strong"])
        assert own.label in [ax.get_title() for ax in figure.axes]
        assert own.label in words(figure.axes[-1].texts)
        assert len({style[1:] for style in dl._styles(results.setting).values()}) == 9


def test_one_seed_and_one_epoch_are_drawn_without_a_warning(study):
    results, history = tables_of(EIGHT.values(), seeds=[3], epochs=1)
    nothing = EFFECTS.assign(half_width=np.nan)
    norms = pd.DataFrame({"setting": B, "epoch": [0, 1], "layer": "fc3", "effective_rate": 0.0})
    story = dl.plot_story(history, norms.assign(norm=1.0), study, [B])
    figures = [dl.plot_results(results, nothing), dl.plot_gains(nothing), story]
    for figure in (*figures, dl.plot_convergence(history, FOUR, SIX)):
        figure.canvas.draw()
    assert "±" not in dl.summary_table(results).to_string()
