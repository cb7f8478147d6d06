"The map of mixing: every number of its table is computed again from the files, without the package"
import json

from tests.conftest import ROOT
from tests.studies.oracles import saved_tables

PAGE = ROOT / "nbs" / "studies" / "05_mixing_map.ipynb"
STEPS = {200: 2000, 400: 4000, 800: 8000}  # of 100 images


def last_epochs():
    "Accuracy, training loss and test loss of each run, by cell, arm and seed"
    found = {}
    for file in sorted((ROOT / "results/map").glob("*.json")):
        record = json.loads(file.read_text())
        recipe, last = record["recipe"], record["epochs"][-1]
        assert record["commit"][-1] != "+" and recipe["data"] == "cifar100" and recipe["bs"] == 100
        images = recipe["limit"] if isinstance(recipe["limit"], int) else recipe["limit"][0]
        cell = (images // 100, images * recipe["epochs"] // 1000)
        assert images // 100 * recipe["epochs"] == STEPS[cell[1]] and len(record["epochs"]) == recipe["epochs"]
        key = (cell, recipe["mixer"], recipe["p"], recipe["seed"])
        assert key not in found
        found[key] = (100 * record["accuracy"], last["train_loss"], last["valid_loss"])
    return found


def test_the_table_follows_from_the_files():
    runs, table = last_epochs(), saved_tables(PAGE)[0]
    cells = sorted({cell for cell, *_ in runs})
    assert len(table) == len(cells)
    for (images, seen), (name, *columns) in zip(cells, table):
        assert name == f"{images}, {seen},000 seen"
        plain = [runs[(images, seen), "none", 1.0, seed] for seed in (0, 1)]
        wanted = [", ".join(f"{run[i]:.{digits}f}" for run in plain) for i, digits in enumerate((1, 2, 1))]
        for p in (1.0, 0.5):
            gains = [runs[(images, seen), "cutmix", p, seed][0] - plain[seed][0] for seed in (0, 1)]
            wanted.append(", ".join(f"{gain:+.1f}" for gain in gains))
        assert columns == wanted


def test_the_search_for_a_regime_follows_from_the_files():
    found = {}
    for file in (ROOT / "results/regime").glob("*.json"):
        record = json.loads(file.read_text())
        recipe, last = record["recipe"], record["epochs"][-1]
        assert record["commit"][-1] != "+" and len(record["epochs"]) == recipe["epochs"]
        assert recipe["data"] == "cifar100"
        cell = (recipe["limit"][0] // 100, recipe["epochs"], recipe["stem"])
        ends = (100 * record["accuracy"], last["train_loss"], last["valid_loss"])
        found.setdefault(cell, {})[recipe["mixer"], recipe["seed"]] = ends

    def row(cell):
        runs = found[cell]
        seeds = [seed for mixer, seed in runs if mixer == "none"]
        plain = [sum(runs["none", seed][i] for seed in seeds) / len(seeds) for i in range(3)]
        gain = sum(runs["cutmix", seed][0] - runs["none", seed][0] for seed in seeds) / len(seeds)
        return [*map(str, cell), str(len(seeds)), f"{plain[0]:.1f}", f"{plain[1]:.2f}", f"{plain[2]:.1f}",
                f"{plain[2] - plain[1]:.1f}", f"{gain:+.1f}"]

    assert sum(map(len, found.values())) == 14
    assert sorted(saved_tables(PAGE)[1]) == sorted(map(row, found))
