"PuzzleMix: the recorded cases, transport against loops, and what a training loop expects of it"
import itertools

import pytest
import torch
from torch import nn

from sumix_nb.mixers.blocks import block_shares
from sumix_nb.mixers.checking import check_devices, check_mixer, check_record, check_types, same
from sumix_nb.mixers.checking import seeded as by_seed
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.puzzlemix import PuzzleMix, transport_plan
from tests.mixers.oracles import BOOLS, seeded

SHAPES = ((5, 3, 16, 8), (1, 3, 8, 24), (2, 1, 8, 8))


def brightness(images):
    "A map that needs no network"
    return images.detach().float().abs().mean(1)


def network(size=8, classes=5):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
                         nn.Linear(4 * (size - 2)**2, classes))


def inputs(golden):
    arrays = golden("mixer_inputs.npz").arrays
    return (torch.from_numpy(arrays[name]) for name in ("img_sq", "sal_sq", "std"))


@pytest.mark.parametrize("case", ["p0", "p1", "p2", "p3", "p4"])
def test_the_recorded_cases(golden, case):
    cases = golden("puzzlemix_official.npz")
    images, saliency, std = inputs(golden)
    b, t_size, transport = (cases[case, name] for name in ("block_num", "t_size", "transport"))
    mixer = PuzzleMix(blocks=(b,), transport=transport, t_size=t_size if t_size > 0 else None, std=tuple(std.tolist()))
    partner, recorded = cases[case, "perm"], cases[case, "graphcut"]
    mixed, mask, _ = mixer.assemble(images, saliency, partner, recorded)
    torch.testing.assert_close(mixed, cases[case, "mixed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(mask.mean((1, 2, 3)), cases[case, "lam_out"], rtol=0, atol=1e-6)
    if transport: same_plans(cases, case, saliency, partner, recorded)


def same_plans(cases, case, saliency, partner, keep):
    side = int(cases[case, "plan_a"].shape[1]**0.5)
    keep = keep.repeat_interleave(side // keep.shape[1], 1).repeat_interleave(side // keep.shape[2], 2)
    shares = block_shares(saliency, side, side)
    for mask, share, name in ((keep, shares, "plan_a"), (1 - keep, shares[partner], "plan_b")):
        recorded, found = cases[case, name].long(), transport_plan(mask, share, 0.8)
        taken = recorded.sum(1) == 1  # places that a claim won
        torch.testing.assert_close(recorded.argmax(1)[taken], found[taken])
        own = torch.arange(side * side).expand_as(found)
        assert torch.equal(found[~taken], own[~taken]) and mask.flatten(1)[~taken].eq(0).all()


@pytest.mark.parametrize("case", ["p0", "p1", "p2", "p3", "p4"])
def test_recorded_costs_and_an_energy_no_higher_than_the_recorded_cut(golden, case, monkeypatch):
    from sumix_nb.mixers import puzzlemix
    cases = golden("puzzlemix_official.npz")
    images, saliency, std = inputs(golden)
    seen, solve = {}, puzzlemix.solve_grid

    def spy(*costs, positive=None, **options):
        seen.update(costs=costs, options=options)
        return solve(*costs, **options)

    monkeypatch.setattr(puzzlemix, "solve_grid", spy)
    mixer = PuzzleMix(std=tuple(std.tolist()))
    lam = torch.tensor([cases[case, "prior"]], dtype=torch.float64)
    keep = mixer.puzzle(images, saliency, cases[case, "perm"], lam, cases[case, "block_num"])
    beta = seen["options"]["beta"]
    for found, name in zip(seen["costs"], ("unary2", "unary1", "pw_row", "pw_col")):
        recorded = cases[case, name]
        if name.startswith("pw"): recorded = recorded - beta * (recorded - found > beta / 2)
        torch.testing.assert_close(found, recorded, rtol=1e-5, atol=1e-6)
    energies = [puzzlemix.grid_energy((2 - 2 * part).round().long(), *seen["costs"], **seen["options"])
                for part in (keep, cases[case, "graphcut"])]
    assert (energies[0] <= energies[1] + 1e-9).all()


def plan_by_loops(mask, shares, t_eps):
    "Greedy transport of one image from the whole table of costs, as the paper has it"
    count, rows, cols = mask.numel(), *mask.shape
    length, shown, worth = max(rows, cols), mask.flatten().tolist(), shares.flatten().tolist()
    cost = [[t_eps * ((i // cols - j // cols)**2 + (i % cols - j % cols)**2) / (length - 1)**2
             - worth[i] * (shown[j] > 0) for j in range(count)] for i in range(count)]
    for _ in range(length):
        claims, plan = [row.index(min(row)) for row in cost], list(range(count))
        for j in range(count):
            fighters = [i for i in range(count) if claims[i] == j]
            winner = min(fighters, key=lambda i: (cost[i][j], i), default=None)
            if winner is not None and cost[winner][j] >= 0: winner = None
            if winner is not None: plan[j] = winner
            for i in fighters: cost[i][j] += i != winner
    return plan


@pytest.mark.parametrize("sides", [(2, 2), (4, 4), (3, 5), (8, 8)])
@pytest.mark.parametrize("t_eps", [0.01, 0.05, 0.8])
def test_transport_is_the_greedy_assignment_of_the_paper(sides, t_eps):
    masks = torch.randint(3, (5, *sides), generator=seeded(1)) / 2
    shares = torch.rand(5, *sides, generator=seeded(2), dtype=torch.float64)
    shares = shares**4 / (shares**4).sum((1, 2), keepdim=True)
    plans = transport_plan(masks, shares, t_eps)
    assert plans.tolist() == [plan_by_loops(mask, share, t_eps) for mask, share in zip(masks, shares)]


def test_a_shown_block_without_saliency_keeps_its_content():
    plan = transport_plan(torch.ones(1, 2, 2), torch.tensor([[[0.0, 0.5], [0.5, 0.0]]]), 0.8)
    assert plan.tolist() == [[0, 1, 2, 3]]
    assert transport_plan(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), 0.8).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("per_sample", BOOLS)
@pytest.mark.parametrize("options", [
    {}, {"n_labels": 2}, {"n_labels": 4, "blocks": (2, 4)}, {"p": 0.5}, {"std": (0.5,)}])
def test_without_transport_it_is_a_mixer_like_any_other(per_sample, options):
    check_mixer(PuzzleMix(saliency=brightness, transport=False, per_sample=per_sample, **options), shapes=SHAPES)


@pytest.mark.parametrize("t_size", [None, 1])
def test_with_transport_all_but_the_place_of_pixels_holds(t_size):
    mixer = PuzzleMix(saliency=brightness, t_eps=0.01, t_size=t_size, per_sample=True)
    mix = by_seed(mixer)
    for shape in SHAPES:
        images, target = torch.randn(shape, generator=seeded()), torch.arange(shape[0]) % 3
        mixed = mix(images, target, 1)
        check_record(images, target, mixed)
        torch.testing.assert_close(mixed.lam, mixed.mask.mean((1, 2, 3)))
        state = torch.get_rng_state()
        assert same(mixed, mix(images, target, 1)) and torch.equal(state, torch.get_rng_state())
        assert shape[0] < 3 or not torch.equal(mixed.images, mix(images, target, 2).images)
        check_types(mix, images, target)
        check_devices(mix, images, target)


def test_every_pixel_of_a_moved_mixture_blends_a_block_of_a_and_one_of_b():
    images = torch.rand(5, 2, 8, 12, generator=seeded())
    saliency, partner = torch.rand(5, 8, 12, generator=seeded(1))**4, torch.tensor([3, 0, 4, 1, 2])
    keep = torch.randint(3, (5, 4, 4), generator=seeded(2)) / 2
    mixed, mask, shown = PuzzleMix(t_eps=0.01).assemble(images, saliency, partner, keep)
    parts = shown(images)
    moved = 0
    for n in range(5):
        shares = [block_shares(saliency[i:i + 1], 4, 4)[0] for i in (n, partner[n])]
        plans = [plan_by_loops(part, share, 0.01) for part, share in zip((keep[n], 1 - keep[n]), shares)]
        for r, c in itertools.product(range(4), range(4)):
            here = mixed[n, :, 2 * r:2 * r + 2, 3 * c:3 * c + 3]
            places = [divmod(plan[4 * r + c], 4) for plan in plans]
            first, second = (images[i, :, 2 * y:2 * y + 2, 3 * x:3 * x + 3]
                             for i, (y, x) in zip((n, partner[n]), places))
            weight = keep[n, r, c]
            torch.testing.assert_close(here, weight * first + (1 - weight) * second)
            for part, block in zip(parts, (weight * first, (1 - weight) * second), strict=True):
                torch.testing.assert_close(part[n, :, 2 * r:2 * r + 2, 3 * c:3 * c + 3], block)
            assert mask[n, 0, 2 * r:2 * r + 2, 3 * c:3 * c + 3].eq(weight).all()
            moved += places != [(r, c), (r, c)] and 0 < weight
    assert moved > 10


def test_lambda_moves_the_share_and_share_one_mixes_nothing():
    images, target = torch.randn(8, 3, 16, 16, generator=seeded()), torch.arange(8)
    mixer, partner = PuzzleMix(blocks=(4,), saliency=brightness), target.roll(1)
    shares = []
    for lam in (1e-6, 0.3, 0.7, 1 - 1e-6, 1.0):
        mixed, share, mask, _ = mixer.mix(images, partner, torch.tensor([lam]).double(), model=None, generator=seeded())
        torch.testing.assert_close(share, mask.mean((1, 2, 3)))
        shares.append(share.mean().item())
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] == 1 and torch.equal(mixed, images)


def test_a_given_map_a_function_and_the_network_are_three_ways_to_the_same():
    images, target = torch.randn(6, 3, 8, 8, generator=seeded()), torch.tensor([0, 1, 4, 3, 2, 2])
    maps, mixer = brightness(images), PuzzleMix(alpha=3.0)
    one = mixer(images, target, saliency=maps, generator=seeded(3))
    two = PuzzleMix(alpha=3.0, saliency=brightness)(images, target, generator=seeded(3))
    assert torch.equal(one.images, two.images) and mixer.saliency is None
    torch.manual_seed(0)
    model = network()
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    three = mixer(images, target, model=model, generator=seeded(3))
    assert not torch.equal(one.images, three.images) and torch.equal(one.partner, three.partner)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_the_coin_leaves_alone_needs_no_pass():
    images, target = torch.randn(4, 3, 8, 8), torch.arange(4)

    def never(images): raise AssertionError("looked at for nothing")

    assert PuzzleMix(p=0.0, saliency=never)(images, target).untouched


def test_soft_labels_and_parts_of_a_batch_work_with_a_network():
    torch.manual_seed(0)
    images, soft = torch.randn(7, 3, 8, 8), torch.rand(7, 5).softmax(1)
    for mixer in (PuzzleMix(), OneOf([PuzzleMix(), PuzzleMix(blocks=(2,))], per_sample=True)):
        mixed = mixer(images, soft, model=network(), generator=seeded())
        check_record(images, soft, mixed)


def test_statistics_are_told_once():
    mixer = PuzzleMix(blocks=(4,))
    assert mixer.with_statistics((0.1,), (0.2,)).std == (0.2,) and mixer.std is None
    assert PuzzleMix(std=(0.5,)).with_statistics((0.1,), (0.2,)).std == (0.5,)
    images, target = torch.rand(6, 3, 16, 16, generator=seeded()), torch.arange(6)
    std = torch.tensor([0.2, 0.3, 0.4])
    plain = PuzzleMix(std=(1.0,), saliency=lambda x: maps)
    maps = brightness(images)
    scaled = PuzzleMix(std=tuple(std.tolist()), saliency=lambda x: maps)
    one = plain(images, target, generator=seeded(2))
    two = scaled((images - 0.4) / std.view(3, 1, 1), target, generator=seeded(2))
    assert torch.equal(one.mask, two.mask)


@pytest.mark.parametrize("options", [
    {"blocks": 4}, {"blocks": ()}, {"blocks": (1,)}, {"blocks": (2.0,)}, {"blocks": (16,)}, {"blocks": (True,)},
    {"n_labels": 1}, {"n_labels": 3.0}, {"n_labels": 9}, {"beta": -1}, {"gamma": 1.1}, {"gamma": -0.1},
    {"eta": float("inf")}, {"eta": "a"}, {"neigh_size": 0}, {"t_eps": -1}, {"t_eps": float("nan")}, {"transport": 1},
    {"t_size": 0}, {"t_size": 2.0}, {"saliency": "gradient"}, {"saliency": torch.rand(2)}, {"std": 0.5}, {"std": (0,)},
    {"alpha": 0}, {"per_sample": 1}, {"p": 2}])
def test_bad_options_are_errors_that_name_them(options):
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(options))}`"): PuzzleMix(**options)


@pytest.mark.parametrize("options, call, name", [
    ({}, {}, "model"), ({}, {"model": abs}, "model"), ({}, {"saliency": torch.rand(6, 4, 4)}, "saliency"),
    ({}, {"saliency": 3}, "saliency"), ({}, {"saliency": torch.full((6, 8, 8), float("nan"))}, "saliency"),
    ({}, {"saliency": -torch.ones(6, 8, 8)}, "saliency"), ({"blocks": (3,)}, {}, "blocks"),
    ({"std": (0.5, 0.5)}, {"saliency": torch.rand(6, 8, 8)}, "std"),
    ({"t_size": 3, "blocks": (2,)}, {"saliency": torch.rand(6, 8, 8)}, "t_size")])
def test_bad_calls_are_errors_that_name_the_argument(options, call, name):
    images, target = torch.randn(6, 3, 8, 8), torch.arange(6)
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"): PuzzleMix(**options)(images, target, **call)


def test_mix_without_a_map_is_an_error():
    lam, partner = torch.tensor([0.5]).double(), torch.arange(2)
    with pytest.raises(ValueError, match="`saliency`"):
        PuzzleMix().mix(torch.rand(2, 3, 8, 8), partner, lam, model=None, generator=None)
