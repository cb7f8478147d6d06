"Every mixer: the package's own checks and properties under hypothesis, and that both notice a mixer that is broken"
import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sumix_nb.mixers
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.fmix import FMix
from sumix_nb.mixers.gridmix import GridMix, SmoothMix
from sumix_nb.mixers.mixed import MixUp, Mixed
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from sumix_nb.mixers.choosing import join, tell_statistics
from sumix_nb.mixers.mixed import unmixed
from sumix_nb.mixers.cutmix import between, box_mask, mixing_box, outer_mask, scaled_box
from sumix_nb.mixers.mixed import blend_, is_channels_last, take_images
from sumix_nb.mixers.fmix import binarise, check_noise, damping, low_frequency_image
from sumix_nb.mixers.gridmix import bell, check_range, grid_lines, outer_share
from sumix_nb.mixers.mixed import uniform
from sumix_nb.mixers.resizemix import RESIZE_MODES, paste, paste_resized, pick, shrink, source_lines
from sumix_nb.mixers.saliency import SALIENCY, WINDOWS, blur, center_surround, fine_grained_saliency, grey_levels
from sumix_nb.mixers.saliency import most_salient, reflected, spectral_saliency, to_255, to_uint8, windows
from sumix_nb.pictures import example_batch, show_images
from sumix_nb.mixers.checking import PRECISION, SHAPES, check_devices, check_ends, check_input_untouched, check_mixer
from sumix_nb.mixers.checking import check_pixels, check_record, check_repeatable, check_share, check_types
from sumix_nb.mixers.checking import numbered_images, same

HAND_DRAWN = (MixUp, CutMix, FMix, ResizeMix, SaliencyMix, GridMix, SmoothMix)
BOOLS = (False, True)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def variants():
    "Every mixer with every option that changes its pixels, as (mixer, may it move pixels?)"
    for per_sample in BOOLS:
        for kind in (MixUp, CutMix, SmoothMix, GridMix, FMix, SaliencyMix):
            yield kind(per_sample=per_sample), False
            yield kind(alpha=0.2, per_sample=per_sample, p=0.5), False
        yield FMix(per_sample=per_sample, quirk=True), False
        yield FMix(per_sample=per_sample, max_soft=0.3, decay=2.0), False
        yield SaliencyMix(per_sample=per_sample, saliency="spectral"), False
        yield SaliencyMix(per_sample=per_sample, saliency="random"), False
        yield SaliencyMix(per_sample=per_sample, mean=(0.5,), std=(0.25,)), False
        yield GridMix(per_sample=per_sample, columns=(1, 1), area=(1, 1), aspect=(1, 1)), False
        yield SmoothMix(per_sample=per_sample, deviation=(0.05, 0.1)), False
        for mode in RESIZE_MODES:
            yield ResizeMix(per_sample=per_sample, mode=mode), True
            yield ResizeMix(per_sample=per_sample, mode=mode, scope=(0.0, 1.0), alpha=0.5), True
        yield OneOf([CutMix(), FMix(), MixUp()], per_sample=per_sample), False
        yield OneOf([CutMix(per_sample=True), GridMix(), SaliencyMix()], [0.4, 0.3, 0.1], per_sample), False
        yield OneOf([ResizeMix(), OneOf([CutMix(), SmoothMix()], per_sample=True)], per_sample=per_sample), True



ALL = [pytest.param(mixer, moves, id=repr(mixer)) for mixer, moves in variants()]


# ---- every check of the package on every mixer ---------------------------------------------------

@pytest.mark.parametrize("mixer, moves", ALL)
def test_every_mixer_passes_every_check(mixer, moves): check_mixer(mixer, moves=moves)


@pytest.mark.parametrize("kind", [CutMix, ResizeMix, SaliencyMix, GridMix, SmoothMix])
@pytest.mark.parametrize("per_sample", BOOLS)
def test_where_the_label_is_the_area_it_is_exactly_that(kind, per_sample):
    check_mixer(kind(per_sample=per_sample), moves=kind is ResizeMix, tolerance=0)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_mixer_on_any_shape_takes_its_pixels_from_where_it_says_in_the_shares_it_says(data):
    mixer, moves = data.draw(st.sampled_from(list(variants())))
    shape = data.draw(st.tuples(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 21), st.integers(1, 21)))
    seed, dtype = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([torch.float32, torch.float64]))
    images, target = numbered_images(shape, seeded(seed), dtype), torch.arange(shape[0]) % 3
    kept = images.clone()
    mixed = mixer(images, target, generator=seeded(seed))
    check_record(images, target, mixed)
    check_pixels(images, mixed, moves)
    check_share(mixed)
    assert torch.equal(images, kept) and same(mixed, mixer(images, target, generator=seeded(seed)))


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(HAND_DRAWN), per_sample=st.booleans(), seed=st.integers(0, 10**6),
       lam=st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0]), st.floats(0, 1)),
       shape=st.tuples(st.sampled_from([1, 2, 5]), st.just(3), st.integers(1, 16), st.integers(1, 16)))
def test_any_share_from_0_to_1_gives_a_valid_mixture_and_1_the_image_itself(kind, per_sample, seed, lam, shape):
    images, n = numbered_images(shape, seeded(seed)), shape[0]
    wanted, partner = torch.full((n if per_sample else 1,), lam, dtype=torch.float64), torch.arange(n).roll(1)
    made, share, mask = kind(per_sample=per_sample).mix(images, partner, wanted, model=None, generator=seeded(seed))
    mixed = Mixed(made, partner, partner[partner], share.float().expand(n), partner, mask)
    check_pixels(images, mixed, moves=kind is ResizeMix)
    check_share(mixed)
    assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()
    if lam == 1: assert torch.equal(made, images) and mixed.lam.eq(1).all()


@pytest.mark.parametrize("per_sample", BOOLS)
@pytest.mark.parametrize("kind", HAND_DRAWN)
def test_per_sample_draws_one_share_each_and_per_batch_one_for_all(kind, per_sample):
    mixed = kind(per_sample=per_sample)(torch.rand(64, 3, 24, 24, generator=seeded()), torch.zeros(64).long(),
                                        generator=seeded(1))
    assert (len(mixed.lam.unique()) > 15) == per_sample
    if mixed.mask is not None: assert len(mixed.mask) == (64 if per_sample else 1)


@pytest.mark.parametrize("kind", HAND_DRAWN)
@pytest.mark.parametrize("per_sample", BOOLS)
def test_p_is_how_often_anything_is_mixed(kind, per_sample):
    mixer, images, generator = kind(per_sample=per_sample, p=0.3), numbered_images((6, 3, 16, 16), seeded()), seeded(2)
    asked = [(mixer.draw(6 if per_sample else 1, generator) < 1).tolist() for _ in range(400)]
    share = sum(map(sum, asked)) / sum(map(len, asked))
    assert share == pytest.approx(0.3, abs=0.08)
    never = kind(per_sample=per_sample, p=0.0)(images, torch.arange(6), generator=generator)
    assert torch.equal(never.images, images) and never.lam.eq(1).all()


@pytest.mark.parametrize("kind", HAND_DRAWN)
def test_views_and_expanded_batches_are_mixed_and_not_written_to(kind):
    base = torch.rand(1, 3, 9, 6, generator=seeded())
    for images in (base.expand(4, 3, 9, 6), torch.rand(8, 3, 9, 6, generator=seeded(1))[::2],
                   torch.rand(4, 3, 6, 9, generator=seeded(2)).mT):
        for per_sample in BOOLS:
            kept, mixer = images.clone(), kind(per_sample=per_sample)
            mixed = mixer(images, torch.arange(4), generator=seeded(3))
            assert torch.equal(images, kept)
            plain = mixer(images.contiguous(), torch.arange(4), generator=seeded(3))
            torch.testing.assert_close(mixed.images, plain.images)


@pytest.mark.parametrize("kind", HAND_DRAWN)
@pytest.mark.parametrize("per_sample", BOOLS)
def test_gradients_reach_both_sources_and_only_finite_ones(kind, per_sample):
    images = torch.rand(4, 3, 12, 9, generator=seeded()).requires_grad_()
    mixed = kind(per_sample=per_sample)(images, torch.arange(4), generator=seeded(5))
    mixed.images.sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).flatten(1).any(1).all()
    if kind is not ResizeMix: assert images.grad.sum().item() == pytest.approx(images.numel(), rel=1e-4)


@pytest.mark.parametrize("mixer, moves", ALL)
def test_dice_and_pixels_stay_where_they_belong_whatever_the_default_device(mixer, moves):
    images, target = torch.rand(5, 3, 9, 8, generator=seeded()), torch.arange(5)
    expected = mixer(images, target, generator=seeded(1))
    with torch.device("meta"): assert same(mixer(images, target, generator=seeded_on_cpu(1)), expected)


def seeded_on_cpu(seed): return torch.Generator(device="cpu").manual_seed(seed)


# ---- the checks notice what is broken ------------------------------------------------------------

def edit(kind, change):
    "A mixer of `kind` whose images, share and mask are changed by `change(images, partner, made, share, mask)`"
    @dataclass
    class Broken(kind):
        def mix(self, images, partner, lam, *, model, generator):
            made = super().mix(images, partner, lam, model=model, generator=generator)
            return change(images, partner, *made)
    return Broken


def overwritten(images, partner, made, share, mask):
    images.copy_(made)
    return made, share, mask


def one_pixel(images, partner, made, share, mask):
    made = made.clone()
    made[-1, 0, -1, -1] += 1
    return made, share, mask


FAULTS = {
    "the share of the partner": lambda images, partner, made, share, mask: (made, 1 - share, mask),
    "an inverted mask": lambda images, partner, made, share, mask: (made, share, 1 - mask),
    "another partner": lambda images, partner, made, share, mask: (made.roll(1, 0), share, mask),
    "a rounded share": lambda images, partner, made, share, mask: (made, (share * 4).round() / 4, mask),
    "a share below 0": lambda images, partner, made, share, mask: (made, share - 1.5, mask),
    "another type": lambda images, partner, made, share, mask: (made.to(torch.float32), share, mask),
    "pixels of a third image": lambda images, partner, made, share, mask: (
        torch.where(mask > mask.mean(), made, images[partner[partner]]), share, mask),
    "one wrong pixel": one_pixel,
    "the batch overwritten": overwritten,
    "a row shifted": lambda images, partner, made, share, mask: (made.roll(1, 2), share, mask),
    "always the same": lambda images, partner, made, share, mask: (images.clone(), torch.ones_like(share),
                                                                   torch.ones_like(mask)),
    "the values looked at": lambda images, partner, made, share, mask: (
        made * float(images.isfinite().all()), share, mask),
    "no mixture, but the images": lambda images, partner, made, share, mask: (images, share, mask),
    "noise": lambda images, partner, made, share, mask: (made + 0.01 * torch.rand_like(made), share, mask),
}


# what is said of each fault, where it is not that pixels or shares disagree with the mask
FOUND = {"a share below 0": r"`lam` must be in \[0, 1\]", "another type": "became torch.float32",
         "the batch overwritten": "(wrote to|shares memory with) the images", "always the same": "ten seeds",
         "the values looked at": "looks at values", "no mixture, but the images": "shares memory|away from",
         "one wrong pixel": "away from|as it is", "a rounded share": "away from|share must be 1"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", [CutMix, FMix, ResizeMix, SaliencyMix, GridMix, SmoothMix])
@pytest.mark.parametrize("per_sample", BOOLS)
def test_check_mixer_finds_a_broken_mixer(kind, fault, per_sample):
    broken = edit(kind, FAULTS[fault])(per_sample=per_sample)
    with pytest.raises((AssertionError, ValueError), match=FOUND.get(fault, "away from the (blend|mean)")):
        check_mixer(broken, moves=kind is ResizeMix)


@pytest.mark.parametrize("fault", ["the share of the partner", "another partner", "one wrong pixel", "noise"])
def test_check_mixer_finds_a_broken_mixer_without_a_mask(fault):
    with pytest.raises(AssertionError): check_mixer(edit(MixUp, FAULTS[fault])())


def test_check_mixer_finds_wrong_targets_and_records():
    def wrong_targets(images, target, *, model=None, generator=None):
        mixed = CutMix()(images, target, generator=generator)
        return Mixed(mixed.images, mixed.target_a, mixed.target_a.flip(0), mixed.lam, mixed.partner, mixed.mask)
    with pytest.raises(AssertionError, match="`target_b`"): check_mixer(wrong_targets)
    with pytest.raises(AssertionError, match="must return a Mixed, got tuple"):
        check_mixer(lambda images, target, *, model=None, generator=None: (images, target))


def test_check_mixer_finds_global_dice_and_dice_that_never_fall():
    class Global(CutMix):
        def mix(self, images, partner, lam, *, model, generator):
            return super().mix(images, partner, lam, model=model, generator=None)
    with pytest.raises(AssertionError, match="global"): check_mixer(Global())
    with pytest.raises(AssertionError, match="ten seeds"): check_mixer(CutMix(p=0.0))


def test_check_ends_finds_a_mixer_that_mixes_when_told_not_to():
    class Always(GridMix):
        def mix(self, images, partner, lam, *, model, generator):
            return super().mix(images, partner, lam.clamp(max=0.5), model=model, generator=generator)
    with pytest.raises(AssertionError, match="with the share 1"): check_ends(Always(), numbered_images((3, 3, 8, 9)))


def test_check_types_finds_lost_memory_formats_and_precision():
    class Contiguous(CutMix):
        def mix(self, images, partner, lam, *, model, generator):
            made = super().mix(images.contiguous(), partner, lam, model=model, generator=generator)
            return made[0].contiguous(), *made[1:]
    images, target = torch.rand(7, 3, 10, 6, generator=seeded()), torch.arange(7)
    with pytest.raises(AssertionError, match="channels last"): check_types(Contiguous(), images, target)

    class Half(MixUp):
        def mix(self, images, partner, lam, *, model, generator):
            made = super().mix(images.bfloat16(), partner, lam, model=model, generator=generator)
            return made[0].to(images.dtype), *made[1:]
    with pytest.raises(AssertionError, match="away from the blend"): check_mixer(Half())


def test_a_model_is_handed_on_and_then_only_the_cpu_is_checked():
    seen = []
    class Looks(CutMix):
        def mix(self, images, partner, lam, *, model, generator):
            seen.append(model)
            assert images.device.type == "cpu"
            return super().mix(images, partner, lam, model=model, generator=generator)
    check_mixer(Looks(), model="the model", shapes=SHAPES[:2])
    assert set(seen) == {"the model"}


def test_the_parts_of_the_checks_are_as_documented():
    images = numbered_images((3, 2, 4, 5), seeded())
    assert torch.equal(images.floor(), torch.arange(6.0).double().view(3, 2, 1, 1).expand_as(images))
    assert set(PRECISION) == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    mixed = CutMix()(images, torch.arange(3), generator=seeded())
    assert same(mixed, mixed) and not same(mixed, MixUp()(images, torch.arange(3), generator=seeded()))
    check_repeatable(CutMix(), images, torch.arange(3))
    check_input_untouched(CutMix(), images, torch.arange(3))
    check_devices(CutMix(), images, torch.arange(3))


# ---- core: fetching, blending, boxes --------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
       last=st.booleans(), seed=st.integers(0, 10**6), one=st.booleans())
def test_take_images_and_blend_equal_indexing_and_where(shape, last, seed, one):
    images = torch.randn(shape, generator=seeded(seed))
    if last: images = images.contiguous(memory_format=torch.channels_last)
    index = torch.randint(shape[0], (shape[0],), generator=seeded(seed))
    others = take_images(images, index)
    assert torch.equal(others, images[index]) and others.stride() == torch.empty_like(images).stride()
    mask = (torch.rand(1 if one else shape[0], 1, *shape[2:], generator=seeded(seed)) < 0.5).float()
    expected = torch.where(mask.bool(), images, others)
    mixed = blend_(others, images, mask)
    assert mixed is others and torch.equal(mixed, expected) and is_channels_last(mixed) == is_channels_last(images)


def test_paste_between_and_outer_mask_by_hand():
    images, patches = torch.zeros(2, 1, 4, 5), torch.ones(2, 1, 2, 3)
    pasted = paste(images, patches, (1, 3, 2, 5))
    assert pasted.sum() == 12 and pasted[:, :, 1:3, 2:5].eq(1).all() and images.eq(0).all()
    assert between(torch.tensor([1, 0]), torch.tensor([3, 0]), 4).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    assert outer_mask(torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, 1.0]])).tolist() == [[[[1, 0], [1, 0.5]]]]


@settings(max_examples=100, deadline=None)
@given(scale=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_scaled_box_is_the_same_for_numbers_and_tensors_and_mixing_box_is_one(scale, height, width, data):
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    half_h, half_w = (int(side * scale) // 2 for side in (height, width))
    box = max(row - half_h, 0), min(row + half_h, height), max(col - half_w, 0), min(col + half_w, width)
    assert scaled_box(scale, height, width, (row, col)) == box
    tensors = scaled_box(torch.tensor([scale, scale], dtype=torch.float64), height, width,
                         (torch.tensor([row, row]), torch.tensor([col, col])))
    assert [edge.tolist() for edge in tensors] == [[edge, edge] for edge in box]
    lam = torch.tensor([scale], dtype=torch.float64)
    one = mixing_box(lam, height, width, (torch.tensor([row]), torch.tensor([col])))
    assert tuple(edge.item() for edge in one) == mixing_box(scale, height, width, (row, col))


# ---- FMix ------------------------------------------------------------------------------------------

def test_damping_is_remembered_and_noise_is_checked():
    arguments = 4, 6, 4, 3.0, torch.float64, torch.device("cpu")
    assert damping(*arguments) is damping(*arguments) and damping(*arguments).shape == (4, 4, 1)
    assert damping(*arguments)[0, 0].item() == 1 and damping(*arguments)[0, 1].item() == pytest.approx(1)
    assert damping(*arguments)[1, 2].item() == pytest.approx((6 * math.hypot(1 / 4, 2 / 6)) ** 3)
    check_noise(torch.zeros(2, 4, 4, 2), (4, 4, 2))
    with pytest.raises(ValueError, match="`noise`"): check_noise(torch.zeros(2, 4, 4, 2).long(), (4, 4, 2))


@settings(max_examples=60, deadline=None)
@given(lam=st.floats(0, 1), max_soft=st.sampled_from([0.0, 0.07, 0.3, 0.5]), up=st.booleans(),
       height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_binarise_orders_pixels_by_brightness_and_has_the_right_number_of_each(lam, max_soft, up, height, width, seed):
    image = torch.rand(3, height, width, generator=seeded(seed), dtype=torch.float64)
    mask, pixels = binarise(image, lam, max_soft, up), height * width
    assert mask.shape == (3, 1, height, width) and mask.dtype == image.dtype
    count = math.ceil(lam * pixels) if up else math.floor(lam * pixels)
    assert mask.sum((1, 2, 3)).tolist() == pytest.approx([count] * 3, abs=0.51 if max_soft else 1e-9)
    for values, weights in zip(image.flatten(1), mask.flatten(1)):
        assert (weights[values.argsort()].diff() >= 0).all()


def test_binarise_ignores_ties_and_gives_exactly_n_pixels():
    assert binarise(torch.ones(2, 4, 4), 0.3, round_up=False).sum((1, 2, 3)).tolist() == [4, 4]


@pytest.mark.parametrize("sides", [(8, 8), (7, 10), (12, 5), (1, 6), (6, 1)])
@pytest.mark.parametrize("decay", [0.0, 1.5, 3.0])
def test_low_frequency_images_are_those_of_numpys_transform(sides, decay):
    height, width = sides
    noise = torch.randn(2, height, width // 2 + 1, 2, generator=seeded(), dtype=torch.float64)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectrum = (noise[..., 0].numpy() + 1j * noise[..., 1].numpy()) / np.maximum(frequency, 1 / max(sides)) ** decay
    image = np.fft.irfft2(spectrum, s=sides)
    low, high = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    expected = (image - low) / (high - low)
    np.testing.assert_allclose(low_frequency_image(noise, *sides, decay).numpy(), expected, atol=1e-12)


def test_low_frequency_images_are_smoother_the_larger_the_decay():
    noise = torch.randn(50, 32, 17, 2, generator=seeded())
    steps = [low_frequency_image(noise, 32, 32, decay).diff(dim=1).abs().mean().item() for decay in (0, 1, 2, 3)]
    assert steps == sorted(steps, reverse=True) and steps[0] > 2 * steps[3]
    assert low_frequency_image(torch.randn(2, 1, 1, 2), 1, 1).eq(0).all()


# ---- ResizeMix -------------------------------------------------------------------------------------

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


def test_pick_and_source_lines_by_hand():
    images = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4)
    rows, cols = torch.tensor([[2, 0, 0], [1, 1, 2]]), torch.tensor([[3, 3, 0, 1], [0, 1, 2, 3]])
    picked = pick(images, rows, cols)
    for n in range(2):
        for r in range(3):
            for c in range(4): assert picked[n, 0, r, c] == images[n, 0, rows[n, r], cols[n, c]]
    first, second, weight = source_lines(torch.tensor([1]), torch.tensor([4]), 6, "bilinear")
    for r in range(1, 4):
        place = 6 / 3 * (r - 1 + 0.5) - 0.5
        assert first[0, r] == int(place) and second[0, r] == int(place) + 1
        assert weight[0, r].item() == pytest.approx(place % 1, abs=1e-6)


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


# ---- SaliencyMix -----------------------------------------------------------------------------------

def test_saliency_looks_at_the_partners_of_the_batch_or_of_the_first_image():
    levels = torch.randint(256, (6, 3, 20, 14), dtype=torch.uint8, generator=seeded())
    rows, cols = most_salient(fine_grained_saliency(levels))
    mixer, partner = SaliencyMix(mean=(0,), std=(1,)), torch.tensor([2, 0, 1, 4, 5, 3])
    lam = torch.tensor([0.8], dtype=torch.float64)
    _, _, mask = mixer.mix(levels / 255, partner, lam, model=None, generator=None)
    assert torch.equal(mask, box_mask(mixing_box(0.8, 20, 14, (rows[2], cols[2])), 20, 14))
    _, _, mask = SaliencyMix(mean=(0,), std=(1,), per_sample=True).mix(levels / 255, partner, lam.expand(6), model=None,
                                                                      generator=None)
    for i, j in enumerate(partner.tolist()):
        assert torch.equal(mask[i:i + 1], box_mask(mixing_box(0.8, 20, 14, (rows[j], cols[j])), 20, 14))


def test_saliency_of_one_image_does_not_depend_on_its_batch_or_its_device_type():
    levels = torch.randint(256, (5, 3, 40, 31), dtype=torch.uint8, generator=seeded())
    for detector in (fine_grained_saliency, spectral_saliency):
        together, alone = detector(levels), torch.cat([detector(levels[i:i + 1]) for i in range(5)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * together.float().max().item())
        assert together.shape == (5, 40, 31) and detector(levels[:, :1]).shape == (5, 40, 31)
    assert fine_grained_saliency(levels).dtype == torch.uint8 and set(SALIENCY) == {"finegrained", "spectral", "random"}


def test_the_parts_of_the_detector_by_hand():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    assert grey_levels(colours.view(4, 3, 1, 1)).flatten().tolist() == [29, 150, 76, 255]
    assert reflected(4, torch.device("cpu")).tolist() == [1, 0, 1, 2, 3, 2]
    assert reflected(1, torch.device("cpu")).tolist() == [0, 0, 0]
    dot = torch.zeros(1, 5, 5, dtype=torch.int32)
    dot[0, 2, 2] = 160
    assert blur(dot)[0, 1:4, 1:4].tolist() == [[10, 20, 10], [20, 40, 20], [10, 20, 10]]
    assert to_255(torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]]])).tolist() == [[[85, 170, 255]], [[0, 0, 0]]]
    rows, cols, count = windows(300, 200, torch.device("cpu"))
    assert rows.shape == (12 * 300,) and cols.shape == (6, 400) and count.shape == (6, 300, 200)
    for scale, n in enumerate(WINDOWS): assert count[scale, 150, 100] == min(2 * n, 300) * min(2 * n, 200) - 1
    on, off = center_surround(torch.tensor([[[0, 0, 9]]], dtype=torch.int32))
    assert on.tolist() == [[[0, 0, 255]]] and off.tolist() == [[[255, 255, 0]]]
    assert [int(part) for part in most_salient(torch.tensor([[[1, 3], [3, 2]]]))] == [0, 1]


def test_maps_wrap_above_255_as_opencvs_cast_does():
    "A spot that is bright against its near surroundings and dark against the far ones"
    image = torch.full((1, 3, 240, 240), 255, dtype=torch.uint8)
    image[..., 96:144, 96:144] = 0
    image[..., 114:126, 114:126] = 225
    on, off = center_surround(blur(blur(grey_levels(image))))
    wrapped = on + off > 255
    assert wrapped.any() and torch.equal(fine_grained_saliency(image)[wrapped].int(), (on + off - 256)[wrapped].int())


def test_to_uint8_undoes_the_normalisation_or_stretches():
    images = torch.rand(3, 3, 5, 4, generator=seeded())
    mean, std = (0.1, 0.5, 0.9), (0.3, 0.2, 0.1)
    levels = (255 * images).round().byte()
    normal = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(to_uint8(normal, mean, std), levels)
    assert to_uint8(10 * images - 3).flatten(1).amax(1).tolist() == [255] * 3
    assert to_uint8(torch.full((1, 3, 2, 2), 7.0)).eq(0).all()


def test_only_mixers_without_statistics_are_told_and_the_original_is_left():
    mixer = SaliencyMix(alpha=0.3, per_sample=True)
    told = tell_statistics(mixer, (0.5,), (0.2,))
    assert (told.mean, told.std, told.alpha, told.per_sample) == ((0.5,), (0.2,), 0.3, True) and mixer.mean is None
    assert tell_statistics(told, (0.1,), (0.1,)) is told
    nested = tell_statistics(OneOf([CutMix(), OneOf([mixer])]), (0.5,), (0.2,))
    assert nested.mixers[1].mixers[0].mean == (0.5,) and tell_statistics(CutMix, 1, 2) is CutMix


# ---- GridMix and SmoothMix ---------------------------------------------------------------------------

def test_the_rectangle_of_a_grid_never_leaves_the_image_and_its_share_is_the_masks():
    generator, n = seeded(), 500
    for height, width in ((32, 32), (17, 40), (3, 2), (1, 1)):
        lam = torch.rand(n, generator=generator)
        rows, cols = grid_lines(lam, height, width, torch.randint(1, 9, (n,), generator=generator),
                                uniform((0.0, 1.0), n, generator), uniform((0.2, 5.0), n, generator),
                                torch.rand(n, 2, generator=generator))
        assert rows.shape == (n, height) and cols.shape == (n, width)
        assert set(rows.unique().tolist()) <= {0.0, 1.0} and set(cols.unique().tolist()) <= {0.0, 1.0}
        counted = outer_mask(rows, cols).double().mean((1, 2, 3))
        torch.testing.assert_close(outer_share(rows, cols), counted, rtol=0, atol=1e-6)


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


def test_bells_and_uniform_draws_by_hand():
    sides = bell(5, torch.tensor([1.0, 4.5]), torch.tensor([2.0, 0.5]))
    for i in range(5):
        assert sides[0, i].item() == pytest.approx(math.exp(-(i - 1) ** 2 / 8), abs=1e-6)
        assert sides[1, i].item() == pytest.approx(math.exp(-(i - 4.5) ** 2 / 0.5), abs=1e-6)
    drawn = uniform((2.0, 3.0), 4000, seeded())
    assert 2 <= drawn.min() < 2.01 and 2.99 < drawn.max() <= 3 and drawn.mean().item() == pytest.approx(2.5, abs=0.02)
    check_range("x", (0, 1), 0, 1)


# ---- OneOf -------------------------------------------------------------------------------------------

def test_one_of_hands_everything_on_and_is_fair_without_p():
    seen = []
    def one(images, target, *, model=None, generator=None):
        seen.append((len(images), model))
        return unmixed(images, target)
    images, generator = torch.rand(10, 3, 4, 4), seeded()
    chooser = OneOf([one, CutMix()])
    for _ in range(400): chooser(images, torch.arange(10), model="the model", generator=generator)
    assert 150 < len(seen) < 250 and set(seen) == {(10, "the model")}


def test_probabilities_that_add_up_to_almost_1_never_leave_a_batch_unmixed():
    chosen = OneOf([CutMix()] * 10, p=[0.1] * 10).choose(200_000, seeded())
    assert chosen.max() == 9 and chosen.bincount().float().std() / 20_000 < 0.02


def test_join_puts_parts_back_in_the_order_of_the_batch():
    images, target = numbered_images((5, 1, 2, 3), seeded()), torch.tensor([5, 6, 7, 8, 9])
    rows = [torch.tensor([3, 0]), torch.tensor([1, 4, 2])]
    parts = [CutMix(per_sample=True)(images[row], target[row], generator=seeded(i)) for i, row in enumerate(rows)]
    mixed = join(parts, rows, target)
    check_record(images, target, mixed)
    check_pixels(images, mixed)
    check_share(mixed, 0)
    for row, part in zip(rows, parts):
        assert torch.equal(mixed.images[row], part.images) and torch.equal(mixed.lam[row], part.lam)
        assert torch.equal(mixed.partner[row], row[part.partner])


def test_mixers_can_be_copied_compared_and_shown():
    for mixer, _ in variants():
        assert copy.deepcopy(mixer) == mixer and type(mixer).__name__ in repr(mixer)


def test_the_package_of_mixers_exports_what_it_says():
    assert set(sumix_nb.mixers.__all__) == {"CutMix", "FMix", "GridMix", "MixUp", "Mixed", "Mixer", "OneOf",
                                            "ResizeMix", "SaliencyMix", "SmoothMix"}


def test_pictures_are_two_photographs_in_three_crops_each():
    images, target = example_batch(20, 30)
    assert images.shape == (6, 3, 20, 30) and target.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.min() >= 0 and images.max() <= 1
    axes = show_images(images[:2], ["a", "b"])
    assert [axis.get_title() for axis in axes] == ["a", "b"]
