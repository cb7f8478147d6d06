"GridMix and SmoothMix: rectangles, holes and spots"
import math

import pytest
import torch

from sumix_nb.mixers.gridmix import SmoothMix, grid_lines, mix_lines
from sumix_nb.mixers.resizemix import uniform
from tests.mixers.oracles import seeded


def test_the_rectangle_of_a_grid_never_leaves_the_image_and_its_share_is_the_masks():
    generator, n = seeded(), 500
    for height, width in ((32, 32), (17, 40), (3, 2), (1, 1)):
        lam = torch.rand(n, generator=generator)
        rows, cols = grid_lines(lam, height, width, torch.randint(1, 9, (n,), generator=generator),
                                uniform((0.0, 1.0), n, generator), uniform((0.2, 5.0), n, generator),
                                torch.rand(n, 2, generator=generator))
        assert rows.shape == (n, height) and cols.shape == (n, width)
        assert set(rows.unique().tolist()) <= {0.0, 1.0} and set(cols.unique().tolist()) <= {0.0, 1.0}
        _, share, mask = mix_lines(torch.zeros(n, 1, height, width), torch.arange(n), lam, rows, cols)
        torch.testing.assert_close(share, mask.double().mean((1, 2, 3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("aspect", [0.5, 2.0])
def test_a_rectangle_too_large_is_cut_to_the_image_and_its_first_hole_starts_at_the_border(place, aspect):
    one = torch.ones(1, dtype=torch.float64)
    rows, cols = grid_lines(0.5 * one, 32, 32, 4 * one, one, aspect * one, torch.full((1, 2), place))
    cut, free, (hole, cell) = (cols, rows, (5, 8)) if aspect < 1 else (rows, cols, (4, 6))
    assert cut[0].tolist() == [float(i % cell < hole) for i in range(32)]
    assert free[0].nonzero()[0].item() == int((32 - 22) * place)


def test_the_middle_of_a_spot_lies_between_two_pixels_and_anywhere():
    mixer = SmoothMix(per_sample=True, deviation=(0.1, 0.1))
    mask = mixer(torch.zeros(400, 1, 20, 30), torch.zeros(400), generator=seeded()).mask[:, 0]
    nearest = math.exp(-0.5**2 / (2 * 2**2) - 0.5**2 / (2 * 3**2))
    torch.testing.assert_close(mask.amin((1, 2)), torch.full((400,), 1 - nearest), rtol=0, atol=1e-6)
    assert len(mask.amin(2).argmin(1).unique()) > 15 and len(mask.amin(1).argmin(1).unique()) > 25
