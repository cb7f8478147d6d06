"Records: written whole, refused unless they are what their name says, and as pandas tables"
import json
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import comparison_table, load_records, markdown, read_record, write_record
from sumix_nb.training.train import train
from tests.conftest import ROOT

RECIPE = Recipe(width=4, epochs=2, bs=50, limit=100, lr=0.02, mixer="mixup")


@pytest.fixture(scope="module")
def record(): return train(RECIPE, progress=False)


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


def without(facts, name): return {key: value for key, value in facts.items() if key != name}


def first(epoch): return lambda record: record | {"epochs": [epoch(record["epochs"][0]), record["epochs"][1]]}


def of(**changes): return lambda record: record | {"recipe": record["recipe"] | changes}


WRONG = {
    "empty": lambda record: {}, "a list": lambda record: [record], "nothing": lambda record: None,
    "no recipe": lambda record: without(record, "recipe"), "no accuracy": lambda record: without(record, "accuracy"),
    "a foreign recipe": of(lr=0.5), "an unknown field": of(color=1),
    "accuracy null": lambda record: record | {"accuracy": None},
    "accuracy NaN": lambda record: record | {"accuracy": math.nan},
    "another accuracy": lambda record: record | {"accuracy": record["accuracy"] / 2},
    "accuracy 2": lambda record: record | {"accuracy": 2.0, "epochs": [record["epochs"][0], record["epochs"][1]
                                                                        | {"accuracy": 2.0}]},
    "question marks": lambda record: record | {"epochs": ["?", "?"]}, "epochs 1": lambda record: record | {"epochs": 1},
    "too few epochs": lambda record: record | {"epochs": record["epochs"][1:]},
    "an epoch twice": lambda record: record | {"epochs": [record["epochs"][1]] * 2},
    "an epoch without seconds": first(lambda epoch: without(epoch, "seconds")),
    "a loss that is no number": first(lambda epoch: epoch | {"train_loss": "?"}),
    "an epoch without accuracy": first(lambda epoch: epoch | {"accuracy": None}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_no_run_has_written_is_no_record(kind, tmp_path, record):
    file = tmp_path / f"{RECIPE.name}.json"
    file.write_text(json.dumps(WRONG[kind](record)))
    with pytest.raises(ValueError, match=f"{RECIPE.name}.json is not a whole record: "): load_records(tmp_path)


def test_a_record_under_another_name_is_refused(tmp_path, record):
    write_record(record, tmp_path).rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="other.json is not a whole record: its recipe is that of"):
        load_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"): load_records(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ['{"name": ', "", "\x00", "[" * 200_000, '{"a":' * 200_000])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "half.json").write_text(text)
    with pytest.raises(ValueError, match="half.json is not a whole record"): load_records(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "a\\b", "..", "", ".hidden", "a\nb", None])
def test_a_record_stays_in_its_folder(name, tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="`name` of a record must be plain"): write_record({"name": name}, folder)
    assert not list(tmp_path.rglob("*.json"))


@given(st.text())
def test_no_text_leaves_its_cell(text):
    lines = markdown(pd.DataFrame({"a": [text], "b": [1]})).split("\n")
    assert len(lines) == 3 and lines[2].replace("\\\\", "").replace("\\|", "").count("|") == 3
    assert not any(sign in lines[2] for sign in "<>") and lines[1] == "|---|---|"


def test_a_comparison_needs_cutmix_only_for_its_ratio(record):
    assert list(comparison_table([record])) == ["accuracy (%)", "s / step"]
    cutmix = record | {"recipe": record["recipe"] | {"mixer": "cutmix"}, "seconds_per_step": 0.5}
    table = comparison_table([cutmix, record | {"seconds_per_step": 1.0}])
    assert table["x CutMix"].to_dict() == {"CutMix": 1.0, "MixUp": 2.0}
