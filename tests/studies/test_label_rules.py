"The study of label rules: every number of its tables is computed again from the files, without the package"
import json
import math
import statistics

from scipy import stats

from sumix_nb.running.grid import read_grid
from tests.conftest import ROOT
from tests.studies.oracles import saved_tables

PAGE = ROOT / "nbs" / "studies" / "45_label_rules.ipynb"
COMPARED = 19  # arms of the plan that are compared with the area, plain training not counted


def arm(recipe):
    "As the page names it"
    if recipe["mixer"] == "none": return "plain"
    rule = recipe["label_rule"] if recipe["method"] == "mce" else f"SUMix {recipe['variant']}"
    return rule + ", means" * (recipe["clean"] == "means")


def by_hand():
    "Arm -> seed -> record, of arms with five seeds"
    found = {}
    for file in sorted((ROOT / "results/label_rules").glob("*.json")):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert recipe["data"] == "hard_scenes" and recipe["epochs"] == 12 and record["commit"][-1] != "+"
        seeds = found.setdefault(arm(recipe), {})
        assert recipe["seed"] not in seeds, file
        seeds[recipe["seed"]] = record
    return {name: seeds for name, seeds in found.items() if sorted(seeds) == [0, 1, 2, 3, 4]}


def interval(differences, level):
    "Mean, and Student's interval of five"
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    reach = stats.t.ppf((1 + level) / 2, 4) * spread / math.sqrt(5)
    return f"{mean:+.1f} [{mean - reach:+.1f}, {mean + reach:+.1f}]"


def test_the_plan_holds_what_it_says():
    arms = {}
    for recipe in read_grid(PAGE.parent / "label_rules.toml"):
        arms.setdefault(arm(vars(recipe)), []).append(recipe.seed)
    assert len(arms) == COMPARED + 2 and all(seeds == [0, 1, 2, 3, 4] for seeds in arms.values())


def judged():
    "Way of training -> the errors after the last epoch, of seed 0"
    found = {}
    for file in (ROOT / "results/rule_errors").glob("*.json"):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert len(record["rule_errors"]) == recipe["epochs"] + 1 == 13 and record["commit"][-1] != "+"
        if recipe["seed"] == 0: found[recipe["mixer"], recipe["method"]] = record["rule_errors"][-1]
    return found["cutmix", "mce"], found["none", "mce"], found["cutmix", "sumix"]


def test_every_number_of_the_errors_follows_from_the_files():
    own, plain, sumix = judged()
    truth, mixers, _, _ = saved_tables(PAGE)
    assert [row[0] for row in truth] == sorted(own["CutMix"], key=lambda rule: own["CutMix"][rule]["error"][0])
    for rule, error, gain, ghosts, *others in truth:
        found = own["CutMix"][rule]
        assert error == f"{found['error'][0]:.3f}" and gain == "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found["gain"])
        assert ghosts == f"{100 * found['ghosts'][0]:.0f}"
        assert others == [f"{network['CutMix'][rule]['error'][0]:.3f}" for network in (plain, sumix)]
    for rule, *errors in mixers:
        assert errors == [f"{rules[rule]['error'][0]:.3f}" for rules in own.values()]


def test_every_number_of_the_accuracies_follows_from_the_files():
    runs = by_hand()
    right = {name: [100 * seeds[k]["accuracy"] for k in range(5)] for name, seeds in runs.items()}
    _, _, trained, sizes = saved_tables(PAGE)
    assert sorted(row[0] for row in trained) == sorted(row[0] for row in sizes) == sorted(right)
    for name, accuracy, difference, ahead in trained:
        values = right[name]
        pairs = [one - other for one, other in zip(values, right["area"], strict=True)]
        assert accuracy == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        if name == "area": assert difference == ahead == ""
        else:
            assert difference == interval(pairs, 1 - 0.05 / COMPARED)
            assert ahead == f"{sum(pair > 0 for pair in pairs)} of 5"
    for name, *fifths in sizes:
        means = [statistics.mean(100 * seeds["by_size"][k] for seeds in runs[name].values()) for k in range(5)]
        assert fifths == [f"{value:.1f}" for value in means]


def test_pairs_saw_the_same_mixtures():
    runs = by_hand()
    for seed in range(5):
        drawn = {json.dumps([epoch["lam"] for epoch in runs[name][seed]["epochs"]]) for name in runs if name != "plain"}
        assert len(drawn) == 1
