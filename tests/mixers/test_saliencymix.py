"SaliencyMix: whose map it looks at, and what it knows of the images"
import torch

from sumix_nb.mixers.choosing import OneOf, tell_statistics
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from tests.mixers.oracles import BOOLS, seeded


def test_only_mixers_without_statistics_are_told_and_the_original_is_left():
    mixer = SaliencyMix(alpha=0.3, per_sample=True)
    told = tell_statistics(mixer, (0.5,), (0.2,))
    assert (told.mean, told.std, told.alpha, told.per_sample) == ((0.5,), (0.2,), 0.3, True) and mixer.mean is None
    assert tell_statistics(told, (0.1,), (0.1,)) is told
    nested = tell_statistics(OneOf([CutMix(), OneOf([mixer])]), (0.5,), (0.2,))
    assert nested.mixers[1].mixers[0].mean == (0.5,) and tell_statistics(CutMix, 1, 2) is CutMix


def test_a_random_centre_is_cutmix():
    images, target = torch.rand(6, 3, 12, 9, generator=seeded()), torch.arange(6)
    for per_sample in BOOLS:
        mixers = CutMix(per_sample=per_sample), SaliencyMix(per_sample=per_sample, saliency="random")
        one, two = (mixer(images, target, generator=seeded(4)) for mixer in mixers)
        assert torch.equal(one.images, two.images) and torch.equal(one.drawn, two.drawn)
