"The uncertainty head and what is made of its outputs"
import pytest
import torch

from sumix_nb.sumix.uncertainty import UncertaintyHead, uncertainty, uncertainty_vector


def test_the_gradient_of_the_vector_and_the_type_of_the_head():
    leaf = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(uncertainty_vector, leaf)
    assert UncertaintyHead(4, 2, (8, 3))(leaf.half()).dtype == torch.float32


@pytest.mark.parametrize("function", [uncertainty, uncertainty_vector])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_outputs_that_are_no_rows_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"one shape \(N, D\)"): function(torch.zeros(shape))
