"""EX1.ipynb and README.md: hygiene, and that their numbers are those of the files."""

import itertools
import json
import re
import statistics

import pandas as pd
import pytest
from conftest import ROOT

import dl_utils as dl

NOTEBOOK = json.loads((ROOT / "EX1.ipynb").read_text(encoding="utf-8"))
CELLS = NOTEBOOK["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = [
    "".join(cell["source"]).replace("\N{NO-BREAK SPACE}", " ")
    for cell in CELLS
    if cell["cell_type"] == "markdown"
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def source(cell):
    return "".join(cell["source"])


def outputs(cell):
    for output in cell["outputs"]:
        yield "".join(output.get("text", "")) + "".join(
            "".join(text) for kind, text in output.get("data", {}).items() if "text/" in kind
        )


def test_saved_by_one_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not [o for cell in CODE for o in cell["outputs"] if o.get("name") == "stderr"]


def test_cells_are_few_and_short():
    lengths = [len(source(cell).splitlines()) for cell in CODE]
    assert 12 <= len(CODE) <= 20 and statistics.median(lengths) <= 5 and max(lengths) <= 15
    for cell in CODE:
        assert max(map(len, source(cell).splitlines())) <= 79
        streams = ["".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream"]
        assert sum(len(text.splitlines()) for text in streams) <= 15


def test_notebook_defines_nothing():
    for cell in CODE:
        assert not re.search(r"^\s*(def|class)\s|\blambda\b", source(cell), re.M)


def test_saved_outputs_are_those_of_the_saved_weights():
    first = source(CODE[0])
    assert 'os.environ.get("RUNS", "weights")' in first
    printed = " ".join(text for cell in CODE for text in outputs(cell))
    assert f"{5 * len(dl.SETTINGS)} runs from weights/" in printed


def test_metadata_is_for_the_student_to_fill_in():
    metadata = NOTEBOOK["metadata"]
    assert metadata["title"] and metadata["date"] == ""
    assert [list(author) for author in metadata["authors"]] == [["name"]]
    assert "authors" in README


def test_no_paths_of_one_machine():
    for path in ("README.md", "theory.md", "EX1.ipynb", "dl_utils.py"):
        assert not re.search(
            r"/(work|tmp|root|home)/", (ROOT / path).read_text(encoding="utf-8")
        ), path


def test_theory_is_shown_from_its_file():
    shown = [text for cell in CODE for text in outputs(cell)]
    assert any((ROOT / "theory.md").read_text(encoding="utf-8").strip() in text for text in shown)


@pytest.fixture(scope="module")
def results():
    table = pd.read_csv(ROOT / "weights/results.csv")
    for name in dl.SETTINGS:
        assert (table.setting == name).sum() == 5
    return table


def test_tables_in_the_notebook_are_those_of_the_results(results):
    shown = [text for cell in CODE for text in outputs(cell)]
    four = ["baseline", "dropout", "weight_decay", "batch_norm"]
    for table in (
        dl.summary_table(results, names=four), dl.seed_table(results),
        dl.difference_table(results), dl.settings_table(),
    ):  # fmt: skip
        body = dl.Table(table, "")._repr_markdown_().split("\n\n")[1]
        assert any(body in text for text in shown)


def facts(results):
    """Every number with two decimals that the prose may quote: accuracies and gaps in percent,
    their means and deviations over the seeds, paired differences with their intervals, means
    over the seeds of the search and of single epochs."""
    runs = results.assign(gap=results.train_accuracy - results.test_accuracy)
    columns = [*dl.ACCURACIES, "gap"]
    numbers = []
    for name, own in runs.groupby("setting"):
        for column in columns:
            numbers += [*own[column], own[column].mean(), own[column].std()]
            for other in set(dl.SETTINGS) - {name}:
                numbers += dl.paired_difference(results, name, other, column)
    history = pd.read_csv(ROOT / "weights/history.csv")
    for epoch in (1, 5):
        rows = history[(history.epoch == epoch) & (history.split == "test")]
        rows = runs.merge(rows, on=["setting", "seed"])
        for name, other in itertools.permutations(dl.SETTINGS, 2):
            numbers += dl.paired_difference(rows, name, other, "accuracy")
    search = pd.read_csv(ROOT / "weights/search.csv")
    groups = list(search.columns.drop(["questions", "seed", "val_accuracy", "seconds"]))
    numbers += [*search.val_accuracy, *search.groupby(groups).val_accuracy.mean()]
    numbers += list(history.groupby(["setting", "split", "epoch"]).accuracy.mean())
    return {f"{abs(100 * number):.2f}" for number in numbers}


NUMBERS = r"(?<![\d.])[1-9]\d?\.\d\d(?![\d.])|(?<=[+−])\d\.\d\d(?!\d)|(?<=± )\d\.\d\d(?!\d)"


def test_numbers_in_prose_and_readme_are_facts(results):
    known, found = facts(results), 0
    for text in [*PROSE, README]:
        text = re.sub(r"\b3\.1\d\b", "", text)  # versions of Python
        for number in re.findall(NUMBERS, text):
            assert number in known, f"{number} in: {text[:60]}"
            found += 1
    assert found > 60


def test_losses_in_prose_are_facts(results):
    history = pd.read_csv(ROOT / "weights/history.csv")
    means = history.groupby(["setting", "split", "epoch"]).loss.mean()
    conclusions = next(text for text in PROSE if "## 10 Conclusions" in text)
    last = history[(history.epoch == history.epoch.max()) & (history.split == "test")]
    runs = results.merge(last, on=["setting", "seed"])
    pairs = itertools.permutations(dl.SETTINGS, 2)
    differences = [abs(x) for pair in pairs for x in dl.paired_difference(runs, *pair, "loss")]
    losses = re.findall(r"(?<!\d)0\.\d{3}(?!\d)", conclusions.replace("lambda = 0.001", ""))
    assert len(losses) > 8 and set(losses) <= {f"{loss:.3f}" for loss in [*means, *differences]}


def test_mistakes_in_prose_are_those_of_the_saved_weights(real_splits):
    model = dl.load_checkpoint(ROOT / "weights/combined.pt").model
    matrix = dl.confusion_matrix(model, real_splits["test"])
    hits = sum(matrix.loc[name, name] for name in dl.CLASSES)
    four = ["T-shirt/top", "pullover", "coat", "shirt"]
    among = sum(matrix.loc[a, b] for a in four for b in four if a != b)
    shirt = (100 * matrix.loc["shirt"] / matrix.loc["shirt"].sum()).map("{:.1f}".format)
    prose = " ".join(PROSE)
    assert f"{among} of its {10_000 - hits} mistakes are confusions among" in prose
    images = real_splits["test"].images
    probability, predicted = dl.compute_logits(model, images).softmax(1).max(1)
    sure = ((predicted != real_splits["test"].labels) & (probability > 0.99)).sum()
    assert f"{sure} of its {10_000 - hits} mistakes are made with more than 99 %" in prose
    most = [f"{100 * matrix.loc[name, name] / 1000:.1f}" for name in ("bag", "sandal", "trouser")]
    said = "Bags, sandals and trousers are recognized to {}, {} and {} %"
    assert said.format(*most) in prose
    assert (
        f"{shirt['shirt']} % are recognized, {shirt['T-shirt/top']} % are taken for T-shirts "
        f"or tops, {shirt['pullover']} % for pullovers and {shirt['coat']} % for coats"
    ) in prose


def test_abstract_and_conclusions_say_the_differences_that_there_are(results):
    abstract, conclusions = PROSE[0], next(text for text in PROSE if "## 10 Conclusions" in text)
    runs = results.groupby("setting")
    means = [f"{100 * runs.test_accuracy.mean()[name]:.2f} %" for name in dl.SETTINGS]
    assert re.findall(r"\d\d\.\d\d %", abstract.split("**Result.**")[1])[:5] == means
    names = {"Dropout": "dropout", "Weight decay": "weight_decay", "All three": "combined",
             "Batch normalization": "batch_norm"}  # fmt: skip
    for label, name in names.items():
        mean, half = (100 * part for part in dl.paired_difference(results, name))
        said = f"{mean:+.2f} ± {half:.2f} points".replace("-", "−")
        resolved = "" if abs(mean) > half else ", which may be no change"
        for text in (abstract, conclusions.split(f"**{label}")[1].split("\n\n")[0]):
            assert said in text and (said + resolved in text), (name, said)
            assert resolved or said + ", which may be no change" not in text


def test_result_table_of_the_readme_is_that_of_the_results(results):
    table = dl.seed_table(results)
    for row in table.itertuples(index=False):
        cells = list(row[:4])
        assert re.search(r"\| *" + r" *\| *".join(map(re.escape, cells)) + r" *\|", README), row


def test_notebook_names_the_hyperparameters_that_are_used():
    text = "\n".join(PROSE)
    config = dl.TrainConfig()
    assert f"{config.epochs} epochs" in text and f"batches of {config.batch_size}" in text
    assert f"{len(pd.read_csv(ROOT / 'weights/search.csv'))} runs" in text


def test_figures_are_saved_as_pictures():
    kinds = [set(output.get("data", ())) for cell in CODE for output in cell["outputs"]]
    figures = [kind for kind in kinds if "image/png" in kind]
    assert len(figures) == 8 and all("application/pdf" in kind for kind in figures)
    plain = [text for cell in CODE for text in outputs(cell) if text.startswith("<Figure")]
    assert len(plain) == len(figures)
