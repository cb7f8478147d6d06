"The uncertainty head and what is made of its outputs"
import pytest
import torch

from sumix_nb.sumix.uncertainty import UncertaintyHead, su_scale, uncertainty, uncertainty_vector
from tests.sumix.oracles import norm, softmax


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


def test_uncertainties_equal_loops_and_their_gradients_finite_differences():
    outputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = uncertainty(outputs)
    torch.testing.assert_close(u, torch.stack([norm(softmax(list(row))) for row in outputs]))
    vectors = [[part / norm(softmax(list(row))) for part in softmax(list(row))] for row in outputs]
    torch.testing.assert_close(uncertainty_vector(outputs), torch.tensor(vectors, dtype=torch.float64))
    torch.testing.assert_close(su_scale(u, u, 2 * u), torch.exp(-u) ** 4)
    leaf = outputs.requires_grad_()
    assert torch.autograd.gradcheck(uncertainty, leaf) and torch.autograd.gradcheck(uncertainty_vector, leaf)


@pytest.mark.parametrize("function", [uncertainty, uncertainty_vector])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_outputs_that_are_no_rows_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"one shape \(N, D\)"): function(torch.zeros(shape))


def test_a_scale_of_unequal_shapes_is_refused():
    with pytest.raises(ValueError, match="must have one shape"): su_scale(torch.rand(3), torch.rand(3), torch.rand(1))
