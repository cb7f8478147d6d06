"Shares of mixtures measured against what is visible"
import math

import pytest
import torch
from fastai.learner import Learner

from sumix_nb.data.loaders import get_dls
from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.label_errors import AREA, ENCODINGS, SCALES, LabelErrorLog, Mixtures, distance_gaps
from sumix_nb.evaluation.label_errors import error_frame, label_errors, measure_mixtures
from sumix_nb.evaluation.mismatch import true_ratio, visible_objects
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from sumix_nb.models.networks import get_model
from sumix_nb.sumix.ratio import mix_ratio
from tests.evaluation.oracles import FACTS, Colours


def by_hand():
    "Four mixtures, of which one has no truth, and a form with gaps 1, 1, 1 and 0"
    truth, lam = torch.tensor([0.9, 0.1, math.nan, 0.5]), torch.full((4,), 0.5)
    beliefs = torch.tensor([[0.7, 0.6, 0.5, 0.4], [0.1, 0.2, 0.3, 0.35]])
    return Mixtures(truth, lam, {"one": torch.tensor([1.0, 1.0, 1.0, 0.0])}, torch.arange(8).view(2, 4), beliefs)


def test_shares_are_those_of_the_ratio():
    generator = torch.Generator().manual_seed(0)
    outputs = [(torch.randn(6, 4, generator=generator), torch.rand(6, 3, generator=generator))
               for _ in range(3)]
    targets = {"target_a": torch.tensor([0, 1, 2, 3, 0, 1]), "target_b": torch.tensor([3, 2, 2, 1, 1, 0])}
    found = distance_gaps(*outputs, **targets)
    assert len(found) == 10 and all(gap.shape == (6,) for gap in found.values())
    lam = torch.tensor([0.3, 0.0, 1.0, 0.5, 0.9, 0.01])
    shares = Mixtures(torch.rand(6), lam, found, None, None).shares()
    for variant, name in (("poster", "logits"), ("released", "logits"), ("corrected", "logits"),
                          ("poster", "features"), ("released", "probabilities")):
        z = [ENCODINGS[name](*output) for output in outputs]
        torch.testing.assert_close(shares[f"{variant}, {name}"], mix_ratio(*z, lam, variant=variant, **targets))
    p, q, r = (output[0].softmax(1).tolist() for output in outputs)
    for i in range(6):
        first, second = ([abs(x - y) for x, y in zip(p[i], source[i])] for source in (q, r))
        variation, euclidean = (sum(second) - sum(first)) / 2, math.hypot(*second) - math.hypot(*first)
        assert math.isclose(found["total variation"][i], variation, abs_tol=1e-6)
        assert math.isclose(found["Euclidean"][i], euclidean, abs_tol=1e-6)


def test_mixtures_are_made_in_batches_and_seen_in_evaluation_mode():
    data, model = scenes(25, 24, seed=3), Colours().train()
    found = measure_mixtures(model, data, CutMix(per_sample=True), **FACTS, bs=10, seed=4)
    assert model.training and found.truth.shape == (20,)  # the last five are no batch
    mean, std = (torch.tensor(FACTS[key]).view(3, 1, 1) for key in FACTS)
    draws = torch.Generator().manual_seed(4)
    model.eval()
    order = torch.randperm(25, generator=draws)
    for part in (slice(0, 10), slice(10, 20)):
        rows = order[part]
        images = (data.images[rows] / 255 - mean) / std
        mixed, *visible = visible_objects(CutMix(per_sample=True), images, data.target[rows], data.masks[rows],
                                          generator=draws)
        expected = mix_ratio(model(mixed.images), model(images), model(images)[mixed.partner], mixed.lam)
        torch.testing.assert_close(found.shares()["poster, logits"][part], expected.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.sources[:, part], torch.stack([rows, rows[mixed.partner]]))
        truth, probs = true_ratio(*visible), model(mixed.images).softmax(1)
        for i in range(10):
            a, b = mixed.target_a[i], mixed.target_b[i]
            if a == b: assert found.truth[part][i].isnan()
            else: assert found.truth[part][i] == truth[i]
            torch.testing.assert_close(found.beliefs[:, part][:, i], probs[i, [a, b]].detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.shares()[AREA][part], mixed.lam)


def test_repeated_mixtures_are_joined_in_order():
    data, model, options = scenes(12, 24, seed=3), Colours(), FACTS | {"bs": 6}
    parts = [measure_mixtures(model, data, CutMix(per_sample=True), **options, seed=seed) for seed in (5, 6)]
    both = measure_mixtures(model, data, CutMix(per_sample=True), **options, seed=5, times=2)
    for name in ("truth", "lam", "sources", "beliefs"):
        joined = torch.cat([getattr(part, name) for part in parts], -1)
        torch.testing.assert_close(getattr(both, name), joined, equal_nan=True)
    for form, gap in both.gaps.items(): assert torch.equal(gap, torch.cat([part.gaps[form] for part in parts]))


def test_errors_scales_and_extremes_by_hand():
    found = label_errors(by_hand(), details=True)
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
    assert len(label_errors(by_hand())["one"]["error"]) == 1


def test_any_rule_can_be_measured():
    shares = {"truth": torch.tensor([0.9, 0.1, 0.3, 0.5]), "first": torch.ones(4)}
    found = label_errors(by_hand(), shares, details=True)
    assert list(found) == [AREA, "truth", "first"] and found["truth"]["error"] == [0, 0, 0]
    assert found["truth"]["gain"] == found[AREA]["error"] and "scaled" not in found["first"]
    assert found["first"]["error"][0] == pytest.approx((0.1 + 0.9 + 0.5) / 3, abs=1e-4)
    assert {row for row, *_ in found["first"]["harmed"][:2]} == {1, 3}


def test_a_table_of_errors():
    frame = error_frame({"CutMix": label_errors(by_hand(), details=True), "MixUp": label_errors(by_hand())})
    assert list(frame.index) == [("CutMix", AREA), ("CutMix", "one"), ("MixUp", AREA), ("MixUp", "one")]
    assert frame.error.xs(AREA, level="label").tolist() == pytest.approx([0.8 / 3] * 2, abs=1e-4)
    ends = frame[["error low", "error high"]]
    assert ends.loc["CutMix"].notna().all(axis=None) and ends.loc["MixUp"].isna().all(axis=None)


def test_a_learner_is_measured_before_training_and_after_every_epoch():
    torch.manual_seed(0)
    dls, data = get_dls("digits", bs=50, limit=200, seed=0), scenes(100, seed=3)
    mixers = {"CutMix": CutMix(per_sample=True), "SaliencyMix": SaliencyMix(per_sample=True)}
    log = LabelErrorLog(data, mixers, **FACTS)
    learn = Learner(dls, get_model("resnet18", 24, width=4), lr=0.5, cbs=log)
    with learn.no_logging(): learn.fit(2)
    assert len(log.epochs) == 3 and all(set(epoch) == set(mixers) for epoch in log.epochs)
    first, _, last = (epoch["CutMix"] for epoch in log.epochs)
    assert first[AREA]["error"] == last[AREA]["error"][:1]  # the same mixtures
    assert any(first[form]["error"] != last[form]["error"][:1] for form in first)  # another network
    assert len(last["poster, logits"]["error"]) == 3 and len(last["poster, logits"]["scaled"]) == len(SCALES)


def test_too_few_images_are_an_error():
    for bs, name in ((0, "bs"), (1, "bs"), (6, "data")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            measure_mixtures(Colours(), scenes(5, 24), CutMix(), **FACTS, bs=bs)
