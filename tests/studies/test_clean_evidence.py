"The study of clean evidence: every number of its tables is computed again from the files, without the package"
import json
import statistics

from tests.conftest import ROOT
from tests.studies.oracles import saved_tables, with_student

PAGE = ROOT / "nbs" / "studies" / "47_clean_evidence.ipynb"


def runs(folder):
    "The records of the study in a folder, each with its recipe"
    for file in sorted((ROOT / "results" / folder).glob("*.json")):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert recipe["data"] == "hard_scenes" and recipe["epochs"] == 12 and record["commit"][-1] != "+"
        yield recipe, record


def accuracy(folder, **wanted):
    "By seed, of the runs whose recipe has these values"
    found = {recipe["seed"]: 100 * record["accuracy"] for recipe, record in runs(folder)
             if all(recipe[name] == value for name, value in wanted.items())}
    assert sorted(found) == [0, 1, 2, 3, 4]
    return [found[seed] for seed in range(5)]


def sumix(clean):
    folder = "label_rules" if clean == "means" else "clean_modes"
    return accuracy(folder, method="sumix", variant="corrected", clean=clean)


def difference(one, other, level=0.95):
    "Mean, Student's interval of five pairs, and how many are ahead"
    pairs = [a - b for a, b in zip(one, other)]
    return with_student(pairs, level), sum(pair > 0 for pair in pairs)


def test_the_table_of_the_modes_follows_from_the_files():
    bench = json.loads((ROOT / "results/bench/6/labels.json").read_text())
    table = saved_tables(PAGE)[0]
    assert [row[0] for row in table] == ["no_grad", "eval", "means", "bank"]
    for mode, _, *steps, accuracies, apart in table:
        assert steps == [f"{bench[f'width {width}']['methods'][f'CutMix + SUMix, {mode}']['ratio']:.2f}"
                         for width in (16, 64)]
        own = sumix(mode)
        assert accuracies == f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}"
        assert apart == ("" if mode == "no_grad" else difference(own, sumix("no_grad"), 1 - 0.05 / 3)[0])


def test_what_the_regulariser_adds_follows_from_the_files():
    [table] = [table for table in saved_tables(PAGE) if table[0][0] == "label and regulariser"]
    for row, clean in zip(table, ("no_grad", "means"), strict=True):
        label = accuracy("label_rules", method="mce", label_rule="corrected", clean=clean)
        found, ahead = difference(sumix(clean), label)
        assert row[2:] == [clean, found, f"{ahead} of 5"]


def test_the_errors_by_the_age_of_the_evidence_follow_from_the_files():
    records = [json.loads(file.read_text()) for file in sorted((ROOT / "results/evidence_age").glob("*.json"))]
    assert all(len(record["evidence_age"]) == 13 and record["commit"][-1] != "+" for record in records)
    assert sorted(record["recipe"]["seed"] for record in records) == [0, 1, 2]

    def mean(variant, epoch):
        found = [record["evidence_age"][epoch][variant] for record in records]
        return {age: sum(one[age] for one in found) / 3 for age in found[0]}

    errors, kept = saved_tables(PAGE)[1:3]
    for row, variant in zip(errors, ("poster", "corrected"), strict=True):
        last = mean(variant, 12)
        assert row == [variant, *(f"{last[age]:.3f}" for age in ("0", "1", "2", "4", "8", "means", "area"))]
    cases = [(variant, epoch) for variant in ("poster", "corrected") for epoch in (4, 8, 12)]
    for row, (variant, epoch) in zip(kept, cases, strict=True):
        found = mean(variant, epoch)
        whole = found["area"] - found["0"]
        gain = {age: f"{round(100 * (found['area'] - error) / whole)} %" for age, error in found.items()}
        assert row == [f"{variant}, {epoch} epochs", *(gain.get(age, "") for age in ("1", "2", "4", "8", "means"))]


def test_the_modes_where_mixing_helps_follow_from_the_files():
    found = {}
    for file in (ROOT / "results/mixing").glob("*.json"):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        defaults = {"mixer": "cutmix", "alpha": 1, "p": 1, "off_after": 1, "variant": "poster", "xi": 0.5,
                    "relabel": True, "label_rule": "area"}
        if any(recipe[name] != value for name, value in defaults.items()): continue
        if recipe["method"] not in ("mce", "sumix"): continue
        arm = "CutMix" if recipe["method"] == "mce" else recipe["clean"]
        found.setdefault(arm, {})[recipe["seed"]] = 100 * record["accuracy"]
        assert record["commit"][-1] != "+" and recipe["limit"] == [2500, 10000] and recipe["epochs"] == 120
    assert {arm: sorted(seeds) for arm, seeds in found.items()} == dict.fromkeys(
        ("CutMix", "no_grad", "eval", "means", "bank"), [1, 2, 3, 4, 5])
    values = {arm: [seeds[seed] for seed in range(1, 6)] for arm, seeds in found.items()}
    [table] = [table for table in saved_tables(PAGE) if table[0][:2] == ["no_grad", "5"]]
    for mode, seeds, accuracies, *columns in table:
        own = values[mode]
        assert (seeds, accuracies) == ("5", f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}")
        assert columns == [difference(own, values["CutMix"])[0],
                           "" if mode == "no_grad" else difference(own, values["no_grad"], 1 - 0.05 / 9)[0]]
