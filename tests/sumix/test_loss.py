"The loss and its parts against plain loops: every variant, dtype, edge of lambda, and reduction of the loss mixed"
import inspect
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from fastai.losses import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy,
                           LabelSmoothingCrossEntropyFlat)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sumix_nb.sumix.loss
import sumix_nb.mixers.mixed
import sumix_nb.sumix.ratio
import sumix_nb.sumix.uncertainty
from sumix_nb.sumix.loss import SUMixLoss, SUMixTerms, released_su_logits, su_logits, sumix_loss
from sumix_nb.sumix.mixed_loss import label_weight, loss_setting, mixed_cross_entropy, mixed_loss, per_sample_loss
from sumix_nb.sumix.mixed_loss import takes_reduction
from sumix_nb.mixers.mixed import Mixed
from sumix_nb.checks import check_encodings, check_labels, check_lam, full_precision
from sumix_nb.sumix.ratio import VARIANTS, check_variant, mix_ratio, own_distance, ratio_from_distances
from sumix_nb.sumix.ratio import released_distance, semantic_distance, source_distances
from sumix_nb.sumix.uncertainty import UncertaintyHead, su_scale, su_vector, uncertainty, uncertainty_vector
from tests.sumix.oracles import nll, norm, repeated_loss, scalar_oracle, softmax

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 2), (3, 7), (8, 5))
SCALAR = ("poster", "corrected")


def draw(n, k, dtype=torch.float64, seed=0, scale=2.0, requires_grad=False):
    "Random inputs of `sumix_loss`: mixed and clean logits, mixed and clean head outputs, and the mixture"
    generator = torch.Generator().manual_seed(seed)
    rows = [(torch.randn(n, k, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(4)]
    target, partner = torch.randint(k, (n,), generator=generator), torch.randperm(n, generator=generator)
    lam = torch.rand(n, generator=generator, dtype=torch.float64).float()
    mixed = Mixed(torch.zeros(n, 1, 1, 1), target, target[partner], lam, partner)
    return [row.requires_grad_(requires_grad) for row in rows], mixed


def with_lam(mixed, lam):
    return Mixed(mixed.images, mixed.target_a, mixed.target_b, torch.as_tensor(lam), mixed.partner)


# ---- every public name ---------------------------------------------------------------------------

def test_every_public_name_of_the_torch_only_modules_is_there_and_documented():
    for module in (sumix_nb.sumix.loss, sumix_nb.sumix.ratio, sumix_nb.sumix.uncertainty, sumix_nb.mixers.mixed):
        assert len(module.__all__) == len(set(module.__all__)) >= 5
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or inspect.getdoc(value), name


def test_every_public_function_runs_once_on_a_small_batch():
    (logits_mixed, logits, head_mixed, head), mixed = draw(4, 3)
    lam, partner = mixed.lam.double(), mixed.partner
    check_variant("poster"), check_encodings(logits, logits_mixed), check_labels(mixed.target_a, logits)
    assert VARIANTS == ("poster", "released", "corrected")
    torch.testing.assert_close(check_lam(0.25, lam), torch.full((4,), 0.25, dtype=torch.float64))
    assert full_precision(logits.half()).dtype == torch.float32 and full_precision(logits).dtype == torch.float64
    d_a, d_b = semantic_distance(logits_mixed, logits), semantic_distance(logits_mixed, logits[partner])
    expected = lam * (-d_a).exp() / (lam * (-d_a).exp() + (1 - lam) * (-d_b).exp())
    torch.testing.assert_close(ratio_from_distances(lam, d_a, d_b), expected)
    torch.testing.assert_close(mix_ratio(logits_mixed, logits, logits[partner], lam), expected)
    u = uncertainty(head)
    torch.testing.assert_close(u, torch.stack([norm(softmax(list(row))) for row in head]))
    torch.testing.assert_close(su_scale(u, u, d_a), torch.exp(-u) ** 2 * torch.exp(-d_a))
    torch.testing.assert_close(uncertainty_vector(head).norm(dim=1), torch.ones(4, dtype=torch.float64))
    vector = released_distance(logits_mixed, logits, mixed.target_b)
    torch.testing.assert_close(vector.norm(dim=1), torch.full((4,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(su_vector(head, head, vector), torch.exp(-2 * head - vector))
    torch.testing.assert_close(su_logits(logits_mixed, head_mixed, head, d_a),
                               torch.exp(-uncertainty(head_mixed) - u - d_a)[:, None] * logits_mixed)
    assert loss_setting(partial(F.cross_entropy, label_smoothing=0.1), "label_smoothing") == 0.1
    torch.testing.assert_close(per_sample_loss(F.cross_entropy, logits, mixed.target_a).mean(),
                               F.cross_entropy(logits, mixed.target_a))
    assert label_weight(F.cross_entropy, mixed.target_a).tolist() == [1, 1, 1, 1]
    distances = source_distances(logits_mixed, logits, logits[partner], variant="released",
                                 target_a=mixed.target_a, target_b=mixed.target_b)
    assert torch.equal(distances[0], vector)
    torch.testing.assert_close(own_distance(vector, mixed.target_a), vector[range(4), mixed.target_a])
    assert own_distance(d_a, None) is d_a and takes_reduction(F.cross_entropy) and not takes_reduction(len)
    su_a, su_b = released_su_logits(head_mixed, head, mixed, distances)
    released = sumix_loss(logits_mixed, logits, head_mixed, head, mixed, variant="released")
    torch.testing.assert_close(released.regulariser, mixed_loss(F.cross_entropy, su_a, su_b, mixed.target_a,
                                                                mixed.target_b, mixed.lam))
    module = SUMixLoss(UncertaintyHead(6, 3))
    features = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    got = module(logits_mixed.float(), logits.float(), *features, mixed)
    outputs = [part @ module.head.layers[0].weight.T + module.head.layers[0].bias for part in features]
    torch.testing.assert_close(got.loss, sumix_loss(logits_mixed.float(), logits.float(), *outputs, mixed).loss)


@pytest.mark.parametrize("module", ["sumix.loss", "sumix.ratio", "sumix.uncertainty", "mixers.mixed"])
def test_the_torch_only_modules_do_not_import_fastai(module):
    code = (f"import sys, sumix_nb.{module}; loaded = {{m.split('.')[0] for m in sys.modules}}; "
            "print(*sorted(loaded & {'fastai', 'fastcore', 'matplotlib'}))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# ---- the loss against loops ----------------------------------------------------------------------

@pytest.mark.parametrize("variant", SCALAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_sumix_loss_equals_loops_over_samples_with_gradients(shape, variant):
    leaves, mixed = draw(*shape, seed=sum(shape), requires_grad=True)
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    got = sumix_loss(*leaves, mixed, xi=0.7, variant=variant)
    logits_mixed, logits, head_mixed, head = copies
    expected = scalar_oracle(logits_mixed, head_mixed, head, logits_mixed, logits, mixed.target_a, mixed.target_b,
                             mixed.lam, mixed.partner, variant, 0.7)
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


def released_vector(z_mixed, z, other, n):
    "`n` times the unit vector of softmax(p~ - p), where p has 0 in place of the other source's label"
    p_mixed, p = softmax(list(z_mixed)), softmax(list(z))
    values = softmax([a - (0.0 if k == int(other) else b) for k, (a, b) in enumerate(zip(p_mixed, p, strict=True))])
    return [n * value / norm(values) for value in values]


@pytest.mark.parametrize("shape", SHAPES)
def test_released_loss_equals_loops_over_samples(shape):
    (logits_mixed, logits, head_mixed, head), mixed = draw(*shape, seed=sum(shape))
    n, ratios, regulariser = shape[0], [], 0.0
    for i in range(n):
        j, a, b, lam = int(mixed.partner[i]), int(mixed.target_a[i]), int(mixed.target_b[i]), float(mixed.lam[i])
        vector_a = released_vector(logits_mixed[i], logits[i], b, n)
        vector_b = released_vector(logits_mixed[i], logits[j], a, n)
        torch.testing.assert_close(released_distance(logits_mixed, logits, mixed.target_b)[i], torch.stack(vector_a))
        share_a, share_b = lam * math.exp(-vector_a[a]), (1 - lam) * math.exp(-vector_b[b])
        ratios.append(share_a / (share_a + share_b))
        u_mixed, u_a, u_b = ([p / norm(softmax(list(row))) for p in softmax(list(row))]
                             for row in (head_mixed[i], head[i], head[j]))
        su_a, su_b = ([math.exp(-(x + y + d)) for x, y, d in zip(u_mixed, u, vector, strict=True)]
                      for u, vector in ((u_a, vector_a), (u_b, vector_b)))
        regulariser = regulariser + (lam * nll(su_a, a) + (1 - lam) * nll(su_b, b)) / n
    share = sum(ratios) / n
    mixed_ce = sum(share * nll(row, a) + (1 - share) * nll(row, b)
                   for row, a, b in zip(logits_mixed, mixed.target_a, mixed.target_b, strict=True)) / n
    got = sumix_loss(logits_mixed, logits, head_mixed, head, mixed, xi=0.7, variant="released")
    torch.testing.assert_close(got.ratio, torch.tensor(ratios, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    for value, wanted in zip((got.mixed_ce, got.regulariser), (mixed_ce, regulariser), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_far_samples_is_finite_and_exact(dtype):
    distance_a = torch.tensor([1000.0, 1000.0, 0.0, 1e4], dtype=dtype)
    distance_b = torch.tensor([1000.0, 1001.0, 1e4, 0.0], dtype=dtype)
    got = ratio_from_distances(0.25, distance_a, distance_b)
    wanted = torch.tensor([0.25, 0.25 * math.e / (0.25 * math.e + 0.75), 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("variant", SCALAR)
def test_encodings_replace_the_logits_only_in_the_distances(variant):
    leaves, mixed = draw(5, 4)
    generator = torch.Generator().manual_seed(9)
    z_mixed, z = (torch.randn(5, 9, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = sumix_loss(*leaves, mixed, variant=variant, encodings=(z_mixed, z))
    logits_mixed, _, head_mixed, head = leaves
    expected = scalar_oracle(logits_mixed, head_mixed, head, z_mixed, z, mixed.target_a, mixed.target_b, mixed.lam,
                             mixed.partner, variant, 0.5)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_xi_weighs_the_regulariser_and_nothing_else(variant):
    leaves, mixed = draw(6, 5)
    terms = {xi: sumix_loss(*leaves, mixed, xi=xi, variant=variant) for xi in (0, 0.25, 3.0)}
    for xi, got in terms.items():
        torch.testing.assert_close(got.loss, got.mixed_ce + xi * got.regulariser)
        torch.testing.assert_close(got[1:], terms[0][1:])
    torch.testing.assert_close(terms[0].loss, terms[0].mixed_ce)


def test_default_variant_and_weight_are_those_documented():
    defaults = inspect.signature(sumix_loss).parameters
    assert [defaults[name].default for name in ("xi", "variant", "loss_func")] == [0.5, "poster", F.cross_entropy]


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_carry_a_ratio_without_gradient(variant):
    leaves, mixed = draw(6, 5, requires_grad=True)
    terms = sumix_loss(*leaves, mixed, variant=variant)
    assert isinstance(terms, SUMixTerms) and not terms.ratio.requires_grad and terms.loss.requires_grad
    assert terms.loss.shape == terms.mixed_ce.shape == terms.regulariser.shape == () and terms.ratio.shape == (6,)


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


@pytest.mark.parametrize("variant", SCALAR)
def test_a_sample_mixed_with_itself_keeps_its_area_and_its_plain_cross_entropy(variant):
    leaves, mixed = draw(5, 4)
    itself = Mixed(mixed.images, mixed.target_a, mixed.target_a, mixed.lam, torch.arange(5))
    terms = sumix_loss(*leaves, itself, variant=variant)
    torch.testing.assert_close(terms.ratio, mixed.lam.double())
    torch.testing.assert_close(terms.mixed_ce, F.cross_entropy(leaves[0], mixed.target_a))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_labels_give_the_plain_cross_entropy_whatever_the_ratio(variant):
    leaves, mixed = draw(6, 5)
    same = Mixed(mixed.images, mixed.target_a, mixed.target_a, mixed.lam, mixed.partner)
    torch.testing.assert_close(sumix_loss(*leaves, same, variant=variant).mixed_ce,
                               F.cross_entropy(leaves[0], mixed.target_a))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sample_and_two_classes_are_enough(variant):
    leaves, mixed = draw(1, 2, requires_grad=True)
    terms = sumix_loss(*leaves, mixed, variant=variant)
    terms.loss.backward()
    assert all(term.isfinite().all() for term in terms) and leaves[0].grad.isfinite().all()
    torch.testing.assert_close(terms.ratio, mixed.lam.double())
    torch.testing.assert_close(terms.mixed_ce, nll(leaves[0][0], mixed.target_a[0]))


@pytest.mark.parametrize("variant", SCALAR)
def test_reordering_the_batch_reorders_the_ratio_and_leaves_the_loss(variant):
    leaves, mixed = draw(7, 4)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    where = order.argsort()
    moved = Mixed(mixed.images, mixed.target_a[order], mixed.target_b[order], mixed.lam[order],
                  where[mixed.partner[order]])
    before = sumix_loss(*leaves, mixed, variant=variant)
    after = sumix_loss(*(leaf[order] for leaf in leaves), moved, variant=variant)
    torch.testing.assert_close(after.ratio, before.ratio[order])
    for name in ("loss", "mixed_ce", "regulariser"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize("variant", SCALAR)
def test_a_ratio_does_not_depend_on_the_rest_of_the_batch(variant):
    leaves, mixed = draw(6, 4)
    partner = torch.tensor([1, 0, 3, 2, 5, 4])
    paired = Mixed(mixed.images, mixed.target_a, mixed.target_a[partner], mixed.lam, partner)
    half = Mixed(*(part[:2] for part in (paired.images, paired.target_a, paired.target_b, paired.lam, partner)))
    whole, part = (sumix_loss(*rows, mix, variant=variant)
                   for rows, mix in ((leaves, paired), ([x[:2] for x in leaves], half)))
    torch.testing.assert_close(part.ratio, whole.ratio[:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_the_two_sources_swaps_the_ratio(variant):
    (z_mixed, z_a, z_b, _), mixed = draw(6, 5)
    lam = mixed.lam.double()
    target_a, target_b = mixed.target_a, (mixed.target_a + 1) % 5
    one = mix_ratio(z_mixed, z_a, z_b, lam, variant=variant, target_a=target_a, target_b=target_b)
    other = mix_ratio(z_mixed, z_b, z_a, 1 - lam, variant=variant, target_a=target_b, target_b=target_a)
    torch.testing.assert_close(other, 1 - one)
    assert (one - lam).abs().max() > 1e-3


def test_the_corrected_ratio_moves_towards_the_source_that_the_mixture_resembles():
    z_a, z_b = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])
    ratios = [mix_ratio(z, z_a, z_b, 0.5, variant="corrected").item() for z in (z_a, (z_a + z_b) / 2, z_b)]
    assert ratios[0] > 0.7 and ratios[1] == pytest.approx(0.5) and ratios[2] < 0.3


def perfect_encodings(seen, classes, dtype=torch.float64):
    "One-hot encodings of the sources, and of mixtures that show the share `seen` of the first"
    z_mixed = torch.zeros(len(seen), classes, dtype=dtype)
    z_mixed[:, 0], z_mixed[:, 1] = seen, 1 - seen
    z_a, z_b = torch.eye(classes, dtype=dtype)[:2, None].expand(-1, len(seen), -1)
    return z_mixed, z_a, z_b


@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_each_variant_makes_of_a_network_that_sees_exactly_what_is_visible(variant, classes):
    seen = torch.linspace(0, 1, 21, dtype=torch.float64)
    encodings, n = perfect_encodings(seen, classes), len(seen)
    # the poster compares the encodings themselves, the others their probabilities: here both are the visible shares
    logits = encodings if variant == "poster" else [z.clamp(min=1e-300).log() for z in encodings]
    labels = {"target_a": torch.zeros(n, dtype=torch.long), "target_b": torch.ones(n, dtype=torch.long)}
    found = mix_ratio(*logits, 0.5, variant=variant, **labels)
    for share, ratio in zip(seen.tolist(), found.tolist(), strict=True):
        # softmax(z~ - z_a) is e^-h, e^h and K-2 times 1, divided by their sum, with h = 1 - share; so for b with share
        hidden_a, hidden_b = 1 - share, share
        lengths = [math.sqrt(2 * math.cosh(2 * h) + classes - 2) for h in (hidden_a, hidden_b)]
        if variant == "corrected": d_a, d_b = (math.sqrt(2 - 2 * math.sqrt(part)) for part in (share, 1 - share))
        elif variant == "poster":
            d_a, d_b = (length / (2 * math.cosh(h) + classes - 2) for length, h in zip(lengths, (hidden_a, hidden_b)))
        else: d_a, d_b = (n * math.exp(-h) / length for length, h in zip(lengths, (hidden_a, hidden_b)))
        assert ratio == pytest.approx(1 / (1 + math.exp(d_a - d_b)), abs=1e-9)
    direction = found.diff()
    if variant == "released": assert (direction < 0).all(), "more of an object lowers its share"
    else: assert (direction > 0).all(), "more of an object raises its share"
    reach = {"corrected": 0.80, "poster": 0.73, "released": 1.0}[variant]
    assert found.max() <= reach + 0.005
    if variant == "corrected": assert found.max() >= reach, "from 0.20 to 0.80 whatever the number of classes"
    if variant == "poster": assert found.max() < {2: 0.6, 5: 0.56, 100: 0.51}[classes], "almost blind to probabilities"


def test_lam_moves_the_ratio_monotonically():
    (z_mixed, z_a, z_b, _), mixed = draw(4, 5)
    for variant in VARIANTS:
        ratios = torch.stack([mix_ratio(z_mixed, z_a, z_b, lam, variant=variant, target_a=mixed.target_a,
                                        target_b=mixed.target_b)
                              for lam in (0.0, 0.1, 0.4, 0.9, 1.0)])
        assert (ratios.diff(dim=0) >= 0).all() and (ratios[0] == 0).all() and (ratios[-1] == 1).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), k=st.integers(2, 9), seed=st.integers(0, 10**6),
       scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
       variant=st.sampled_from(VARIANTS), end=st.sampled_from([None, 0.0, 1.0]))
def test_ratio_is_in_0_1_and_all_terms_and_gradients_are_finite(n, k, seed, scale, variant, end):
    leaves, mixed = draw(n, k, torch.float32, seed, scale, requires_grad=True)
    if end is not None: mixed = with_lam(mixed, torch.full((n,), end))
    terms = sumix_loss(*leaves, mixed, variant=variant)
    assert ((terms.ratio >= 0) & (terms.ratio <= 1)).all() and terms.ratio.shape == (n,)
    terms.loss.backward()
    assert all(term.isfinite().all() for term in terms)
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


# ---- dtypes and gradcheck ------------------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_half_precision_logits_stay_finite(dtype):
    (logits_mixed, logits, head_mixed, head), mixed = draw(6, 8, dtype, scale=1e4)
    for variant in VARIANTS:
        terms = sumix_loss(logits_mixed, logits, head_mixed, head, mixed, variant=variant)
        assert all(term.isfinite().all() for term in terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision_of_the_loss(dtype):
    leaves, mixed = draw(6, 8, torch.float32)
    with torch.autocast("cpu", dtype=dtype): inside = sumix_loss(*leaves, mixed)
    torch.testing.assert_close(inside, sumix_loss(*leaves, mixed))


@pytest.mark.parametrize("variant", SCALAR)
def test_gradcheck_of_the_regulariser_in_float64(variant):
    (logits_mixed, logits, head_mixed, head), mixed = draw(2, 3, requires_grad=True, scale=0.7)
    z = (logits_mixed.detach().clone(), logits.detach().clone())
    def regulariser(logits_mixed, head_mixed, head):
        return sumix_loss(logits_mixed, z[1], head_mixed, head, mixed, variant=variant, encodings=z).regulariser
    assert torch.autograd.gradcheck(regulariser, (logits_mixed, head_mixed, head))


def test_gradcheck_of_ratio_distance_uncertainty_and_mixed_cross_entropy():
    (logits_mixed, logits, head, _), mixed = draw(3, 4, requires_grad=True, scale=0.7)
    lam = mixed.lam.double().requires_grad_()
    for variant in SCALAR:
        assert torch.autograd.gradcheck(partial(semantic_distance, variant=variant), (logits_mixed, logits))
    assert torch.autograd.gradcheck(ratio_from_distances, (lam, logits[:, 0], logits[:, 1]))
    assert torch.autograd.gradcheck(uncertainty, (head,)) and torch.autograd.gradcheck(uncertainty_vector, (head,))
    def mce(rows, share): return mixed_cross_entropy(rows, mixed.target_a, mixed.target_b, share)
    assert torch.autograd.gradcheck(mce, (logits, lam))


# ---- the loss mixed ------------------------------------------------------------------------------

WEIGHT = torch.tensor([10.0, 1.0, 0.5, 2.0, 3.0])  # float32, as fastai's losses turn everything into float32
LOSSES = {
    "F.cross_entropy": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "weights, partial": partial(F.cross_entropy, weight=WEIGHT),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=2),
    "ignore_index, weights, smoothing": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2, label_smoothing=0.2),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "smoothing, partial": partial(F.cross_entropy, label_smoothing=0.2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "sum, weights": nn.CrossEntropyLoss(reduction="sum", weight=WEIGHT),
    "sum, partial": partial(F.cross_entropy, reduction="sum", weight=WEIGHT),
    "fastai": CrossEntropyLossFlat(),
    "fastai, weights": CrossEntropyLossFlat(weight=WEIGHT),
    "fastai, ignore_index": CrossEntropyLossFlat(ignore_index=2),
    "fastai smoothing": LabelSmoothingCrossEntropyFlat(eps=0.2),
    "fastai smoothing, sum": LabelSmoothingCrossEntropyFlat(eps=0.2, reduction="sum"),
    "fastai smoothing module": LabelSmoothingCrossEntropy(eps=0.2),
    "focal": FocalLossFlat(gamma=2.0),
    "focal, weights": FocalLossFlat(gamma=2.0, weight=WEIGHT),
    "nll": lambda logits, target, reduction="mean": F.nll_loss(logits.log_softmax(1), target, reduction=reduction),
}


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_loss_equals_the_loss_of_a_batch_with_each_row_repeated_by_its_shares(name):
    loss_func = LOSSES[name]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 5, generator=generator)
    target_a, target_b = torch.tensor([0, 1, 2, 3, 4, 2, 0]), torch.tensor([2, 2, 0, 1, 4, 3, 1])
    eighths = [8, 3, 0, 5, 1, 7, 6]
    expected = repeated_loss(loss_func, logits, target_a, target_b, eighths) / (8 if "sum" in name else 1)
    got = mixed_loss(loss_func, logits, logits, target_a, target_b, torch.tensor(eighths) / 8)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
    if hasattr(loss_func, "reduction"):
        assert loss_func.reduction == ("sum" if "sum" in name else "mean"), "left changed"


@pytest.mark.parametrize("loss_func", [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(),
                                       F.binary_cross_entropy_with_logits,
                                       nn.BCEWithLogitsLoss(reduction="sum")])
def test_multi_label_losses_mix_row_by_row(loss_func):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, generator=generator)
    target_a, target_b = (torch.randint(2, (4, 3), generator=generator).float() for _ in range(2))
    eighths = [8, 3, 0, 5]
    got = mixed_loss(loss_func, logits, logits, target_a, target_b, torch.tensor(eighths) / 8)
    total = getattr(loss_func, "reduction", "mean") == "sum"
    expected = repeated_loss(loss_func, logits, target_a, target_b, eighths) / (8 if total else 1)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)


def test_soft_labels_mix_as_their_own_cross_entropies():
    generator = torch.Generator().manual_seed(1)
    logits, soft_a, soft_b = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    soft_a, soft_b, lam = soft_a.softmax(1), soft_b.softmax(1), torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    expected = F.cross_entropy(logits, lam[:, None] * soft_a + (1 - lam[:, None]) * soft_b)
    torch.testing.assert_close(mixed_loss(nn.CrossEntropyLoss(), logits, logits, soft_a, soft_b, lam), expected)


def test_the_two_labels_are_judged_by_their_own_logits():
    (logits_a, logits_b, *_), mixed = draw(5, 4)
    got = mixed_loss(F.cross_entropy, logits_a, logits_b, mixed.target_a, mixed.target_b, mixed.lam)
    expected = 0.0
    for i, lam in enumerate(mixed.lam.tolist()):
        expected += (lam * nll(logits_a[i], mixed.target_a[i]) + (1 - lam) * nll(logits_b[i], mixed.target_b[i])) / 5
    torch.testing.assert_close(got, expected)


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
    weighted = sumix_loss(*leaves, mixed, variant=variant, loss_func=nn.CrossEntropyLoss(weight=WEIGHT.double()))
    share = plain.ratio.mean().expand(6) if variant == "released" else plain.ratio
    above = below = 0.0
    for i in range(6):
        for label, part in ((mixed.target_a[i], share[i]), (mixed.target_b[i], 1 - share[i])):
            above, below = above + part * WEIGHT[label] * nll(leaves[0][i], label), below + part * WEIGHT[label]
    torch.testing.assert_close(weighted.mixed_ce, above / below)


def test_a_loss_without_a_reduction_is_refused_and_one_that_fails_is_left_as_it_was():
    (logits, *_), mixed = draw(3, 4)
    with pytest.raises(ValueError, match="`loss_func` must have a `reduction`"):
        mixed_loss(lambda logits, target: logits.sum(), logits, logits, mixed.target_a, mixed.target_b, 0.5)
    loss_func = nn.CrossEntropyLoss()
    with pytest.raises((IndexError, RuntimeError)): per_sample_loss(loss_func, logits, mixed.target_a + 100)
    assert loss_func.reduction == "mean"


# ---- the head ------------------------------------------------------------------------------------

@pytest.mark.parametrize("hidden", [(), (16,), (8, 4)])
def test_head_is_the_mlp_it_describes(hidden):
    head = UncertaintyHead(6, 3, hidden)
    sizes = (6, *hidden, 3)
    assert sum(p.numel() for p in head.parameters()) == sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    wanted, weights = x, list(head.parameters())
    for i in range(0, len(weights), 2):
        wanted = wanted @ weights[i].T + weights[i + 1]
        if i + 2 < len(weights): wanted = wanted.clamp(min=0)
    torch.testing.assert_close(head(x), wanted)
    assert head(x.half()).dtype == torch.float32


def test_plain_pytorch_loop_with_the_loss_module_trains_network_and_head():
    torch.manual_seed(0)
    body, classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU()), nn.Linear(16, 3)
    criterion = SUMixLoss(UncertaintyHead(16, 3))
    images, target = torch.randn(12, 3, 2, 2), torch.arange(12) % 3
    parameters = [*body.parameters(), *classifier.parameters(), *criterion.parameters()]
    before, opt, losses = [p.detach().clone() for p in parameters], torch.optim.SGD(parameters, lr=0.5), []
    for _ in range(30):
        partner = torch.randperm(12)
        mixed = Mixed(torch.lerp(images[partner], images, 0.9), target, target[partner], torch.full((12,), 0.9),
                      partner)
        features, features_mixed = body(images), body(mixed.images)
        terms = criterion(classifier(features_mixed), classifier(features), features_mixed, features, mixed)
        opt.zero_grad(), terms.loss.backward(), opt.step()
        losses.append(terms.mixed_ce.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all((p - old).abs().max() > 0 for p, old in zip(parameters, before, strict=True))


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
