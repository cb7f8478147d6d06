"OneOf: fair choices, parts in the order of the batch, and mixers by name"

import torch

import sumix_nb.mixers
from sumix_nb.mixers import MIXERS, CutMix, MixUp, OneOf
from sumix_nb.mixers.checking import check_pixels, check_record, check_share, numbered_images
from sumix_nb.mixers.choosing import join
from sumix_nb.mixers.mixed import unmixed
from tests.mixers.oracles import BOOLS, seeded


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


def test_what_was_drawn_is_kept_if_any_part_was_clipped():
    images, target, rows = torch.rand(5, 1, 8, 8), torch.arange(5), [torch.tensor([3, 0]), torch.tensor([1, 4, 2])]
    boxes, fades = (kind(per_sample=True)(images[row], target[row], generator=seeded(1))
                    for kind, row in zip((CutMix, MixUp), rows))
    mixed = join([boxes, fades], rows, target)
    assert torch.equal(mixed.drawn[rows[0]], boxes.drawn) and torch.equal(mixed.drawn[rows[1]], fades.lam)
    assert join([fades, fades], [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])], torch.arange(6)).drawn is None


def test_a_batch_for_which_nothing_was_chosen_is_untouched():
    images, target = torch.rand(4, 3, 6, 6), torch.arange(4)
    for per_sample in BOOLS:
        never, coin = OneOf([CutMix()], [0.0], per_sample), OneOf([CutMix(p=0.0), MixUp(p=0.0)], None, per_sample)
        for mixer in (never, coin):
            mixed = mixer(images, target, generator=seeded())
            assert mixed.untouched and torch.equal(mixed.images, images) and mixed.lam.eq(1).all()
        assert not OneOf([CutMix(), MixUp()], None, per_sample)(images, target, generator=seeded()).untouched
    some = OneOf([MixUp()], [0.5], per_sample=True)(images, target, generator=seeded(3))
    assert not some.untouched and 0 < some.lam.eq(1).sum() < 4


def test_the_package_of_mixers_exports_what_it_says_and_names_each_mixer():
    assert set(sumix_nb.mixers.__all__) == {"CutMix", "FMix", "GridMix", "MIXERS", "MixUp", "Mixed", "Mixer", "OneOf",
                                            "PuzzleMix", "ResizeMix", "SaliencyMix", "SmoothMix"}
    assert list(MIXERS) == ["mixup", "cutmix", "fmix", "resizemix", "saliencymix", "gridmix", "smoothmix",
                            "puzzlemix"]
    assert all(getattr(sumix_nb.mixers, kind.__name__) is kind for kind in MIXERS.values())
