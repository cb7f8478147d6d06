"The study of label rules: every number of its tables is computed again from the files, without the package"
import json
import math
import re
import statistics

from scipy import stats

from sumix_nb.running.grid import read_grid
from tests.conftest import ROOT
from tests.studies.oracles import saved_tables, with_student

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


def judged():
    "Way of training -> for each of three seeds the errors after each epoch"
    found = {}
    for file in sorted((ROOT / "results/rule_errors").glob("*.json")):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert len(record["rule_errors"]) == recipe["epochs"] + 1 == 13 and record["commit"][-1] != "+"
        found.setdefault((recipe["mixer"], recipe["method"]), []).append(record["rule_errors"])
    assert all(len(networks) == 3 for networks in found.values())
    return found["cutmix", "mce"], found["none", "mce"], found["cutmix", "sumix"]


def error(networks, rule, mixer="CutMix", epoch=-1, measure="error"):
    "Mean over networks"
    return sum(network[epoch][mixer][rule][measure][0] for network in networks) / len(networks)


def cost(name):
    "Of a step, in steps of CutMix by the area; none where it was not timed"
    steps = json.loads((ROOT / "results/bench/6/labels.json").read_text())["width 16"]["methods"]
    names = {"area": "CutMix", "SUMix corrected, means": "CutMix + SUMix, means",
             "SUMix poster, means": "CutMix + SUMix, means"}
    step = steps.get(names.get(name, f"CutMix, {name}"))
    return f"{step['ratio']:.2f}" if step else ""


def test_the_plan_holds_what_it_says():
    arms = {}
    for recipe in read_grid(PAGE.parent / "label_rules.toml"):
        arms.setdefault(arm(vars(recipe)), []).append(recipe.seed)
    assert len(arms) == COMPARED + 2 and all(seeds == [0, 1, 2, 3, 4] for seeds in arms.values())


def test_every_number_of_the_errors_follows_from_the_files():
    own, plain, sumix = judged()
    _, truth, by_size, by_mixer, *_ = saved_tables(PAGE)
    assert [row[0] for row in truth] == sorted(own[0][-1]["CutMix"], key=lambda rule: error(own, rule))
    for rule, mean, gain, ghosts, *others in truth:
        gains = [network[-1]["CutMix"][rule]["gain"] for network in own]
        low, high = min(found[1] for found in gains), max(found[2] for found in gains)
        assert mean == f"{error(own, rule):.3f}"
        assert gain == f"{sum(found[0] for found in gains) / 3:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert ghosts == f"{100 * error(own, rule, measure='ghosts'):.0f}"
        assert others == [f"{error(networks, rule):.3f}" for networks in (plain, sumix)]
    for rule, *errors in by_size:
        fifths = [sum(network[-1]["CutMix"][rule]["sizes"][k][0] for network in own) / 3 for k in range(5)]
        assert errors == [f"{value:.3f}" for value in fifths]
    for rule, *errors in by_mixer:
        assert errors == [f"{error(own, rule, mixer):.3f}" for mixer in own[0][-1]]


def test_every_number_of_the_accuracies_follows_from_the_files():
    runs, (own, _, _) = by_hand(), judged()
    right = {name: [100 * seeds[k]["accuracy"] for k in range(5)] for name, seeds in runs.items()}
    frontier, *_, sizes = saved_tables(PAGE)
    assert sorted(row[0] for row in frontier) == sorted(row[0] for row in sizes) == sorted(right)
    for name, mean, accuracy, difference, ahead, step in frontier:
        values = right[name]
        pairs = [one - other for one, other in zip(values, right["area"], strict=True)]
        assert mean == (f"{error(own, name):.3f}" if name in own[0][-1]["CutMix"] else "") and step == cost(name)
        assert accuracy == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        if name == "area": assert difference == ahead == ""
        else:
            assert difference == with_student(pairs, 1 - 0.05 / COMPARED)
            assert ahead == f"{sum(pair > 0 for pair in pairs)} of 5"
    for name, *fifths in sizes:
        means = [statistics.mean(100 * seeds["by_size"][k] for seeds in runs[name].values()) for k in range(5)]
        assert fifths == [f"{value:.1f}" for value in means]


def photographs():
    "By the training of the network, what each found on photographs"
    found = {}
    for file in sorted((ROOT / "results/rule_photographs").glob("*.json")):
        record = json.loads(file.read_text())
        assert record["commit"][-1] != "+" and record["judged"][-1] != "+" and record["recipe"]["data"] == "cifar100"
        dose = "plain" if record["recipe"]["mixer"] == "none" else str(record["recipe"]["p"])
        found.setdefault(dose, []).append(record["rule_errors"]["CutMix"])
    assert {dose: len(networks) for dose, networks in found.items()} == {"plain": 4, "1.0": 6, "0.5": 6}
    return found, sum(found.values(), [])


def test_the_short_table_of_the_home_page_says_the_same():
    (own, _, _), (_, everyone) = judged(), photographs()
    names = {"λ~ of SUMix (poster)": "poster", "λ~ of SUMix (corrected)": "corrected",
             "SnapMix": "snapmix", "the truth itself": "oracle"}
    rows = re.findall(r"^\| ([^|]+) \| (0\.\d{3}) \| (0\.\d{3}) \| (\d\.\d\d) \|$", (ROOT / "README.md").read_text(),
                      re.MULTILINE)
    assert len(rows) == 7
    for label, mean, pictured, step in rows:
        rule = names.get(label, label.partition(":")[0])
        shown = statistics.mean(network[rule]["error"][0] for network in everyone)
        assert (mean, pictured, step) == (f"{error(own, rule):.3f}", f"{shown:.3f}", cost(rule))


def test_the_planned_correlation_and_sizes_follow_from_the_files():
    runs, (own, _, _) = by_hand(), judged()
    text = PAGE.read_text()
    names = [name for name in runs if name in own[0][-1]["CutMix"]]
    errors = [error(own, name) for name in names]
    by_seed = [stats.spearmanr(errors, [runs[name][k]["accuracy"] for name in names])[0] for k in range(5)]
    assert with_student(by_seed, digits=2) in text
    def gained(size, k, odds):
        shares = [runs[name][k]["by_size"][size] for name in ("oracle", "area")]
        one, other = (math.log(share / (1 - share)) if odds else 100 * share for share in shares)
        return one - other
    for odds in (False, True):
        asked = [gained(0, k, odds) - gained(4, k, odds) for k in range(5)]
        assert with_student(asked, digits=2) in text


def test_pairs_saw_the_same_mixtures():
    runs = by_hand()
    for seed in range(5):
        drawn = {json.dumps([epoch["lam"] for epoch in runs[name][seed]["epochs"]]) for name in runs if name != "plain"}
        assert len(drawn) == 1


def test_every_number_of_the_photographs_follows_from_the_files():
    found, everyone = photographs()
    table = saved_tables(PAGE)[4]
    errors = [statistics.mean(network[row[0]]["error"][0] for network in everyone) for row in table]
    assert errors == sorted(errors) and {row[0] for row in table} == set(everyone[0])
    for rule, *columns in table:
        gains = list(zip(*(network[rule]["gain"] for network in everyone)))
        wanted = [f"{statistics.mean(network[rule]['error'][0] for network in found[dose]):.3f}"
                  for dose in ("plain", "1.0", "0.5")]
        wanted.append(f"{statistics.mean(gains[0]):+.3f} [{min(gains[1]):+.3f}, {max(gains[2]):+.3f}]")
        assert columns == [*wanted, f"{sum(gain > 0 for gain in gains[0])} of 16"]


def test_labels_by_networks_trained_with_sumix_follow_from_the_files():
    found = {}
    for file in sorted((ROOT / "results/study_photographs").glob("*.json")):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert record["commit"][-1] != "+" and record["judged"][-1] != "+" and recipe["data"] == "cifar100"
        kind = "plain" if recipe["mixer"] == "none" else recipe["method"]
        found.setdefault(kind, {})[recipe["seed"]] = record["rule_errors"]["CutMix"]
    assert len(found) == 3 and all(sorted(seeds) == [1, 2, 3, 4, 5] for seeds in found.values())
    [table] = [table for table in saved_tables(PAGE) if (len(table), len(table[0]), table[0][0]) == (5, 5, "poster")]
    for rule, *columns in table:
        errors = {kind: [seeds[seed][rule]["error"][0] for seed in range(1, 6)] for kind, seeds in found.items()}
        pairs = [one - other for one, other in zip(errors["sumix"], errors["mce"])]
        means = [f"{statistics.mean(errors[kind]):.3f}" for kind in ("plain", "mce", "sumix")]
        assert columns == [*means, with_student(pairs, digits=3)]
