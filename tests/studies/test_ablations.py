"The arms of the ablations, and what is found of their records"
import json

from sumix_nb.studies.ablations import ABLATIONS, ARMS
from sumix_nb.studies.statistics import accuracies
from sumix_nb.sumix.ratio import VARIANTS
from sumix_nb.training.records import SEEDS, load_records, records_by_seed
from tests.conftest import ROOT


def test_the_arms_cover_variants_clean_modes_parts_and_controls():
    recipes = [first for first, *_ in ABLATIONS.values()]
    sumix = [recipe for recipe in recipes if recipe.method == "sumix"]
    assert {recipe.variant for recipe in sumix} == set(VARIANTS)
    assert {recipe.clean for recipe in sumix} == {"no_grad", "concat", "separate"}
    assert {recipe.relabel for recipe in sumix} == {recipe.update_bn for recipe in sumix} == {True, False}
    assert {recipe.method for recipe in recipes} == {"mce", "sumix", "mce_bn", "mce_clean"}
    assert {recipe.alpha for recipe in recipes} == {0.2, 1.0}
    assert list(ABLATIONS) == list(ARMS)
    assert all([recipe.seed for recipe in recipes] == list(SEEDS) for recipes in ABLATIONS.values())
    assert len({recipe.name for recipes in ABLATIONS.values() for recipe in recipes}) == 3 * len(ARMS)


def test_the_recorded_arms_are_found_by_what_was_run():
    "Eight arms of three seeds, each the file whose recipe has the words of its arm and the defaults for the rest"
    values = accuracies(records_by_seed(load_records(ROOT / "results"), ABLATIONS))
    assert values.shape == (3, 8) and values.notna().all(axis=None)
    common = {"data": "cifar100", "mixer": "cutmix", "epochs": 12, "precision": "bf16", "momentum": 0.9, "alpha": 1.0,
              "width": 16, "bs": 100}
    words = {"CutMix": {"method": "mce", "lr": 0.1}, "CutMix, lr 0.12": {"method": "mce", "lr": 0.12},
             "CutMix + clean BatchNorm": {"method": "mce_bn"}, "CutMix + clean loss": {"method": "mce_clean"},
             "corrected, concat": {"method": "sumix", "variant": "corrected", "clean": "concat"}} | {
        variant: {"method": "sumix", "variant": variant, "clean": "no_grad", "xi": 0.5, "update_bn": True}
        for variant in ("poster", "released", "corrected")}
    files = [json.loads(file.read_text()) for file in (ROOT / "results").glob("*.json")]
    for arm in values:
        wanted = common | words[arm]
        fits = {file["recipe"]["seed"]: file for file in files if file["recipe"]["seed"] in SEEDS
                and all(file["recipe"][name] == value for name, value in wanted.items())
                and file["recipe"].get("relabel", True)}
        assert {seed: 100 * fits[seed]["accuracy"] for seed in SEEDS} == values[arm].to_dict(), arm
