"Label rules by hand: what they say, what they need, and that nothing else is looked at"
import pytest
import torch

from sumix_nb.labels import RULES, Evidence
from sumix_nb.labels.rules import Ratio
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.fmix import FMix
from sumix_nb.mixers.mixed import Mixed, MixUp
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from sumix_nb.sumix.loss import sumix_loss
from tests.sumix.learners import released_label

N, K = 7, 5


def evidence(dtype=torch.float32, **extra):
    generator = torch.Generator().manual_seed(0)
    partner, target = torch.randperm(N, generator=generator), torch.randint(K, (N,), generator=generator)
    mixed = Mixed(torch.zeros(N, 3, 2, 4), target, target[partner], torch.linspace(0, 1, N), partner, **extra)
    logits, clean = torch.randn(2, N, K, generator=generator, dtype=dtype)
    return Evidence(mixed, logits=logits, clean_logits=clean)


def test_area_and_draw_are_those_of_the_mixer():
    assert RULES["area"](evidence()).tolist() == RULES["drawn"](evidence()).tolist() == torch.linspace(0, 1, N).tolist()
    drawn = torch.full((N,), 0.3)
    assert RULES["drawn"](evidence(drawn=drawn)) is drawn


@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
def test_the_ratio_is_that_of_the_loss_and_carries_no_gradient(variant):
    seen = evidence()
    for part in (seen.logits, seen.clean_logits): part.requires_grad_()
    terms = sumix_loss(seen.logits, seen.clean_logits, None, None, seen.mixed, variant=variant)
    share = RULES[variant](seen)
    wanted = released_label(terms.ratio, seen.mixed.lam) if variant == "released" else terms.ratio
    torch.testing.assert_close(share, wanted)
    assert not share.requires_grad and RULES[variant].needs == ("logits", "clean_logits")


def test_features_take_the_place_of_logits():
    seen = evidence()
    moved = Evidence(seen.mixed, features=seen.logits, clean_features=seen.clean_logits)
    assert torch.equal(Ratio(z="features")(moved), Ratio()(seen)) and Ratio(z="features").needs[0] == "features"


def whole_evidence(mixer, seed, dtype=torch.float32, scale=1.0):
    "All that any rule may look at, of a random batch"
    generator = torch.Generator().manual_seed(seed)
    images, target = torch.randn(N, 3, 6, 10, generator=generator), torch.randint(K, (N,), generator=generator)
    mixed = mixer(images, target, generator=generator)
    logits, clean = (scale * torch.randn(2, N, K, generator=generator)).to(dtype)
    maps, clean_maps = (scale * torch.randn(2, N, 4, 2, 3, generator=generator)).to(dtype)
    masks = torch.rand(N, 1, 6, 10, generator=generator) > torch.rand(N, 1, 1, 1, generator=generator)
    return Evidence(mixed, logits, None, maps, clean, None, clean_maps, images, masks,
                    torch.randn(K, K, generator=generator), torch.nn.Linear(4, K), generator)


EVERY = [MixUp(per_sample=True), CutMix(), CutMix(per_sample=True, p=0.5), FMix(), ResizeMix(), SaliencyMix(),
         ResizeMix(per_sample=True), OneOf([ResizeMix(), MixUp()], per_sample=True)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mixer", EVERY, ids=str)
def test_every_rule_is_finite_and_in_0_to_1(rule, mixer):
    for seed, (dtype, scale) in enumerate([(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float32, 0.0),
                                           (torch.float32, 1e4)] * 3):
        seen = whole_evidence(mixer, seed, dtype, scale)
        label = RULES[rule](seen._replace(masks=seen.masks & (scale > 0)))
        for weight in label if isinstance(label, tuple) else (label,):
            assert weight.shape == (N,) and weight.dtype == torch.float32
            assert weight.isfinite().all() and (weight >= 0).all() and (weight <= 1).all(), (rule, seed)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "permuted"])
def test_an_image_that_is_wholly_shown_decides_what_is_visible(rule):
    seen = whole_evidence(CutMix(p=0.0), 0)
    visible = rule in ("area", "drawn", "saliency", "cam", "snapmix", "oracle", "oracle_relative")
    if visible and seen.masks.sum((1, 2, 3)).min() > 0: torch.testing.assert_close(RULES[rule](seen), torch.ones(N))


def test_ours_and_the_two_oracles_of_a_moved_partner():
    seen = whole_evidence(ResizeMix(per_sample=True), 3)
    whole = torch.ones(N, 1, 6, 10, dtype=torch.bool)
    torch.testing.assert_close(RULES["oracle"](seen._replace(masks=whole)), seen.mixed.lam)
    torch.testing.assert_close(RULES["oracle_relative"](seen._replace(masks=whole)), seen.mixed.lam)


def test_what_is_needed_is_enough():
    seen = whole_evidence(CutMix(per_sample=True), 5)
    for name, rule in RULES.items():
        needed = {part: getattr(seen, part) for part in getattr(rule, "needs", ())}
        same = [seen._replace(generator=torch.Generator().manual_seed(0)), Evidence(seen.mixed, **needed)]
        if "generator" in needed: same[1] = same[1]._replace(generator=torch.Generator().manual_seed(0))
        one, two = (rule(part) for part in same)
        torch.testing.assert_close(one, two)
        assert not any(part.requires_grad for part in (one if isinstance(one, tuple) else (one,))), name
