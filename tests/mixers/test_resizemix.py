"ResizeMix: shrinking as `F.interpolate` does it, and the scales that are drawn"
import pytest
import torch

from sumix_nb.mixers.cutmix import box_mask
from sumix_nb.mixers.resizemix import RESIZE_MODES, ResizeMix, check_range, paste_resized, shrink, uniform
from tests.mixers.oracles import BOOLS, seeded


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("side", [(32, 32), (33, 47), (224, 225), (7, 5)])
def test_pasting_per_sample_equals_interpolate_for_every_size(mode, side):
    height, width = side
    sizes = [(max(height * k // 17, 1), max(width * (18 - k) // 17, 1)) for k in range(1, 18)]
    images = torch.randn(len(sizes), 2, height, width, generator=seeded())
    partners = torch.randn(len(sizes), 2, height, width, generator=seeded(1))
    boxes = [(top, top + h, left, left + w) for i, (h, w) in enumerate(sizes)
             for top, left in [((height - h) * (i % 3) // 2, (width - w) * (i % 2))]]
    pasted = paste_resized(images, partners, tuple(torch.tensor(edge) for edge in zip(*boxes)), mode)
    for i, box in enumerate(boxes):
        top, bottom, left, right = box
        small = torch.nn.functional.interpolate(partners[i:i + 1], (bottom - top, right - left), mode=mode)
        torch.testing.assert_close(pasted[i:i + 1, :, top:bottom, left:right], small, rtol=0,
                                   atol=0 if mode == "nearest" else 1e-6)
        assert torch.equal(paste_resized(images, partners, box, mode)[i:i + 1, :, top:bottom, left:right], small)
        assert torch.equal(shrink(partners, box, mode)[i:i + 1], small)
        outside = box_mask(box, height, width)[0, 0].bool()
        assert torch.equal(pasted[i][:, outside], images[i][:, outside])


@pytest.mark.parametrize("alpha, scope", [(None, (0.1, 0.8)), (0.2, (0.1, 0.8)), (1.0, (0.3, 0.4)), (5.0, (0.0, 1.0))])
def test_resizemix_draws_its_scales_inside_the_scope(alpha, scope):
    scale = (1 - ResizeMix(scope=scope, alpha=alpha).sample(5000, seeded())).sqrt()
    assert scale.min() >= scope[0] - 1e-7 and scale.max() <= scope[1] + 1e-7
    if alpha in (None, 0.2): assert scale.mean().item() == pytest.approx(sum(scope) / 2, abs=0.02)


@pytest.mark.parametrize("scale", [0.1, 0.25, 0.3, 0.35, 0.7, 0.8])
@pytest.mark.parametrize("per_sample", BOOLS)
def test_a_scale_arrives_as_it_was_drawn_although_it_travels_as_a_share(scale, per_sample):
    mixer = ResizeMix(scope=(scale, scale), per_sample=per_sample)
    images = torch.rand(60, 1, 40, 240, generator=seeded())
    pasted = mixer(images, torch.arange(60), generator=seeded(1)).mask[:, 0] == 0
    heights, widths = pasted.any(2).sum(1), pasted.any(1).sum(1)
    half = int(40 * scale) // 2, int(240 * scale) // 2
    assert heights.max() <= 2 * half[0] and widths.max() <= 2 * half[1]
    if per_sample: assert heights.max() == 2 * half[0] and widths.max() == 2 * half[1]


@pytest.mark.parametrize("per_sample", BOOLS)
def test_the_share_is_kept_as_drawn_and_the_label_has_what_is_left(per_sample):
    mixer, images = ResizeMix(scope=(0.5, 0.5), per_sample=per_sample), torch.rand(40, 1, 20, 20, generator=seeded())
    mixed = mixer(images, torch.arange(40), generator=seeded(2))
    assert mixed.drawn.eq(0.75).all() and (mixed.lam >= 0.75).all()
    torch.testing.assert_close(mixed.lam, mixed.mask.mean((1, 2, 3)).expand(40))
    if per_sample: assert 0.75 < mixed.lam.mean() < 0.9


def test_numbers_and_ranges_by_hand():
    drawn = uniform((2.0, 3.0), 4000, seeded())
    assert 2 <= drawn.min() < 2.01 and 2.99 < drawn.max() <= 3 and drawn.mean().item() == pytest.approx(2.5, abs=0.02)
    assert check_range("x", (0, 1), 0, 1) is None
    for values, error in (((1, 0), ValueError), ((0, 2), ValueError), ((True, 1), TypeError), ("01", TypeError)):
        with pytest.raises(error, match="`x` must"): check_range("x", values, 0, 1)
