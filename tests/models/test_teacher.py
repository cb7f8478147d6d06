"The teacher against a real copy, and its momentum against the recorded schedule"
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sumix_nb.models.teacher import Teacher, teacher_momentum


@pytest.mark.parametrize("case", ["s0", "s1", "s2", "s3"])
def test_momentum_follows_the_recorded_schedule(golden, case):
    "s3 warms up linearly, which no published recipe does: there the schedule is compared after the warm-up"
    cases = golden("automix_official.npz")
    base, end, total = (cases.arrays[f"{case}__{name}"].item() for name in ("base", "end", "max_iters"))
    scope, compared = tuple(cases[case, "scope"].tolist()), 0
    for iteration, wanted in zip(cases[case, "iters"].tolist(), cases[case, "momentum"].tolist()):
        if case == "s3" and iteration < 10: continue
        assert teacher_momentum(iteration, total, base, end, scope) == pytest.approx(wanted, abs=1e-12)
        compared += 1
    assert compared >= 9


def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def test_the_teacher_is_a_copy_with_statistics_of_its_own():
    "Against a real copy, moved by hand"
    torch.manual_seed(0)
    network, images = net(), torch.randn(4, 3, 6, 6)
    teacher, twin = Teacher(network), copy.deepcopy(network)
    for momentum in (0.9, 0.5):
        with torch.no_grad():
            for p in network.parameters(): p.add_(torch.randn_like(p))
        network(images + 1)
        teacher.follow(network, momentum)
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), network.parameters()):
                mine.copy_(momentum * mine + (1 - momentum) * theirs)
        torch.testing.assert_close(teacher(network, images), twin(images))
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    teacher.exchange(network)
    for name, value in network.state_dict().items(): torch.testing.assert_close(value, twin.state_dict()[name])
    teacher.exchange(network)
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())


def test_nothing_of_a_teacher_can_be_trained():
    network = net()
    teacher = Teacher(network)
    assert not list(teacher.parameters()) and not any(b.requires_grad for b in teacher.buffers())
    images = torch.randn(4, 3, 6, 6, requires_grad=True)
    F.cross_entropy(teacher(network, images), torch.tensor([0, 1, 0, 1])).backward()
    assert images.grad.any() and all(p.grad is None for p in network.parameters())


def test_tied_weights_stay_tied():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    network, inputs = nn.Sequential(first, second), torch.randn(2, 3)
    teacher, before = Teacher(network), network(inputs)
    with torch.no_grad(): first.weight.add_(1)
    torch.testing.assert_close(teacher(network, inputs), before)


@pytest.mark.parametrize(("arguments", "words"), [((-1, 10), "`iteration`"), ((0, 0), "`iterations`"),
                                                  ((0, 10, 1.5), "`base`"), ((0, 10, 0.9, -1), "`end`"),
                                                  ((0, 10, 0.9, 1.0, (0.5, 0.5)), "`scope`")])
def test_momentum_of_nonsense_is_an_error(arguments, words):
    with pytest.raises(ValueError, match=words): teacher_momentum(*arguments)
