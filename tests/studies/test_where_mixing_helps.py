"SUMix where mixing helps: every number of its tables is computed again from the files, without the package"
import json
import re
import statistics

from tests.conftest import ROOT
from tests.studies.oracles import saved_tables, with_student

PAGE, ROBUSTNESS = (ROOT / "nbs" / "studies" / f"{name}.ipynb" for name in ("25_where_mixing_helps", "27_robustness"))
NAMES = {"mixup": "MixUp", "cutmix": "CutMix", "fmix": "FMix", "saliencymix": "SaliencyMix", "resizemix": "ResizeMix",
         "puzzlemix": "PuzzleMix", "automix": "AutoMix"}
FIVE = list(NAMES.values())[:5]  # of the one number
DEFAULTS = {"alpha": 1, "p": 1, "off_after": 1, "variant": "poster", "xi": 0.5, "relabel": True, "label_rule": "area",
            "clean": "no_grad"}
KINDS = ("plain", "CutMix", "CutMix + SUMix")


def main_runs(**changed):
    "Arm -> seed -> record, of the arms of the first table, or of those that are not as by default"
    found, options = {}, DEFAULTS | changed
    for file in sorted((ROOT / "results/mixing").glob("*.json")):
        record = json.loads(file.read_text())
        recipe = record["recipe"]
        assert record["commit"][-1] != "+" and recipe["limit"] == [2500, 10000] and recipe["epochs"] == 120
        assert recipe["stem"] == "standard" and recipe["precision"] == "fp32"
        assert record["device"].startswith(("AMD EPYC", "Intel(R) Xeon(R)")) and record["device"].endswith("1 threads")
        if any(recipe[name] != value for name, value in options.items()) or recipe["method"] not in ("mce", "sumix"):
            continue
        arm = NAMES.get(recipe["mixer"], "plain") + (" + SUMix" if recipe["method"] == "sumix" else "")
        found.setdefault(arm, {})[recipe["seed"]] = record
    return found


def test_a_mixer_and_the_same_with_sumix_ran_on_one_kind_of_processor():
    runs = main_runs()
    assert len(runs) == 15
    for mixer in NAMES.values():
        assert len({record["device"] for arm in (mixer, f"{mixer} + SUMix") for record in runs[arm].values()}) == 1


def test_a_run_that_was_made_twice_is_the_same_to_the_bit():
    [file] = (ROOT / "results/mixing/again").glob("*.json")
    runs = [json.loads(path.read_text()) for path in (file, file.parent.parent / file.name)]
    first, second = ([[epoch[name] for name in ("train_loss", "valid_loss", "ratio")] for epoch in run["epochs"]]
                     for run in runs)
    assert first == second and len(first) == 120 and runs[0]["accuracy"] == runs[1]["accuracy"]
    assert runs[0]["seconds"] != runs[1]["seconds"]  # no copy


def calibration_error(record):
    curve = record["reliability"]
    return 100 * sum(part["n"] * abs(part["accuracy"] - part["confidence"]) for part in curve) / sum(
        part["n"] for part in curve)


def test_the_table_of_mixers_follows_from_the_files():
    runs = main_runs()
    table = saved_tables(PAGE)[0]
    assert [row[0] for row in table] == list(NAMES.values())
    for mixer, *columns in table:
        seeds = sorted(set(runs[mixer]) & set(runs[f"{mixer} + SUMix"]))
        alone, with_sumix, plain = ([100 * runs[arm][seed]["accuracy"] for seed in seeds]
                                    for arm in (mixer, f"{mixer} + SUMix", "plain"))
        added = [one - other for one, other in zip(with_sumix, alone)]
        errors = [statistics.mean(map(calibration_error, runs[arm].values())) for arm in (mixer, f"{mixer} + SUMix")]
        spreads = [f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}" for own in (alone, with_sumix)]
        assert seeds == [1, 2, 3, 4, 5]
        assert columns == [spreads[0], with_student([one - other for one, other in zip(alone, plain)]), spreads[1],
                           with_student(added, 1 - 0.05 / 7), f"{sum(pair > 0 for pair in added)} of {len(seeds)}",
                           f"{errors[0]:.0f}, {errors[1]:.0f}"]


def added_to(runs, mixer):
    "What SUMix adds to a mixer, seed by seed, points"
    return [100 * (runs[f"{mixer} + SUMix"][seed]["accuracy"] - runs[mixer][seed]["accuracy"]) for seed in range(1, 6)]


def mean_of_five(by_mixer): return [statistics.mean(seed) for seed in zip(*(by_mixer[mixer] for mixer in FIVE))]


def test_the_one_number_follows_from_the_files():
    runs = main_runs()
    added = mean_of_five({mixer: added_to(runs, mixer) for mixer in FIVE})
    shown = re.search(r"by seed ({.*?}), mean (.*?)\\n", PAGE.read_text())
    assert shown[1] == str({seed: round(one, 2) for seed, one in enumerate(added, 1)})
    assert shown[2] == with_student(added)


def test_the_table_of_variants_and_doses_follows_from_the_files():
    table, usual = saved_tables(PAGE)[2], main_runs()
    doses = {"p 0.5": main_runs(p=0.5), "alpha 0.2": main_runs(alpha=0.2),
             "alpha 0.2, p 0.5": main_runs(alpha=0.2, p=0.5), "off in the last fifth": main_runs(off_after=0.8)}
    pairs = {"poster, the default": (usual, usual, 5), "released": (main_runs(variant="released"), usual, 2),
             "corrected": (main_runs(variant="corrected"), usual, 2)}
    pairs |= {dose: (runs, runs, 5) for dose, runs in doses.items()}
    assert [row[0] for row in table] == list(pairs)
    for name, *columns in table:
        ours, bases, comparisons = pairs[name]
        with_sumix, alone, plain = ([100 * runs[arm][seed]["accuracy"] for seed in range(1, 6)] for runs, arm in (
            (ours, "CutMix + SUMix"), (bases, "CutMix"), (usual, "plain")))
        added = [one - other for one, other in zip(with_sumix, alone)]
        spreads = [f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}" for own in (alone, with_sumix)]
        assert columns == [*spreads, f"{statistics.mean(alone) - statistics.mean(plain):+.1f}",
                           with_student(added, 1 - 0.05 / comparisons), f"{sum(pair > 0 for pair in added)} of 5"]
    for runs in doses.values():
        for seed in range(1, 6): assert runs["CutMix"][seed]["device"] == runs["CutMix + SUMix"][seed]["device"]


def test_runs_made_again_are_of_the_same_recipes_on_another_processor():
    runs, table, again = main_runs(), saved_tables(PAGE)[1], {}
    for file in sorted((ROOT / "results/mixing/another_processor").glob("*.json")):
        second, first = (json.loads(path.read_text()) for path in (file, file.parent.parent / file.name))
        assert second["recipe"] == first["recipe"] and second["commit"][-1] != "+"
        assert (first["device"], second["device"]) == ("AMD EPYC, 1 threads", "AMD EPYC, AVX512, 1 threads")
        arm = NAMES[second["recipe"]["mixer"]] + (" + SUMix" if second["recipe"]["method"] == "sumix" else "")
        again.setdefault(arm, {})[second["recipe"]["seed"]] = second
    assert sorted(again) == ["CutMix", "CutMix + SUMix", "MixUp", "MixUp + SUMix"]
    pairs = {mixer: (added_to(runs, mixer), added_to(again, mixer)) for mixer in ("MixUp", "CutMix")}
    first = {mixer: added_to(runs, mixer) for mixer in FIVE}
    second = first | {mixer: later for mixer, (_, later) in pairs.items()}
    pairs["the one number"] = mean_of_five(first), mean_of_five(second)
    assert table == [[name, with_student(first), with_student(second),
                      with_student([(one + other) / 2 for one, other in zip(first, second)])]
                     for name, (first, second) in pairs.items()]


def measured(runs, arm, measure, key):
    "By seed, percent, of the networks of an arm"
    files = [ROOT / "results/mixing/evaluation" / f"{runs[arm][seed]['name']}.{measure}.json" for seed in range(1, 6)]
    records = [json.loads(file.read_text()) for file in files]
    for record in records:
        assert record["facts"]["n"] == 2000 and all(commit[-1] != "+" for commit in record["commits"].values())
    return [100 * (record["parts"]["scenes"][key]["auroc"] if measure == "ood" else record["headline"][key])
            for record in records], {record["facts"]["images"] for record in records}


def test_the_tables_of_robustness_follow_from_the_files():
    runs, (table, by_mixer) = main_runs(), saved_tables(ROBUSTNESS)
    wanted = {"accuracy (%)": ("calibration", "accuracy"), "under 19 corruptions (%)": ("corruption", "mean_19"),
              "patches covered (%)": ("occlusion", "random"), "error, FGSM of 8 (%)": ("fgsm", "fgsm"),
              "error, the authors' tool (%)": ("fgsm", "legacy"),
              "error, PGD of 2 (%)": ("pgd", "2"), "calibration error (%)": ("calibration", "ece"),
              "after one temperature (%)": ("calibration", "ece_scaled"),
              "AUROC by energy (%)": ("ood", "energy"), "AUROC by softmax (%)": ("ood", "softmax")}
    arms = ["plain", *NAMES.values(), *(f"{mixer} + SUMix" for mixer in NAMES.values())]
    assert [row[0] for row in table] == [row[0] for row in by_mixer] == list(wanted)
    for (name, *columns), (_, *added) in zip(table, by_mixer):
        found, images = zip(*(measured(runs, arm, *wanted[name]) for arm in arms))
        assert len(set.union(*images)) == 1
        alone, with_sumix = ([statistics.mean(seed) for seed in zip(*part)] for part in (found[1:6], found[8:13]))
        assert columns[:3] == [f"{statistics.mean(own):.1f}" for own in (found[0], alone, with_sumix)]
        pairs = [[one - other for one, other in zip(*pair)] for pair in ((alone, found[0]), (with_sumix, alone))]
        assert columns[3:] == [with_student(pair, 1 - 0.05 / 10) for pair in pairs]
        assert added == [f"{statistics.mean(one - other for one, other in zip(found[8 + i], found[1 + i])):+.1f}"
                         for i in range(7)]


def test_the_row_of_the_readme_follows_from_the_files():
    runs = main_runs()
    shown = [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.search(
        r"^\| 25 a class, 120 epochs \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)[1].split("|")]
    values = [[100 * runs[kind][seed]["accuracy"] for seed in range(1, 6)] for kind in KINDS]
    added = [one - other for one, other in zip(values[2], values[1])]
    assert shown[:3] == [f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}" for own in values]
    assert shown[3:5] == [with_student(added, digits=2), f"{sum(pair > 0 for pair in added)} of 5"]
    errors = [statistics.mean(map(calibration_error, runs[kind].values())) for kind in KINDS]
    assert shown[5] == ", ".join(f"{error:.0f}" for error in errors)
