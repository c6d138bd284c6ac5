"""Tables and figures: the numbers in them are those that went in."""

import math

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import dl_utils as dl


@pytest.fixture(scope="module")
def results():
    rows = [
        (name, seed, 3, 0.9 + 0.01 * k, 0.89 + 0.01 * k, 0.88 + 0.01 * k + 0.001 * k * seed, 9.0)
        for k, name in enumerate(dl.SETTINGS)
        for seed in range(3)
    ]
    columns = [
        "setting",
        "seed",
        "epoch",
        "train_accuracy",
        "val_accuracy",
        "test_accuracy",
        "seconds",
    ]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture(scope="module")
def history(trained):
    runs = [run.history.assign(setting=name, seed=0) for name, run in trained.items()]
    return pd.concat([*runs, *(run.assign(seed=1) for run in runs)])


def test_summary_table_is_train_and_test_of_one_seed(results):
    table = dl.summary_table(results, names=("baseline", "dropout"))
    assert table.to_dict("list") == {
        "setting": ["No regularization", "Dropout"],
        "train %": ["90.00", "91.00"],
        "test %": ["88.00", "89.00"],
    }
    assert list(dl.summary_table(results, seed=2)["test %"])[2] == "90.40"


def test_seed_table_has_mean_deviation_and_gap(results):
    row = dl.seed_table(results).set_index("setting").loc["Weight decay"]
    assert row["test %"] == "90.20 ± 0.20" and row["gap"] == "1.80 ± 0.20"


def test_paired_differences_have_students_interval(results):
    difference = dl.paired_difference(results, "combined")
    k = list(dl.SETTINGS).index("combined")  # see the results above
    assert difference[0] == pytest.approx(0.011 * k)
    assert difference[1] == pytest.approx(4.303 * 0.001 * k / math.sqrt(3))
    table = dl.difference_table(results).set_index("setting")
    assert table["test"]["All three"] == f"{1.1 * k:+.2f} ± {0.4303 * k / math.sqrt(3):.2f}"
    assert dl._with_spread(-0.001, 0.3, "+.2f") == "+0.00 ± 0.30"
    assert dl._with_spread(-1.25, 0.3, "+.2f") == "−1.25 ± 0.30"
    many = pd.concat([results.assign(seed=results.seed + 3 * k) for k in range(5)])
    assert dl.paired_difference(many, "combined")[1] < difference[1]  # 15 seeds
    with pytest.raises(ValueError, match="expected runs of dropuot and baseline; found baseline"):
        dl.paired_difference(results, "dropuot")
    with pytest.raises(ValueError, match="baseline has no run of seed 7"):
        dl.summary_table(results, seed=7)
    one_seed = results[results.seed == 0]
    assert math.isnan(dl.paired_difference(one_seed, "combined")[1])
    assert "nan" not in str(dl.difference_table(one_seed)) + str(dl.seed_table(one_seed))


def test_quantiles_are_students():
    for k, quantile in enumerate(dl.T_975, 1):
        x = torch.linspace(0, quantile, 100_001, dtype=torch.float64)
        scale = math.gamma((k + 1) / 2) / math.gamma(k / 2) / math.sqrt(k * math.pi)
        density = scale * (1 + x**2 / k) ** (-(k + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)


def test_settings_table_shows_what_differs():
    table = dl.settings_table().set_index("setting")
    assert table["dropout p"].iloc[0] == "off"
    for setting in dl.SETTINGS.values():
        assert table.loc[setting.label, "learning rate"] == f"{setting.lr:g}"


def test_tables_are_markdown_in_jupyter_and_latex_in_the_pdf(results):
    table = dl.Table(dl.summary_table(results), "Table 9. 50 % of it")
    assert table._repr_markdown_().splitlines()[:5] == [
        "**Table 9. 50 % of it**",
        "",
        "| setting | train % | test % |",
        "| :-- | --: | --: |",
        "| No regularization | 90.00 | 88.00 |",
    ]
    latex = table._repr_latex_()
    assert r"Table 9. 50 \% of it" in latex and r"train \%" in latex and "90.00 &" in latex
    frame = pd.DataFrame({"images": [55_000], "difference": [8.3e-17], "agrees": [True]})
    assert "| 55,000 | 8.3e-17 | True |" in dl.Table(frame, "")._repr_markdown_()


def test_means_are_those_of_the_history(history):
    other = history.assign(seed=1, loss=2 * history.loss, accuracy=history.accuracy / 2)
    history = pd.concat([history, other])
    figure = dl.plot_means(history)
    means = history.groupby(["setting", "split", "epoch"])[["accuracy", "loss"]].mean()
    accuracies, losses = figure.axes
    for name, line, test, train in zip(
        dl.SETTINGS, accuracies.lines, losses.lines[::2], losses.lines[1::2]
    ):
        assert list(line.get_ydata()) == list(100 * means.accuracy[name, "test"])
        assert list(test.get_ydata()) == list(means.loss[name, "test"])
        assert list(train.get_ydata()) == list(means.loss[name, "train"])
        assert line.get_label() == dl.SETTINGS[name].label


def test_convergence_draws_the_history(history, trained):
    figure = dl.plot_convergence(history)
    assert isinstance(figure, Figure) and len(figure.axes) == 6
    ax = figure.axes[1]
    assert ax.get_title() == "Dropout: accuracy by epoch"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "accuracy (%)")
    run = trained["dropout"].history
    for line, split in zip(ax.lines[::2], ("train", "test")):
        assert list(line.get_ydata()) == list(100 * run[run.split == split].accuracy)
        assert line.get_label() == split
    assert figure.axes[0].get_shared_y_axes().joined(figure.axes[0], figure.axes[1])


def test_settings_of_ones_own_and_a_ninth_row_appear_in_every_table_and_figure(
    history, results, trained, monkeypatch
):
    own = history[history.setting == "baseline"].assign(setting="strong", label="Dropout 0.5")
    rows = results[results.setting == "baseline"].assign(setting="strong", label="Dropout 0.5")
    for inside in (False, True):
        if inside:
            monkeypatch.setitem(dl.SETTINGS, "strong", dl.Setting("strong", "Dropout 0.5"))
        all_runs, all_results = pd.concat([history, own]), pd.concat([results, rows])
        figure = dl.plot_convergence(all_runs)
        assert figure.axes[5].get_title() == "Dropout 0.5: accuracy by epoch"
        lines = dl.plot_means(all_runs).axes[0].lines
        assert len({line.get_color() for line in lines}) == 6
        for table in (dl.summary_table, dl.seed_table, dl.difference_table):
            assert "Dropout 0.5" in list(table(all_results).setting)
        assert list(dl.plot_convergence(own).axes[0].lines[0].get_ydata())
    for number in range(9):
        monkeypatch.setitem(dl.SETTINGS, f"s{number}", dl.Setting(f"s{number}", f"S {number}"))
    more = [own.assign(setting=f"s{number}") for number in range(9)]
    assert len(dl.plot_convergence(pd.concat([history, *more])).axes) == 14


def test_architecture_is_drawn_from_the_shapes():
    figure = dl.plot_architecture(dl.build_model(dl.SETTINGS["combined"]))
    texts = [text.get_text() for text in figure.axes[0].texts]
    sizes = [text.replace("\n", " ") for text in texts[::2]]
    assert sizes[:3] == ["1 map 28 × 28", "6 maps 28 × 28", "6 maps 14 × 14"]
    assert sizes[3:5] == ["16 maps 10 × 10", "16 maps 5 × 5"]
    assert sizes[5:] == ["120 units", "84 units", "10 units"]
    assert "48,120" in texts[11] and len(figure.axes[0].patches) == 1 + 6 + 6 + 16 + 16 + 3


def test_plots_draw_into_given_axes(history, splits, trained):
    ax = Figure().subplots()
    assert dl.plot_convergence(history, axes=ax, names=["dropout"]) is ax.figure
    assert ax.lines
    ax = Figure().subplots()
    matrix = dl.confusion_matrix(trained["baseline"].model, splits["test"])
    assert dl.plot_confusion(matrix, axes=ax) is ax.figure


def test_plots_say_what_they_need(history, splits):
    with pytest.raises(ValueError, match="found 1 axes; expected one for each of 5 panels"):
        dl.plot_convergence(history, axes=Figure().subplots())
    for rest in (history[history.split != "train"], history[history.setting != "combined"]):
        with pytest.raises(ValueError, match="the history lacks (train|combined)"):
            dl.plot_convergence(rest, names=["combined"])
    few = splits["val"].labels < 9
    with pytest.raises(ValueError, match="the split has no image of class 9"):
        dl.plot_examples(dl.Split(splits["val"].images[few], splits["val"].labels[few]))


def test_confusion_is_in_percent_of_each_true_class(trained, splits):
    matrix = dl.confusion_matrix(trained["baseline"].model, splits["test"])
    shown = dl.plot_confusion(matrix).axes[0].images[0].get_array()
    assert shown.sum(axis=1).tolist() == pytest.approx([100.0] * 10)


def test_examples_show_each_class(splits):
    titles = [ax.get_title() for ax in dl.plot_examples(splits["train"]).axes]
    assert titles == [f"{k} {name}" for k, name in enumerate(dl.CLASSES)]


def test_mistakes_are_mistakes_with_the_greatest_confidence_first(trained, splits):
    model, split = trained["dropout"].model, splits["val"]
    noisy = dl.Split(split.images.flip(3), split.labels)  # many mistakes
    figure = dl.plot_mistakes(model, noisy)
    probability, guess = dl.compute_logits(model, noisy.images).softmax(1).max(1)
    wrong = probability[guess != noisy.labels].sort(descending=True)[0]
    for ax, value in zip(figure.axes, wrong.tolist()):
        assert f"({100 * value:.1f} %)" in ax.get_title()
