"Shares of mixtures judged against what is visible: on scenes, on photographs on white, and what the records say"
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from sumix_nb.studies.ablations import arm_recipe
from sumix_nb.data.sources import SOURCES
from sumix_nb.evaluation.label_errors import label_errors as study
from sumix_nb.studies import photographs
from sumix_nb.evaluation.label_errors import AREA, ENCODINGS, SCALES, STUDY_MIXERS, Judged, all_distances, join, judge
from sumix_nb.evaluation.label_errors import label_errors
from sumix_nb.studies.label_errors import TRAININGS, error_table, run_study, seed_values, study_recipe, study_records
from sumix_nb.evaluation.mismatch import true_ratio, visible_objects
from sumix_nb.studies.photographs import PHOTO_ARMS, WHITE, cifar100_objects, judge_photographs, move_box
from sumix_nb.studies.photographs import objects_on_white, run_photographs
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.ratio import mix_ratio
from sumix_nb.data.scenes import scenes
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import SEEDS, load_records
from tests.conftest import ROOT

FACTS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


class Colours(nn.Module):
    "Features: mean of each channel; logits: a linear map of them"
    def __init__(self, classes=24):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.linspace(-2, 2, 3 * classes).view(classes, 3).roll(5, 0))

    def forward(self, images): return self.fc(self.drop(images.mean((2, 3))))


def test_distances_are_those_of_the_ratio():
    generator = torch.Generator().manual_seed(0)
    outputs = [(torch.randn(6, 4, generator=generator), torch.rand(6, 3, generator=generator)) for _ in range(3)]
    targets = {"target_a": torch.tensor([0, 1, 2, 3, 0, 1]), "target_b": torch.tensor([3, 2, 2, 1, 1, 0])}
    found = all_distances(*outputs, **targets)
    assert len(found) == 10 and all(values.shape == (2, 6) for values in found.values())
    judged = Judged(torch.rand(6), torch.full((6,), 0.3), found, torch.zeros(2, 6), torch.zeros(2, 6))
    for variant, name in (("poster", "logits"), ("released", "logits"), ("corrected", "logits"),
                          ("poster", "features"), ("released", "probabilities")):
        z = [ENCODINGS[name](*output) for output in outputs]
        torch.testing.assert_close(judged.share(f"{variant}, {name}"), mix_ratio(*z, 0.3, variant=variant, **targets))
    p, q = outputs[0][0].softmax(1), outputs[1][0].softmax(1)
    for i in range(6):
        pairs = list(zip(p[i].tolist(), q[i].tolist(), strict=True))
        assert math.isclose(found["total variation"][0, i], sum(abs(x - y) for x, y in pairs) / 2, abs_tol=1e-6)
        assert math.isclose(found["Euclidean"][0, i], math.sqrt(sum((x - y) ** 2 for x, y in pairs)), abs_tol=1e-6)


def test_judging_mixes_in_batches_and_looks_in_evaluation_mode():
    data, model = scenes(25, 24, seed=3), Colours().train()
    found = judge(model, data, CutMix(per_sample=True), **FACTS, bs=10, seed=4)
    assert model.training and found.truth.shape == (20,)  # the last five are no batch
    dice, mean, std = torch.Generator().manual_seed(4), *(torch.tensor(FACTS[key]).view(3, 1, 1) for key in FACTS)
    model.eval()
    order = torch.randperm(25, generator=dice)
    for part in (slice(0, 10), slice(10, 20)):
        rows = order[part]
        images = (data.images[rows] / 255 - mean) / std
        mixed, *visible = visible_objects(CutMix(per_sample=True), images, data.target[rows], data.masks[rows],
                                          generator=dice)
        expected = mix_ratio(model(mixed.images), model(images), model(images)[mixed.partner], mixed.lam)
        torch.testing.assert_close(found.share("poster, logits")[part], expected.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.sources[:, part], torch.stack([rows, rows[mixed.partner]]))
        truth, probs = true_ratio(*visible), model(mixed.images).softmax(1)
        for i in range(10):
            a, b = mixed.target_a[i], mixed.target_b[i]
            if a == b: assert found.truth[part][i].isnan()
            else: assert found.truth[part][i] == truth[i]
            torch.testing.assert_close(found.beliefs[:, part][:, i], probs[i, [a, b]].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.share(AREA)[part], mixed.lam)


def test_judgements_are_joined_in_order():
    data, model = scenes(12, 24, seed=3), Colours()
    parts = [judge(model, data, CutMix(per_sample=True), **FACTS, bs=6, seed=seed) for seed in (0, 1)]
    both = join(parts)
    assert torch.equal(both.lam, torch.cat([part.lam for part in parts])) and both.sources.shape == (2, 24)
    assert torch.equal(both.distances["Euclidean"][:, 12:], parts[1].distances["Euclidean"])
    with pytest.raises(ValueError, match="`name` must be one of"): both.share("nothing")


def test_errors_scales_and_extremes_by_hand():
    truth, lam = torch.tensor([0.9, 0.1, math.nan, 0.5]), torch.tensor([0.5, 0.5, 0.5, 0.5])
    distances = {"one": torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])}
    sources, beliefs = torch.arange(8).view(2, 4), torch.tensor([[0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.35]])
    found = label_errors(Judged(truth, lam, distances, sources, beliefs), details=True)
    up = 1 / (1 + math.exp(-1))
    assert found[AREA]["error"][0] == pytest.approx(0.8 / 3, abs=1e-4) and "scaled" not in found[AREA]
    assert found[AREA]["hidden"] == 0.25 and found[AREA]["gain"] == [0, 0, 0]
    assert found["one"]["error"][0] == pytest.approx((0.9 - up + up - 0.1) / 3, abs=1e-4)
    assert found["one"]["gain"][0] == pytest.approx(0, abs=1e-4)  # what the first gains the second loses
    for scale, error in zip(SCALES, found["one"]["scaled"], strict=True):
        share = 1 / (1 + math.exp(-scale))
        assert error == pytest.approx((abs(0.9 - share) + share - 0.1) / 3, abs=1e-4)
    assert found["one"]["harmed"][0] == [1, round(up, 3), 0.6, 0.2]
    assert found["one"]["helped"][0] == [0, round(up, 3), 0.7, 0.1]
    assert len(label_errors(Judged(truth, lam, distances, sources, beliefs))["one"]["error"]) == 1


def test_the_study_trains_what_is_missing_and_judges_after_every_epoch(tmp_path, monkeypatch):
    small = {name: STUDY_MIXERS[name] for name in ("CutMix", "SaliencyMix")}
    monkeypatch.setattr(study, "STUDY_MIXERS", small)
    monkeypatch.setattr(study, "scenes", lambda n, seed: scenes(100, seed=seed))

    def short(training, seed):
        return Recipe(data="scenes", epochs=2, width=4, limit=400, lr=0.5, seed=seed, **TRAININGS[training])

    monkeypatch.setattr(study, "study_recipe", short)
    done = short("plain", 0)
    (tmp_path / f"{done.name}.json").write_text("{}")
    run_study(out=tmp_path, most=1)
    record, = [file for file in load_records_of(tmp_path) if file]
    assert record["recipe"]["mixer"] == "cutmix" and record["recipe"]["method"] == "mce"
    assert len(record["label_errors"]) == 3 and set(record["label_errors"][0]) == set(small)
    first, _, last = (epoch["CutMix"] for epoch in record["label_errors"])
    assert first[AREA]["error"] == last[AREA]["error"][:1]  # the same mixtures
    assert any(first[name]["error"] != last[name]["error"][:1] for name in first)  # another network
    assert len(last["poster, logits"]["error"]) == 3 and len(last["poster, logits"]["scaled"]) == len(SCALES)


def load_records_of(folder):
    "Whatever JSON files hold"
    return [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]


def test_white_is_the_border_and_the_object_the_rest():
    images = torch.full((4, 3, 20, 16), 255, dtype=torch.uint8)
    images[0, 1, 5:12, 4:10] = WHITE - 1  # one channel is enough
    images[1, :, 5:12, 4:10] = WHITE  # still white
    images[2, :, 5:12, 4:10], images[2, :, :3] = 0, 0  # a dark border
    images[3, :, 8, 8] = 0  # too small
    found = objects_on_white(images, torch.arange(4), tuple("abcd"))
    assert found.target.tolist() == [0] and found.masks.sum() == 42 and bool(found.masks[0, 0, 5:12, 4:10].all())
    with pytest.raises(ValueError, match="`border`"): objects_on_white(images, torch.arange(4), (), border=2)


def write_cifar100(root):
    "A miniature in the layout of CIFAR-100: two images of each class and split, objects on white in 13 test classes"
    for split in ("train", "test"):
        for k in range(100):
            folder = root / split / f"class{k:02d}"
            folder.mkdir(parents=True)
            for i in range(2):
                image = torch.full((32, 32, 3), 255 if split == "test" and k < 13 else 90, dtype=torch.uint8)
                image[6 + i:20, 3 + k % 8:18] = torch.tensor([10 + 2 * k, 100, 200 - k], dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return root


def test_photographs_are_found_judged_and_recorded(tmp_path, monkeypatch):
    root = write_cifar100(tmp_path / "cifar100")
    data = cifar100_objects(root)
    assert len(data) == 26 and data.target.tolist() == [k for k in range(13) for _ in range(2)]
    assert data.masks[1].sum() == (20 - 7) * (18 - 3) and len(data.vocab) == 100
    monkeypatch.setattr(photographs, "PHOTO_ARMS", ("CutMix",))
    short = Recipe(data="cifar100", mixer="cutmix", epochs=1, width=4, bs=20)
    monkeypatch.setattr(photographs, "arm_recipe", lambda arm, seed: short)
    monkeypatch.setattr(photographs, "judge_photographs",
                        lambda model, data: judge_photographs(model, data, times=2, bs=20, pairs=2))
    run_photographs(data_dir=root, out=tmp_path / "out")
    record, = load_records_of(tmp_path / "out")
    found = record["photographs"]
    assert found["n"] == 26 and len(found["lattice"]) == 2
    assert set(found["label_errors"]) == set(photographs.PHOTO_MIXERS)
    run_photographs(data_dir="nowhere", out=tmp_path / "out")  # nothing is missing


def test_the_box_visits_every_place_and_shows_what_it_should():
    data, model = scenes(4, 24, seed=1), Colours()
    found = move_box(model, data, 2, 2, **FACTS, lam=0.6)
    for name in ("poster, logits", "corrected, logits"): # an image mixed with itself: nothing moves the share
        torch.testing.assert_close(found[name], found["lam"])
    assert move_box(model, data, 0, 1, **FACTS, lam=1.0)["visible"].eq(1).all()
    hidden = move_box(model, data, 0, 1, **FACTS, lam=0.0)
    assert hidden["visible"].shape == (1, 1) and hidden["truth"].item() == 0


def test_studies_of_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="`training` must be one of"): study_recipe("AutoMix")
    with pytest.raises(ValueError, match="`bs`"): judge(Colours(), scenes(5, 24), CutMix(), **FACTS, bs=0)
    assert len({study_recipe(training, seed).name for training in TRAININGS for seed in SEEDS}) == 12
    assert len({arm_recipe(arm).name for arm in PHOTO_ARMS}) == 3 and SOURCES["cifar100"].n_classes == 100


@pytest.mark.parametrize("training", TRAININGS)
def test_the_headline_follows_from_the_records(training):
    "lambda~ is nearer to the truth than lambda for mixers that hide objects, in every network; as released it is not"
    runs = study_records(load_records(ROOT / "results/label_errors"))[training]
    assert sorted(runs) == list(SEEDS)
    for run in runs.values():
        assert run["recipe"] | {"seed": 0} == study_recipe(training).__dict__ | {"seed": 0}
        assert len(run["label_errors"]) == run["recipe"]["epochs"] + 1
        before, after = run["label_errors"][0], run["label_errors"][-1]
        for mixer in ("CutMix", "FMix", "SaliencyMix"):
            area, poster, corrected, released = (after[mixer][name] for name in (
                AREA, "poster, logits", "corrected, logits", "released, logits"))
            assert poster["gain"][1] > 0 and corrected["gain"][1] > 0 and released["gain"][2] < 0
            worse = 2 if run["accuracy"] > 0.25 else 1.5  # one network learned little
            assert corrected["error"][0] < poster["error"][0] < area["error"][0] < released["error"][0] / worse
            assert abs(poster["gain"][0] - (area["error"][0] - poster["error"][0])) < 2e-4
            assert abs(before[mixer]["poster, logits"]["gain"][0]) < 1e-3  # an untrained network knows nothing
        assert after["ResizeMix"]["corrected, logits"]["gain"][0] < 0


def test_the_area_is_the_same_in_every_record():
    found = study_records(load_records(ROOT / "results/label_errors"))
    runs = [run for seeds in found.values() for run in seeds.values()]
    for mixer in STUDY_MIXERS:
        assert len({str(run["label_errors"][-1][mixer][AREA]["error"]) for run in runs}) == 1  # the same mixtures


def test_photographs_do_not_want_the_factor_that_scenes_want():
    for file in sorted((ROOT / "results/photographs").glob("*.json")):
        found = json.loads(file.read_text())["photographs"]
        errors = found["label_errors"]["CutMix"]
        assert found["n"] == 165 and errors["corrected, features"]["gain"][1] > 0
        assert errors["poster, logits"]["scaled"][SCALES.index(4.0)] > errors[AREA]["error"][0]


def test_tables_average_over_seeds():
    records = [{"name": study_recipe("plain", seed).name, "label_errors": [{"CutMix": {AREA: {"error": [value]}}}]}
               for seed, value in ((0, 0.1), (1, 0.3))]
    assert seed_values(records, "CutMix", AREA) == {"plain": {0: 0.1, 1: 0.3}}
    assert error_table(records, "CutMix", (AREA,)).splitlines()[1].split() == ["area", "20.0", "±", "14.1"]
