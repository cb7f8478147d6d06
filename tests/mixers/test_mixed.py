"The mixers: where each pixel comes from, that the label's share is the pixels' share, and that dice are repeatable"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumix_nb.checks import check_batch, check_generator
from sumix_nb.mixers.cutmix import CutMix, box_mask, box_ratio, cut_and_paste, mixing_box
from sumix_nb.mixers.mixed import MixUp, Mixed, Mixer, sample_lam, sample_partner

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BOTH = (MixUp, CutMix)
SIZES = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 13), st.integers(1, 13))


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def numbered(n, channels, height, width, dtype=torch.float32):
    "Images whose every value tells which image, channel, row and column it comes from"
    return torch.arange(n * channels * height * width, dtype=dtype).view(n, channels, height, width)


# ---- the parts -----------------------------------------------------------------------------------

def test_sample_lam_follows_the_beta_distribution():
    for alpha in (0.2, 1.0, 4.0):
        lam = sample_lam(alpha, 20000, seeded())
        assert lam.shape == (20000,) and lam.dtype == torch.float64
        assert lam.mean().item() == pytest.approx(0.5, abs=0.01)
        assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
        assert ((lam >= 1e-6) & (lam <= 1 - 1e-6)).all()


def test_sample_lam_stays_inside_0_1_where_the_distribution_has_its_ends():
    lam = sample_lam(0.01, 20000, seeded())
    assert lam.min() >= 1e-6 and lam.max() <= 1 - 1e-6 and lam.isfinite().all()
    assert ((lam < 0.01) | (lam > 0.99)).double().mean() > 0.93


def test_an_alpha_too_small_to_draw_from_is_refused_or_drawn_rightly():
    try: lam = sample_lam(1e-3, 2000, seeded())
    except ValueError as error: assert "`alpha` must" in str(error)
    else: assert ((lam < 0.01) | (lam > 0.99)).double().mean() > 0.97


def test_sample_partner_is_a_permutation_in_which_all_orders_occur():
    generator = seeded()
    drawn = [tuple(sample_partner(3, generator).tolist()) for _ in range(200)]
    assert len(set(drawn)) == 6 and all(sorted(order) == [0, 1, 2] for order in drawn)
    assert sample_partner(1).tolist() == [0]


def test_check_batch_and_check_generator_accept_what_is_right():
    assert check_batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)) is None
    assert check_batch(torch.zeros(2, 3, 4, 5, dtype=torch.float16), torch.zeros(2, 7)) is None
    assert check_generator(None) is None and check_generator(torch.Generator()) is None


@settings(max_examples=150, deadline=None)
@given(lam=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 40), data=st.data())
def test_mixing_box_is_the_papers_box_clipped_and_its_mask_and_ratio_agree(lam, height, width, data):
    row, col = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = top, bottom, left, right = mixing_box(lam, height, width, (row, col))
    half_h, half_w = (int(side * math.sqrt(1 - lam)) // 2 for side in (height, width))
    assert box == (max(row - half_h, 0), min(row + half_h, height), max(col - half_w, 0), min(col + half_w, width))
    mask, counted = box_mask(box, height, width), 0
    for r in range(height):
        for c in range(width):
            inside = top <= r < bottom and left <= c < right
            assert mask[0, 0, r, c] == (0 if inside else 1)
            counted += not inside
    assert box_ratio(box, height, width) == pytest.approx(counted / (height * width))


def test_boxes_of_a_batch_equal_the_boxes_one_by_one():
    lam, generator = torch.rand(50, generator=seeded()), seeded(1)
    row, col = (torch.randint(length, (50,), generator=generator) for length in (9, 15))
    boxes = mixing_box(lam, 9, 15, (row, col))
    images, partner = torch.randn(50, 2, 9, 15, generator=seeded(3)), sample_partner(50, seeded(4))
    mixed, mask = cut_and_paste(images, partner, boxes)
    ratios = box_ratio(boxes, 9, 15)
    assert mask.shape == (50, 1, 9, 15) and mask.dtype == torch.float32
    for i in range(50):
        box = mixing_box(lam[i].item(), 9, 15, (row[i].item(), col[i].item()))
        assert box == tuple(edge[i].item() for edge in boxes)
        alone, alone_mask = cut_and_paste(images, partner, box)
        assert torch.equal(mixed[i], alone[i]) and torch.equal(mask[i], alone_mask[0])
        assert ratios[i].item() == pytest.approx(box_ratio(box, 9, 15), abs=1e-6)


# ---- properties of both mixers -------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(size=SIZES, per_sample=st.booleans(), alpha=st.sampled_from([0.1, 1.0, 5.0]), seed=st.integers(0, 10**6))
def test_cutmix_takes_each_pixel_from_the_image_or_its_partner_at_the_same_place(size, per_sample, alpha, seed):
    images, target = numbered(*size), torch.arange(size[0])
    mixed = CutMix(alpha, per_sample)(images, target, generator=seeded(seed))
    mask = mixed.mask.expand(len(images), 1, *images.shape[2:])
    assert mixed.mask.shape[0] == (size[0] if per_sample else 1)
    for i, j in enumerate(mixed.partner.tolist()):
        own = mask[i, 0].bool()
        assert torch.equal(mixed.images[i][:, own], images[i][:, own])
        assert torch.equal(mixed.images[i][:, ~own], images[j][:, ~own])
        assert mixed.lam[i].item() == pytest.approx(own.double().mean().item(), abs=1e-6)
    assert torch.equal(mixed.target_a, target) and torch.equal(mixed.target_b, target[mixed.partner])


@settings(max_examples=60, deadline=None)
@given(size=SIZES, per_sample=st.booleans(), alpha=st.sampled_from([0.1, 1.0, 5.0]), seed=st.integers(0, 10**6))
def test_mixup_fades_each_image_with_its_partner_by_lam(size, per_sample, alpha, seed):
    images, target = torch.randn(size, generator=seeded(seed)), torch.arange(size[0])
    mixed = MixUp(alpha, per_sample)(images, target, generator=seeded(seed))
    assert mixed.mask is None
    for i, j in enumerate(mixed.partner.tolist()):
        lam = mixed.lam[i].double()
        torch.testing.assert_close(mixed.images[i].double(), lam * images[i].double() + (1 - lam) * images[j].double(),
                                   rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed.target_a, target) and torch.equal(mixed.target_b, target[mixed.partner])


@settings(max_examples=60, deadline=None)
@given(size=SIZES, per_sample=st.booleans(), mixer=st.sampled_from(BOTH), p=st.sampled_from([0.0, 0.5, 1.0]),
       seed=st.integers(0, 10**6))
def test_every_mixture_is_a_valid_record_repeatable_by_its_generator_and_leaves_its_input(size, per_sample, mixer, p,
                                                                                          seed):
    images, target = torch.randn(size, generator=seeded(seed)), torch.arange(size[0]) % 2
    kept, kept_target, mixer = images.clone(), target.clone(), mixer(per_sample=per_sample, p=p)
    torch.manual_seed(1)
    one = mixer(images, target, generator=seeded(seed))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    torch.rand(7)
    two = mixer(images, target, generator=seeded(seed))
    for name in ("images", "target_a", "target_b", "lam", "partner"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(images, kept) and torch.equal(target, kept_target)
    assert one.images.data_ptr() != images.data_ptr() or 0 in one.images.shape
    n = size[0]
    assert one.lam.shape == one.partner.shape == (n,) and one.lam.dtype == torch.float32
    assert ((one.lam >= 0) & (one.lam <= 1)).all() and sorted(one.partner.tolist()) == list(range(n))
    assert one.images.shape == images.shape and one.images.dtype == images.dtype


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mixer", BOTH)
def test_another_seed_or_the_next_draw_gives_another_mixture(mixer, per_sample):
    images, target, generator = torch.randn(8, 3, 16, 16, generator=seeded()), torch.arange(8), seeded(5)
    draws = [mixer(per_sample=per_sample)(images, target, generator=g) for g in (generator, generator, seeded(6))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(draws[i].images, draws[j].images) and not torch.equal(draws[i].lam, draws[j].lam)
        assert not torch.equal(draws[i].partner, draws[j].partner)


@pytest.mark.parametrize("mixer", BOTH)
def test_without_a_generator_pytorchs_own_seed_decides(mixer):
    images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mixer()(images, target).images)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("mixer", BOTH)
def test_per_batch_lam_is_shared_and_per_sample_lam_differs_across_rows(mixer):
    images, target = torch.zeros(64, 1, 32, 32), torch.zeros(64, dtype=torch.long)
    shared, own = (mixer(per_sample=per_sample)(images, target, generator=seeded()).lam for per_sample in (False, True))
    assert len(set(shared.tolist())) == 1 and len(set(own.tolist())) > 40
    assert own.std() > 0.1 and (own[:-1] - own[1:]).abs().mean() > 0.1


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mixer", BOTH)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_p_is_how_often_a_batch_or_a_sample_is_mixed(mixer, p, per_sample):
    images, target, generator = numbered(4, 1, 16, 16), torch.arange(4), seeded(1)
    mixer, changed = mixer(alpha=8.0, per_sample=per_sample, p=p), []
    for _ in range(300):
        mixed = mixer(images, target, generator=generator)
        unmixed = mixed.lam == 1
        assert torch.equal(mixed.images[unmixed], images[unmixed])
        changed += [not flag for flag in unmixed.tolist()][:None if per_sample else 1]
        if not per_sample: assert len(set(unmixed.tolist())) == 1
    share = sum(changed) / len(changed)
    assert share == pytest.approx(p, abs=0.08)
    if p in (0.0, 1.0): assert share == p


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_lam_has_the_variance_of_its_beta_distribution(alpha):
    lam = MixUp(alpha, per_sample=True)(torch.zeros(4000, 1, 1, 1), torch.zeros(4000), generator=seeded()).lam.double()
    assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_cutmix_boxes_are_centred_everywhere_and_keep_the_images_proportions():
    images, target = torch.zeros(3000, 1, 20, 40), torch.zeros(3000)
    mask = CutMix(alpha=1000.0, per_sample=True)(images, target, generator=seeded()).mask[:, 0] == 0
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    assert heights.max() == 14 and widths.max() == 28, "half the area, so 0.7 of each side"
    rows, cols = mask.double().mean((0, 2)), mask.double().mean((0, 1))
    torch.testing.assert_close(rows, rows.flip(0), rtol=0.1, atol=0.03)
    torch.testing.assert_close(cols, cols.flip(0), rtol=0.1, atol=0.03)
    assert mask[:, 0].any(1).double().mean() > 0.2 and mask[:, :, -1].any(1).double().mean() > 0.2


@pytest.mark.parametrize("mixer", BOTH)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("size", [(1, 3, 5, 9), (2, 1, 7, 1), (5, 4, 8, 6)])
def test_every_float_type_and_shape_keeps_its_dtype_and_mixes_as_in_float64(mixer, dtype, per_sample, size):
    images = torch.randn(size, generator=seeded()).to(dtype)
    target = torch.arange(size[0])
    got, wanted = (mixer(per_sample=per_sample)(x, target, generator=seeded(2)) for x in (images, images.double()))
    assert got.images.dtype == dtype and got.lam.dtype == torch.float32
    tolerance = {torch.bfloat16: 4e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(got.images.double(), wanted.images, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.lam, wanted.lam, rtol=0, atol=tolerance)
    for i, j in enumerate(got.partner.tolist()):
        lam = got.lam[i].double()
        wanted = lam * images[i].double() + (1 - lam) * images[j].double()
        if mixer is MixUp: torch.testing.assert_close(got.images[i].double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mixer", BOTH)
def test_channels_last_batches_stay_channels_last(mixer, per_sample):
    images = torch.randn(4, 3, 8, 6, generator=seeded()).contiguous(memory_format=torch.channels_last)
    mixed = mixer(per_sample=per_sample)(images, torch.arange(4), generator=seeded())
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)
    plain = mixer(per_sample=per_sample)(images.contiguous(), torch.arange(4), generator=seeded())
    torch.testing.assert_close(mixed.images, plain.images)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mixer", BOTH)
def test_views_and_expanded_images_are_mixed_without_being_written_to(mixer, per_sample):
    base = torch.randn(1, 3, 8, 6, generator=seeded())
    expanded, strided = base.expand(4, 3, 8, 6), torch.randn(8, 3, 8, 6, generator=seeded(1))[::2]
    for images in (expanded, strided):
        kept = images.clone()
        mixed = mixer(per_sample=per_sample)(images, torch.arange(4), generator=seeded())
        assert torch.equal(images, kept)
        plain = mixer(per_sample=per_sample)(kept, torch.arange(4), generator=seeded())
        torch.testing.assert_close(mixed.images, plain.images)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("mixer", BOTH)
def test_gradients_flow_back_to_both_sources_by_their_share_of_the_pixels(mixer, per_sample):
    images = torch.randn(3, 2, 6, 4, generator=seeded(), requires_grad=True)
    mixed = mixer(per_sample=per_sample)(images, torch.arange(3), generator=seeded(3))
    mixed.images.sum().backward()
    shares = torch.zeros(3)
    for i, j in enumerate(mixed.partner.tolist()): shares[i] += mixed.lam[i]; shares[j] += 1 - mixed.lam[i]
    torch.testing.assert_close(images.grad.mean((1, 2, 3)), shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", BOTH)
def test_soft_and_multi_label_targets_travel_with_their_images(mixer):
    target = torch.rand(5, 4, generator=seeded())
    mixed = mixer()(torch.randn(5, 3, 4, 4), target, generator=seeded())
    assert torch.equal(mixed.target_a, target) and torch.equal(mixed.target_b, target[mixed.partner])


def test_a_mixer_of_ones_own_needs_only_mix_and_is_given_the_model():
    class Half(Mixer):
        def mix(self, images, partner, lam, *, model, generator):
            seen.append((model, generator, lam))
            return (images + images[partner]) / 2, lam * 0 + 0.5, None
    seen, images, generator = [], torch.randn(4, 1, 2, 2), seeded()
    mixed = Half(per_sample=True)(images, torch.arange(4), model="the model", generator=generator)
    assert isinstance(mixed, Mixed) and seen[0][:2] == ("the model", generator) and seen[0][2].shape == (4,)
    assert mixed.lam.tolist() == [0.5] * 4
    torch.testing.assert_close(mixed.images, (images + images[mixed.partner]) / 2)
    with pytest.raises(NotImplementedError, match="Mixer must define `mix`"): Mixer()(images, torch.arange(4))


def test_a_record_cannot_be_changed():
    mixed = MixUp()(torch.zeros(2, 1, 2, 2), torch.arange(2))
    with pytest.raises(AttributeError): mixed.lam = torch.ones(2)
