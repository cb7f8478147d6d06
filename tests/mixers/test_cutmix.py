"Boxes and CutMix: the paper's box, its mask and share, and where each pixel comes from"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumix_nb.mixers.cutmix import CutMix, box_mask, box_ratio, box_share, mixing_box
from sumix_nb.mixers.cutmix import scaled_box
from tests.mixers.oracles import seeded


@settings(max_examples=150, deadline=None)
@given(lam=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_mixing_box_is_the_papers_box_clipped_and_its_mask_and_ratio_agree(lam, height, width, data):
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = top, bottom, left, right = mixing_box(lam, height, width, (row, col))
    half_h, half_w = (int(side * math.sqrt(1 - lam)) // 2 for side in (height, width))
    assert box == (max(row - half_h, 0), min(row + half_h, height), max(col - half_w, 0), min(col + half_w, width))
    assert all(type(edge) is int for edge in box)
    mask, counted = box_mask(box, height, width), 0
    for r in range(height):
        for c in range(width):
            inside = top <= r < bottom and left <= c < right
            assert mask[0, 0, r, c] == (0 if inside else 1)
            counted += not inside
    assert box_ratio(box, height, width) == pytest.approx(counted / (height * width))
    assert box_share(box, height, width).tolist() == pytest.approx([counted / (height * width)])


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_scaled_box_is_the_same_for_numbers_and_tensors(scale, height, width, data):
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    half_h, half_w = (int(side * scale) // 2 for side in (height, width))
    box = max(row - half_h, 0), min(row + half_h, height), max(col - half_w, 0), min(col + half_w, width)
    assert scaled_box(scale, height, width, (row, col)) == box
    assert scaled_box(scale, height, width, (torch.tensor(row), torch.tensor(col))) == box
    tensors = scaled_box(torch.tensor([scale, scale], dtype=torch.float64), height, width,
                         (torch.tensor([row, row]), torch.tensor([col, col])))
    assert [edge.tolist() for edge in tensors] == [[edge, edge] for edge in box]
    assert torch.equal(box_mask(tensors, height, width)[1:], box_mask(box, height, width))
    assert box_share(tensors, height, width).tolist() == pytest.approx(2 * [box_ratio(box, height, width)], abs=1e-6)


@pytest.mark.parametrize("scale", [-0.1, 1.5, math.nan])
def test_a_scale_outside_0_1_is_refused_as_number_and_as_tensor(scale):
    for value in (scale, torch.tensor([0.5, scale], dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"`scale` must be in \[0, 1\]"): scaled_box(value, 8, 8, (4, 4))
        with pytest.raises(ValueError, match=r"`lam` must be in \[0, 1\]"): mixing_box(value, 8, 8, (4, 4))


def test_boxes_are_centred_everywhere_and_keep_the_images_proportions():
    images, target = torch.zeros(3000, 1, 20, 40), torch.zeros(3000)
    mask = CutMix(alpha=1000.0, per_sample=True)(images, target, generator=seeded()).mask[:, 0] == 0
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    assert heights.max() == 14 and widths.max() == 28, "half the area, so 0.7 of each side"
    rows, cols = mask.double().mean((0, 2)), mask.double().mean((0, 1))
    torch.testing.assert_close(rows, rows.flip(0), rtol=0.1, atol=0.03)
    torch.testing.assert_close(cols, cols.flip(0), rtol=0.1, atol=0.03)
    assert mask[:, 0].any(1).double().mean() > 0.2 and mask[:, :, -1].any(1).double().mean() > 0.2
