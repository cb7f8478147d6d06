"The map of mixing: every number of its tables is computed again from the files, without the package"
import json
import re
import statistics

from tests.conftest import ROOT
from tests.studies.oracles import saved_tables

PAGE = ROOT / "nbs" / "studies" / "05_mixing_map.ipynb"
STEPS = {200: 2000, 400: 4000, 800: 8000}  # of 100 images
SEEDS = {"standard": (1, 2), "small": (0, 1)}


def last_epochs(stem):
    "Accuracy, training loss and test loss of each run of a network, by cell, arm and seed"
    found = {}
    for file in sorted((ROOT / "results/map").glob("*.json")):
        record = json.loads(file.read_text())
        recipe, last = record["recipe"], record["epochs"][-1]
        if recipe["stem"] != stem: continue
        assert record["commit"][-1] != "+" and recipe["data"] == "cifar100" and recipe["bs"] == 100
        assert recipe["precision"] == {"standard": "fp32", "small": "bf16"}[stem] and recipe["seed"] in SEEDS[stem]
        images = recipe["limit"] if isinstance(recipe["limit"], int) else recipe["limit"][0]
        cell = (images // 100, images * recipe["epochs"] // 1000)
        assert images // 100 * recipe["epochs"] == STEPS[cell[1]] and len(record["epochs"]) == recipe["epochs"]
        key = (cell, recipe["mixer"], recipe["p"], recipe["seed"])
        assert key not in found
        found[key] = (100 * record["accuracy"], last["train_loss"], last["valid_loss"])
    return found


def gains_of(runs, cell, mixer, p, seeds):
    return [runs[cell, mixer, p, seed][0] - runs[cell, "none", 1.0, seed][0] for seed in seeds
            if (cell, mixer, p, seed) in runs]


def test_the_tables_follow_from_the_files():
    for (stem, seeds), table in zip(SEEDS.items(), saved_tables(PAGE)):
        runs = last_epochs(stem)
        cells = sorted({cell for cell, *_ in runs})
        assert [row[0] for row in table] == [f"{images}, {seen},000 seen" for images, seen in cells]
        for cell, (_, *columns) in zip(cells, table):
            plain = [runs[cell, "none", 1.0, seed] for seed in seeds]
            wanted = [", ".join(f"{run[i]:.{digits}f}" for run in plain) for i, digits in enumerate((1, 2, 1))]
            wanted.append(", ".join(f"{new - own:.1f}" for _, own, new in plain))
            wanted += [", ".join(f"{gain:+.1f}" for gain in gains_of(runs, cell, *arm, seeds))
                       for arm in (("cutmix", 1.0), ("cutmix", 0.5), ("mixup", 1.0))[:len(columns) - 4]]
            assert len(columns) == {"standard": 7, "small": 6}[stem]
            assert columns == wanted


def signs(seed):
    "Gap of plain training and whether CutMix gains, for each cell"
    runs = last_epochs("standard")
    return [(runs[cell, "none", 1.0, seed][2] - runs[cell, "none", 1.0, seed][1],
             runs[cell, "cutmix", 1.0, seed][0] > runs[cell, "none", 1.0, seed][0])
            for cell in sorted({cell for cell, *_ in runs})]


def fitted():
    "The cut that tells most signs of seed 1, and how many"
    def right(cut): return sum((gap > cut) == gains for gap, gains in signs(1))
    ends = sorted(gap for gap, _ in signs(1))
    cuts = [ends[0] - 1, *((one + other) / 2 for one, other in zip(ends, ends[1:])), ends[-1] + 1]
    counts = [right(cut) for cut in cuts]
    return statistics.median(cut for cut, count in zip(cuts, counts) if count == max(counts)), max(counts)


def test_the_rule_follows_from_the_files():
    (cut, most), judges = fitted(), signs(2)
    told = sum((gap > cut) == gains for gap, gains in judges)
    always = max(sum(gains for _, gains in judges), sum(not gains for _, gains in judges))
    shown = re.search(r"at a gap of (\S+): (\d+) of (\d+) signs of seed 1.*?(\d+) of \d+ of seed 2 \(.*?: (\d+)\)",
                      "".join(re.findall(r'"(cut at.*?|\d+ of \d+ of seed 2.*?)\\n"', PAGE.read_text())))
    assert shown.groups() == (f"{cut:.1f}", str(most), str(len(judges)), str(told), str(always))


def test_the_search_for_a_regime_follows_from_the_files():
    found, (cut, _) = {}, fitted()
    for file in (ROOT / "results/regime").glob("*.json"):
        record = json.loads(file.read_text())
        recipe, last = record["recipe"], record["epochs"][-1]
        assert record["commit"][-1] != "+" and len(record["epochs"]) == recipe["epochs"]
        assert recipe["data"] == "cifar100"
        cell = (recipe["limit"][0] // 100, recipe["epochs"], recipe["stem"])
        ends = (100 * record["accuracy"], last["train_loss"], last["valid_loss"])
        found.setdefault(cell, {})[recipe["mixer"], recipe["seed"]] = ends

    cells = {cell for cell, *_ in last_epochs("standard")}

    def row(cell):
        runs = found[cell]
        seeds = [seed for mixer, seed in runs if mixer == "none"]
        plain = [sum(runs["none", seed][i] for seed in seeds) / len(seeds) for i in range(3)]
        gain = sum(runs["cutmix", seed][0] - runs["none", seed][0] for seed in seeds) / len(seeds)
        images, epochs, stem = cell
        on_map = stem == "standard" and (images, images * epochs // 10) in cells
        return [*map(str, cell), str(len(seeds)), "yes" if on_map else "no", f"{plain[0]:.1f}",
                f"{plain[1]:.2f}", f"{plain[2]:.1f}", f"{plain[2] - plain[1]:.1f}", f"{gain:+.1f}",
                "right" if (plain[2] - plain[1] > cut) == (gain > 0) else "wrong"]

    assert sum(map(len, found.values())) == 14
    assert sorted(saved_tables(PAGE)[2]) == sorted(map(row, found))
