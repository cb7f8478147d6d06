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

    def agrees(got, name):
        recorded = torch.as_tensor(cases[case, precision, name], dtype=dtype)
        finite = recorded.isfinite()
        scale = recorded[finite].abs().max().item() if finite.any() else 0.0
        torch.testing.assert_close(got[finite], recorded[finite], rtol=tolerance, atol=tolerance * scale)

    for value, name in zip(terms, ("loss", "lam_a", "mix_ce", "reg"), strict=True): agrees(value, name)
    if torch.as_tensor(cases[case, precision, "loss"]).isfinite():
        for name, gradient in gradients.items(): agrees(gradient, f"grad_{name}")
    logits_mixed, logits = (cases[case, name].to(dtype) for name in LEAVES[:2])
    target_a, target_b, partners = (cases[case, name] for name in ("y_a", "y_b", "rand_index"))
    agrees(mix_ratio(logits_mixed, logits, logits[partners], cases[case, "lam"], variant="released",
                     target_a=target_a, target_b=target_b), "lam_a")
    if (case, precision, "alpha") in cases:
        distance = VARIANTS["released"].distance
        agrees(distance(logits_mixed, logits, target_a, target_b), "alpha")
        agrees(distance(logits_mixed, logits[partners], target_b, target_a), "alpha_")


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
    assert cases["c8", "f32", "lam_a"].isnan().any()
    terms, _ = run_case(cases, "c8", torch.float32)
    torch.testing.assert_close(terms.ratio, cases["c8", "f64", "lam_a"].float(), rtol=1e-3, atol=1e-5)


@pytest.fixture
def recorded(golden):
    "`recorded(mixer, least)`: the values of each case by name, and the `images` that it mixed; at least so many cases"
    def load(mixer, least):
        cases, inputs = golden(f"{mixer}_official.npz"), golden("mixer_inputs.npz").arrays
        found = {name: {"name": name} for name in cases.names}
        for name, value in (key.split("__") for key in cases.arrays if "__" in key):
            found[name][value] = cases[name, value]
            if value == "input": found[name]["images"] = torch.from_numpy(inputs[f"img_{cases[name, value]}"])
        assert len(found) >= least
        return list(found.values())
    return load


def close(got, wanted, atol=1e-6): torch.testing.assert_close(got, wanted.to(got.dtype), rtol=0, atol=atol)


def test_cutmix_equals_recorded_boxes_masks_and_pixels(recorded):
    for case in recorded("cutmix", 8):
        sides = case["images"].shape[-2:]
        box = mixing_box(case["lam_in"], *sides, case["centre_rc"].tolist())
        assert list(box) == case["box"].tolist()
        mixed, mask = cut_and_paste(case["images"], case["perm"], box)
        assert torch.equal(mixed, case["mixed"]) and torch.equal(mask[0, 0], 1 - case["mask"].float())
        assert box_ratio(box, *sides) == pytest.approx(case["lam_out"], abs=1e-7)


def test_mixup_equals_recorded_images(recorded):
    for case in recorded("mixup", 5):
        share = torch.tensor([case["lam_out"]], dtype=torch.float64)
        mixed, lam, mask = MixUp().mix(case["images"], case["perm"], share, model=None, generator=None)
        assert mask is None
        close(mixed, case["mixed"])
        close(lam, share, 1e-7)


# ---- FMix ------------------------------------------------------------------------------------------

def test_fmix_equals_recorded_low_frequency_images_masks_and_mixtures(recorded):
    cases = recorded("fmix", 20)
    assert sum("noise" in case for case in cases) >= 9 and sum("mask" in case for case in cases) >= 20
    low = next(case["low"] for case in cases if case["name"] == "f0")
    for case in cases:
        if "noise" in case:
            got = low_frequency_image(case["noise"], *case["low"].shape[1:], case["decay"], quirk=True)
            close(got, case["low"], 1e-12)
        if "mask" not in case: continue
        lam, round_up = case.get("lam", case.get("lam_out")), case.get("ceil", not case["name"].endswith("f"))
        mask = binarise(case.get("low", low), lam, case.get("max_soft", 0.0), round_up)
        close(mask[0, 0], case["mask"], 1e-7)
        if "mixed" not in case: continue
        close(blend_(take_images(case["images"], case["perm"]), case["images"], mask), case["mixed"])


# ---- ResizeMix -------------------------------------------------------------------------------------

def test_resizemix_equals_recorded_boxes_and_images(recorded):
    for case in recorded("resizemix", 12):
        images, box = case["images"], tuple(case["box"].tolist())
        sides, (col, row) = images.shape[-2:], case["draws"].tolist()
        if sides[0] == sides[1]:
            assert scaled_box(case["tau"], *sides, (row, col)) == box
            assert mixing_box(1 - case["tau"] ** 2, *sides, (row, col)) == box
        many = tuple(torch.tensor([edge] * len(images)) for edge in box)
        for form in (box, many):
            mixed = paste_resized(images, images[case["perm"]], form, case["mode"])
            close(mixed, case["mixed"], 0 if case["mode"] == "nearest" else 1e-6)
        assert box_ratio(box, *sides) == pytest.approx(case["lam_out"], abs=1e-12)


def test_resizemix_mask_is_not_transposed_as_the_recorded_one_is(recorded):
    transposed = 0
    for case in recorded("resizemix", 12):
        wrong = case["mask"].float()
        if wrong.shape[0] != wrong.shape[1]: continue
        mask = 1 - box_mask(tuple(case["box"].tolist()), *wrong.shape)[0, 0]
        assert torch.equal(mask.T, wrong)
        transposed += not torch.equal(mask, wrong)
    assert transposed > 3


def test_resizemix_centres_rows_over_rows_on_images_that_are_not_square():
    "The reference draws a row where it needs a column: on 64 x 16 pixels its rows would stay in the upper quarter"
    lam = torch.full((2000,), 0.9, dtype=torch.float64)
    images, partner = torch.zeros(2000, 1, 64, 16), torch.arange(2000)
    mixer, generator = ResizeMix(per_sample=True), torch.Generator().manual_seed(0)
    _, share, mask, _ = mixer.mix(images, partner, lam, model=None, generator=generator)
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


def test_saliencymix_boxes_are_those_of_the_8_bit_map_and_not_of_the_misread_floats(golden, recorded):
    inputs, cases = golden("mixer_inputs.npz").arrays, recorded("saliencymix", 6)
    for case in cases:
        photos, source = torch.from_numpy(inputs[f"u8_{case['input']}"]).permute(0, 3, 1, 2), case["perm"][0]
        rows, cols = most_salient(fine_grained_saliency(photos))
        box = mixing_box(case["lam_in"], *photos.shape[-2:], (rows[source], cols[source]))
        misread = tuple(case["box"].tolist())
        assert list(box) == case["box_u8"].tolist() != list(misread)
        assert torch.equal(cut_and_paste(case["images"], case["perm"], misread)[0], case["mixed"])
        assert box_ratio(misread, *photos.shape[-2:]) == pytest.approx(case["lam_out"], abs=1e-12)


# ---- GridMix and SmoothMix ---------------------------------------------------------------------------

def grid_of(case):
    "Our grid from the draws of a recorded case, and whether the reference's rectangle fits into the image, a square"
    height, width = case["images"].shape[-2:]
    one = [torch.tensor([case[name]], dtype=torch.float64) for name in ("lam_in", "n_holes", "cut_area", "cut_aspect")]
    lines = grid_lines(one[0], height, width, *one[1:], case["cxy"][None], case["hole_aspect"])
    cut_width = int((int(height * width * case["cut_area"]) / case["cut_aspect"]) ** 0.5)
    return lines, height == width and cut_width <= width and int(cut_width * case["cut_aspect"]) <= height


def test_gridmix_equals_recorded_masks_and_images_where_the_rectangle_fits(recorded):
    fitting = [(case, *grid_of(case)[0]) for case in recorded("gridmix", 7) if grid_of(case)[1]]
    assert len(fitting) >= 4
    for case, rows, cols in fitting:
        mixed, share, mask = mix_lines(case["images"], case["perm"], torch.zeros(1), rows, cols)
        assert torch.equal(1 - mask[0, 0], case["mask"].float())
        close(mixed, case["mixed"])
        assert share.item() == pytest.approx(case["lam_out"], abs=1e-7)


def test_gridmix_keeps_its_rectangle_inside_the_image_where_the_reference_does_not(recorded):
    faulty = [(case, *grid_of(case)[0]) for case in recorded("gridmix", 7) if not grid_of(case)[1]]
    assert len(faulty) >= 3
    for case, rows, cols in faulty:
        height, width = case["images"].shape[-2:]
        whole = case["cut_area"] == 1 and height != width
        assert rows.any() and cols.any() and not (whole and not rows[:, -height // 4:].any())
        assert not torch.equal(1 - outer_mask(rows, cols)[0, 0], case["mask"].float())
    wide = GridMix(area=(1, 1), aspect=(1, 1), columns=(2, 2))
    _, _, mask = wide.mix(torch.zeros(1, 1, 64, 16), torch.tensor([0]), torch.tensor([0.5], dtype=torch.float64),
                          model=None, generator=None)
    assert (mask[0, 0, 56:] == 0).any(), "holes reach the lower rows of images that are not square"


def test_smoothmix_equals_recorded_kernels_and_images_but_gives_the_share_to_the_right_image(recorded):
    for case in recorded("smoothmix", 3):
        deviation = torch.tensor([case["sigma"]], dtype=torch.float64)
        rows, cols = (bell(side, torch.tensor([(side - 1) / 2 + case[shift]]), deviation)
                      for side, shift in zip(case["images"].shape[-2:], ("shift_h", "shift_w")))
        mixed, share, mask = mix_lines(case["images"], case["perm"], torch.zeros(1), rows, cols)
        close(1 - mask[0, 0], case["kernel"])
        close(mixed, case["mixed"])
        assert share.item() == pytest.approx(1 - case["lam_out"], abs=1e-6)
        assert share.item() == pytest.approx(mask.double().mean().item(), abs=1e-6)


def test_smoothmix_works_on_images_that_are_not_square_or_of_odd_sides_where_the_reference_fails():
    for shape in ((2, 3, 64, 48), (2, 3, 33, 33), (1, 3, 1, 7)):
        mixed = SmoothMix()(torch.rand(shape), torch.zeros(shape[0]), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(mixed.lam, mixed.mask.mean((1, 2, 3)).expand(shape[0]), rtol=0, atol=1e-6)
