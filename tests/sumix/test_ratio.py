"The ratio of each variant against closed forms and loops: limits, directions, and what it takes"
import math

import pytest
import torch

from sumix_nb.sumix.ratio import VARIANTS, mix_ratio, ratio_from_distances
from tests.sumix.oracles import draw, released_vector

Z = torch.tensor([[6.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.0, 4.0]])
LABELS = {"target_a": torch.tensor([0, 1, 2]), "target_b": torch.tensor([1, 2, 0])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_far_samples_is_finite_and_exact(dtype):
    distance_a = torch.tensor([1000.0, 1000.0, 0.0, 1e4], dtype=dtype)
    distance_b = torch.tensor([1000.0, 1001.0, 1e4, 0.0], dtype=dtype)
    got = ratio_from_distances(0.25, distance_a, distance_b)
    wanted = torch.tensor([0.25, 0.25 * math.e / (0.25 * math.e + 0.75), 1.0, 0.0], dtype=dtype)
    torch.testing.assert_close(got, wanted)


def test_integer_and_half_precision_distances_give_a_float32_ratio():
    for dtype in (torch.int64, torch.int32, torch.float16, torch.bfloat16):
        got = ratio_from_distances(0.5, torch.tensor([0], dtype=dtype), torch.tensor([1], dtype=dtype))
        torch.testing.assert_close(got, torch.tensor([1 / (1 + math.exp(-1))]))


def test_distances_and_labels_of_the_variants_are_those_of_their_formulas():
    assert list(VARIANTS) == ["poster", "released", "corrected"] and "paper" not in VARIANTS
    assert [rule.by_label for rule in VARIANTS.values()] == [False, True, False]
    z_mixed, z = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = (z_mixed - z).exp()
    poster = difference.pow(2).sum(1).sqrt() / difference.sum(1)
    torch.testing.assert_close(VARIANTS["poster"].distance(z_mixed, z), poster)
    p_mixed, p = (x.exp() / x.exp().sum(1, keepdim=True) for x in (z_mixed, z))
    torch.testing.assert_close(VARIANTS["corrected"].distance(z_mixed, z), (2 - 2 * (p_mixed * p).sqrt().sum(1)).sqrt())
    own, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 0, 1])
    vector = VARIANTS["released"].distance(z_mixed, z, own, other)
    for i in range(4):
        wanted = torch.stack(released_vector(z_mixed[i], z[i], other[i], 4))
        torch.testing.assert_close(vector[i], wanted)
        assert VARIANTS["released"].number(vector, own)[i] == vector[i, own[i]]
    ratio, half = torch.tensor([0.25, 0.5, 0.75, 0.0]), torch.full((4,), 0.5)
    assert VARIANTS["poster"].label(ratio, half) is ratio and VARIANTS["corrected"].label(ratio, half) is ratio
    assert VARIANTS["released"].label(ratio, half).tolist() == [0.375] * 4
    lam, ratio = torch.tensor([0.5, 0.2, 1.0, 0.0]), torch.tensor([0.25, 0.5, 1.0, 0.0])
    assert VARIANTS["released"].label(ratio, lam).tolist() == [0.375, 0.375, 1.0, 0.0]
    assert VARIANTS["released"].label(ratio[2:], lam[2:]).tolist() == [1.0, 0.0]


def test_released_ignored_labels_keep_their_lam():
    lam = torch.tensor([0.2, 0.5, 0.9])
    plain = mix_ratio(Z, Z.roll(1, 1), Z.flip(0), lam, variant="released", **LABELS)
    for name in LABELS:
        labels = LABELS | {name: torch.where(torch.tensor([False, True, False]), -100, LABELS[name])}
        got = mix_ratio(Z, Z.roll(1, 1), Z.flip(0), lam, variant="released", **labels)
        assert got[1] == 0.5 and torch.equal(got[::2], plain[::2]) and plain[1] != 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_the_two_sources_swaps_the_ratio(variant):
    (z_mixed, z_a, z_b, _), mixed = draw(6, 5)
    lam = mixed.lam.double()
    target_a, target_b = mixed.target_a, (mixed.target_a + 1) % 5
    one = mix_ratio(z_mixed, z_a, z_b, lam, variant=variant, target_a=target_a, target_b=target_b)
    other = mix_ratio(z_mixed, z_b, z_a, 1 - lam, variant=variant, target_a=target_b, target_b=target_a)
    torch.testing.assert_close(other, 1 - one)
    assert (one - lam).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ratio_compiles_into_one_graph_and_is_mapped(variant):
    def ratio(z_mixed, z_a, z_b, lam): return mix_ratio(z_mixed, z_a, z_b, lam, variant=variant, **LABELS)
    lam, stack = torch.tensor([0.2, 0.5, 0.9]), torch.stack([Z, Z.roll(1, 1), Z.flip(0)])
    compiled = torch.compile(ratio, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*stack, lam), ratio(*stack, lam))
    mapped = torch.vmap(ratio)(stack, stack.roll(1, 0), stack.roll(2, 0), torch.stack([lam, lam.flip(0), lam]))
    torch.testing.assert_close(mapped[1], ratio(stack[1], stack[0], stack[2], lam.flip(0)))
