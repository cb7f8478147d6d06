"Label rules by hand: what they say, what they need, and that nothing else is looked at"
import pytest
import torch

from sumix_nb.labels import RULES, Evidence
from sumix_nb.labels.rules import Ratio
from sumix_nb.mixers.mixed import Mixed
from sumix_nb.sumix.loss import sumix_loss

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
    wanted = terms.ratio.mean().expand(N) if variant == "released" else terms.ratio
    torch.testing.assert_close(share, wanted)
    assert not share.requires_grad and RULES[variant].needs == ("logits", "clean_logits")


def test_features_take_the_place_of_logits():
    seen = evidence()
    moved = Evidence(seen.mixed, features=seen.logits, clean_features=seen.clean_logits)
    assert torch.equal(Ratio(z="features")(moved), Ratio()(seen)) and Ratio(z="features").needs[0] == "features"
