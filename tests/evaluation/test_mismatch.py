"Visible objects, the true ratio, and how a share is compared with it"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.mismatch import agreement, true_ratio, visible_objects
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.fmix import FMix
from sumix_nb.mixers.gridmix import GridMix, SmoothMix
from sumix_nb.mixers.mixed import Mixed, MixUp
from sumix_nb.mixers.puzzlemix import PuzzleMix
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.mixers.saliencymix import SaliencyMix

MIXERS = {"mixup": MixUp(), "cutmix": CutMix(), "fmix": FMix(per_sample=True), "soft fmix": FMix(max_soft=0.5),
          "resizemix": ResizeMix(per_sample=True), "bilinear": ResizeMix(mode="bilinear"), "smoothmix": SmoothMix(),
          "saliencymix": SaliencyMix(per_sample=True), "gridmix": GridMix(), "one": OneOf([CutMix(), ResizeMix()]),
          "puzzlemix": PuzzleMix(t_eps=0.01, saliency=lambda images: images.square().mean(1))}


def draw(n=12, seed=0):
    "Images, classes and masks"
    data = scenes(n, 24, seed)
    return data.images / 255, data.target, data.masks


def count(mixer, images, target, masks, seed):
    "`visible_objects` with the draws of a seed"
    return visible_objects(mixer, images, target, masks, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MIXERS)
def test_no_more_is_visible_than_there_is_and_the_mixture_is_the_mixers_own(name):
    images, target, masks = draw()
    kept = images.clone(), masks.clone()
    sizes = masks.sum((1, 2, 3))
    for seed in range(5):
        mixed, a, b = count(MIXERS[name], images, target, masks, seed)
        assert torch.equal(mixed.target_b, target[mixed.partner]) and mixed.images.shape == images.shape
        for seen, size in ((a, sizes), (b, sizes[mixed.partner])): assert ((seen >= 0) & (seen <= size + 1e-3)).all()
        again = count(MIXERS[name], images, target, masks, seed)
        assert torch.equal(again[0].images, mixed.images) and torch.equal(again[1], a) and torch.equal(again[2], b)
    assert torch.equal(images, kept[0]) and torch.equal(masks, kept[1])


@pytest.mark.parametrize("name", MIXERS)
def test_objects_that_fill_the_image_make_the_area_the_truth(name):
    images, target, masks = draw()
    mixed, *visible = count(MIXERS[name], images, target, torch.ones_like(masks), 1)
    torch.testing.assert_close(true_ratio(*visible), mixed.lam, rtol=0, atol=1 / 24**2 + 1e-5)


@pytest.mark.parametrize("wrong", [torch.zeros(12, 1, 24, 24), torch.zeros(12, 24, 24, dtype=torch.bool),
                                   torch.zeros(11, 1, 24, 24, dtype=torch.bool)])
def test_masks_that_do_not_fit_are_refused(wrong):
    images, target, _ = draw()
    with pytest.raises(ValueError, match="`masks`"): visible_objects(CutMix(), images, target, wrong)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 60), seed=st.integers(0, 999), hidden=st.floats(0, 0.5))
def test_agreement_is_numpys_and_lies_in_its_interval(n, seed, hidden):
    generator = torch.Generator().manual_seed(seed)
    share, truth = torch.rand(2, n, generator=generator, dtype=torch.float64)
    truth[torch.rand(n, generator=generator) < hidden] = math.nan
    known = ~truth.isnan().numpy()
    if known.sum() < 3:
        with pytest.raises(ValueError, match="`truth`"): agreement(share, truth)
        return
    found, x, y = agreement(share, truth, repeats=200), share.numpy()[known], truth.numpy()[known]
    assert found["n"] == known.sum() and found["hidden"] == pytest.approx(1 - known.mean())
    assert found["error"][0] == pytest.approx(np.abs(x - y).mean())
    assert found["correlation"][0] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["error"][1] <= found["error"][2]
    assert str(agreement(share, truth, repeats=200)) == str(found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_other_types_are_counted_alike(dtype):
    images, target, masks = draw()
    for name in ("cutmix", "saliencymix"):
        images = images.to(torch.bfloat16)  # both types show the same images to the saliency detector
        expected, found = (count(MIXERS[name], batch, target, masks, 3) for batch in (images.float(), images.to(dtype)))
        for one, other in zip(expected[1:], found[1:], strict=True): torch.testing.assert_close(one, other)


def test_a_mixer_that_chooses_partners_by_what_it_sees_is_noticed():
    def by_brightness(images, target, *, model=None, generator=None):
        partner = images.mean((1, 2, 3)).argsort()
        mask = (torch.arange(images.shape[3]) < 9).float().expand(1, 1, *images.shape[2:]).contiguous()
        mixed = mask * images + (1 - mask) * images[partner]
        return Mixed(mixed, target, target[partner], mask.mean().expand(len(images)), partner, mask)

    images, target, masks = draw()
    mixed, a, b = count(by_brightness, images, target, masks, 0)
    torch.testing.assert_close(a, masks[..., :9].sum((1, 2, 3)).float())
    torch.testing.assert_close(b, masks[mixed.partner][..., 9:].sum((1, 2, 3)).float())


def test_a_share_that_never_changes_has_no_correlation():
    found = agreement(torch.full((5,), 0.5), torch.linspace(0, 1, 5), repeats=20)
    assert math.isnan(found["correlation"][0]) and found["error"][0] == pytest.approx(0.3)


def test_images_are_drawn_where_sources_are_known():
    generator = torch.Generator().manual_seed(0)
    share, truth, other = torch.rand(3, 30, generator=generator, dtype=torch.float64)
    truth[4] = math.nan
    sources = torch.stack([torch.arange(30) % 12 + 40, (5 * torch.arange(30)) % 12 + 40])
    found = agreement(share, truth, repeats=300, seed=7, baseline=other, sources=sources)
    known = [i for i in range(30) if i != 4]
    images = sorted({int(sources[k, i]) for k in (0, 1) for i in known})
    draws, values = torch.Generator().manual_seed(7), {"error": [], "gain": []}
    for drawn in torch.randint(len(images), (300, len(images)), generator=draws).tolist():
        times = {image: sum(images[row] == image for row in drawn) for image in images}
        weights = [times[int(sources[0, i])] * times[int(sources[1, i])] for i in known]
        errors = [float(abs(share[i] - truth[i])) for i in known]
        gains = [float(abs(other[i] - truth[i])) - error for i, error in zip(known, errors, strict=True)]
        for name, each in (("error", errors), ("gain", gains)):
            values[name].append(sum(w * e for w, e in zip(weights, each, strict=True)) / sum(weights))
    for name, each in values.items():
        np.testing.assert_allclose(found[name][1:], np.quantile(each, [0.025, 0.975]), rtol=1e-9)
