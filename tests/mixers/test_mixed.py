"Dice, the record, the frame and blending: what is drawn, that a record cannot lie, and what is skipped"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumix_nb.checks import check_shares
from sumix_nb.mixers.mixed import Mixed, Mixer, blend_, is_channels_last, sample_lam, take_images
from sumix_nb.mixers.resizemix import ResizeMix
from tests.mixers.oracles import ALL, BOOLS, BOX, seeded

IMAGES, TARGET = torch.randn(4, 1, 6, 5, generator=seeded()), torch.tensor([3, 1, 2, 1])
PARTNER, HALF = torch.tensor([2, 0, 3, 1]), torch.full((4,), 0.5)


def record(**changes):
    parts = {"images": IMAGES, "target_a": TARGET, "target_b": TARGET[PARTNER], "lam": HALF, "partner": PARTNER}
    return Mixed(**parts | changes)


# ---- dice ----------------------------------------------------------------------------------------

def test_lambda_stays_inside_0_1_where_the_distribution_has_its_ends():
    lam = sample_lam(0.01, 20000, seeded())
    assert lam.min() >= 1e-6 and lam.max() <= 1 - 1e-6
    assert ((lam < 0.01) | (lam > 0.99)).double().mean() > 0.93
    with pytest.raises(ValueError, match="`alpha` must"): sample_lam(1e-3)


# ---- the record ----------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, rule", [
    ({"target_b": TARGET}, "`target_b` must be the targets of the partners"),
    ({"partner": PARTNER.flip(0)}, "`target_b` must be the targets of the partners"),
    ({"target_a": torch.rand(4, 3), "target_b": torch.rand(4, 3)}, "`target_b` must be the targets"),
    ({"target_b": TARGET[PARTNER][:, None]}, "`target_b` must be the targets"),
    ({"lam": 14 * HALF}, r"`lam` must be in \[0, 1\], got values from 7.0 to 7.0"),
    ({"lam": HALF - 0.6}, r"`lam` must be in \[0, 1\]"),
    ({"lam": HALF * torch.nan}, r"`lam` must be in \[0, 1\], got values from nan"),
    ({"partner": PARTNER + 90}, r"`partner` must be in \[0, 3\], got values 90 to 93"),
    ({"partner": PARTNER - 1}, r"`partner` must be in \[0, 3\]"),
    ({"partner": PARTNER[:, None]}, r"`partner` must have the shape \(4,\)"),
    ({"drawn": HALF[:2]}, "`drawn` must have one row"),
    ({"drawn": HALF[:, None]}, r"`drawn` must have the shape \(4,\)"),
])
def test_a_record_that_lies_is_refused(changes, rule):
    with pytest.raises(ValueError, match=rule): record(**changes)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="`partner` must be int64"): record(partner=PARTNER.float())
    with pytest.raises(TypeError, match="`untouched` must be True or False, got 'no'"): record(untouched="no")


def test_true_records_are_accepted_and_cannot_be_changed():
    soft = torch.rand(4, 7)
    assert record(target_a=soft, target_b=soft[PARTNER], drawn=HALF).drawn is HALF
    assert record(lam=torch.tensor([0.0, 1.0, 0.3, 1e-6])).mask is None
    with pytest.raises(AttributeError): record().lam = HALF
    empty = Mixed(IMAGES[:0], TARGET[:0], TARGET[:0], HALF[:0], PARTNER[:0])
    assert len(empty.images) == 0


def test_values_are_not_compared_where_looking_is_not_free_nor_where_they_are_known():
    "Shapes are, everywhere"
    parts = (part.to("meta") for part in (IMAGES, TARGET, TARGET, 7 * HALF, PARTNER))
    assert Mixed(*parts).lam.device.type == "meta"
    assert record(lam=7 * HALF, checked=True).lam.max() == 3.5
    with pytest.raises(ValueError, match="`lam` must have one row"): record(lam=HALF[:3], checked=True)
    assert check_shares("lam", torch.full((2,), 7.0, device="meta")) is None


def test_a_record_moves_as_a_whole():
    mixed = record(mask=torch.ones(1, 1, 6, 5), drawn=HALF, untouched=True)
    away = mixed.to("meta")
    tensors = [part for part in vars(away).values() if isinstance(part, torch.Tensor)]
    assert len(tensors) == 7 and {part.device.type for part in tensors} == {"meta"}
    assert away.untouched and away.images.shape == IMAGES.shape
    back = mixed.to("cpu")
    assert all(vars(back)[name] is part for name, part in vars(mixed).items())
    assert record().to("meta").mask is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_what_a_moved_record_shows_is_where_the_maps_are(device):
    mixed = ResizeMix(per_sample=True)(IMAGES, TARGET, generator=torch.Generator().manual_seed(0))
    parts = mixed.to(device).visible(IMAGES.to(device))
    assert {part.device.type for part in parts} == {device}
    for part, wanted in zip(parts, mixed.visible(IMAGES), strict=True): torch.testing.assert_close(part.cpu(), wanted)


def test_soft_targets_of_indices_soft_labels_and_equal_labels_by_hand():
    lam = torch.tensor([0.9, 0.2, 0.0, 1.0])
    for target in (TARGET, TARGET.int(), torch.nn.functional.one_hot(TARGET), torch.rand(4, 4)):
        got = record(target_a=target, target_b=target[PARTNER], lam=lam).soft_target(4)
        assert got.dtype == torch.float32 and got.shape == (4, 4)
        for i, j in enumerate(PARTNER.tolist()):
            for k in range(4):
                first, second = (float(target[n] == k) if target.ndim == 1 else float(target[n, k]) for n in (i, j))
                assert got[i, k].item() == pytest.approx(lam[i].item() * first + (1 - lam[i].item()) * second)


@pytest.mark.parametrize("target, classes, error, rule", [
    (TARGET, 3, ValueError, r"`target_a` must be in \[0, 2\], got 3"),
    (TARGET - 2, 4, ValueError, r"`target_a` must be in \[0, 3\], got -1"),
    (TARGET.float(), 4, ValueError, "`target_a` must be class indices or soft labels of 4 classes"),
    (torch.rand(4, 3), 4, ValueError, r"soft labels of 4 classes, got the shape \(4, 3\)"),
    (TARGET, 4.0, TypeError, "`num_classes` must be a whole number"),
    (TARGET, True, TypeError, "`num_classes` must be a whole number"),
])
def test_soft_targets_that_do_not_fit_the_classes_are_refused(target, classes, error, rule):
    with pytest.raises(error, match=rule): record(target_a=target, target_b=target[PARTNER]).soft_target(classes)


# ---- the frame -----------------------------------------------------------------------------------

class Half(Mixer):
    "Half of both images, and what it was called with"
    def mix(self, images, partner, lam, *, model, generator):
        self.seen = model, generator, lam
        return (images + images[partner]) / 2, lam * 0 + 0.5, None


def test_a_new_mixer_needs_only_mix_and_is_given_model_and_generator():
    generator, mixer = seeded(), Half(per_sample=True)
    mixed = mixer(IMAGES, TARGET, model="the model", generator=generator)
    assert isinstance(mixed, Mixed) and mixer.seen[:2] == ("the model", generator)
    assert mixer.seen[2].shape == (4,) and mixer.seen[2].dtype == torch.float64
    assert mixed.lam.tolist() == [0.5] * 4 and mixed.lam.dtype == torch.float32
    assert mixed.drawn is None and not mixed.untouched
    torch.testing.assert_close(mixed.images, (IMAGES + IMAGES[mixed.partner]) / 2)
    with pytest.raises(NotImplementedError, match="Mixer must define `mix`"): Mixer()(IMAGES, TARGET)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("per_sample", BOOLS)
def test_partner_first_then_lambda_then_the_coin_are_drawn(kind, per_sample):
    "So that a batch with `p=1` is the one it always was, and the coin comes after what is drawn without it"
    twin, images = seeded(3), torch.rand(5, 3, 9, 8, generator=seeded())
    mixed = kind(per_sample=per_sample)(images, torch.arange(5), generator=seeded(3))
    assert torch.equal(mixed.partner, torch.randperm(5, generator=twin))
    if kind in BOX and kind not in ALL[3:4]:
        drawn = sample_lam(1.0, 5 if per_sample else 1, twin).float().expand(5)
        assert torch.equal(mixed.drawn, drawn)
    assert (mixed.drawn is not None) == (kind in BOX)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("per_sample", BOOLS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_p_is_how_often_anything_is_mixed_and_nothing_is_done_for_an_untouched_batch(kind, per_sample, p):
    calls = []
    class Counted(kind):
        def mix(self, images, partner, lam, **kwargs):
            calls.append(lam)
            assert (lam < 1).any()
            return super().mix(images, partner, lam, **kwargs)
    images, generator, touched = torch.rand(3, 3, 8, 9, generator=seeded()), seeded(2), []
    mixer = Counted(per_sample=per_sample, p=p)
    for _ in range(200):
        before = len(calls)
        mixed = mixer(images, torch.arange(3), generator=generator)
        assert mixed.untouched == (len(calls) == before)
        if mixed.untouched:
            assert torch.equal(mixed.images, images) and mixed.lam.eq(1).all()
            assert mixed.partner.tolist() == [0, 1, 2] and mixed.images.data_ptr() != images.data_ptr()
        else: touched += (calls[-1] < 1).tolist()
    share = sum(touched) / (200 * (3 if per_sample else 1))
    assert share == pytest.approx(p, abs=0.1) and (p not in (0, 1) or share == p)


# ---- fetching, blending, MixUp -------------------------------------------------------------------

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
