"The arms of the ablations, how they are run, and what is found of their records"
import pytest

from sumix_nb.studies import ablations
from sumix_nb.studies.ablations import ARMS, BASE, arm_accuracies, arm_recipe, run_ablations
from sumix_nb.sumix.ratio import VARIANTS
from sumix_nb.training.records import SEEDS, load_records, write_record
from tests.conftest import ROOT


def test_the_arms_cover_variants_clean_modes_parts_and_controls():
    recipes = [arm_recipe(arm) for arm in ARMS]
    sumix = [recipe for recipe in recipes if recipe.method == "sumix"]
    assert {recipe.variant for recipe in sumix} == set(VARIANTS)
    assert {recipe.clean for recipe in sumix} == {"no_grad", "concat", "separate"}
    assert {recipe.xi for recipe in sumix} >= {0.0, 0.1, 0.5, 1.0}
    assert {recipe.relabel for recipe in sumix} == {recipe.update_bn for recipe in sumix} == {True, False}
    assert {recipe.method for recipe in recipes} == {"mce", "sumix", "mce_bn", "mce_clean"}
    assert {recipe.alpha for recipe in recipes} == {0.2, 1.0}
    assert len({recipe.name for recipe in recipes}) == len(ARMS) and arm_recipe("CutMix", 2).seed == 2


def test_all_runs_are_one_grid_seed_by_seed(tmp_path, monkeypatch):
    def told(grid):
        assert list(grid.recipes.values()) == [arm_recipe(arm, seed) for seed in SEEDS for arm in ARMS]
        assert grid.out == tmp_path and grid.options["path"] == images
        assert (grid.engine.slots, grid.engine.threads) == (2, 1) and [*grid.again] == [failed]
        grid.states = dict.fromkeys(grid.states, "done") | {arm_recipe("poster", 1).name: outcome}
    failed = arm_recipe("poster", 1).name
    write_record({"name": failed, "recipe": {}, "error": "OSError: no images"}, tmp_path / "failed")
    (images := tmp_path / "images").mkdir()
    monkeypatch.setattr(ablations.Grid, "run", told)
    outcome = "done"
    run_ablations(data_dir=images, out=tmp_path, jobs=2, threads=1)
    outcome = "failed"
    with pytest.raises(SystemExit, match=f"{failed}.json: OSError: no images"):
        run_ablations(data_dir=images, out=tmp_path, jobs=2, threads=1)


def test_records_of_arms_are_found_and_others_left_out():
    records = load_records(ROOT / "results", **BASE)
    for momentum in (0.9, 0.0):
        series = [record for record in records if record["recipe"]["momentum"] == momentum
                  and record["recipe"]["seed"] in SEEDS]  # the study has more of some arms
        found = arm_accuracies(records, momentum)
        assert sum(map(len, found.values())) == len(series) > 0
        for record in series: assert any(100 * record["accuracy"] in values.values() for values in found.values())
    assert arm_accuracies([{"name": "another", "accuracy": 0.5}]) == {}


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="`arm` must be one of"): arm_recipe("puzzle")


def test_a_folder_that_is_none_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^no folder .*nowhere"):
        run_ablations(data_dir=tmp_path / "nowhere", out=tmp_path / "out")
