"Numbers recorded from the public reference code: the released loss with its gradients, and the mixers"
from pathlib import Path

import pytest
import torch

from sumix_nb.sumix.loss import sumix_loss
from sumix_nb.mixers.cutmix import box_mask, box_ratio, cut_and_paste, mixing_box, outer_mask, scaled_box
from sumix_nb.mixers.mixed import MixUp, Mixed, blend_, take_images
from sumix_nb.mixers.fmix import binarise, low_frequency_image
from sumix_nb.mixers.gridmix import GridMix, SmoothMix, bell, grid_lines, mix_lines
from sumix_nb.mixers.resizemix import ResizeMix, paste_resized
from sumix_nb.mixers.saliency import fine_grained_saliency, most_salient
from sumix_nb.sumix.ratio import VARIANTS, mix_ratio
from tests.conftest import Cases

EXCERPT = Path(__file__).parent / "sumix" / "sumix_loss_excerpt.npz"
LEAVES = ("cls_mix", "cls_one", "unc_mix_pre", "unc_one_pre")


def run_case(cases, case, dtype):
    "Terms and gradients of `sumix_loss` on the recorded inputs of one case"
    has_head = (case, "unc_one_pre") in cases
    leaves = {name: cases[case, name].to(dtype).requires_grad_() for name in (LEAVES if has_head else LEAVES[:2])}
    target, n = cases[case, "y_a"], len(cases[case, "y_a"])
    lam = torch.full((n,), cases[case, "lam"], dtype=dtype)
    mixed = Mixed(torch.zeros(n, 1, 1, 1), target, cases[case, "y_b"], lam, cases[case, "rand_index"])
    logits_mixed, logits, *heads = leaves.values()
    heads = heads or (None, None)
    terms = sumix_loss(logits_mixed, logits, *heads, mixed, xi=cases[case, "gama"], variant="released")
    terms.loss.backward()
    return terms, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def check_case(cases, case, precision):
    "Every recorded number of one case; where the reference is NaN, ours must be finite"
    dtype, tolerance = {"f64": (torch.float64, 1e-9), "f32": (torch.float32, 1e-5)}[precision]
    terms, gradients = run_case(cases, case, dtype)
    assert all(value.isfinite().all() for value in (*terms, *gradients.values()))

    def close(got, name):
        recorded = torch.as_tensor(cases[case, precision, name], dtype=dtype)
        finite = recorded.isfinite()
        scale = recorded[finite].abs().max().item() if finite.any() else 0.0
        torch.testing.assert_close(got[finite], recorded[finite], rtol=tolerance, atol=tolerance * scale)

    close(terms.ratio, "lam_a")
    close(terms.regulariser, "reg")
    close(terms.mixed_ce, "mix_ce")
    close(terms.loss, "loss")
    if torch.as_tensor(cases[case, precision, "loss"]).isfinite():
        for name, gradient in gradients.items(): close(gradient, f"grad_{name}")
    if (case, precision, "alpha") in cases:
        logits_mixed, logits = (cases[case, name].to(dtype) for name in LEAVES[:2])
        target_a, target_b, partners = (cases[case, name] for name in ("y_a", "y_b", "rand_index"))
        distance = VARIANTS["released"].distance
        close(distance(logits_mixed, logits, target_a, target_b), "alpha")
        close(distance(logits_mixed, logits[partners], target_b, target_a), "alpha_")


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_released_loss_equals_every_recorded_case(golden, precision):
    cases = golden("sumix_loss_official.npz")
    assert len(cases.names) >= 9
    for case in cases.names: check_case(cases, case, precision)


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_released_loss_equals_the_committed_excerpt(precision):
    cases = Cases(EXCERPT)
    assert cases.names == ["c0", "c1"]
    for case in cases.names: check_case(cases, case, precision)


def test_reference_nan_is_finite_here(golden):
    cases = golden("sumix_loss_official.npz")
    recorded = cases["c8", "f32", "lam_a"]
    assert recorded.isnan().any()
    terms, _ = run_case(cases, "c8", torch.float32)
    torch.testing.assert_close(terms.ratio, cases["c8", "f64", "lam_a"].float(), rtol=1e-3, atol=1e-5)


def test_mix_ratio_equals_recorded_ratios(golden):
    cases = golden("sumix_loss_official.npz")
    for case in cases.names:
        logits_mixed, logits = (cases[case, name].double() for name in LEAVES[:2])
        partners = logits[cases[case, "rand_index"]]
        ratio = mix_ratio(logits_mixed, logits, partners, cases[case, "lam"], variant="released",
                          target_a=cases[case, "y_a"], target_b=cases[case, "y_b"])
        torch.testing.assert_close(ratio, cases[case, "f64", "lam_a"], rtol=1e-9, atol=1e-12)


def test_cutmix_equals_recorded_boxes_masks_and_pixels(golden):
    cases, inputs = golden("cutmix_official.npz"), golden("mixer_inputs.npz")
    assert len(cases.names) >= 8
    for case in cases.names:
        images = torch.from_numpy(inputs.arrays[f"img_{cases[case, 'input']}"])
        height, width = images.shape[-2:]
        box = mixing_box(cases[case, "lam_in"], height, width, cases[case, "centre_rc"].tolist())
        assert list(box) == cases[case, "box"].tolist()
        mixed, mask = cut_and_paste(images, cases[case, "perm"], box)
        assert torch.equal(mixed, cases[case, "mixed"])
        assert torch.equal(mask[0, 0], 1 - cases[case, "mask"].float())
        assert box_ratio(box, height, width) == pytest.approx(cases[case, "lam_out"], abs=1e-7)


def test_mixup_equals_recorded_images(golden):
    cases, inputs = golden("mixup_official.npz"), golden("mixer_inputs.npz")
    for case in cases.names:
        images = torch.from_numpy(inputs.arrays[f"img_{cases[case, 'input']}"])
        share = torch.tensor([cases[case, "lam_out"]], dtype=torch.float64)
        mixed, lam, mask = MixUp().mix(images, cases[case, "perm"], share, model=None, generator=None)
        assert mask is None
        torch.testing.assert_close(mixed, cases[case, "mixed"], rtol=0, atol=1e-6)
        torch.testing.assert_close(lam.double(), share, rtol=0, atol=1e-7)


# ---- FMix ------------------------------------------------------------------------------------------

def test_fmix_equals_recorded_low_frequency_images(golden):
    cases = golden("fmix_official.npz")
    names = [case for case in cases.names if (case, "noise") in cases]
    assert len(names) >= 9
    for case in names:
        low = cases[case, "low"]
        got = low_frequency_image(cases[case, "noise"], *low.shape[1:], cases[case, "decay"], quirk=True)
        torch.testing.assert_close(got, low, rtol=0, atol=1e-12)


def test_fmix_equals_recorded_masks_and_images(golden):
    cases, inputs = golden("fmix_official.npz"), golden("mixer_inputs.npz")
    names = [case for case in cases.names if (case, "mask") in cases]
    assert len(names) >= 20
    for case in names:
        low = cases[case, "low"] if (case, "low") in cases else cases["f0", "low"]
        lam = cases[case, "lam"] if (case, "lam") in cases else cases[case, "lam_out"]
        max_soft = cases[case, "max_soft"] if (case, "max_soft") in cases else 0.0
        round_up = cases[case, "ceil"] if (case, "ceil") in cases else not case.endswith("f")
        mask = binarise(low, lam, max_soft, round_up)
        torch.testing.assert_close(mask[0, 0], cases[case, "mask"].double(), rtol=0, atol=1e-7)
        if (case, "mixed") not in cases: continue
        images = torch.from_numpy(inputs.arrays[f"img_{cases[case, 'input']}"])
        mixed = blend_(take_images(images, cases[case, "perm"]), images, mask)
        torch.testing.assert_close(mixed, cases[case, "mixed"], rtol=0, atol=1e-6)


# ---- ResizeMix -------------------------------------------------------------------------------------

def test_resizemix_equals_recorded_boxes_and_images(golden):
    cases, inputs = golden("resizemix_official.npz"), golden("mixer_inputs.npz")
    assert len(cases.names) >= 12
    for case in cases.names:
        images = torch.from_numpy(inputs.arrays[f"img_{cases[case, 'input']}"])
        sides, box = images.shape[-2:], tuple(cases[case, "box"].tolist())
        col, row = cases[case, "draws"].tolist()
        if sides[0] == sides[1]:
            assert scaled_box(cases[case, "tau"], *sides, (row, col)) == box
            assert mixing_box(1 - cases[case, "tau"] ** 2, *sides, (row, col)) == box
        partners, many = images[cases[case, "perm"]], tuple(torch.tensor([edge] * len(images)) for edge in box)
        for form in (box, many):
            mixed = paste_resized(images, partners, form, cases[case, "mode"])
            exact = cases[case, "mode"] == "nearest"
            torch.testing.assert_close(mixed, cases[case, "mixed"], rtol=0, atol=0 if exact else 1e-6)
        assert box_ratio(box, *sides) == pytest.approx(cases[case, "lam_out"], abs=1e-12)


def test_resizemix_mask_is_not_transposed_as_the_recorded_one_is(golden):
    cases, transposed = golden("resizemix_official.npz"), 0
    for case in cases.names:
        recorded, box = cases[case, "mask"].float(), tuple(cases[case, "box"].tolist())
        if recorded.shape[0] != recorded.shape[1]: continue
        mask = 1 - box_mask(box, *recorded.shape)[0, 0]
        assert torch.equal(mask.T, recorded)
        transposed += not torch.equal(mask, recorded)
    assert transposed > 3


def test_resizemix_centres_rows_over_rows_on_images_that_are_not_square():
    "The reference draws a row where it needs a column: on 64 x 16 pixels its rows would stay in the upper quarter"
    lam = torch.full((2000,), 0.9, dtype=torch.float64)
    images, partner = torch.zeros(2000, 1, 64, 16), torch.arange(2000)
    mixer, generator = ResizeMix(per_sample=True), torch.Generator().manual_seed(0)
    _, share, mask = mixer.mix(images, partner, lam, model=None, generator=generator)
    pasted = mask[:, 0] == 0
    rows, cols = (pasted.any(dim).float().mean(0).tolist() for dim in (2, 1))
    assert rows[60] == pytest.approx(rows[3], abs=0.05) and cols[13] == pytest.approx(cols[2], abs=0.05)
    assert min(rows[:8] + rows[56:]) > 0.1 and (share < 1).float().mean() > 0.9


# ---- SaliencyMix -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["sq", "ns"])
def test_saliency_equals_recorded_maps_and_peaks_of_8_bit_images(golden, kind):
    cases, inputs = golden("saliencymix_official.npz").arrays, golden("mixer_inputs.npz").arrays
    images = torch.from_numpy(inputs[f"u8_{kind}"]).permute(0, 3, 1, 2)
    for name, picture in ((f"u8_{kind}", images), (f"u8_bgr_{kind}", images.flip(1))):
        found = fine_grained_saliency(picture)
        assert torch.equal(found, (255 * torch.from_numpy(cases[f"map_{name}"])).to(torch.uint8))
        assert torch.stack(most_salient(found), 1).tolist() == cases[f"peak_{name}"].tolist()


def test_saliencymix_boxes_are_those_of_the_8_bit_map_and_not_of_the_misread_floats(golden):
    cases, inputs = golden("saliencymix_official.npz"), golden("mixer_inputs.npz").arrays
    names, misread = [case for case in cases.names if (case, "box_u8") in cases], 0
    assert len(names) >= 6
    for case in names:
        kind, source = cases[case, "input"], cases[case, "perm"][0]
        images = torch.from_numpy(inputs[f"u8_{kind}"]).permute(0, 3, 1, 2)
        rows, cols = most_salient(fine_grained_saliency(images))
        box = mixing_box(cases[case, "lam_in"], *images.shape[-2:], (rows[source], cols[source]))
        assert list(box) == cases[case, "box_u8"].tolist()
        misread += list(box) != cases[case, "box"].tolist()
        normalised = torch.from_numpy(inputs[f"img_{kind}"])
        reference = tuple(cases[case, "box"].tolist())
        mixed, _ = cut_and_paste(normalised, cases[case, "perm"], reference)
        assert torch.equal(mixed, cases[case, "mixed"])
        assert box_ratio(reference, *images.shape[-2:]) == pytest.approx(cases[case, "lam_out"], abs=1e-12)
    assert misread == len(names)


# ---- GridMix and SmoothMix ---------------------------------------------------------------------------

def recorded_grid(cases, case, sides):
    "Our grid from the draws of one recorded case"
    one = [torch.tensor([cases[case, name]], dtype=torch.float64)
           for name in ("lam_in", "n_holes", "cut_area", "cut_aspect")]
    return grid_lines(one[0], *sides, *one[1:], cases[case, "cxy"][None], cases[case, "hole_aspect"])


def crop_fits(cases, case, sides):
    "Does the reference's rectangle fit into the image?"
    cut_width = int((int(sides[0] * sides[1] * cases[case, "cut_area"]) / cases[case, "cut_aspect"]) ** 0.5)
    return cut_width <= sides[1] and int(cut_width * cases[case, "cut_aspect"]) <= sides[0]


def test_gridmix_equals_recorded_masks_and_images_where_the_rectangle_fits(golden):
    cases, inputs = golden("gridmix_official.npz"), golden("mixer_inputs.npz")
    compared = 0
    for case in cases.names:
        images = torch.from_numpy(inputs.arrays[f"img_{cases[case, 'input']}"])
        sides = images.shape[-2:]
        rows, cols = recorded_grid(cases, case, sides)
        if sides[0] != sides[1] or not crop_fits(cases, case, sides): continue
        mixed, share, mask = mix_lines(images, cases[case, "perm"], torch.zeros(1), rows, cols)
        assert torch.equal(1 - mask[0, 0], cases[case, "mask"].float())
        torch.testing.assert_close(mixed, cases[case, "mixed"], rtol=0, atol=1e-6)
        assert share.item() == pytest.approx(cases[case, "lam_out"], abs=1e-7)
        compared += 1
    assert compared >= 4


def test_gridmix_keeps_its_rectangle_inside_the_image_where_the_reference_does_not(golden):
    cases, inputs = golden("gridmix_official.npz"), golden("mixer_inputs.npz")
    faulty = 0
    for case in cases.names:
        sides = inputs.arrays[f"img_{cases[case, 'input']}"].shape[-2:]
        if sides[0] == sides[1] and crop_fits(cases, case, sides): continue
        rows, cols = recorded_grid(cases, case, sides)
        whole = cases[case, "cut_area"] == 1
        assert rows.any() and cols.any() and not (whole and sides[0] != sides[1] and not rows[:, -sides[0] // 4:].any())
        assert not torch.equal(1 - outer_mask(rows, cols)[0, 0], cases[case, "mask"].float())
        faulty += 1
    assert faulty >= 3
    wide = GridMix(area=(1, 1), aspect=(1, 1), columns=(2, 2))
    _, _, mask = wide.mix(torch.zeros(1, 1, 64, 16), torch.tensor([0]), torch.tensor([0.5], dtype=torch.float64),
                          model=None, generator=None)
    assert (mask[0, 0, 56:] == 0).any(), "holes reach the lower rows of images that are not square"


def test_smoothmix_equals_recorded_kernels_and_images_but_gives_the_share_to_the_right_image(golden):
    cases, inputs = golden("smoothmix_official.npz"), golden("mixer_inputs.npz")
    assert len(cases.names) >= 3
    for case in cases.names:
        images = torch.from_numpy(inputs.arrays[f"img_{cases[case, 'input']}"])
        deviation = torch.tensor([cases[case, "sigma"]], dtype=torch.float64)
        rows, cols = (bell(side, torch.tensor([(side - 1) / 2 + cases[case, shift]]), deviation)
                      for side, shift in zip(images.shape[-2:], ("shift_h", "shift_w")))
        mixed, share, mask = mix_lines(images, cases[case, "perm"], torch.zeros(1), rows, cols)
        torch.testing.assert_close(1 - mask[0, 0], cases[case, "kernel"], rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed, cases[case, "mixed"], rtol=0, atol=1e-6)
        assert share.item() == pytest.approx(1 - cases[case, "lam_out"], abs=1e-6)
        assert share.item() == pytest.approx(mask.double().mean().item(), abs=1e-6)


def test_smoothmix_works_on_images_that_are_not_square_or_of_odd_sides_where_the_reference_fails():
    for shape in ((2, 3, 64, 48), (2, 3, 33, 33), (1, 3, 1, 7)):
        mixed = SmoothMix()(torch.rand(shape), torch.zeros(shape[0]), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(mixed.lam, mixed.mask.mean((1, 2, 3)).expand(shape[0]), rtol=0, atol=1e-6)
