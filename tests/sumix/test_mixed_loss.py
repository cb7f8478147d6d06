"Any loss, mixed, against the loss of a batch that repeats its rows"
from functools import partial

import pytest
import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat
from fastai.losses import LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat
from torch import nn
from torch.nn import functional as F

from sumix_nb.sumix.mixed_loss import label_weight, loss_setting, mixed_cross_entropy, mixed_loss, per_sample_loss
from tests.sumix.oracles import draw, repeated_loss

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


MULTI = {"multi-label": nn.BCEWithLogitsLoss(), "multi-label, fastai": BCEWithLogitsLossFlat(),
         "multi-label, function": F.binary_cross_entropy_with_logits,
         "multi-label, sum": nn.BCEWithLogitsLoss(reduction="sum")}


@pytest.mark.parametrize("name", [*LOSSES, *MULTI])
def test_mixed_loss_equals_the_loss_of_a_batch_with_each_row_repeated_by_its_shares(name):
    loss_func, generator = (LOSSES | MULTI)[name], torch.Generator().manual_seed(1)
    logits = torch.randn(7, 5, generator=generator)
    target_a, target_b = torch.tensor([0, 1, 2, 3, 4, 2, 0]), torch.tensor([2, 2, 0, 1, 4, 3, 1])
    if name in MULTI: target_a, target_b = torch.randint(2, (2, 7, 5), generator=generator).float()
    eighths = [8, 3, 0, 5, 1, 7, 6]
    expected = repeated_loss(loss_func, logits, target_a, target_b, eighths) / (8 if "sum" in name else 1)
    got = mixed_loss(loss_func, logits, logits, target_a, target_b, torch.tensor(eighths) / 8)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
    if hasattr(loss_func, "reduction"):
        assert loss_func.reduction == ("sum" if "sum" in name else "mean"), "left changed"


def test_soft_labels_mix_as_their_own_cross_entropies():
    generator = torch.Generator().manual_seed(1)
    logits, soft_a, soft_b = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    soft_a, soft_b, lam = soft_a.softmax(1), soft_b.softmax(1), torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=torch.float64)
    expected = F.cross_entropy(logits, lam[:, None] * soft_a + (1 - lam[:, None]) * soft_b)
    torch.testing.assert_close(mixed_loss(nn.CrossEntropyLoss(), logits, logits, soft_a, soft_b, lam), expected)


def test_a_loss_without_a_reduction_is_refused_and_one_that_fails_is_left_as_it_was():
    (logits, *_), mixed = draw(3, 4)
    with pytest.raises(ValueError, match="`loss_func` must have a `reduction`"):
        mixed_loss(lambda logits, target: logits.sum(), logits, logits, mixed.target_a, mixed.target_b, 0.5)
    loss_func = nn.CrossEntropyLoss()
    with pytest.raises((IndexError, RuntimeError)): per_sample_loss(loss_func, logits, mixed.target_a + 100)
    assert loss_func.reduction == "mean"


def test_an_error_inside_a_loss_is_not_mistaken_for_a_missing_reduction():
    def broken(logits, target, reduction="mean"): raise TypeError("inside")
    (logits, *_), mixed = draw(3, 4)
    with pytest.raises(TypeError, match="inside"): per_sample_loss(broken, logits, mixed.target_a)


def test_settings_and_weights_are_found_wherever_a_loss_keeps_them():
    target = torch.tensor([0, 2, -100])
    assert loss_setting(partial(F.cross_entropy, label_smoothing=0.1), "label_smoothing") == 0.1
    assert loss_setting(CrossEntropyLossFlat(ignore_index=7), "ignore_index") == 7
    assert loss_setting(F.cross_entropy, "reduction", "mean") == "mean"
    assert label_weight(F.cross_entropy, target).tolist() == [1, 1, 0]
    assert label_weight(nn.CrossEntropyLoss(WEIGHT), target).tolist() == [10, 0.5, 0]
    assert label_weight(nn.BCEWithLogitsLoss(), target).tolist() == [1, 1, 1]


def test_mixed_cross_entropy_takes_integers_of_any_width_and_its_gradient_is_right():
    (logits, *_), mixed = draw(3, 4, requires_grad=True, scale=0.7)
    lam = mixed.lam.double().requires_grad_()
    def mce(rows, share): return mixed_cross_entropy(rows, mixed.target_a, mixed.target_b, share)
    assert torch.autograd.gradcheck(mce, (logits, lam))
    assert mixed_cross_entropy(logits, mixed.target_a.int(), mixed.target_b.byte(), lam) == mce(logits, lam)
    with pytest.raises(ValueError, match=r"in \[0, 3\] for 4 classes"):
        mixed_cross_entropy(logits, mixed.target_a + 4, mixed.target_b, 0.5)
