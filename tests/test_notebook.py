"""EX1.ipynb and README.md: hygiene, and that their numbers are those of the files."""

import inspect
import json
import re

import pandas as pd
import pytest
from conftest import REAL_FILES, ROOT

import dl_utils as dl

NOTEBOOK = json.loads((ROOT / "EX1.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
SHOWN = ["".join(output.get("data", {}).get("text/markdown", "")) for output in OUTPUTS]
TEXTS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "markdown"]
PROSE = "\n\n".join(TEXTS).replace("\N{NO-BREAK SPACE}", " ")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_saved_by_one_run_from_top_to_bottom_without_a_warning():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert {o["output_type"] for o in OUTPUTS} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in OUTPUTS if output.get("name") == "stderr"]
    assert PROSE.startswith(f"# {NOTEBOOK['metadata']['title']}\n")  # which the PDF shows once
    pictures = [o["data"] for o in OUTPUTS if "image/png" in o.get("data", {})]
    assert len(pictures) == 9 and all("application/pdf" in data for data in pictures)


def test_cells_are_short_and_define_nothing():
    assert max(len(source.splitlines()) for source in SOURCES) <= 10
    for source in SOURCES:
        assert max(map(len, source.splitlines())) <= 79
        assert not re.search(r"^\s*(def|class)\s|\blambda .*:", source, re.M)


def test_what_is_shown_are_the_saved_runs_and_the_theory_of_its_file():
    source = "\n".join(map(inspect.getsource, (dl.LeNet5, dl.train_epoch)))
    assert any(source in text for text in SHOWN)
    assert max(map(len, source.splitlines())) <= 79, "a line runs off the page"
    assert any((ROOT / "theory.md").read_text(encoding="utf-8").strip() in text for text in SHOWN)


def test_no_path_of_another_is_handed_in():
    for path in ("README.md", "theory.md", "EX1.ipynb", "dl_utils.py"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not re.search(r"/(work|tmp|root|home)/", text), path


def test_the_cell_that_loads_weights_runs_alone(real_splits, capsys, monkeypatch):
    monkeypatch.setattr(dl, "DATA_FILES", REAL_FILES)  # small data may have changed them
    source = next(source for source in SOURCES if "load_checkpoint" in source)
    exec(source, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for line in lines[:3]:
        recorded, measured = re.findall(r"[\d.]+%", line)
        assert float(recorded[:-1]) == pytest.approx(float(measured[:-1]), abs=0.021)


RESULTS, STUDY = pd.read_csv(ROOT / "weights/results.csv"), dl.read_study()


def test_tables_in_the_notebook_are_those_of_the_files():
    four = RESULTS[RESULTS.setting.isin(["baseline", *dl.TECHNIQUES])]
    tables = [dl.summary_table(RESULTS, ["train", "val", "test"]), dl.summary_table(four)]
    first = dl.summary_table(four[four.seed == 0])
    eight = tables.pop().merge(first, on="setting")
    for table in (*tables, eight):
        body = dl.show_table(table, "").data.split("\n", 2)[2]
        assert any(body in text for text in SHOWN)
    rows = tables[0].to_numpy()
    for row, (name, runs) in zip(rows, RESULTS.groupby("setting", sort=False)):
        first = 100 * runs[runs.seed == 0].test_accuracy.iloc[0]
        assert f"| {' | '.join(row)} | {first:.2f} |" in README
        assert re.search(rf"{re.escape(row[0])} +{row[3]}", dl.__doc__, re.I)
        setting = dl.SETTINGS[name]
        values = setting.dropout, setting.weight_decay, "on" if setting.batch_norm else 0
        words = [str(value or "–") for value in values]
        assert any(f"| {row[0]} | {' | '.join(words)} | {setting.lr} |" in text for text in SHOWN)


def test_every_choice_in_settings_follows_from_the_study_by_its_rules():
    chosen = dl.choices(STUDY)
    for name in chosen.index:
        setting = dl.SETTINGS[name]
        row = {key: value for key, value in vars(setting).items() if key in dl.CELL}
        assert chosen.loc[name, [*row]].to_dict() == row, name


def test_the_grids_have_all_that_the_rules_ask_for_and_the_fixed_choices_stand():
    chosen = dl.choices(STUDY)
    strengths = {name: chosen[name][name] for name in dl.STRENGTHS}
    for name in chosen.index:
        assert dl.lacking(dl.accuracy_grid(STUDY, name, strengths)) == [], name
    for key in ("epochs", "batch_size", "optimizer"):
        assert {*chosen[key]} == {getattr(dl.TrainConfig(), key)}
    assert dl.alternatives(STUDY).mean(axis=1).max() < dl.noise_band(STUDY), "rule 3"


def test_the_study_is_complete_and_final_runs_are_others():
    assert STUDY.val_accuracy.notna().all()
    for _, cell in STUDY.groupby(["part", "setting", *dl.CELL]):
        assert sorted(cell.seed) == [101, 102, 103]
    hits = 5000 * STUDY.val_accuracy
    assert ((hits - hits.round()).abs() < 1e-6).all(), "not an accuracy on 5,000 images"
    assert len(RESULTS) == 64 and {*RESULTS.seed} == {0, *range(8, 15)}
    runs = dl.load_runs(ROOT / "weights")
    assert dl.collect(runs)[0].equals(RESULTS), "python dl_utils.py collect weights"
    assert {run.config.epochs for run in runs} == {dl.TrainConfig().epochs}
    assert len({run.versions["cpu"] for run in runs}) == 1, "not one kind of processor"
    assert len({run.model.layers.conv1.weight.sum().item() for run in runs}) == 64, "an alias"
