"Records as pandas tables"
import math

import pandas as pd
import pytest

from sumix_nb.training.records import epochs_frame, runs_frame
from sumix_nb.training.records import load_records
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def records(): return load_records(ROOT / "results", data="cifar100", epochs=12)


def test_a_row_for_each_run_has_recipe_and_results(records):
    frame = runs_frame(records)
    assert isinstance(frame, pd.DataFrame) and list(frame.index) == [record["name"] for record in records]
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


def test_what_a_run_did_not_log_is_unknown(records):
    plain = records[0] | {"epochs": [{"epoch": 0, "accuracy": 0.5}]}
    frame = epochs_frame([records[0], plain])
    assert math.isnan(frame.iloc[-1].lam) and not math.isnan(frame.iloc[0].lam)
    assert runs_frame([]).empty and epochs_frame([]).empty
