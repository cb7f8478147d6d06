"Familiar and strange images: both numbers against counting and scikit-learn, and where strange images come from"
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import roc_auc_score

from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.accuracy import UnseenImages as Images
from sumix_nb.evaluation.accuracy import predict
from sumix_nb.evaluation.ood import SCORES, against_outside, auroc, fpr_at, outside_images, present_outside
from tests.evaluation.oracles import FACTS, Colours

FOUR = torch.arange(4.0)


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 30), (40, 3), (200, 150)])
def test_auroc_counts_pairs(n, m, levels):
    draws = torch.Generator().manual_seed(n + m + levels)
    inside, outside = (torch.randint(levels, (size,), generator=draws).float() for size in (n, m))
    wins = sum((a > b) + 0.5 * (a == b) for a in inside.tolist() for b in outside.tolist())
    assert auroc(inside, outside) == pytest.approx(wins / (n * m), abs=1e-12)
    assert auroc(inside, outside) == pytest.approx(roc_auc_score([1] * n + [0] * m, torch.cat([inside, outside])))
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside))


def test_auroc_is_that_of_torchmetrics():
    auc = pytest.importorskip("torchmetrics.functional.classification")
    draws = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(300, generator=draws), torch.randint(2, (300,), generator=draws)
    wanted = auc.binary_auroc(scores, labels).item()
    assert auroc(scores[labels == 1], scores[labels == 0]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_fpr_is_that_of_the_highest_threshold_that_lets_enough_pass(share):
    draws = torch.Generator().manual_seed(int(100 * share))
    inside, outside = torch.randint(9, (50,), generator=draws), torch.randint(9, (70,), generator=draws)
    passing = [t for t in range(10) if (inside >= t).double().mean() >= share]
    assert fpr_at(inside, outside, share) == pytest.approx((outside >= max(passing)).double().mean().item())


def test_scores_are_their_formulas():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for row, softmax, energy in zip(logits.tolist(), SCORES["softmax"](logits), SCORES["energy"](logits)):
        total = sum(math.exp(value) for value in row)
        assert softmax.item() == pytest.approx(math.exp(max(row)) / total)
        assert energy.item() == pytest.approx(math.log(total))


def test_the_measure_uses_both_sets_of_logits():
    data = scenes(20, 16, seed=3)
    test, model = Images(data.images, data.target, *FACTS.values()), Colours()
    strange = torch.randint(256, (13, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = against_outside(model, test, strange, bs=7)
    for name, score in SCORES.items():
        inside, outside = score(predict(model, test)), score(predict(model, test, strange))
        assert found[name] == {"auroc": auroc(inside, outside), "fpr95": fpr_at(inside, outside)}


def test_strange_images_come_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path))
    assert present_outside("cifar100") == ["scenes"] and present_outside("scenes") == ["digits"]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    (tmp_path / "svhn").mkdir()
    savemat(tmp_path / "svhn" / "test_32x32.mat", {"X": pixels, "y": np.arange(6)[:, None]})
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "cifar10" / split / f"c{label}"
            folder.mkdir(parents=True)
            Image.fromarray(np.full((32, 32, 3), 20 * label, np.uint8)).save(folder / "a.png")
    assert present_outside("cifar100") == ["scenes", "svhn", "cifar10"]
    assert present_outside("cifar10") == ["scenes", "svhn"]
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda data: True)  # ours has another sum
    found = outside_images("svhn", 32, 100)
    stored = {pixels[..., i].transpose(2, 0, 1).tobytes() for i in range(6)}
    assert {image.numpy().tobytes() for image in found} == stored
    colours = [image[0, 0, 0].item() for image in outside_images("cifar10", 16, 4)]
    assert len(set(colours)) == 4 and set(colours) <= set(range(0, 200, 20))
    assert outside_images("cifar10", 16, 4).shape == (4, 3, 16, 16)
    assert torch.equal(outside_images("scenes", 20, 7), scenes(7, 20, seed=1).images)


@pytest.mark.parametrize(("error", "call", "message"), [
    (ValueError, lambda: auroc(FOUR[:0], FOUR), "`inside` must be scores"),
    (ValueError, lambda: auroc(FOUR, FOUR[:0]), "`outside` must be scores"),
    (ValueError, lambda: auroc(FOUR.view(2, 2), FOUR), "`inside` must be scores"),
    (ValueError, lambda: auroc(FOUR, [1.0, 2.0]), "`outside` must be scores"),
    (ValueError, lambda: fpr_at(FOUR * math.nan, FOUR), "none of them NaN"),
    (ValueError, lambda: fpr_at(FOUR, FOUR, 0), "`share` must be above 0"),
    (ValueError, lambda: fpr_at(FOUR, FOUR, 1.5), "`share` must be in"),
    (TypeError, lambda: fpr_at(FOUR, FOUR, "95"), "`share` must be a number"),
    (ValueError, lambda: outside_images("cats", 32, 5), "`name` must be one of"),
    (ValueError, lambda: outside_images("scenes", 0, 5), "`size` must be at least 1"),
    (ValueError, lambda: outside_images("scenes", 32, 0), "`n` must be at least 1"),
])
def test_bad_input(error, call, message):
    with pytest.raises(error, match=message): call()


@pytest.mark.parametrize("name", ["scenes", "hard_scenes"])
def test_scenes_are_not_strange_to_scenes(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path))
    assert present_outside(name) == ["digits"] and present_outside("digits") == ["scenes"]


def test_familiar_images_are_not_strange():
    images = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    test = Images(images, torch.zeros(5, dtype=torch.int64))
    mostly_strange = torch.cat([255 - images, images[3:4]])
    with pytest.raises(ValueError, match="`outside` must be strange"): against_outside(None, test, mostly_strange)


@pytest.mark.parametrize("name", ["svhn", "cifar10", "imagenet"])
def test_sets_that_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="SUMIX_DATA"): outside_images(name, 32, 5)
