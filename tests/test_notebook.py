"""EX1.ipynb and README.md: hygiene, and that their numbers are those of the files."""

import json
import re
import statistics

import pandas as pd
import pytest
from conftest import ROOT

import dl_utils as dl

NOTEBOOK = json.loads((ROOT / "EX1.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
SHOWN = ["".join(output.get("data", {}).get("text/markdown", "")) for output in OUTPUTS]
PROSE = "\n\n".join(
    "".join(cell["source"]).replace("\N{NO-BREAK SPACE}", " ")
    for cell in NOTEBOOK["cells"]
    if cell["cell_type"] == "markdown"
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIVE = ["baseline", "dropout", "weight_decay", "batch_norm", "combined"]


def test_saved_by_one_run_from_top_to_bottom_without_a_warning():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert {o["output_type"] for o in OUTPUTS} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in OUTPUTS if output.get("name") == "stderr"]
    pictures = [o["data"] for o in OUTPUTS if "image/png" in o.get("data", {})]
    assert len(pictures) == 9 and all("application/pdf" in data for data in pictures)


def test_cells_are_short_and_define_nothing():
    lengths = [len(source.splitlines()) for source in SOURCES]
    assert statistics.median(lengths) <= 3 and max(lengths) <= 10
    for source in SOURCES:
        assert max(map(len, source.splitlines())) <= 79
        assert not re.search(r"^\s*(def|class)\s|\blambda\b", source, re.M)


def test_what_is_shown_are_the_saved_runs_and_the_theory_of_its_file():
    assert 'os.environ.get("RUNS", "weights")' in SOURCES[0]
    assert any((ROOT / "theory.md").read_text(encoding="utf-8").strip() in text for text in SHOWN)


def test_metadata_is_for_the_student_to_fill_in():
    metadata = NOTEBOOK["metadata"]
    assert metadata["title"] and metadata["date"] == "" and "authors" in README
    assert [list(author) for author in metadata["authors"]] == [["name"]]


def test_no_paths_of_one_machine():
    for path in ("README.md", "theory.md", "EX1.ipynb", "dl_utils.py"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"/(work|tmp|root|home)/", text), path


def test_prose_is_light(capsys):
    """Under 0.8 numbers a sentence and at most three, but for years and for what is counted."""
    text = re.sub(r"```.*?```|^\s*\|.*$|^#.*$|\$[^$]*\$|`[^`]*`", " ", PROSE, flags=re.S | re.M)
    text = text.split("- V. Godbole")[0]
    text = re.sub(
        r"\b(19|20)\d\d\b|\b([Ff]igure|[Tt]able|[Ss]ections?|LeNet|[Ss]eeds?)[ -]\d+", " ", text
    )
    sentences = [s for s in re.split(r"(?<=[.:?])\s+|\n\n", text) if len(s.split()) > 2]
    counts = [len(re.findall(r"(?<![A-Za-z\d])\d[\d,.]*", s)) for s in sentences]
    assert sum(counts) / len(counts) < 0.8 and max(counts) <= 3


@pytest.fixture(scope="module")
def results():
    return pd.read_csv(ROOT / "weights/results.csv")


@pytest.fixture(scope="module")
def study():
    return pd.read_csv(dl.STUDY)


def test_tables_in_the_notebook_are_those_of_the_files(results):
    chosen = pd.DataFrame([*dl.SETTINGS.values()])[["label", "name", *dl.STRENGTHS]]
    for table in (dl.summary_table(results), chosen):
        body = dl.show_table(table, "").data.split("\n", 2)[2]
        assert any(body in text for text in SHOWN)
    for name, runs in results.groupby("setting"):
        means = [
            f"{100 * runs[f'{split}_accuracy'].mean():.2f} ± "
            f"{100 * runs[f'{split}_accuracy'].std():.2f}"
            for split in ("train", "val", "test")
        ]
        cells = [dl.SETTINGS[name].label, *means]
        assert f"| {' | '.join(cells)} |" in README
        assert any(f"| {means[0]} | {means[2]} |" in text for text in SHOWN)
