"The study on CIFAR-100: every number of its tables is computed again from the files, without the package"
import json
import math
import re
import statistics
import tomllib

import pytest

from sumix_nb.comparisons import paired_interval
from sumix_nb.grid import read_grid
from sumix_nb.study import accuracies, arm_of, gains, pooled_intervals, poster_row, study_runs, study_table
from sumix_nb.training import Recipe, load_records
from tests.conftest import ROOT

PAGE = ROOT / "nbs" / "experiments" / "50_cifar100_cpu.ipynb"
NAMES = {"none": "plain", "mixup": "MixUp", "cutmix": "CutMix", "fmix": "FMix", "saliencymix": "SaliencyMix",
         "resizemix": "ResizeMix"}
POSTER = {"CutMix": "78.17, 79.78", "FMix": "79.69, 80.20", "SaliencyMix": "79.12, 79.91", "ResizeMix": "80.01, 80.38"}
T = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}  # 97.5 % of Student's distribution, from a printed table
OTHERWISE = {"alpha": 1.0, "lr": 0.1, "momentum": 0.9, "width": 16, "bs": 100, "weight_decay": 5e-4, "xi": 0.5,
             "clean": "no_grad", "update_bn": True, "relabel": True, "limit": None, "model": "resnet18"}


def by_hand():
    "(mixer, method, variant) -> seed -> record, from the files that fit the study's own words"
    wanted, found = tomllib.loads((PAGE.parent / "study.toml").read_text()), {}
    common = {name: wanted[name] for name in ("data", "epochs", "precision")} | OTHERWISE
    for file in sorted((ROOT / "results").glob("*.json")):
        record = json.loads(file.read_text())
        recipe = {"relabel": True} | record["recipe"]
        variant = recipe["variant"] if recipe["method"] == "sumix" else "poster"
        if any(recipe[name] != value for name, value in common.items()): continue
        if recipe["mixer"] not in NAMES or recipe["method"] not in ("mce", "sumix") or variant == "corrected": continue
        found.setdefault((NAMES[recipe["mixer"]], recipe["method"], variant), {})[recipe["seed"]] = record
    return found


def spread(values):
    "Mean and standard deviation"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def difference(found, base):
    "Mean and Student's interval of the paired differences"
    pairs = [found[seed] - base[seed] for seed in sorted(found) if seed in base]
    mean, text = sum(pairs) / len(pairs), f"{sum(pairs) / len(pairs):+.2f}"
    if len(pairs) == 1: return text
    reach = T[len(pairs) - 1] * math.sqrt(sum((x - mean) ** 2 for x in pairs) / (len(pairs) - 1) / len(pairs))
    return f"{text} [{mean - reach:+.2f}, {mean + reach:+.2f}]"


def expected_tables():
    "Rows of the table of accuracies and of that of calibration errors"
    right = {key: {seed: 100 * record["accuracy"] for seed, record in runs.items()} for key, runs in by_hand().items()}
    error = {key: {seed: 100 * sum(part["n"] * abs(part["accuracy"] - part["confidence"])
                                   for part in record["reliability"]) / 10_000 for seed, record in runs.items()}
             for key, runs in by_hand().items()}
    rows, errors = [], []
    for mixer in NAMES.values():
        base = right.get((mixer, "mce", "poster"))
        if base is None: continue
        arms = [key for key in right if key[:2] == (mixer, "sumix")]
        if not arms: rows.append([mixer, str(len(base)), spread([*base.values()]), "", "", POSTER.get(mixer, "")])
        errors.append([mixer, str(len(base)), spread([*error[mixer, "mce", "poster"].values()]), ""])
        for key in sorted(arms, key=lambda key: key[2] != "poster"):
            named = "" if key[2] == "poster" else f" ({key[2]})"
            rows.append([mixer + named, str(len(right[key])), spread([*base.values()]), spread([*right[key].values()]),
                         difference(right[key], base), "" if named else POSTER.get(mixer, "")])
            errors.append([f"{mixer} + SUMix{named}", str(len(right[key])), spread([*error[key].values()]),
                           difference(error[key], error[mixer, "mce", "poster"])])
    return rows, errors


def tables(text):
    "The rows of each Markdown table, without head"
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        found.append([[cell.strip() for cell in line[1:-1].split("|")] for line in block.strip().splitlines()[2:]])
    return found


def saved_tables():
    "The tables that the page shows"
    cells = json.loads(PAGE.read_text())["cells"]
    texts = ["".join(output["data"]["text/markdown"]) for cell in cells for output in cell.get("outputs", ())
             if "text/markdown" in output.get("data", {})]
    return [rows for text in texts for rows in tables(text)]


def test_every_number_of_the_page_follows_from_the_files():
    shown, (rows, errors) = saved_tables(), expected_tables()
    assert len(shown) == 2
    assert sorted(shown[0]) == sorted(rows)
    assert sorted(shown[1]) == sorted(errors)


def test_every_number_of_the_readme_follows_from_the_files():
    rows, _ = expected_tables()
    shown = [table for table in tables((ROOT / "README.md").read_text()) if table[0][0] in NAMES.values()]
    assert len(shown) == 1 and sorted(shown[0]) == sorted(rows)


def test_the_file_holds_the_runs_that_were_promised():
    recipes = read_grid(PAGE.parent / "study.toml")
    seeds = {}
    for recipe in recipes: seeds.setdefault(arm_of(recipe), []).append(recipe.seed)
    five, three = [0, 1, 2, 3, 4], [0, 1, 2]
    assert seeds == {"CutMix": five, "CutMix + SUMix": five, "CutMix + SUMix (released)": five, "plain": three} | {
        f"{mixer}{end}": three for mixer in ("MixUp", "FMix", "SaliencyMix", "ResizeMix") for end in ("", " + SUMix")}


def test_records_are_found_by_what_was_run_and_others_left_out():
    records = load_records(ROOT / "results")
    runs = study_runs(read_grid(PAGE.parent / "study.toml"), records)
    expected = {key: sorted(found) for key, found in by_hand().items()}
    def label(mixer, method, variant):
        return mixer + " + SUMix" * (method == "sumix") + f" ({variant})" * (variant != "poster")
    assert {arm: sorted(found) for arm, found in runs.items()} == {
        label(*key): seeds for key, seeds in expected.items()}
    for arm, values in accuracies(runs).items():
        assert values == {seed: 100 * record["accuracy"] for seed, record in runs[arm].items()}
    assert study_runs([Recipe()], records) == {}


def test_gains_are_paired_by_seed():
    found = gains({"CutMix": {0: 1.0, 1: 2.0, 5: 9.0}, "CutMix + SUMix": {1: 5.0, 0: 3.0}, "FMix + SUMix": {0: 1.0}})
    assert found == {"CutMix + SUMix": {0: 2.0, 1: 3.0}}


def test_the_posters_numbers_are_beside_their_mixers():
    assert {mixer: poster_row(mixer) for mixer in (*NAMES.values(), "GridMix")} == dict.fromkeys(
        (*NAMES.values(), "GridMix"), "") | POSTER


def test_pooled_intervals_by_hand():
    groups = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 0.0, 2: 4.0}, "c": {1: 7.0}}
    spread_of_all = math.sqrt((2 + 8) / 3)  # of 2 + 1 degrees of freedom
    for arm, (mean, n) in {"a": (2, 3), "b": (2, 2), "c": (7, 1)}.items():
        half = T[3] * spread_of_all / math.sqrt(n)
        assert pooled_intervals(groups)[arm] == pytest.approx((mean - half, mean + half), rel=1e-6)
    assert pooled_intervals({"a": groups["a"]})["a"] == pytest.approx(paired_interval(groups["a"]))
    with pytest.raises(ValueError, match="`level`"): pooled_intervals(groups, 1.0)


def test_an_arm_without_sumix_has_a_short_row():
    assert study_table({"plain": {0: 50.0, 1: 52.0}}).splitlines()[2:] == ["| plain | 2 | 51.0 ± 1.4 | | |  |"]
