"Wrong labels: every number of the page's tables is computed again from the files, without the package"
import json
import statistics

from tests.conftest import ROOT
from tests.studies.oracles import saved_tables, with_student

PAGE = ROOT / "nbs" / "studies" / "28_wrong_labels.ipynb"
NAMES = {"none": "plain", "mixup": "MixUp", "cutmix": "CutMix"}


def measured():
    "Arm -> the four numbers of each seed, percent"
    found = {}
    for file in sorted((ROOT / "results/wrong_labels").glob("*.json")):
        record = json.loads(file.read_text())
        recipe, epochs = record["recipe"], record["epochs"]
        assert record["commit"][-1] != "+" and recipe["data"] == "cifar100" and recipe["limit"] == 10000
        assert recipe["label_noise"] == 0.4 and recipe["epochs"] == len(epochs) == 60 and recipe["stem"] == "standard"
        assert (recipe["p"], recipe["alpha"], recipe["variant"], recipe["precision"]) == (1, 1, "poster", "fp32")
        asked = [epoch for epoch in epochs if epoch["accuracy"] is not None]
        assert [epoch["epoch"] for epoch in asked] == [told["epoch"] for told in record["label_noise"]]
        assert [epoch["epoch"] + 1 for epoch in asked] == list(range(5, 61, 5))
        last = record["label_noise"][-1]
        arm = NAMES[recipe["mixer"]] + (" + SUMix" if recipe["method"] == "sumix" else "")
        assert recipe["seed"] not in found.setdefault(arm, {})
        found[arm][recipe["seed"]] = [100 * value for value in (
            asked[-1]["accuracy"], max(epoch["accuracy"] for epoch in asked), last["memorised"], last["recovered"])]
    return found


def test_the_tables_follow_from_the_files():
    found, (table, differences) = measured(), saved_tables(PAGE)
    assert sorted(found) == sorted([*NAMES.values(), "CutMix + SUMix"])
    assert all(sorted(of_seed) == [1, 2, 3] for of_seed in found.values())
    assert [row[0] for row in table] == ["plain", "MixUp", "CutMix", "CutMix + SUMix"]
    for arm, *columns in table:
        assert columns == [f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}"
                           for own in zip(*found[arm].values())]
    pairs = [("CutMix + SUMix", "CutMix"), ("CutMix", "plain"), ("MixUp", "plain")]
    assert [row[0] for row in differences] == [f"{arm} less {base}" for arm, base in pairs]
    for (arm, base), (_, *columns) in zip(pairs, differences):
        assert columns == [with_student([found[arm][seed][i] - found[base][seed][i] for seed in (1, 2, 3)])
                           for i in range(4)]


def test_the_runs_of_one_seed_had_the_same_processor():
    devices = {json.loads(file.read_text())["device"] for file in (ROOT / "results/wrong_labels").glob("*.json")}
    assert len(devices) == 1 and devices.pop().endswith("1 threads")
