"The detectors and SaliencyMix: each step by hand, where it looks, and how images become 8 bits again"
import pytest
import torch

from sumix_nb.mixers.saliency import SALIENCY, blur, center_surround, check_statistics, fine_grained_saliency
from sumix_nb.mixers.saliency import grey_levels, spectral_saliency, to_uint8
from sumix_nb.mixers.saliencymix import SaliencyMix
from tests.mixers.oracles import seeded


def test_saliency_of_one_image_does_not_depend_on_its_batch_or_its_device_type():
    levels = torch.randint(256, (5, 3, 40, 31), dtype=torch.uint8, generator=seeded())
    for detector in (fine_grained_saliency, spectral_saliency):
        together, alone = detector(levels), torch.cat([detector(levels[i:i + 1]) for i in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * together.float().max().item())
        assert together.shape == (5, 40, 31) and detector(levels[:, :1]).shape == (5, 40, 31)
    assert fine_grained_saliency(levels).dtype == torch.uint8 and set(SALIENCY) == {"finegrained", "spectral", "random"}


def test_maps_wrap_above_255_as_opencvs_cast_does():
    "A spot that is bright against its near surroundings and dark against the far ones"
    image = torch.full((1, 3, 240, 240), 255, dtype=torch.uint8)
    image[..., 96:144, 96:144] = 0
    image[..., 114:126, 114:126] = 225
    on, off = center_surround(blur(blur(grey_levels(image))))
    wrapped = on + off > 255
    assert wrapped.any() and torch.equal(fine_grained_saliency(image)[wrapped].int(), (on + off - 256)[wrapped].int())


@pytest.mark.parametrize("mean, std, error, rule", [
    ((0.5,), (0,), ValueError, "`std` must be in"), ((0.5,), (-0.2,), ValueError, "`std` must be in"),
    ((0.5,), (float("nan"),), ValueError, "`std` must be in"), (0.5, 0.2, TypeError, "`mean` must be a number for"),
    ("abc", (1,), TypeError, "`mean` must be a number"), ((0.5,), ("1",), TypeError, "`std` must be a number"),
    ((True,), (1,), TypeError, "`mean` must be a number"), (None, 0, ValueError, "`mean` and `std` must both be given"),
])
def test_statistics_that_no_image_was_normalised_with_are_refused(mean, std, error, rule):
    for refuse in (check_statistics, lambda *values: SaliencyMix(mean=values[0], std=values[1]),
                   lambda *values: to_uint8(torch.rand(1, 1, 4, 4), *values)):
        with pytest.raises(error, match=rule): refuse(mean, std)
    assert check_statistics(None, None) is check_statistics([0.5], [0.2]) is None
