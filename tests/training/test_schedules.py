"Learning rates against PyTorch's schedulers, weight decay in a real Learner, and what is reported"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sumix_nb.training.schedules import RULES, WARMUP_FROM, SpareFromDecay, cosine, no_decay, reported


def pytorchs(lr, min_lr, steps):
    "The learning rates of PyTorch's cosine"
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, min_lr), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step(), scheduler.step()
    return rates


@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(1, 40), steps=st.integers(1, 30), least=st.floats(0, 1), warmup=st.integers(0, 5))
def test_both_cosines_are_pytorchs_whatever_the_number_of_steps(epochs, steps, least, warmup):
    lr, min_lr, warmup, total = 0.2, 0.2 * least, min(warmup, epochs), epochs * steps
    constant, moving = cosine(lr, epochs, min_lr), cosine(lr, epochs, min_lr, by_epoch=False, warmup=warmup)
    by_epoch, by_step = pytorchs(lr, min_lr, epochs), pytorchs(lr, min_lr, total)
    for t in range(total):
        factor = 1 - (1 - t / (warmup * steps)) * (1 - WARMUP_FROM) if t < warmup * steps else 1
        assert math.isclose(constant(t / total), by_epoch[t // steps], rel_tol=1e-6, abs_tol=1e-12)
        assert math.isclose(moving(t / total), by_step[t] * factor, rel_tol=1e-6, abs_tol=1e-12)
    assert constant(1.0) == constant((epochs - 0.5) / epochs)


@pytest.mark.parametrize(("options", "name"), [
    ({"epochs": 0}, "epochs"), ({"lr": -1.0}, "lr"), ({"min_lr": 0.2}, "min_lr"), ({"warmup": 11}, "warmup"),
    ({"epochs": 2.5}, "epochs")])
def test_schedules_refuse_what_cannot_be(options, name):
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"): cosine(**{"lr": 0.1, "epochs": 10} | options)


def test_vectors_and_what_the_network_names_are_spared():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.matrix = nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 2)
            self.norm, self.scale = nn.LayerNorm(3), nn.Parameter(torch.tensor(1.0))

        def no_weight_decay(self): return {"table"}

    assert set(no_decay(Tokens())) == {"table", "matrix.bias", "norm.weight", "norm.bias", "scale"}
    assert no_decay(nn.Conv2d(1, 1, 3, bias=False)) == [] and SpareFromDecay().name == "spare_from_decay"


@pytest.mark.parametrize("rule", RULES)
def test_only_the_last_epochs_are_reported(rule):
    series = [0.99, 0.1, 0.3, 0.2]
    expected = {"median": 0.2, "best": 0.3}
    assert reported(series, rule, last=3) == {"reported": expected[rule], "last": 0.2, "best": 0.99}
    assert reported([0.5], rule)["reported"] == 0.5
