"The arms of the ablations, and what is found of their records"
import json
import statistics

from sumix_nb.studies.ablations import ABLATIONS, ARMS
from sumix_nb.studies.statistics import accuracies
from sumix_nb.sumix.ratio import VARIANTS
from sumix_nb.training.records import SEEDS, load_records, records_by_seed
from tests.conftest import ROOT
from tests.studies.oracles import saved_tables, with_student


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


def test_the_table_of_parts_where_mixing_helps_follows_from_the_files():
    usual = {"alpha": 1, "p": 1, "off_after": 1, "mixer": "cutmix", "method": "sumix", "label_rule": "area", "xi": 0.5,
             "variant": "poster", "clean": "no_grad", "relabel": True}
    parts = {"label alone": {"method": "mce", "label_rule": "poster"}, "regulariser alone": {"relabel": False},
             "clean BatchNorm alone": {"method": "mce_bn"}, "clean loss alone": {"method": "mce_clean"},
             "SUMix, xi 0.1": {"xi": 0.1}, "SUMix, xi 1": {"xi": 1.0},
             **{f"SUMix, clean by {origin}": {"clean": origin} for origin in ("eval", "means", "bank")}}

    def accuracy(folder="", **changed):
        "By seed, percent, of the runs with these options"
        files = [json.loads(file.read_text()) for file in (ROOT / "results/mixing" / folder).glob("*.json")]
        return {file["recipe"]["seed"]: 100 * file["accuracy"] for file in files
                if all(file["recipe"][name] == value for name, value in (usual | changed).items())}

    table = saved_tables(ROOT / "nbs/studies/30_ablations.ipynb")[1]
    bases = [[accuracy(folder, **method) for folder in ("", "another_processor")] for method in ({}, {"method": "mce"})]
    assert [row[0] for row in table] == list(parts) and all(len(base) == 5 for both in bases for base in both)
    for name, *columns in table:
        own = accuracy(**parts[name])
        gaps = [[own[seed] - base[seed] for seed in sorted(own)] for both in bases for base in both]
        spread = f"{statistics.mean(own.values()):.1f} ± {statistics.stdev(own.values()):.1f}"
        assert columns == [str(len(own)), spread, *(with_student(gap, 1 - 0.05 / 9) for gap in gaps[:2]),
                           ", ".join(f"{statistics.mean(gap):+.1f}" for gap in gaps[2:])]
