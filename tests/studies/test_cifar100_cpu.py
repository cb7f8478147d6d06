"The study on CIFAR-100: every number of its tables is computed again from the files, without the package"
import json
import math
import re
import statistics

import pandas as pd
from scipy import stats

from sumix_nb.running.grid import read_grid
from sumix_nb.studies.cifar100_cpu import arm_of, gains, study_runs
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records
from tests.conftest import ROOT
from tests.studies.oracles import saved_tables, with_student

PAGE = ROOT / "nbs" / "studies" / "20_cifar100_cpu.ipynb"
NAMES = {"none": "plain", "mixup": "MixUp", "cutmix": "CutMix", "fmix": "FMix", "saliencymix": "SaliencyMix",
         "resizemix": "ResizeMix"}
POSTER = {"CutMix": "78.17, 79.78", "FMix": "79.69, 80.20", "SaliencyMix": "79.12, 79.91", "ResizeMix": "80.01, 80.38"}
T = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}  # 97.5 % of Student's distribution, from a printed table
COMMON = {"data": "cifar100", "epochs": 12, "precision": "bf16", "model": "resnet18", "width": 16, "stem": "small",
          "alpha": 1.0, "per_sample": False, "p": 1.0, "xi": 0.5, "clean": "no_grad", "update_bn": True, "bs": 100,
          "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "channels_last": True, "valid": "test", "limit": None,
          "z": "logits", "relabel": True, "mixer_options": {}, "view": None, "size": None, "stats": None,
          "drop_last": True, "pretrained": False, "optimizer": "sgd", "schedule": "one_cycle", "min_lr": 0.0,
          "warmup": 0.0, "clip": 0.0, "smoothing": 0.0, "spare_norms": False, "accumulate": 1, "ema": 0.0,
          "compile": False}


def by_hand():
    "(mixer, method, variant) -> seed -> record, from the files that fit the study's own words"
    found = {}
    for file in sorted((ROOT / "results").glob("*.json")):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        mixer, method, variant, seed = (recipe[name] for name in ("mixer", "method", "variant", "seed"))
        other = any(recipe.get(name, value) != value for name, value in COMMON.items())
        if other or mixer not in NAMES or method not in ("mce", "sumix") or variant == "corrected": continue
        group = found.setdefault((NAMES[mixer], method, variant), {})
        assert seed not in group, file
        group[seed] = record
    return found


def spread(values):
    "Mean and standard deviation"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def pairs_of(found, base): return [found[seed] - base[seed] for seed in sorted(found) if seed in base]


def deviation(pairs):
    "Sum of squares around the mean"
    mean = sum(pairs) / len(pairs)
    return sum((x - mean) ** 2 for x in pairs)


def interval(pairs):
    "Mean, and Student's interval if there are two differences or more"
    mean = sum(pairs) / len(pairs)
    if len(pairs) == 1: return f"{mean:+.2f}", ""
    reach = T[len(pairs) - 1] * math.sqrt(deviation(pairs) / (len(pairs) - 1) / len(pairs))
    return f"{mean:+.2f}", f"[{mean - reach:+.2f}, {mean + reach:+.2f}]"


def expected_tables():
    "Rows of the tables of accuracies, of differences and of calibration errors"
    runs = by_hand()
    right = {key: {seed: 100 * record["accuracy"] for seed, record in group.items()} for key, group in runs.items()}
    def over(measure):
        return {key: {seed: 100 * sum(measure(part) for part in record["reliability"]) / 10_000
                      for seed, record in group.items()} for key, group in runs.items()}
    error = over(lambda part: part["n"] * abs(part["accuracy"] - part["confidence"]))
    direction = over(lambda part: part["n"] * (part["accuracy"] - part["confidence"]))
    rows, errors, added = [], [], {}
    for mixer in NAMES.values():
        plain = (mixer, "mce", "poster")
        if plain not in right: continue
        arms = [key for key in right if key[:2] == (mixer, "sumix") and pairs_of(right[key], right[plain])]
        if not arms: rows.append([mixer, str(len(right[plain])), spread([*right[plain].values()]), "", "",
                                  POSTER.get(mixer, "")])
        for key in [plain, *arms]:
            named, pairs = "" if key[2] == "poster" else f" ({key[2]})", ["", ""]
            if key != plain:
                pairs = interval(pairs_of(error[key], error[plain]))
                shared = [seed for seed in right[key] if seed in right[plain]]
                both = [spread([right[one][seed] for seed in shared]) for one in (plain, key)]
                added[f"{mixer} + SUMix{named}"] = differences = pairs_of(right[key], right[plain])
                rows.append([mixer + named, str(len(shared)), *both, " ".join(interval(differences)).strip(),
                             "" if named else POSTER.get(mixer, "")])
            errors.append([mixer + " + SUMix" * (key != plain) + named, str(len(error[key])),
                           *(spread([*measured[key].values()]) for measured in (error, direction)),
                           " ".join(pairs).strip()])
    freedom = sum(len(pairs) - 1 for pairs in added.values())
    common = math.sqrt(sum(map(deviation, added.values())) / freedom)
    strict = stats.t.ppf(1 - 0.05 / 12, freedom)
    differences = []
    for arm, pairs in added.items():
        mean, half = sum(pairs) / len(pairs), strict * common / math.sqrt(len(pairs))
        strictly = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
        differences.append([arm, str(len(pairs)), " ".join(interval(pairs)), strictly])
    return rows, differences, errors


def tables(text):
    "The rows of each Markdown table, without head"
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        found.append([[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in line[1:-1].split("|")]  # escaped
                      for line in block.strip().splitlines()[2:]])
    return found


def test_every_number_in_the_tables_of_the_page_follows_from_the_files():
    first, *shown, floors, _ = saved_tables(PAGE)
    for table, expected in zip(shown, expected_tables(), strict=True): assert sorted(table) == sorted(expected)
    right = sorted(f"{100 * record['accuracy']:.1f}" for group in by_hand().values() for record in group.values())
    assert sorted(cell for row in first for cell in row[1:] if cell != "NaN") == right and len(floors) == 12


def test_the_table_of_doses_follows_from_the_files():
    whole = by_hand()
    runs = {((1.0, 1.0), method): whole["CutMix", method, "poster"] for method in ("mce", "sumix")}
    for file in (ROOT / "results/dose").glob("*.json"):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert record["commit"][-1] != "+" and recipe["mixer"] == "cutmix"
        assert all(recipe.get(name, value) == value for name, value in COMMON.items() if name != "p")
        runs.setdefault(((recipe["p"], recipe["off_after"]), recipe["method"]), {})[recipe["seed"]] = record
    table = saved_tables(PAGE)[-1]
    for (_, *columns), dose in zip(table, ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)), strict=True):
        plain, alone, with_sumix = ([100 * found[seed]["accuracy"] for seed in range(3)] for found in (
            whole["plain", "mce", "poster"], runs[dose, "mce"], runs[dose, "sumix"]))
        above, added = ([one - other for one, other in zip(*pair)] for pair in ((alone, plain), (with_sumix, alone)))
        assert columns == [spread(alone), with_student(above), spread(with_sumix), with_student(added),
                           ", ".join(f"{gain:+.1f}" for gain in added)]
        assert all(runs[dose, "mce"][seed]["device"] == runs[dose, "sumix"][seed]["device"] for seed in range(3))
    assert len(runs) == 6


def test_the_row_of_the_readme_follows_from_the_files():
    rows, _, errors = ({row[0]: row for row in found} for found in expected_tables())
    [table] = [found for found in tables((ROOT / "README.md").read_text()) if found[0][0].startswith("all images")]
    _, *shown, ahead, calibration = table[0]
    assert shown == [rows["plain"][2], *rows["CutMix"][2:5]] and ahead == "5 of 5"
    means = [float(errors[arm][2].split()[0]) for arm in ("plain", "CutMix", "CutMix + SUMix")]
    assert calibration == ", ".join(f"{mean:.0f}" for mean in means)


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
    assert study_runs([Recipe()], records) == {}


def test_gains_are_paired_by_seed():
    values = pd.DataFrame({"CutMix": {0: 1.0, 1: 2.0, 5: 9.0}, "CutMix + SUMix": {1: 5.0, 0: 3.0},
                           "FMix + SUMix": {0: 1.0}, "MixUp": {0: 4.0}, "MixUp + SUMix": {1: 5.0}})
    found = gains(values)
    assert list(found) == ["CutMix + SUMix"] and found["CutMix + SUMix"].dropna().to_dict() == {0: 2.0, 1: 3.0}


def test_pairs_saw_the_same_mixtures_on_the_same_software():
    runs, pairs = by_hand(), 0
    for (mixer, method, _), group in runs.items():
        base = runs.get((mixer, "mce", "poster"), {})
        for seed in group.keys() & base.keys() if method == "sumix" else ():
            one, other = group[seed], base[seed]
            assert [epoch["lam"] for epoch in one["epochs"]] == [epoch["lam"] for epoch in other["epochs"]]
            assert all(one[name] == other[name] for name in ("device", "versions"))
            pairs += 1
    assert pairs >= 4
