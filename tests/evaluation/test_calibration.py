"Counts of confidence and accuracy, and what must not be counted"
import pytest
import torch

from sumix_nb.evaluation.calibration import calibration_error, plot_reliability
from sumix_nb.evaluation.calibration import reliability_curve, reliability_sums


@pytest.mark.parametrize("target", [[0, 3], [-1, 0], [0, -100], [2, 99]])
def test_labels_that_are_no_class_are_refused(target):
    with pytest.raises(ValueError, match=r"`target` must be 2 class indices in \[0, 2\]"):
        reliability_sums(torch.zeros(2, 3), torch.tensor(target))


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_every_answer_is_in_one_bin(bins):
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(bins))
    target = torch.arange(500) % 4
    sums = reliability_sums(logits, target, bins)
    assert sums.shape == (bins, 3) and sums[:, 0].sum() == 500
    assert sums[:, 1].sum() == (logits.argmax(1) == target).sum()
    torch.testing.assert_close(sums[:, 2].sum(), logits.softmax(1).amax(1).sum())
    for m, (n, right, confidence) in enumerate(sums.tolist()):
        assert 0 <= right <= n and m * n / bins - 1e-3 <= confidence <= (m + 1) * n / bins + 1e-3


def test_the_picture_names_the_error():
    curve = reliability_curve(reliability_sums(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 1])))
    assert curve == [{"confidence": 0.5, "accuracy": 0.0, "n": 2}] and calibration_error(curve) == 0.5
    label, = [text.get_text() for text in plot_reliability({"mine": curve}).get_legend().get_texts()]
    assert label == "mine (ECE 0.500)"
