"Records: written whole, refused unless they are what their name says, and as pandas tables"
import json
import math
import os
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import comparison_table, epochs_frame, load_records, markdown, read_record
from sumix_nb.training.records import runs_frame, write_record
from sumix_nb.training.train import train
from tests.conftest import ROOT

RECIPE = Recipe(width=4, epochs=2, bs=50, limit=100, lr=0.02, mixer="mixup")


@pytest.fixture(scope="module")
def record(): return train(RECIPE, progress=False)


@pytest.fixture(scope="module")
def records(): return load_records(ROOT / "results", data="cifar100", epochs=12)


def test_a_record_survives_its_file(tmp_path, record):
    assert json.loads(write_record(record, tmp_path).read_text()) == record == load_records(tmp_path)[0]
    assert Recipe(**record["recipe"]) == RECIPE and record["ratio_curve"] is None
    pair = record | {"recipe": record["recipe"] | {"limit": (100, None)}}
    pair["name"] = Recipe(**pair["recipe"]).name
    assert read_record(write_record(pair, tmp_path)) == pair


def test_all_records_of_the_project_can_be_read():
    found = [record for folder in (".", "label_errors", "photographs", "throughput")
             for record in load_records(ROOT / "results" / folder)]
    assert len(found) > 80 and all(Recipe(**record["recipe"]).name == record["name"] for record in found)


def without(record, name): return {key: value for key, value in record.items() if key != name}


WRONG = {
    "empty": lambda record: {}, "a list": lambda record: [record], "nothing": lambda record: None,
    "no recipe": lambda record: without(record, "recipe"), "no accuracy": lambda record: without(record, "accuracy"),
    "a foreign recipe": lambda record: record | {"recipe": record["recipe"] | {"lr": 0.5}},
    "an unknown field": lambda record: record | {"recipe": record["recipe"] | {"color": 1}},
    "accuracy null": lambda record: record | {"accuracy": None},
    "accuracy NaN": lambda record: record | {"accuracy": math.nan},
    "accuracy 2": lambda record: record | {"accuracy": 2.0},
    "another accuracy": lambda record: record | {"accuracy": record["accuracy"] / 2},
    "question marks": lambda record: record | {"epochs": ["?", "?"]}, "epochs 1": lambda record: record | {"epochs": 1},
    "too few epochs": lambda record: record | {"epochs": record["epochs"][1:]},
    "an epoch twice": lambda record: record | {"epochs": [record["epochs"][1]] * 2},
    "an epoch without seconds": lambda record: record | {"epochs": [without(record["epochs"][0], "seconds"),
                                                                    record["epochs"][1]]},
    "a loss that is no number": lambda record: record | {"epochs": [record["epochs"][0] | {"train_loss": "?"},
                                                                    record["epochs"][1]]},
    "an epoch without accuracy": lambda record: record | {"epochs": [record["epochs"][0] | {"accuracy": None},
                                                                     record["epochs"][1]]},
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_no_run_has_written_is_no_record(kind, tmp_path, record):
    file = tmp_path / f"{RECIPE.name}.json"
    file.write_text(json.dumps(WRONG[kind](record)))
    for read in (lambda: read_record(file), lambda: load_records(tmp_path)):
        with pytest.raises(ValueError, match=f"{RECIPE.name}.json is not a whole record: "): read()


@pytest.mark.parametrize("text", ['{"name": ', "", "\x00", "[" * 200_000, '{"a":' * 200_000])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "half.json").write_text(text)
    with pytest.raises(ValueError, match="half.json is not a whole record"): load_records(tmp_path)


def test_a_record_under_another_name_is_refused(tmp_path, record):
    write_record(record, tmp_path).rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="other.json is not a whole record: it is the record of"):
        load_records(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "a\\b", "..", "", ".hidden", "a\nb", None, 7.5j])
def test_a_record_stays_in_its_folder(name, tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="`name` of a record must be plain"): write_record({"name": name}, folder)
    assert not list(tmp_path.rglob("*.json"))


def test_a_failed_write_keeps_the_old_record_and_leaves_no_scraps(tmp_path, monkeypatch):
    write_record({"name": "run", "value": 1}, tmp_path)
    def full(*paths): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"): write_record({"name": "run", "value": 2}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["value"] == 1


def test_reading_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): load_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mixr"): load_records(tmp_path, mixr="cutmix")


@given(st.text())
def test_no_text_leaves_its_cell(text):
    lines = markdown(pd.DataFrame({"a": [text], "b": [1]})).split("\n")
    assert len(lines) == 3 and lines[2].replace("\\\\", "").replace("\\|", "").count("|") == 3
    assert not any(sign in lines[2] for sign in "<>") and lines[1] == "|---|---|"


def test_a_row_for_each_run_has_recipe_and_results(records):
    frame = runs_frame(records)
    assert list(frame.index) == [record["name"] for record in records] and len(frame) > 50
    for record, (_, row) in zip(records, frame.iterrows(), strict=True):
        assert all(row[name] == value or row[name] is value or pd.isna(row[name]) and value is None
                   for name, value in record["recipe"].items())
        assert row.accuracy == record["accuracy"] and row.commit == record["commit"]
        if not (curve := record.get("reliability")): assert math.isnan(row.ece)
        else:
            parts = [part["n"] * abs(part["accuracy"] - part["confidence"]) for part in curve]
            assert row.ece == pytest.approx(sum(parts) / 10_000)


def test_a_row_for_each_epoch(records):
    frame = epochs_frame(records)
    assert len(frame) == 12 * len(records) and set(frame.name) == {record["name"] for record in records}
    for record in records:
        rows = frame[frame.name == record["name"]]
        assert rows.accuracy.tolist() == [epoch["accuracy"] for epoch in record["epochs"]]
        assert set(rows.seed) == {record["recipe"]["seed"]}
    plain = records[0] | {"epochs": [{"epoch": 0, "accuracy": 0.5}]}
    assert math.isnan(epochs_frame([records[0], plain]).iloc[-1].lam) and epochs_frame([]).empty


def test_a_comparison_needs_cutmix_only_for_its_ratio(record):
    assert list(comparison_table([record])) == ["accuracy (%)", "s / step"]
    cutmix = record | {"recipe": record["recipe"] | {"mixer": "cutmix"}, "seconds_per_step": 0.5}
    table = comparison_table([cutmix, record | {"seconds_per_step": 1.0}])
    assert table["x CutMix"].to_dict() == {"CutMix": 1.0, "MixUp": 2.0}
    assert replace(RECIPE, mixer="cutmix") == Recipe(**cutmix["recipe"])
