"The energy of a grid of blocks and its exact minimum: recorded optima, every labelling, and all ways to the same"
import itertools
import math

import pytest
import torch

from sumix_nb.mixers import puzzlemix
from sumix_nb.mixers.energy import cross_, grid_energy, label_prior, lowest_labels, raise_labels, solve_grid
from tests.mixers.oracles import BOOLS, seeded

CASES = [f"e{i}" for i in range(11)]


def recorded(cases, case):
    costs = [cases[case, name] for name in ("unary_a", "unary_b", "pw_row", "pw_col")]
    return costs, {name: cases[case, name] for name in ("lam", "beta", "eta", "n_labels")}


def random_problem(n, b, least=0.0, dtype=torch.float64, seed=0):
    generator, shapes = seeded(seed), ((b, b), (b, b), (b - 1, b), (b, b - 1))
    parts = [torch.rand(n, *shape, generator=generator, dtype=dtype) for shape in shapes]
    return [part / b**2 for part in parts[:2]] + [least + 0.1 * part for part in parts[2:]]


def energy_by_loops(labels, unary_a, unary_b, down, right, lam, beta, eta, n_labels):
    "The energy of one labelling, from lists"
    b, top, total = len(labels), n_labels - 1, 0.0
    for r, c in itertools.product(range(b), range(b)):
        label = labels[r][c]
        chance = math.comb(top, label) * lam**(top - label) * (1 - lam)**label
        total += unary_a[r][c] + label / top * (unary_b[r][c] - unary_a[r][c]) - eta / b**2 * math.log(chance + 1e-8)
        if r + 1 < b: total += (down[r][c] + beta) * ((label - labels[r + 1][c]) / top)**2
        if c + 1 < b: total += (right[r][c] + beta) * ((label - labels[r][c + 1]) / top)**2
    return total


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_problems_are_solved_to_the_optimum(golden, case, dtype):
    cases = golden("puzzlemix_energy.npz")
    costs, options = recorded(cases, case)
    costs = [part.to(dtype) for part in costs]
    found = grid_energy(solve_grid(*costs, **options), *costs, **options)
    torch.testing.assert_close(found, cases[case, "e_real_opt"], rtol=0, atol=1e-9)
    assert (found <= cases[case, "e_real_gco"] + 1e-9).all()
    for name in ("gco", "real_opt"):
        energy = grid_energy(cases[case, f"labels_{name}"].long(), *costs, **options)
        expected = cases[case, "e_real_" + name.replace("real_", "")]
        torch.testing.assert_close(energy, expected, rtol=0, atol=1e-9)


def test_what_the_page_says_of_graph_cuts(golden):
    cases = golden("puzzlemix_energy.npz")
    missed, gaps = {2: [], 4: [], 8: []}, []
    for case in CASES[:10]:
        gap = cases[case, "e_real_gco"] - cases[case, "e_real_opt"]
        missed[cases[case, "b"]].append((gap > 1e-9).double().mean().item())
        gaps.append(gap / cases[case, "e_real_opt"].abs())
    assert max(missed[4]) == 0.25 and 0.3 < missed[8][0] < 0.7 and torch.cat(gaps).median() < 0.01
    overflow = cases["e10", "overflow"]
    assert overflow.any() and cases["e10", "unary_int"][overflow].amax() * 100_000 > 2**31


@pytest.mark.parametrize("n_labels, lam, least", [
    (n, lam, least) for n in (2, 3, 4) for lam in (0.0, 1e-6, 0.37, 1.0) for least in (-0.01, -0.3)])
def test_no_labelling_of_2_x_2_blocks_is_better(n_labels, lam, least):
    costs, options = random_problem(5, 2, least), dict(lam=lam, beta=0.01, eta=0.2, n_labels=n_labels)
    found = grid_energy(solve_grid(*costs, **options), *costs, **options)
    for n in range(5):
        lists = [part[n].tolist() for part in costs]
        lowest = min(energy_by_loops((board[:2], board[2:]), *lists, *options.values())
                     for board in itertools.product(range(n_labels), repeat=4))
        assert abs(found[n].item() - lowest) < 1e-12


@pytest.mark.parametrize("b", [1, 3, 5])
def test_the_energy_is_that_of_loops(b):
    costs, lam = random_problem(4, b, -0.1), torch.rand(4, generator=seeded(1), dtype=torch.float64)
    labels = torch.randint(5, (4, b, b), generator=seeded(2))
    found = grid_energy(labels, *costs, lam=lam, beta=0.3, eta=0.7, n_labels=5)
    lists = [[part[n].tolist() for part in costs] for n in range(4)]
    expected = [energy_by_loops(labels[n].tolist(), *lists[n], lam[n].item(), 0.3, 0.7, 5) for n in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("b, n_labels", [(1, 3), (3, 2), (3, 5), (4, 3), (5, 4)])
@pytest.mark.parametrize("per_sample", BOOLS)
def test_two_labels_at_a_time_are_as_good_as_all_at_once(b, n_labels, per_sample):
    costs = random_problem(30, b, -0.01)
    lam = torch.linspace(0.01, 0.99, 30).double() if per_sample else 0.3
    options = dict(lam=lam, beta=0.01, eta=0.2, n_labels=n_labels)
    fast, general = (solve_grid(*costs, **options, positive=positive) for positive in (True, False))
    energies = [grid_energy(labels, *costs, **options) for labels in (fast, general)]
    torch.testing.assert_close(*energies, rtol=0, atol=1e-12)
    assert fast.dtype == torch.int64 and fast.shape == (30, b, b) and fast.unique().numel() > 1


def test_crossing_a_border_takes_the_best_label_above():
    cost, weight = torch.rand(2, 4, 3, 5, generator=seeded()), torch.linspace(-0.1, 0.2, 5)
    below = cost.clone()
    cross_(below, weight)
    for a, label, c, n in itertools.product(range(2), range(4), range(3), range(5)):
        best = min(cost[a, above, c, n] + weight[n] * (label - above)**2 for above in range(4))
        assert abs(below[a, label, c, n] - best) < 1e-6


def test_samples_whose_prior_is_bent_take_the_general_way(monkeypatch):
    from sumix_nb.mixers import energy
    seen = []
    monkeypatch.setattr(energy, "raise_labels", lambda slope, *rest: (seen.append(("fast", slope.shape[-1])),
                                                                      raise_labels(slope, *rest))[1])
    costs, lam = random_problem(5, 3), torch.tensor([0.5, 1e-6, 0.3, 1.0, 0.7]).double()
    options = dict(lam=lam, beta=0.01, eta=0.2, n_labels=3)
    found = solve_grid(*costs, **options)
    assert seen == [("fast", 3)]
    for n in range(5):
        alone = solve_grid(*(part[n:n + 1] for part in costs), **{**options, "lam": lam[n].item()})
        assert torch.equal(alone[0], found[n])
    assert ((label_prior(lam, 3, 0.2, 3).diff(n=2, dim=1) >= 0)[:, 0]).tolist() == [True, False, True, False, True]


def test_large_batches_are_solved_in_portions():
    costs, options = random_problem(3000, 8), dict(lam=0.5, beta=0.01, eta=0.2, n_labels=2)
    found = solve_grid(*costs, **options)
    few = [part[2040:2060] for part in costs]
    assert torch.equal(found[2040:2060], solve_grid(*few, **options))


def test_raising_needs_weights_of_at_least_zero():
    node, weight = torch.zeros(2, 2, 3, 1), torch.full((1, 2, 1), -1.0)
    found = lowest_labels(node, weight, weight.view(2, 1, 1))
    assert found[..., 0].tolist() in ([[0, 2], [2, 0]], [[2, 0], [0, 2]])


def test_nothing_is_written_into_and_no_value_is_looked_at_elsewhere():
    costs, options = random_problem(4, 4, dtype=torch.float32), dict(lam=0.5, beta=0.01, eta=0.2, n_labels=3)
    kept = [part.clone() for part in costs]
    solve_grid(*costs, **options)
    assert all(torch.equal(a, b) for a, b in zip(costs, kept))
    for positive in (None, True):
        labels = solve_grid(*(part.to("meta") for part in costs), **options, positive=positive)
        assert labels.device.type == "meta" and labels.shape == (4, 4, 4)


def test_costs_that_need_gradients_are_fine():
    costs = [part.requires_grad_() for part in random_problem(2, 2)]
    assert not solve_grid(*costs, lam=0.5, beta=0.1, eta=0.2, n_labels=3).requires_grad


def test_names_are_where_the_mixer_is():
    assert puzzlemix.grid_energy is grid_energy and puzzlemix.solve_grid is solve_grid
    assert {"grid_energy", "solve_grid", "PuzzleMix"} <= set(puzzlemix.__all__)


@pytest.mark.parametrize("change", [
    {"unary_a": torch.rand(3, 4, 5)}, {"unary_a": torch.rand(4, 4)}, {"unary_a": torch.rand(0, 4, 4)},
    {"unary_b": torch.rand(3, 2, 2)}, {"pw_row": torch.rand(3, 4, 3)}, {"pw_col": torch.rand(3, 3, 4)},
    {"lam": -0.1}, {"lam": 1.1}, {"lam": "half"}, {"lam": torch.rand(2)}, {"lam": torch.full((3,), 2.0)},
    {"beta": -1}, {"eta": float("nan")}, {"n_labels": 1}, {"n_labels": 2.5}, {"n_labels": 33}])
def test_bad_problems_are_errors_that_name_the_argument(change):
    names = ("unary_a", "unary_b", "pw_row", "pw_col")
    problem = dict(zip(names, random_problem(3, 4))) | dict(lam=0.5, beta=0.1, eta=0.2, n_labels=3) | change
    costs = [problem.pop(name) for name in names]
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(change))}`"): solve_grid(*costs, **problem)


@pytest.mark.parametrize("labels", [torch.zeros(3, 4, 4), torch.zeros(3, 4, 3, dtype=torch.int64)])
def test_labels_must_be_whole_and_of_the_shape_of_the_grid(labels):
    with pytest.raises(ValueError, match="`labels`"):
        grid_energy(labels, *random_problem(3, 4), lam=0.5, beta=0.1, eta=0.2, n_labels=3)
