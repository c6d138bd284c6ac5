"""Tables and figures: what is drawn is what went in."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SETTINGS, save, study_rows
from matplotlib.figure import Figure

import dl_utils as dl

FIVE = ["baseline", "dropout", "weight_decay", "batch_norm", "combined"]
LABELS = [dl.SETTINGS[name].label for name in FIVE]


@pytest.fixture(scope="module")
def runs(trained, splits, config):
    """Two runs of each setting."""
    again = [dl.train(SETTINGS[name], splits, replace(config, seed=1)) for name in trained]
    return [*trained.values(), *again]


@pytest.fixture(scope="module")
def tables(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save(folder, *runs)
    return dl.collect(folder)


@pytest.fixture(scope="module")
def study():
    """A study that is complete: A for the techniques, D, B and C."""
    rows, rng = [], np.random.default_rng(0)
    for name, setting in dl.SETTINGS.items():
        part = "A" if name in ("baseline", *dl.TECHNIQUES) else "D"
        for scale, mean in ((0.5, 0.910), (2, 0.9137), (1, 0.914)):  # the last two are as good
            base = {**vars(setting), "setting": name, "lr": scale * setting.lr}
            noise = rng.normal(0, 0.001, 3)
            rows += study_rows(mean + noise - noise.mean(), part, **base)
        for epochs, accuracy in ((8, 0.90), (32, 0.92)) if name in FIVE else ():
            rows += study_rows(accuracy + rng.normal(0, 0.001, 3), "C", **base, epochs=epochs)
    for lr in (0.1, 0.2):
        rows += study_rows(np.array([0.90, 0.91, 0.92]) - lr / 100, "B", pooling="average", lr=lr)
    return pd.DataFrame(rows)


def words(texts):
    return [text.get_text() for text in texts]


def test_the_summary_has_the_first_seed_and_mean_and_deviation_of_all(tables):
    results, _ = tables
    table = dl.summary_table(results).set_index("setting").loc["Dropout"]
    for split in ("train", "test"):
        own = 100 * results[results.setting == "dropout"][f"{split}_accuracy"]
        assert table[f"{split}, seed 0"] == f"{own.iloc[0]:.2f}"
        assert table[f"{split}, mean"] == f"{own.mean():.2f} ± {own.std():.2f}"


def test_tables_and_source_are_markdown_that_reads_well_and_fits_the_page():
    frame = pd.DataFrame({"setting": ["None", "All three"], "test": [90.5, 91]})
    assert dl.show_table(frame, "Table 9. Of it").data.splitlines() == [
        "| **Table 9. Of it** | test |",
        "| :------------------ | ----: |",
        "| None | 90.5 |",
        "| All three | 91.0 |",
    ]
    shown = dl.show_source(dl.LeNet5, dl.train_epoch).data
    lines = shown.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 79
    assert "nn.Conv2d(1, 6, kernel_size=5, padding=2)" in shown and "optimizer.step()" in shown
    assert lines[2] == "```python" and lines[3] == "class LeNet5(nn.Module):"


def test_examples_show_each_class_and_the_diagram_the_shapes(splits):
    assert [ax.get_title() for ax in dl.plot_examples(splits["train"]).axes] == [*dl.CLASSES]
    ax = dl.plot_architecture(dl.build_model(dl.SETTINGS["combined"])).axes[0]
    assert [text.replace("\n", " ") for text in words(ax.texts)[::2]] == [
        "1 map 28 × 28",
        "6 maps 28 × 28",
        "6 maps 14 × 14",
        "16 maps 10 × 10",
        "16 maps 5 × 5",
        "120 units",
        "84 units",
        "10 units",
    ]
    assert "48,120" in words(ax.texts)[11] and len(ax.patches) == 1 + 6 + 6 + 16 + 16 + 3


def test_convergence_draws_means_and_extremes_of_all_seeds(tables):
    _, history = tables
    figure = dl.plot_convergence(history, FIVE)
    ax = figure.axes[1]
    assert (ax.get_title(), ax.get_ylabel()) == ("Dropout", "accuracy (%)")
    own = 100 * history[history.setting == "dropout"].pivot(
        index=["split", "epoch"], columns="seed", values="accuracy"
    )
    for line, band, split in zip(ax.lines, ax.collections, ("train", "test")):
        assert list(line.get_ydata()) == pytest.approx([*own.loc[split].mean(axis=1)])
        low, high = band.get_datalim(ax.transData).intervaly
        ends = own.loc[split].to_numpy()
        assert (low, high) == pytest.approx((ends.min(), ends.max()))
    assert sorted(words(figure.axes[5].texts)) == sorted(LABELS)
    with pytest.raises(ValueError, match="the table lacks strong"):
        dl.plot_convergence(history, ["strong"])


def test_results_draw_each_run_and_bars_of_the_tukey_hsd_into_axes_given(tables):
    results, _ = tables
    left, right = axes = Figure().subplots(1, 2)
    assert dl.plot_results(results, axes=axes) is left.figure
    own = 100 * results[results.setting == "weight_decay"].select_dtypes("number")
    assert list(left.lines[2 * 2].get_xdata()) == list(own.test_accuracy)
    bar = left.collections[2].get_segments()[0][:, 0]
    assert bar[1] - bar[0] == pytest.approx(100 * dl.tukey_hsd(results))
    assert words(left.texts)[2] == f"{own.test_accuracy.mean():.2f}"
    assert words(right.texts)[2] == f"{(own.train_accuracy - own.test_accuracy).mean():.1f}"


def test_additivity_draws_the_effects(tables):
    results, _ = tables
    effect, axes = 100 * dl.effects(results).effect, dl.plot_additivity(results).axes
    titles = [ax.get_title() for ax in axes[:3]]
    assert titles == ["Dropout (D)", "Weight decay (W)", "Batch norm (B)"]
    for ax, name in zip(axes, dl.TECHNIQUES):
        others = words(ax.get_xticklabels())
        assert others[0] == "none" and others[3].count("+") == 1
        assert ax.lines[0].get_ydata()[0] == effect[name]
    points = axes[1].lines[1].get_ydata()
    assert points[0] == effect["weight_decay over baseline"]
    assert points[3] == effect["weight_decay over dropout_batch_norm"]
    assert list(axes[3].lines[0].get_ydata()) == list(effect[-2:])


def test_grids_show_every_mean_and_frame_what_was_chosen_and_what_is_as_good(study):
    figure, ofs = dl.plot_grids(study), study[(study.setting == "dropout") & (study.part == "A")]
    labels = [setting.label.replace(" + ", "\n+ ") for setting in dl.SETTINGS.values()]
    assert [ax.get_title() for ax in figure.axes] == labels[1:]
    ax, means = figure.axes[0], 100 * ofs.groupby("lr").val_accuracy.mean()
    assert words(ax.texts)[-3:] == [f"{mean:.1f}" for mean in means]
    thick = [patch for patch in ax.patches if patch.get_linewidth() > 1]
    assert len(thick) == 2 and thick[1].get_x() == pytest.approx(0.57)  # none's, the higher rate
    assert words(ax.get_yticklabels()) == ["off", f"{dl.SETTINGS['dropout'].dropout:g}"[1:]]
    framed = [patch for patch in ax.patches if patch.get_y() > 0.5]
    assert len(framed) == sum(means >= means.max() - 100 * dl.noise_band(study)) == 2


def test_alternatives_are_compared_at_their_best_rate_seed_by_seed(study):
    found = dl.alternatives(study)
    chosen = study[(study.setting == "baseline") & (study.lr == dl.SETTINGS["baseline"].lr)]
    default = chosen[chosen.part == "A"].val_accuracy
    assert list(found.index) == ["Average pooling"]
    expected = [0.899, 0.909, 0.919] - default
    assert list(found.loc["Average pooling"]) == pytest.approx(list(expected))
    left, right = dl.plot_choices(study).axes
    assert list(left.lines[0].get_xdata()) == pytest.approx(list(100 * expected))
    width = left.patches[0].get_extents().width / left.transData.get_matrix()[0, 0]
    assert width == pytest.approx(200 * dl.noise_band(study))
    assert sorted(words(right.texts)) == sorted(LABELS)
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
    medians = history.groupby(["setting", "split", "epoch"]).loss.median()
    x, y = losses.lines[0].get_data()
    assert [*x] == [*medians["baseline", "train"]] and [*y] == [*medians["baseline", "test"]]
    length = 100 * dl.lengths(study).groupby(["setting", "epochs"]).val_accuracy.mean()
    x, y = fits.lines[0].get_data()
    assert [*y] == pytest.approx([*length["baseline"]]) and [*x] == pytest.approx([*(y + 5)])
    assert len(fits.lines) == 5
    conv1 = inside[inside.setting == "baseline"].conv1.mean()
    assert norms.lines[0].get_ydata()[0] == pytest.approx(conv1)
    assert words(sure.get_yticklabels()) == LABELS


def test_errors_are_shares_of_each_true_class_and_the_most_confident_mistakes(trained, splits):
    model, split = trained["dropout"].model, splits["val"]
    noisy = dl.Split(split.images.flip(3), split.labels)  # many mistakes
    probability, guess = dl.compute_logits(model, noisy.images).softmax(1).max(1)
    matrix = dl.confusion_matrix(model, noisy).to_numpy()
    for truth, answer in ((0, 3), (2, 2), (7, 5)):
        assert matrix[truth, answer] == sum((noisy.labels == truth) & (guess == answer))
    assert matrix.sum(axis=1).tolist() == torch.bincount(noisy.labels, minlength=10).tolist()
    first, *others = dl.plot_errors(model, noisy).axes
    assert first.images[0].get_array().sum(axis=1).tolist() == pytest.approx([100.0] * 10)
    wrong = probability[guess != noisy.labels].sort(descending=True)[0]
    shown = [re.search(r"[\d.]+%", ax.get_title())[0] for ax in others]
    assert shown == [f"{value:.1%}" for value in wrong[:6].tolist()]


def test_own_settings_and_a_ninth_row_are_everywhere(runs, tables, splits, study, monkeypatch):
    own = dl.Setting("strong", "Dropout 0.5", dropout=0.5)
    one = [table[table.setting == "baseline"] for table in tables]
    added = [table.assign(setting="strong", label=own.label) for table in one]
    results, history = map(pd.concat, zip(tables, added))
    inside = dl.examine([*runs, replace(runs[0], setting=own)], splits["test"])
    for rows in ({}, {"strong": own}):
        monkeypatch.setattr(dl, "SETTINGS", dl.SETTINGS | rows)
        later = results[(results.setting != "strong") | (results.seed == 1)]  # it lacks seed 0
        assert list(dl.summary_table(later).iloc[-1][:2]) == [own.label, ""]
        figure = dl.plot_convergence(history)
        assert figure.axes[8].get_title() == own.label and own.label in words(figure.axes[9].texts)
        assert words(dl.plot_results(results).axes[0].get_yticklabels())[-1] == own.label
        sure = dl.plot_why(history, inside, study).axes[3]
        assert words(sure.get_yticklabels())[-1] == own.label
        assert len({color for _, color in dl._styles(results).values()}) == 9
        dl.plot_additivity(results)
    many = [one[1].assign(setting=f"s{n}", label=f"S {n}") for n in range(20)]
    assert len(dl.plot_convergence(pd.concat(many)).axes) == 21


def test_one_seed_is_drawn_as_dots_without_intervals(tables):
    results, history = (table[table.seed == 0] for table in tables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            dl.plot_results(results),
            dl.plot_additivity(results),
            dl.plot_convergence(history),
        ):
            figure.canvas.draw()
    assert np.isnan(dl.tukey_hsd(results)) and dl.effects(results).half_width.isna().all()
