"Covered patches: equal to recorded ones, as many as asked for, the right ones"
import numpy as np
import pytest
import torch

from sumix_nb.evaluation.accuracy import UnseenImages as Images
from sumix_nb.evaluation.accuracy import accuracy_of, predict
from sumix_nb.evaluation.occlusion import occlude, patch_side, plot_occlusion, salient_patches, under_occlusion
from tests.evaluation.oracles import FACTS, Colours

IMAGES = torch.randn(5, 3, 16, 24, generator=torch.Generator().manual_seed(0)) + 9  # never 0


@pytest.mark.parametrize("case", ["o0", "o1"])
def test_masks_equal_the_recorded_tool(golden, case):
    cases = golden("evaluation_official.npz")
    size, patch = cases[case, "size"], cases[case, "patch"]
    images = cases[case, "x"] if case == "o0" else torch.ones(1, 3, size, size)
    for j, ratio in enumerate(cases[case, "ratios"].tolist()):
        patches = cases[case, f"r{j}_patches"]
        assert len(patches) == cases[case, f"r{j}_count"] == round((size // patch)**2 * ratio)
        found = occlude(images, ratio, patch, patches=patches[None])
        assert torch.equal(found[0, 0] == 0, cases[case, f"r{j}_mask"].bool() | (images[0, 0] == 0))
        if case == "o0": assert torch.equal(found, cases[case, f"r{j}_out"])


@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 0.77, 1])
@pytest.mark.parametrize("per_image", [True, False])
def test_as_many_patches_as_asked_for_are_covered(ratio, per_image):
    found = occlude(IMAGES, ratio, 4, per_image=per_image, generator=torch.Generator().manual_seed(1))
    covered = (found == 0).all(1)
    blocks = covered.view(5, 4, 4, 6, 4).double().mean((2, 4)).flatten(1)
    assert set(blocks.unique().tolist()) <= {0.0, 1.0} and (blocks.sum(1) == round(24 * ratio)).all()
    assert torch.equal(found[~covered[:, None].expand_as(found)], IMAGES[~covered[:, None].expand_as(found)])
    if 0 < ratio < 1: assert (len(blocks.unique(dim=0)) == 1) is not per_image


def test_the_input_stays_and_a_seed_repeats():
    before = IMAGES.clone()
    one, same = (occlude(IMAGES, 0.5, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, same) and torch.equal(IMAGES, before)
    black = -torch.tensor(FACTS["mean"]) / torch.tensor(FACTS["std"])
    assert torch.equal(occlude(IMAGES, 1, 8, fill=black), black.view(1, 3, 1, 1).expand_as(IMAGES))


def test_the_curve_counts_answers():
    pixels = torch.randint(256, (9, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    test, model = Images(pixels, torch.arange(9), *FACTS.values()), Colours()
    found = under_occlusion(model, test, 4, (0, 0.5, 1), masks=2, seed=5, bs=9)
    assert found["n"] == 9 and found["patch"] == 4 and [len(row) for row in found["random"]] == [2, 2, 2]
    for mask in (0, 1):
        draws = torch.Generator().manual_seed(5 + mask)
        for i, ratio in enumerate((0, 0.5, 1)):
            seen = occlude(test.normalised(pixels), ratio, 4, generator=draws)
            assert found["random"][i][mask] == accuracy_of(predict(model, test, seen), test.target)
    images = test.normalised(pixels)
    seen = occlude(images, 0.5, 4, patches=salient_patches(model, images, test.target, 4))
    assert found["salient"][1] == accuracy_of(predict(model, test, seen), test.target)


def test_the_band_is_a_t_interval():
    found = {"ratio": [0, 1], "random": [[0.5, 0.6, 0.7], [0.1, 0.1, 0.1]], "salient": [0.6, 0.1]}
    ax = plot_occlusion({"mine": found})
    corners, reach = np.array(ax.collections[0].get_paths()[0].vertices), 4.302653 * 10 / 3**0.5
    ends = corners[corners[:, 0] == 0][:, 1]
    assert ax.get_lines()[0].get_ydata().tolist() == pytest.approx([60, 10])
    assert (ends.min(), ends.max()) == pytest.approx((60 - reach, 60 + reach))


@pytest.mark.parametrize(("sides", "patch"), [((32, 32), 4), ((64, 64), 8), ((224, 224), 16), ((28, 28), 4),
                                              ((100, 100), 10), ((48, 32), 4), ((31, 31), 1)])
def test_the_patch_divides_both_sides(sides, patch): assert patch_side(*sides) == patch


@pytest.mark.parametrize(("error", "call", "message"), [
    (TypeError, lambda: occlude([1], 0.5, 4), "`images` must be a tensor"),
    (ValueError, lambda: occlude(IMAGES[0], 0.5, 4), "`images` must have the shape"),
    (ValueError, lambda: occlude(IMAGES.byte(), 0.5, 4), "`images` must be floating point"),
    (ValueError, lambda: occlude(IMAGES, 1.1, 4), "`ratio` must be in"),
    (ValueError, lambda: occlude(IMAGES, float("nan"), 4), "`ratio` must be in"),
    (TypeError, lambda: occlude(IMAGES, "half", 4), "`ratio` must be a number"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 0), "`patch` must be at least 1"),
    (TypeError, lambda: occlude(IMAGES, 0.5, 4.0), "`patch` must be a whole number"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 5), "`patch` must divide"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 16), "`patch` must divide"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 4, fill="grey"), "`fill` must be one of"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 4, fill=torch.zeros(2)), "`fill` must have 3 values"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 4, patches=torch.zeros(2, 24).long()), "`patches` must be at least 12"),
    (ValueError, lambda: occlude(IMAGES, 0.5, 4, patches=torch.zeros(1, 11).long()), "`patches` must be at least 12"),
    (TypeError, lambda: occlude(IMAGES, 0.5, 4, generator=1), "`generator` must be"),
    (ValueError, lambda: salient_patches(Colours(), IMAGES, torch.zeros(5).long(), 7), "`patch` must divide"),
    (ValueError, lambda: under_occlusion(Colours(), Images(IMAGES, torch.zeros(5)), masks=0), "`masks` must be"),
])
def test_bad_input(error, call, message):
    with pytest.raises(error, match=message): call()
