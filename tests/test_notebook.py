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
    assert 'os.environ.get("RUNS") or "weights"' in SOURCES[0]
    assert any((ROOT / "theory.md").read_text(encoding="utf-8").strip() in text for text in SHOWN)


def test_no_name_and_no_path_of_another_is_handed_in():
    metadata = NOTEBOOK["metadata"]
    assert metadata["title"] and metadata["date"] == "" and metadata["authors"] == [{"name": ""}]
    for path in ("README.md", "theory.md", "EX1.ipynb", "dl_utils.py"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"/(work|tmp|root|home)/", text), path


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
        percent = [100 * runs[f"{split}_accuracy"] for split in ("train", "val", "test")]
        means = [f"{values.mean():.2f} ± {values.std():.2f}" for values in percent]
        cells = [dl.SETTINGS[name].label, *means]
        assert f"| {' | '.join(cells)} |" in README
        assert any(f"| {means[0]} | {means[2]} |" in text for text in SHOWN)
        assert re.search(rf"{re.escape(cells[0])} +{means[2]}", dl.__doc__, re.I)


def test_every_choice_in_settings_follows_from_the_study_by_its_rules(study):
    best = dl.best_cells(study)
    for name, setting in dl.SETTINGS.items():
        assert list(best.loc[name, dl.STRENGTHS]) == [getattr(setting, key) for key in dl.STRENGTHS]
    fixed = best[[name for name in dl.SHARED if name != "seed"]].drop_duplicates()
    assert [[*map(vars(dl.TrainConfig()).get, fixed)]] == fixed.to_numpy().tolist()
    assert (dl.alternatives(study).mean(axis=1) < dl.noise_band(study)).all(), "rule 2"


def test_the_study_is_complete_and_final_runs_are_others(study, results):
    assert list(study.columns) == ["part", "setting", *dl.FIELDS, *dl.OUTCOME]
    assert study.val_accuracy.notna().all() and not study.duplicated(dl.FIELDS).any()
    for _, cell in study.groupby(["part", *dl.CELL]):
        assert sorted(cell.seed) == [101, 102, 103]
    hits = 5000 * study.val_accuracy
    assert ((hits - hits.round()).abs() < 1e-6).all(), "not an accuracy on 5,000 images"
    assert len(results) == 64 and set(results.seed) == set(range(8))
    derived, _ = dl.collect(ROOT / "weights")
    assert derived.equals(results), "python dl_utils.py collect weights"
    runs = dl.load_runs(ROOT / "weights")
    assert {run.config.epochs for run in runs} == {dl.TrainConfig().epochs}
    assert len({run.model.layers.conv1.weight.sum().item() for run in runs}) == 64, "an alias"
