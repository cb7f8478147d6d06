"FMix: damping, ties, and flags"
import math

import pytest
import torch

from sumix_nb.mixers.fmix import binarise, damping, low_frequency_image


def test_damping_is_remembered_and_noise_is_checked():
    arguments = 4, 6, 4, 3.0, torch.float64, torch.device("cpu")
    assert damping(*arguments) is damping(*arguments) and damping(*arguments).shape == (4, 4, 1)
    assert damping(*arguments)[0, 0].item() == 1 and damping(*arguments)[0, 1].item() == pytest.approx(1)
    assert damping(*arguments)[1, 2].item() == pytest.approx((6 * math.hypot(1 / 4, 2 / 6)) ** 3)
    with pytest.raises(ValueError, match="`noise`"): low_frequency_image(torch.zeros(2, 4, 4, 2).long(), 4, 6)
    with pytest.raises(TypeError, match="`quirk` must be True or False, got 'yes'"):
        low_frequency_image(torch.zeros(2, 4, 4, 2), 4, 6, quirk="yes")


def test_binarise_ignores_ties_and_gives_exactly_n_pixels():
    assert binarise(torch.ones(2, 4, 4), 0.3, round_up=False).sum((1, 2, 3)).tolist() == [4, 4]
