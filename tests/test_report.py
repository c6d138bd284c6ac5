"""Tables and figures: what is drawn is what went in."""

import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import study_rows
from matplotlib.figure import Figure

import dl_utils as dl

FIVE = ["baseline", "dropout", "weight_decay", "batch_norm", "combined"]


@pytest.fixture(scope="module")
def runs(trained):
    """Two runs of each setting; the second has the first's history, a little worse."""
    again = [
        replace(
            run,
            config=replace(run.config, seed=1),
            history=run.history.assign(accuracy=0.99 * run.history.accuracy),
            metrics={
                name: dl.Metrics(x.loss, 0.99 * x.accuracy) for name, x in run.metrics.items()
            },
        )
        for run in trained.values()
    ]
    return [*trained.values(), *again]


@pytest.fixture
def tables(runs, tmp_path):
    for run in runs:
        dl.save_checkpoint(dl.checkpoint_path(tmp_path, run.setting, run.config), run)
    return dl.collect(tmp_path)


@pytest.fixture(scope="module")
def study():
    """A study that is complete: A for the techniques, D, B and C."""
    rows, rng = [], np.random.default_rng(0)
    for name, setting in dl.SETTINGS.items():
        for lr in (0.5 * setting.lr, setting.lr):
            base = {"setting": name, "dropout": setting.dropout, "batch_norm": setting.batch_norm}
            base |= {"weight_decay": setting.weight_decay, "lr": lr}
            part = "A" if name in ("baseline", *dl.TECHNIQUES) else "D"
            rows += study_rows(
                part, 0.910 + 0.004 * (lr == setting.lr) + rng.normal(0, 0.001, 3), **base
            )
        if name in FIVE:
            for epochs, accuracy in ((8, 0.90), (32, 0.92)):
                rows += study_rows("C", accuracy + rng.normal(0, 0.001, 3), **base, epochs=epochs)
    for lr in (0.1, 0.2):
        rows += study_rows("B", np.array([0.90, 0.91, 0.92]) - lr / 100, pooling="average", lr=lr)
    return pd.DataFrame(rows)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_summary_has_the_first_seed_and_mean_and_deviation_of_all(tables):
    results, _ = tables
    table = dl.summary_table(results).set_index("setting")
    own = 100 * results[results.setting == "dropout"].test_accuracy
    assert table.loc["Dropout", "test, seed 0"] == f"{own.iloc[0]:.2f}"
    assert table.loc["Dropout", "test, mean"] == f"{own.mean():.2f} ± {own.std():.2f}"
    one = dl.summary_table(results[results.seed == 1]).set_index("setting")
    assert one.loc["Dropout", "test, seed 1"] == one.loc["Dropout", "test, mean"]


def test_tables_are_markdown_that_reads_left_to_right():
    frame = pd.DataFrame({"setting": ["None", "All three"], "test": [90.5, 91]})
    assert dl.show_table(frame, "Table 9. Of it").data.splitlines() == [
        "| **Table 9. Of it** | test |",
        "| :------------------ | ----: |",
        "| None | 90.5 |",
        "| All three | 91.0 |",
    ]


def test_the_source_that_is_shown_is_the_source_and_fits_the_page():
    shown = dl.show_source(dl.LeNet5, dl.train_epoch).data
    lines = shown.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 79
    assert "nn.Conv2d(1, 6, kernel_size=5, padding=2)" in shown and "optimizer.step()" in shown
    assert lines[0] == "```python" and lines[1] == "class LeNet5(nn.Module):"


def test_examples_show_each_class_and_the_diagram_the_shapes(splits):
    titles = [ax.get_title() for ax in dl.plot_examples(splits["train"]).axes]
    assert titles == list(dl.CLASSES)
    ax = dl.plot_architecture(dl.build_model(dl.SETTINGS["combined"])).axes[0]
    sizes = [text.replace("\n", " ") for text in texts(ax)[::2]]
    assert sizes[:3] == ["1 map 28 × 28", "6 maps 28 × 28", "6 maps 14 × 14"]
    assert sizes[3:] == ["16 maps 10 × 10", "16 maps 5 × 5", "120 units", "84 units", "10 units"]
    assert "48,120" in texts(ax)[11] and len(ax.patches) == 1 + 6 + 6 + 16 + 16 + 3


def test_convergence_draws_means_and_extremes_of_all_seeds(tables):
    _, history = tables
    figure = dl.plot_convergence(history, FIVE)
    ax = figure.axes[1]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == (
        "Dropout",
        "epoch",
        "accuracy (%)",
    )
    own = history[(history.setting == "dropout")].groupby(["split", "epoch"]).accuracy
    for line, band, split in zip(ax.lines, ax.collections, ("train", "test")):
        assert list(line.get_ydata()) == pytest.approx(list(100 * own.mean()[split]))
        low, high = band.get_datalim(ax.transData).intervaly
        assert low == pytest.approx(100 * own.min()[split].min())
        assert high == pytest.approx(100 * own.max()[split].max())
    assert sorted(texts(figure.axes[5])) == sorted(dl.SETTINGS[name].label for name in FIVE)


def test_results_draw_each_run_and_bars_of_the_least_difference(tables):
    results, _ = tables
    left, right = dl.plot_results(results).axes
    own = results[results.setting == "weight_decay"]
    dots, bar = left.lines[2 * 2].get_xdata(), left.collections[2].get_segments()[0][:, 0]
    assert list(dots) == list(100 * own.test_accuracy)
    assert bar[1] - bar[0] == pytest.approx(100 * dl.least_difference(results))
    gap = 100 * (own.train_accuracy - own.test_accuracy).mean()
    assert texts(left)[2] == f"{100 * own.test_accuracy.mean():.2f}"
    assert texts(right)[2] == f"{gap:.1f}"


def test_additivity_draws_the_effects(tables):
    results, _ = tables
    table = 100 * dl.effects(results)
    axes = dl.plot_additivity(results).axes
    assert [ax.get_title() for ax in axes[:3]] == [
        "Dropout (D)",
        "Weight decay (W)",
        "Batch norm (B)",
    ]
    for ax, name in zip(axes, dl.TECHNIQUES):
        others = [text.get_text() for text in ax.get_xticklabels()]
        assert others[0] == "none" and others[3].count("+") == 1
        assert ax.lines[0].get_ydata()[0] == table.effect[name]
    points = axes[1].lines[1].get_ydata()
    assert points[0] == table.effect["weight_decay over baseline"]
    assert points[3] == table.effect["weight_decay over dropout_batch_norm"]
    assert list(axes[3].lines[0].get_ydata()) == list(table.effect[-2:])


def test_grids_show_every_mean_and_frame_what_was_chosen_and_what_is_as_good(study):
    figure = dl.plot_grids(study)
    assert [ax.get_title() for ax in figure.axes] == [row.label for row in dl.SETTINGS.values()][1:]
    ax, setting = figure.axes[0], dl.SETTINGS["dropout"]
    means = (
        100 * study[study.setting == "dropout"].groupby(["epochs", "lr"]).val_accuracy.mean()[16]
    )
    assert texts(ax)[-2:] == [f"{mean:.1f}" for mean in means]
    thick = [patch for patch in ax.patches if patch.get_linewidth() > 1]
    assert len(thick) == 2 and thick[1].get_x() == pytest.approx(0.57)  # none's, the higher rate
    assert [t.get_text() for t in ax.get_yticklabels()] == ["off", f"p {setting.dropout:g}"]
    band, best = 100 * dl.noise_band(study), means.max()
    framed = [patch for patch in ax.patches if patch.get_y() > 0.5]
    assert len(framed) == sum(means >= best - band)


def test_alternatives_are_compared_at_their_best_rate_seed_by_seed(study):
    found = dl.alternatives(study)
    chosen = study[(study.setting == "baseline") & (study.lr == dl.SETTINGS["baseline"].lr)]
    default = chosen[chosen.part == "A"].set_index("seed").val_accuracy
    assert list(found.index) == ["Average pooling"]
    expected = pd.Series([0.899, 0.909, 0.919], default.index) - default
    assert list(found.loc["Average pooling"]) == pytest.approx(list(expected))
    left, right = dl.plot_choices(study).axes
    assert list(left.lines[0].get_xdata()) == pytest.approx(list(100 * expected))
    width = left.patches[0].get_extents().width / left.transData.get_matrix()[0, 0]
    assert width == pytest.approx(200 * dl.noise_band(study))
    assert sorted(texts(right)) == sorted(dl.SETTINGS[name].label for name in FIVE)
    lengths = dl.lengths(study)
    assert set(lengths.epochs) == {8, 16, 32} and set(lengths.setting) == set(FIVE)


def test_why_draws_what_is_inside_the_models(runs, tables, splits, study):
    inside, (_, history) = dl.examine(runs, splits["test"]), tables
    row, model = inside.iloc[2], runs[2].model
    assert row.fc3 == model.layers.fc3.weight.norm().item() and "fc5" in inside
    probability, answer = model(splits["test"].images).softmax(1).max(1)
    wrong = answer != splits["test"].labels
    assert row.confidence == pytest.approx(probability[wrong].mean().item(), rel=1e-5)
    losses, fits, norms, sure = dl.plot_why(history, inside, study, FIVE).axes
    means = history.groupby(["setting", "split", "epoch"]).loss.mean()
    assert list(losses.lines[0].get_xdata()) == list(means["baseline", "train"])
    assert list(losses.lines[0].get_ydata()) == list(means["baseline", "test"])
    assert len(fits.lines) == 5 and len(fits.lines[0].get_xdata()) == 3
    assert norms.lines[0].get_ydata()[0] == pytest.approx(
        inside[inside.setting == "baseline"].conv1.mean()
    )
    assert [t.get_text() for t in sure.get_yticklabels()] == [dl.SETTINGS[n].label for n in FIVE]


def test_errors_are_shares_of_each_true_class_and_the_most_confident_mistakes(trained, splits):
    model, split = trained["dropout"].model, splits["val"]
    noisy = dl.Split(split.images.flip(3), split.labels)  # many mistakes
    first, *others = dl.plot_errors(model, noisy).axes
    assert first.images[0].get_array().sum(axis=1).tolist() == pytest.approx([100.0] * 10)
    probability, guess = dl.compute_logits(model, noisy.images).softmax(1).max(1)
    wrong = probability[guess != noisy.labels].sort(descending=True)[0]
    shown = [re.search(r"[\d.]+%", ax.get_title())[0] for ax in others]
    assert shown == [f"{value:.1%}" for value in wrong[:6].tolist()]


def test_settings_of_ones_own_and_a_ninth_row_appear_in_every_table_and_figure(
    runs, tables, splits, study, monkeypatch
):
    own = dl.Setting("strong", "Dropout 0.5", dropout=0.5)
    results, history = tables
    added = [
        table[table.setting == "baseline"].assign(setting="strong", label=own.label)
        for table in tables
    ]
    results, history = (pd.concat(pair) for pair in zip(tables, added))
    inside = dl.examine([*runs, replace(runs[0], setting=own)], splits["test"])
    for inside_settings in (False, True):
        if inside_settings:
            monkeypatch.setitem(dl.SETTINGS, "strong", own)
        assert own.label in list(dl.summary_table(results).setting)
        figure = dl.plot_convergence(history)
        assert figure.axes[8].get_title() == own.label and own.label in texts(figure.axes[9])
        left, _ = dl.plot_results(results).axes
        assert left.get_yticklabels()[-1].get_text() == own.label
        sure = dl.plot_why(history, inside, study).axes[3]
        assert sure.get_yticklabels()[-1].get_text() == own.label
        assert len({color for _, color in dl._styles(results).values()}) == 9
        dl.plot_additivity(results)
    many = [history.assign(setting=f"s{n}", label=f"S {n}") for n in range(20)]
    assert (
        len(
            dl.plot_convergence(
                pd.concat(many).drop_duplicates(["setting", "split", "epoch", "seed"])
            ).axes
        )
        == 21
    )


def test_one_seed_is_drawn_as_dots_without_intervals(runs, tables):
    results, history = (table[table.seed == 0] for table in tables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            dl.plot_results(results),
            dl.plot_additivity(results),
            dl.plot_convergence(history),
        ):
            figure.canvas.draw()
    assert math.isnan(dl.least_difference(results)) and dl.effects(results).half.isna().all()


def test_plots_draw_into_given_axes_and_say_what_they_lack(tables, splits, trained):
    results, history = tables
    axes = Figure().subplots(1, 2)
    assert dl.plot_results(results, axes=axes) is axes[0].figure and axes[0].lines
    assert dl.plot_convergence(history, ["dropout"], axes=axes) is axes[0].figure
    with pytest.raises(ValueError, match="the table lacks strong"):
        dl.plot_convergence(history, ["strong"])
    assert torch.is_grad_enabled()
