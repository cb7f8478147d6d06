"Numbers recorded from the public reference code: the released loss with its gradients, CutMix and MixUp"
from pathlib import Path

import pytest
import torch

from sumix_nb.loss import sumix_loss
from sumix_nb.mixers.core import Mixed, MixUp, box_ratio, cut_and_paste, mixing_box
from sumix_nb.ratio import mix_ratio, released_distance
from tests.conftest import Cases

EXCERPT = Path(__file__).parent / "data" / "sumix_loss_excerpt.npz"
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
        close(released_distance(logits_mixed, logits, cases[case, "y_b"]), "alpha")
        close(released_distance(logits_mixed, logits[cases[case, "rand_index"]], cases[case, "y_a"]), "alpha_")


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
