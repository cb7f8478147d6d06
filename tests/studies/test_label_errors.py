"What the records of label errors say, on scenes and on photographs"
import json

import pytest

from sumix_nb.data.sources import SOURCES
from sumix_nb.evaluation.label_errors import AREA, SCALES
from sumix_nb.studies.label_errors import LABEL_RUNS, TRAININGS, label_mixers
from sumix_nb.training.records import SEEDS, load_records, records_by_seed
from tests.conftest import ROOT


def recorded(): return records_by_seed(load_records(ROOT / "results/label_errors"), LABEL_RUNS)


def test_the_study_has_twelve_networks_and_five_mixers():
    assert len({recipe.name for recipes in LABEL_RUNS.values() for recipe in recipes}) == 12
    mixers = label_mixers(SOURCES["cifar100"])
    assert list(mixers) == ["MixUp", "CutMix", "FMix", "ResizeMix", "SaliencyMix"]
    assert all(mixer.per_sample for mixer in mixers.values())
    for runs in recorded().values():
        for run in runs.values(): assert all(list(epoch) == list(mixers) for epoch in run["label_errors"])


@pytest.mark.parametrize("training", TRAININGS)
def test_the_headline_follows_from_the_records(training):
    "lambda~ is nearer to the truth than lambda for mixers that hide objects, in every network; as released it is not"
    runs = recorded()[training]
    assert sorted(runs) == list(SEEDS)
    for run in runs.values():
        assert run["recipe"].items() >= {"data": "scenes", "epochs": 8, **TRAININGS[training]}.items()
        assert len(run["label_errors"]) == run["recipe"]["epochs"] + 1
        before, after = run["label_errors"][0], run["label_errors"][-1]
        for mixer in ("CutMix", "FMix", "SaliencyMix"):
            area, poster, corrected, released = (after[mixer][name] for name in (
                AREA, "poster, logits", "corrected, logits", "released, logits"))
            assert poster["gain"][1] > 0 and corrected["gain"][1] > 0 and released["gain"][2] < 0
            worse = 2 if run["accuracy"] > 0.25 else 1.5  # one network learned little
            assert corrected["error"][0] < poster["error"][0] < area["error"][0] < released["error"][0] / worse
            assert abs(poster["gain"][0] - (area["error"][0] - poster["error"][0])) < 2e-4
            assert abs(before[mixer]["poster, logits"]["gain"][0]) < 1e-3  # an untrained network knows nothing
        assert after["ResizeMix"]["corrected, logits"]["gain"][0] < 0


def test_the_area_is_the_same_in_every_record():
    runs = [run for seeds in recorded().values() for run in seeds.values()]
    for mixer in runs[0]["label_errors"][-1]:
        assert len({str(run["label_errors"][-1][mixer][AREA]["error"]) for run in runs}) == 1  # the same mixtures


def test_photographs_do_not_want_the_factor_that_scenes_want():
    files = sorted((ROOT / "results/photographs").glob("*.json"))
    assert len(files) == 3
    for file in files:
        found = json.loads(file.read_text())["photographs"]
        errors = found["label_errors"]["CutMix"]
        assert found["n"] == 165 and errors["corrected, features"]["gain"][1] > 0
        assert errors["poster, logits"]["scaled"][SCALES.index(4.0)] > errors[AREA]["error"][0]
