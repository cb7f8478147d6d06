"Saliency by the gradient, shares of blocks, and seams: against small changes and loops"
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sumix_nb.mixers.blocks import block_shares, choice_costs, gradient_saliency, seam_differences
from tests.mixers.oracles import seeded


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(4 * 3 * 5, 4))


@pytest.mark.parametrize("soft", [False, True])
def test_saliency_is_the_size_of_the_loss_gradient(soft):
    model, images = network().double(), torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=seeded())
    target = torch.rand(3, 4, generator=seeded(1)).softmax(1) if soft else torch.tensor([3, 0, 1])
    found = gradient_saliency(images, target, model)
    assert found.shape == (3, 5, 7) and found.dtype == torch.float32
    model.eval()
    for n, y, x in itertools.product(range(3), (0, 4), range(7)):
        slopes = []
        for c in range(2):
            ends = []
            for step in (1e-5, -1e-5):
                moved = images.clone()
                moved[n, c, y, x] += step
                ends.append(F.cross_entropy(model(moved).float().double(), target.double() if soft else target,
                                            reduction="sum").item())
            slopes.append((ends[0] - ends[1]) / 2e-5)
        assert abs(found[n, y, x].item() - ((slopes[0]**2 + slopes[1]**2) / 2)**0.5) < 2e-2
    model.train()
    one = gradient_saliency(images[:1], target[:1], model)
    torch.testing.assert_close(one, found[:1])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_pass_leaves_no_trace_even_after_an_error(frozen):
    model, images, target = network(), torch.randn(3, 2, 5, 7), torch.tensor([3, 0, 1])
    model[1].eval()
    if frozen: model.requires_grad_(False)
    else: model(images).sum().backward()
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    kept, state = images.clone(), torch.get_rng_state()
    with torch.no_grad(): gradient_saliency(images, target, model)
    with pytest.raises(RuntimeError): gradient_saliency(images[:, :1], target, model)
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for one, p in zip(gradients, model.parameters()): assert one is p.grad or torch.equal(one, p.grad)
    assert torch.equal(images, kept) and not images.requires_grad


@pytest.mark.parametrize("model", [None, abs, "resnet18"])
def test_without_a_network_it_is_an_error(model):
    with pytest.raises(ValueError, match="`model`"): gradient_saliency(torch.rand(2, 3, 4, 4), torch.arange(2), model)


@pytest.mark.parametrize("shape, rows, cols", [((5, 12, 18), 3, 6), ((1, 4, 4), 4, 1), ((3, 7, 5), 7, 5)])
def test_shares_of_blocks_sum_to_one(shape, rows, cols):
    saliency = torch.rand(shape, generator=seeded(), dtype=torch.float64)
    shares, (_, height, width) = block_shares(saliency, rows, cols), shape
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(shape[0], dtype=torch.float64))
    for n, r, c in itertools.product(range(shape[0]), range(rows), range(cols)):
        h, w = height // rows, width // cols
        part = sum(saliency[n, y, x].item() for y in range(h * r, h * r + h) for x in range(w * c, w * c + w))
        assert abs(shares[n, r, c].item() - part / saliency[n].sum().item()) < 1e-12
    assert block_shares(torch.zeros(2, 4, 4), 2, 2).eq(0).all()


def test_seams_compare_the_cells_on_both_sides_of_a_border():
    rows, cols, k, m = 4, 2, 3, 5
    cells, partner = torch.rand(3, 2, rows * k, cols * m, generator=seeded()), torch.tensor([2, 0, 1])
    found = seam_differences(cells, partner, rows, cols)
    for n, r, c in itertools.product(range(3), range(rows - 1), range(cols)):
        pair = (n, partner[n].item())
        for seam, (upper, lower) in zip(found, itertools.product(pair, pair)):
            gaps = [abs(cells[upper, ch, k * r + k - 1, m * c + x] - cells[lower, ch, k * r + k, m * c + x]).item()
                    for ch in range(2) for x in range(m)]
            assert seam.shape == (3, rows - 1, cols) and abs(seam[n, r, c].item() - sum(gaps) / len(gaps)) < 1e-6


def test_costs_say_the_same_as_the_seams_themselves():
    "For every choice of images, up to a constant: saliency given up, plus the seam of the images that meet"
    b, partner = 2, torch.tensor([1, 2, 0])
    shares = torch.rand(3, b, b, generator=seeded(), dtype=torch.float64)
    vertical = torch.rand(4, 3, b - 1, b, generator=seeded(1), dtype=torch.float64)
    horizontal = torch.rand(4, 3, b, b - 1, generator=seeded(2), dtype=torch.float64)
    kept = shares.clone()
    unary_a, unary_b, down, right = choice_costs(shares, partner, vertical, horizontal)
    assert torch.equal(shares, kept)
    gaps = []
    for board in itertools.product((0, 1), repeat=4):
        board = torch.tensor(board).view(b, b)
        ours = torch.where(board == 0, unary_a, unary_b).sum((1, 2))
        ours = ours + (down * board.diff(dim=0).abs()).sum((1, 2)) + (right * board.diff(dim=1).abs()).sum((1, 2))
        direct = torch.where(board == 0, shares[partner], shares).sum((1, 2))
        for r, c in itertools.product(range(b), range(b)):
            if r + 1 < b: direct = direct + vertical[2 * board[r, c] + board[r + 1, c], :, r, c]
            if c + 1 < b: direct = direct + horizontal[2 * board[r, c] + board[r, c + 1], :, r, c]
        gaps.append(ours - direct)
    torch.testing.assert_close(torch.stack(gaps), gaps[0].expand(16, 3))
