"The loss and its parts against plain loops: every variant, dtype and edge of lambda, and what is refused"
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sumix_nb.mixers.mixed import Mixed
from sumix_nb.sumix.loss import SUMixLoss, sumix_loss
from sumix_nb.sumix.ratio import VARIANTS
from sumix_nb.sumix.uncertainty import UncertaintyHead
from tests.sumix.oracles import draw, nll, scalar_oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 2), (3, 7), (8, 5))
SCALAR = ("poster", "corrected")
WEIGHT = torch.tensor([10.0, 1.0, 0.5, 2.0, 3.0], dtype=torch.float64)


def with_lam(mixed, lam): return replace(mixed, lam=lam)


def with_labels(mixed, change):
    return replace(mixed, target_a=change(mixed.target_a), target_b=change(mixed.target_b))


def test_the_method_for_plain_loops_does_not_import_fastai():
    code = ("import sys, sumix_nb.sumix.loss, sumix_nb.sumix.step; "
            "print(*sorted({'fastai', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("variant", SCALAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_sumix_loss_equals_loops_over_samples_with_gradients(shape, variant):
    leaves, mixed = draw(*shape, seed=sum(shape), requires_grad=True)
    copies = logits_mixed, logits, head_mixed, head = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    got = sumix_loss(*leaves, mixed, xi=0.7, variant=variant)
    expected = scalar_oracle(logits_mixed, head_mixed, head, logits_mixed, logits, mixed, variant, 0.7)
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    got.loss.backward()
    expected[0].backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        wanted = torch.zeros_like(copy) if copy.grad is None else copy.grad
        torch.testing.assert_close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, wanted, rtol=1e-8,
                                   atol=1e-11)
    assert leaves[1].grad is None, "the distances must not send gradient into the clean pass"
    assert leaves[2].grad.abs().sum() > 0 and leaves[3].grad.abs().sum() > 0


@pytest.mark.parametrize("variant", SCALAR)
def test_encodings_replace_the_logits_only_in_the_distances(variant):
    leaves, mixed = draw(5, 4)
    generator = torch.Generator().manual_seed(9)
    z_mixed, z = (torch.randn(5, 9, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = sumix_loss(*leaves, mixed, variant=variant, encodings=(z_mixed, z))
    logits_mixed, _, head_mixed, head = leaves
    expected = scalar_oracle(logits_mixed, head_mixed, head, z_mixed, z, mixed, variant, 0.5)
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    assert not got.loss.requires_grad, "encodings are measured, not trained"


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_head_the_logits_take_its_place(variant):
    leaves, mixed = draw(5, 4)
    without = sumix_loss(leaves[0], leaves[1], None, None, mixed, variant=variant)
    if variant != "released":
        torch.testing.assert_close(without, sumix_loss(*leaves[:2], *leaves[:2], mixed, variant=variant))
    torch.testing.assert_close(without.mixed_ce, sumix_loss(*leaves, mixed, variant=variant).mixed_ce)
    assert all(term.isfinite().all() for term in without)


def test_the_module_is_the_loss_of_its_head_s_outputs():
    leaves, mixed = draw(4, 3, torch.float32)
    module = SUMixLoss(UncertaintyHead(6, 3), xi=0.2, variant="corrected")
    features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    outputs = [part @ module.head.layers[0].weight.T + module.head.layers[0].bias for part in features]
    wanted = sumix_loss(*leaves[:2], *outputs, mixed, xi=0.2, variant="corrected")
    torch.testing.assert_close(module(*leaves[:2], *features, mixed), wanted)


# ---- edges ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_lam_exactly_0_or_1_is_kept_exactly_and_stays_finite(variant, end):
    leaves, mixed = draw(6, 5, requires_grad=True)
    mixed = with_lam(mixed, torch.full((6,), end))
    terms = sumix_loss(*leaves, mixed, variant=variant)
    assert terms.ratio.tolist() == [end] * 6
    torch.testing.assert_close(terms.mixed_ce, F.cross_entropy(leaves[0], mixed.target_a if end else mixed.target_b))
    terms.loss.backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("ignored", [-100, 255])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_ignored_label_weighs_nothing_in_either_term(variant, ignored):
    "Put on one image: its mixtures count by their other label alone"
    leaves, mixed = draw(6, 5)
    target = torch.where(torch.arange(6) == 0, ignored, mixed.target_a)
    mixed = replace(mixed, target_a=target, target_b=target[mixed.partner])
    got = sumix_loss(*leaves, mixed, variant=variant, loss_func=nn.CrossEntropyLoss(ignore_index=ignored))
    share = got.ratio.mean().expand(6) if variant == "released" else got.ratio
    above = below = 0.0
    for i in range(6):
        for label, part in ((mixed.target_a[i], share[i]), (mixed.target_b[i], 1 - share[i])):
            if label != ignored: above, below = above + part * nll(leaves[0][i], label), below + part
    torch.testing.assert_close(got.mixed_ce, above / below)
    assert got.loss.isfinite()
    if variant == "released": torch.testing.assert_close(got.ratio[0], mixed.lam[0].double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_may_be_integers_of_any_width_and_must_name_classes(variant):
    leaves, mixed = draw(6, 5)
    wanted = sumix_loss(*leaves, mixed, variant=variant)
    for dtype in (torch.int32, torch.uint8):
        got = sumix_loss(*leaves, with_labels(mixed, lambda y, dtype=dtype: y.to(dtype)), variant=variant)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    for change, message in ((torch.Tensor.float, "class indices"), (lambda y: y + 5, r"labels must be in \[0, 4\]"),
                            (lambda y: y - 9, r"labels must be in \[0, 4\] .* or -100 to be ignored")):
        with pytest.raises(ValueError, match=message): sumix_loss(*leaves, with_labels(mixed, change), variant=variant)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(bad):
    leaves, mixed = draw(6, 5)
    for i, name in enumerate(("logits_mixed", "logits", "head_mixed", "head")):
        broken = [torch.where(row == row.max(), bad, row) if i == k else row for k, row in enumerate(leaves)]
        with pytest.raises(ValueError, match=f"`{name}` must be finite"): sumix_loss(*broken, mixed)


@pytest.mark.parametrize("variant", SCALAR)
def test_su_logits_of_single_rows_or_of_other_batches_are_refused(variant):
    (logits, _, head_mixed, head), _ = draw(3, 4)
    su_logits, distance = VARIANTS[variant].su_logits, torch.rand(3, dtype=torch.float64)
    assert su_logits(logits, head_mixed, head, distance).shape == (3, 4)
    for wrong in ((logits[:, 0], head_mixed, head, distance), (logits[:1], head_mixed, head, distance),
                  (logits, head_mixed[0], head[0], distance[0]), (logits, head_mixed, head, distance[:1])):
        with pytest.raises(ValueError, match="one shape"): su_logits(*wrong)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_func", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1),
                                       partial(F.cross_entropy, label_smoothing=0.1)])
def test_the_loss_compiles_into_one_graph_and_is_mapped(variant, loss_func):
    leaves, mixed = draw(6, 5, torch.float32)
    def loss(lam, *rows):
        return sumix_loss(*rows, with_lam(mixed, lam), variant=variant, loss_func=loss_func).loss
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(mixed.lam, *leaves), loss(mixed.lam, *leaves))
    lams, many = torch.stack([mixed.lam, mixed.lam.flip(0)]), [torch.stack([row, row.flip(0)]) for row in leaves]
    one_by_one = [loss(lams[i], *(rows[i] for rows in many)) for i in range(2)]
    torch.testing.assert_close(torch.vmap(loss)(lams, *many), torch.stack(one_by_one))


# ---- precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_inputs_give_a_float32_loss_close_to_that_of_their_float64_values(shape, dtype, variant):
    leaves, mixed = draw(*shape, dtype, seed=3, requires_grad=True)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got, wanted = (sumix_loss(*rows, mixed, variant=variant) for rows in (leaves, exact))
    for value, reference in zip(got, wanted, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), reference, rtol=2e-5, atol=2e-5)
    got.loss.backward(), wanted.loss.backward()
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 2e-5)
    for leaf, reference in zip(leaves, exact, strict=True):
        if reference.grad is None: assert leaf.grad is None
        else: torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_lower_the_precision_of_the_loss():
    leaves, mixed = draw(6, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = sumix_loss(*leaves, mixed)
    torch.testing.assert_close(inside, sumix_loss(*leaves, mixed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sumix_loss_honours_weights_and_reduction_in_both_terms(variant):
    leaves, mixed = draw(6, 5)
    plain = sumix_loss(*leaves, mixed, variant=variant)
    twice = nn.CrossEntropyLoss(weight=torch.full((5,), 2.0, dtype=torch.float64))
    doubled = sumix_loss(*leaves, mixed, variant=variant, loss_func=twice)
    torch.testing.assert_close(doubled, plain)
    total = sumix_loss(*leaves, mixed, variant=variant, loss_func=nn.CrossEntropyLoss(reduction="sum"))
    for name in ("loss", "mixed_ce", "regulariser"):
        torch.testing.assert_close(getattr(total, name), 6 * getattr(plain, name))
    weighted = sumix_loss(*leaves, mixed, variant=variant, loss_func=nn.CrossEntropyLoss(weight=WEIGHT))
    share = plain.ratio.mean().expand(6) if variant == "released" else plain.ratio
    above = below = 0.0
    for i in range(6):
        for label, part in ((mixed.target_a[i], share[i]), (mixed.target_b[i], 1 - share[i])):
            above, below = above + part * WEIGHT[label] * nll(leaves[0][i], label), below + part * WEIGHT[label]
    torch.testing.assert_close(weighted.mixed_ce, above / below)


TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(n=st.one_of(st.integers(1, 40), st.sampled_from([100, 512])),
       classes=st.one_of(st.integers(2, 20), st.sampled_from([100, 1000])),
       scale=st.floats(-4, 4).map(lambda power: 10**power), lam=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
       labels=st.sampled_from(["any", "equal", "one pair"]), dtype=st.sampled_from(TYPES), with_head=st.booleans(),
       seed=st.integers(0, 2**16))
@example(n=512, classes=2, scale=1e4, lam=0.5, labels="any", dtype=torch.float16, with_head=True, seed=0)
@example(n=512, classes=1000, scale=1e4, lam=0.0, labels="equal", dtype=torch.bfloat16, with_head=False, seed=1)
@example(n=1, classes=2, scale=1e-4, lam=1.0, labels="one pair", dtype=torch.float32, with_head=True, seed=2)
def test_nothing_becomes_infinite_or_nan(variant, n, classes, scale, lam, labels, dtype, with_head, seed):
    generator = torch.Generator().manual_seed(seed)
    most = torch.finfo(dtype).max
    leaves = [(scale * torch.randn(n, classes, generator=generator)).clamp(-most, most).to(dtype).requires_grad_()
              for _ in range(4)]
    target = {"any": torch.randint(classes, (n,), generator=generator), "equal": torch.full((n,), classes - 1),
              "one pair": torch.arange(n) % 2}[labels]
    partner = torch.randperm(n, generator=generator)
    mixed = Mixed(torch.zeros(n, 1, 1, 1), target, target[partner], torch.full((n,), lam), partner)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        terms = sumix_loss(*leaves[:2], *(leaves[2:] if with_head else (None, None)), mixed, variant=variant)
    terms.loss.backward()
    for name, value in zip(terms._fields, terms, strict=True): assert value.isfinite().all(), name
    assert ((terms.ratio >= 0) & (terms.ratio <= 1)).all()
    if lam in (0.0, 1.0): assert (terms.ratio == lam).all()
    assert leaves[0].grad is not None
    # without a head the released logits are exp(-2 * logits): their gradient may be beyond float16 (not beyond float32)
    if variant == "released" and dtype == torch.float16 and not with_head: return
    for leaf in leaves: assert leaf.grad is None or leaf.grad.isfinite().all()
