"Every mixer passes the package's own checks and properties under hypothesis; and the checks find broken mixers"
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumix_nb.mixers import CutMix, FMix, GridMix, Mixed, MixUp, ResizeMix, SaliencyMix, SmoothMix
from sumix_nb.mixers.checking import SHAPES, check_ends, check_mixer, check_pixels, check_record, check_share
from sumix_nb.mixers.checking import check_types, numbered_images, same, seeded
from tests.mixers.oracles import ALL, BOOLS, seeded as generator_of, variants

MASKED = (CutMix, FMix, ResizeMix, SaliencyMix, GridMix, SmoothMix)
VARIANTS = [pytest.param(mixer, id=repr(mixer)) for mixer in variants()]


@pytest.mark.parametrize("mixer", VARIANTS)
def test_every_mixer_passes_every_check(mixer): check_mixer(mixer)


@pytest.mark.parametrize("kind", [kind for kind in MASKED if kind is not FMix])
@pytest.mark.parametrize("per_sample", BOOLS)
def test_where_the_label_is_the_area_it_is_exactly_that(kind, per_sample):
    check_mixer(kind(per_sample=per_sample), tolerance=0)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_mixer_on_any_shape_takes_its_pixels_from_where_it_says_in_the_shares_it_says(data):
    mixer = data.draw(st.sampled_from(list(variants())))
    shape = data.draw(st.tuples(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 21), st.integers(1, 21)))
    seed, dtype = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([torch.float32, torch.float64]))
    images, target = numbered_images(shape, generator_of(seed), dtype), torch.arange(shape[0]) % 3
    kept, mix = images.clone(), seeded(mixer)
    mixed = mix(images, target, seed)
    check_record(images, target, mixed)
    check_pixels(images, mixed)
    check_share(mixed)
    assert replace(mixed, checked=False) and torch.equal(images, kept) and same(mixed, mix(images, target, seed))


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(ALL), per_sample=st.booleans(), seed=st.integers(0, 10**6),
       lam=st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0]), st.floats(0, 1)),
       shape=st.tuples(st.sampled_from([1, 2, 5]), st.just(3), st.integers(1, 16), st.integers(1, 16)))
def test_any_share_from_0_to_1_gives_a_valid_mixture_and_1_the_image_itself(kind, per_sample, seed, lam, shape):
    images, n, dice = numbered_images(shape, generator_of(seed)), shape[0], generator_of(seed)
    wanted, partner = torch.full((n if per_sample else 1,), lam, dtype=torch.float64), torch.arange(n).roll(1)
    made, share, mask, *shown = kind(per_sample=per_sample).mix(images, partner, wanted, model=None, generator=dice)
    mixed = Mixed(made, partner, partner[partner], share.float().expand(n), partner, mask,
                  shown=shown[0] if shown else None)
    check_pixels(images, mixed)
    check_share(mixed)
    if lam == 1: assert torch.equal(made, images) and mixed.lam.eq(1).all()


@pytest.mark.parametrize("per_sample", BOOLS)
@pytest.mark.parametrize("kind", ALL)
def test_per_sample_draws_one_share_each_and_per_batch_one_for_all(kind, per_sample):
    images = torch.rand(64, 3, 24, 24, generator=generator_of())
    mixed = seeded(kind(per_sample=per_sample))(images, torch.zeros(64).long(), 1)
    assert (len(mixed.lam.unique()) > 15) == per_sample and (per_sample or len(mixed.lam.unique()) == 1)
    if mixed.mask is not None: assert len(mixed.mask) == (64 if per_sample else 1)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("per_sample", BOOLS)
def test_views_and_expanded_batches_are_mixed_as_copies_are_and_not_written_to(kind, per_sample):
    base, mix = torch.rand(8, 3, 9, 6, generator=generator_of()), seeded(kind(per_sample=per_sample))
    for images in (base[:1].expand(4, 3, 9, 6), base[::2], base[:4, :, :6].mT):
        kept = images.clone()
        mixed = mix(images, torch.arange(4), 3)
        assert torch.equal(images, kept)
        torch.testing.assert_close(mixed.images, mix(images.contiguous(), torch.arange(4), 3).images)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("per_sample", BOOLS)
def test_gradients_reach_both_sources_by_their_share_of_the_pixels(kind, per_sample):
    images = torch.rand(4, 3, 12, 9, generator=generator_of()).requires_grad_()
    mixed = seeded(kind(per_sample=per_sample))(images, torch.arange(4), 5)
    mixed.images.sum().backward()
    assert images.grad.isfinite().all() and (images.grad != 0).flatten(1).any(1).all()
    own = (mixed.lam if mixed.mask is None else mixed.mask.mean((1, 2, 3))).expand(4)
    shares = own.clone().index_add_(0, mixed.partner, 1 - own)
    if kind is not ResizeMix: torch.testing.assert_close(images.grad.mean((1, 2, 3)), shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", VARIANTS)
def test_dice_and_pixels_stay_where_they_belong_whatever_the_default_device(mixer):
    images, target = torch.rand(5, 3, 9, 8, generator=generator_of()), torch.arange(5)
    expected = mixer(images, target, generator=generator_of(1))
    with torch.device("meta"): assert same(mixer(images, target, generator=generator_of(1)), expected)


# ---- the checks find what is broken --------------------------------------------------------------

def edit(kind, change):
    "A mixer of `kind` whose images, share and mask are changed by `change(images, partner, made, share, mask)`"
    @dataclass
    class Broken(kind):
        def mix(self, images, partner, lam, **kwargs):
            made, share, mask, *shown = super().mix(images, partner, lam, **kwargs)
            return *change(images, partner, made, share, mask), *shown
    return Broken


def one_pixel(images, partner, made, share, mask):
    made[-1, 0, -1, -1] += 1
    return made, share, mask


MESSAGE = "away from the (blend|mean|mask)"
FAULTS = {  # change, and what is said of it
    "the share of the partner": (lambda x, b, made, share, mask: (made, 1 - share, mask), MESSAGE),
    "an inverted mask": (lambda x, b, made, share, mask: (made, share, 1 - mask), MESSAGE),
    "another partner": (lambda x, b, made, share, mask: (made.roll(1, 0), share, mask), MESSAGE),
    "a rounded share": (lambda x, b, made, share, mask: (made, (share * 4).round() / 4, mask), "away from|share 1"),
    "a share below 0": (lambda x, b, made, share, mask: (made, share - 1.5, mask), r"`lam` must be in \[0, 1\]"),
    "another type": (lambda x, b, made, share, mask: (made.to(torch.float32), share, mask), "became torch.float32"),
    "pixels of a third image": (lambda x, b, made, share, mask: (
        torch.where(mask > mask.mean(), made, x[b[b]]), share, mask), MESSAGE),
    "one wrong pixel": (one_pixel, "away from|as it is"),
    "the batch overwritten": (lambda x, b, made, share, mask: (x.copy_(made), share, mask),
                              "(wrote to|shares memory with) the images"),
    "a row shifted": (lambda x, b, made, share, mask: (made.roll(1, 2), share, mask), MESSAGE),
    "always the same": (lambda x, b, made, share, mask: (
        x.clone(), torch.ones_like(share), torch.ones_like(mask)), "ten seeds|from the mask"),
    "the values looked at": (lambda x, b, made, share, mask: (
        made * float(x.isfinite().all()), share, mask), "looks at values"),
    "no mixture, but the images": (lambda x, b, made, share, mask: (x, share, mask), "shares memory|away from"),
    "noise": (lambda x, b, made, share, mask: (made + 0.01 * torch.rand_like(made), share, mask), MESSAGE),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("per_sample", BOOLS)
def test_check_mixer_finds_a_broken_mixer(kind, fault, per_sample):
    change, message = FAULTS[fault]
    with pytest.raises((AssertionError, ValueError), match=message):
        check_mixer(edit(kind, change)(per_sample=per_sample))


@pytest.mark.parametrize("fault", ["the share of the partner", "another partner", "one wrong pixel", "noise"])
def test_check_mixer_finds_a_broken_mixer_without_a_mask(fault):
    with pytest.raises(AssertionError): check_mixer(edit(MixUp, FAULTS[fault][0])())


def returns(change):
    "A CutMix whose record is changed by `change(mixed)`"
    def mix(images, target, *, model=None, generator=None):
        return change(CutMix()(images, target, model=model, generator=generator))
    return mix


@pytest.mark.parametrize("change, message", [
    (lambda mixed: replace(mixed, target_b=mixed.target_a.flip(0), checked=True), "`target_b`"),
    (lambda mixed: replace(mixed, partner=mixed.partner + 9, checked=True), "`partner` must be in"),
    (lambda mixed: replace(mixed, drawn=mixed.drawn + 1), r"`drawn` must be in \[0, 1\]"),
    (lambda mixed: replace(mixed, drawn=mixed.partner), "`drawn` must be floating point"),
    (lambda mixed: replace(mixed, untouched=True), "an `untouched` batch"),
    (lambda mixed: (mixed.images, mixed.target_a), "must return a Mixed, got tuple"),
])
def test_check_mixer_finds_wrong_records(change, message):
    with pytest.raises(AssertionError, match=message): check_mixer(returns(change))


def test_check_mixer_finds_a_record_whose_methods_lie():
    class Lies(Mixed):
        def soft_target(self, num_classes): return Mixed.soft_target(self, num_classes).flip(1)
    class Stays(Mixed):
        def to(self, device): return replace(self, mask=1 - self.mask, checked=True)
    for kind, message in ((Lies, "`soft_target` must"), (Stays, "`to` must keep")):
        with pytest.raises(AssertionError, match=message):
            check_mixer(returns(lambda mixed, kind=kind: kind(**vars(mixed))), shapes=SHAPES[:1])


def test_check_mixer_finds_global_dice_and_dice_that_never_fall():
    class Global(CutMix):
        def mix(self, images, partner, lam, *, model, generator):
            return super().mix(images, partner, lam, model=model, generator=None)
    with pytest.raises(AssertionError, match="global"): check_mixer(Global())
    with pytest.raises(AssertionError, match="ten seeds"): check_mixer(CutMix(p=0.0))


def test_check_ends_finds_a_mixer_that_mixes_when_told_not_to():
    class Always(GridMix):
        def mix(self, images, partner, lam, **kwargs): return super().mix(images, partner, lam.clamp(max=0.5), **kwargs)
    with pytest.raises(AssertionError, match="with the share 1"): check_ends(Always(), numbered_images((3, 3, 8, 9)))


def test_check_types_finds_lost_memory_formats_and_precision():
    contiguous = edit(CutMix, lambda x, b, made, share, mask: (made.contiguous(), share, mask))()
    with pytest.raises(AssertionError, match="channels last"):
        check_types(seeded(contiguous), torch.rand(7, 3, 10, 6, generator=generator_of()), torch.arange(7))
    coarse = edit(MixUp, lambda x, b, made, share, mask: (made.bfloat16().to(made.dtype), share, mask))()
    with pytest.raises(AssertionError, match="away from the blend"): check_mixer(coarse)


def test_a_model_is_handed_on_and_then_only_the_cpu_is_checked():
    seen = []
    class Looks(CutMix):
        def mix(self, images, partner, lam, *, model, generator):
            seen.append(model)
            assert images.device.type == "cpu"
            return super().mix(images, partner, lam, model=model, generator=generator)
    check_mixer(Looks(), model="the model", shapes=SHAPES[:2])
    assert set(seen) == {"the model"}
