"Attacks: equal to recorded ones, inside their box, and without side effects"
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sumix_nb.evaluation.accuracy import UnseenImages as Images
from sumix_nb.evaluation.adversarial import fgsm, loss_gradient, pgd, random_signs, under_attack
from tests.evaluation.oracles import FACTS, Colours, Small

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) / 2
TARGET = torch.tensor([0, 4, 2, 1])


@pytest.mark.parametrize("case", ["f0", "f1"])
def test_fgsm_equals_the_recorded_tools(golden, case):
    cases = golden("evaluation_official.npz")
    model, x, y = Small(cases, case), cases[case, "x_norm"], cases[case, "y"]
    facts = {name: tuple(cases[case, name].tolist()) for name in ("mean", "std")}
    torch.testing.assert_close(model(x), cases[case, "logits_clean"])
    gradient = loss_gradient(model, x, y) / len(x)
    torch.testing.assert_close(gradient, cases[case, "grad_norm"], rtol=1e-4, atol=1e-8)
    for eps, space, name in ((8, "pixel", "pixel"), (4, "pixel", "pixel_eps4"), (8, "legacy", "legacy"),
                             (0, "legacy", "legacy_eps0")):
        found = fgsm(model, x, y, eps / 255, space=space, **facts)
        torch.testing.assert_close(found, cases[case, f"{name}_adv"], rtol=0, atol=2e-6 / min(facts["std"]))
        error = 100 * (model(found).argmax(1) != y).double().mean().item()
        assert error == pytest.approx(cases[case, f"{name}_error"], abs=1e-4)
    clamped = (fgsm(model, x, y, 0, space="legacy", **facts) != x).double().mean()
    assert clamped > 0.7 and cases[case, "legacy_eps0_error"] == cases[case, "legacy_error"]


def test_attacks_are_those_of_captum():
    robust = pytest.importorskip("captum.robust")
    facts = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    pixels, model = torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(1)), Colours(5).eval()
    loss = torch.nn.CrossEntropyLoss(reduction="none")
    wanted = robust.FGSM(model, loss, 0.0, 1.0).perturb(pixels, 0.05, TARGET)
    torch.testing.assert_close(fgsm(model, pixels, TARGET, 0.05, **facts), wanted)
    wanted = robust.PGD(model, loss, 0.0, 1.0).perturb(pixels, 0.05, 0.02, 6, TARGET)
    found = pgd(model, pixels, TARGET, 0.05, step=0.02, steps=6, start=pixels, **facts)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", ["f0", "f1"])
def test_pgd_equals_the_recorded_script(golden, case):
    cases = golden("evaluation_official.npz")
    model, x, y = Small(cases, case), cases[case, "x_norm"], cases[case, "y"]
    mean, std = (cases[case, name] for name in ("mean", "std"))
    eps, step, steps = cases[case, "pgd_eps_step_iters"].tolist()
    found = pgd(model, x, y, eps / 255, mean=tuple(mean.tolist()), std=tuple(std.tolist()), step=step / 255,
                steps=steps, start=cases[case, "pgd_start_pix"])
    pixels = found * std.view(3, 1, 1) + mean.view(3, 1, 1)
    torch.testing.assert_close(pixels, cases[case, "pgd_adv_pix"], rtol=0, atol=2e-6)


def test_attacks_leave_the_network_as_it_was():
    model = Colours().train()
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for attack in (fgsm, pgd): attack(model, IMAGES, TARGET, **FACTS)
    assert model.training and not model.drop.training and model.fc.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad(): assert not fgsm(model, IMAGES, TARGET, **FACTS).requires_grad


def test_the_gradient_is_that_of_a_finite_difference():
    model = Colours(5).double().eval()
    images = IMAGES.double()
    gradient, tiny = loss_gradient(model, images, TARGET), 1e-6
    for index in ((0, 0, 0, 0), (2, 1, 3, 4), (3, 2, 5, 5)):
        moved = images.clone()
        moved[index] += tiny
        slope = (F.cross_entropy(model(moved), TARGET, reduction="sum")
                 - F.cross_entropy(model(images), TARGET, reduction="sum")) / tiny
        assert gradient[index].item() == pytest.approx(slope.item(), rel=1e-3)


def test_half_precision_is_switched_off_for_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    wanted = loss_gradient(model, IMAGES, TARGET)
    with torch.autocast("cpu", torch.bfloat16): found = loss_gradient(model, IMAGES, TARGET)
    assert torch.equal(found, wanted)


def test_the_measure_counts_what_each_attack_finds():
    pixels = torch.randint(256, (7, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    test = Images(pixels, torch.arange(7), *FACTS.values())
    model = Colours()
    found = under_attack(model, test, (0, 8, 64), bs=3)
    images, counted = test.normalised(pixels), {0: 0, 8: 0, 64: 0}
    for level, fast, legacy in zip(found["eps"], found["fgsm"], found["legacy"]):
        for share, space in ((fast, "pixel"), (legacy, "legacy")):
            attacked = fgsm(model, images, test.target, level / 255, space=space, **FACTS)
            with torch.no_grad(): wrong = model.eval()(attacked).argmax(1) != test.target
            assert share == pytest.approx(wrong.double().mean().item())
    draws = torch.Generator().manual_seed(0)
    for part, target in zip(images.split(3), test.target.split(3)):
        for level in found["eps"]:
            moved = random_signs(part, level / 255, generator=draws, **FACTS)
            with torch.no_grad(): counted[level] += (model.eval()(moved).argmax(1) != target).sum().item()
    assert found["n"] == 7 and found["random"] == pytest.approx([counted[level] / 7 for level in found["eps"]])
    assert found["random"][1:] != found["fgsm"][1:]


def test_random_signs_move_every_value_that_has_room():
    pixels = IMAGES.abs().clamp(0.2, 0.8)
    mean, std = (torch.tensor(FACTS[name]).view(3, 1, 1) for name in FACTS)
    found = random_signs((pixels - mean) / std, 0.1, generator=torch.Generator().manual_seed(0), **FACTS)
    moved = found * std + mean - pixels
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.1))
    assert 0.3 < (moved > 0).double().mean() < 0.7


NET = Colours(5)


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(("error", "changes", "message"), [
    (TypeError, {"images": [1]}, "`images` must be a tensor"),
    (ValueError, {"images": IMAGES[0]}, "`images` must have the shape"),
    (ValueError, {"images": IMAGES.byte()}, "`images` must be floating point"),
    (ValueError, {"images": IMAGES[:0]}, "not be empty"),
    (ValueError, {"target": TARGET[:2]}, "`target` must have one row"),
    (ValueError, {"target": torch.rand(4)}, "`target` must be class indices"),
    (ValueError, {"target": torch.rand(4, 5)}, "`target` must be class indices"),
    (ValueError, {"eps": 8}, "`eps` must be in"),
    (ValueError, {"eps": -0.1}, "`eps` must be in"),
    (TypeError, {"eps": "8"}, "`eps` must be a number"),
    (ValueError, {"mean": (0.5,)}, "each of the 3 channels"),
    (ValueError, {"std": (0.5, 0.5)}, "each of the 3 channels"),
    (ValueError, {"std": (0.5, 0.5, 0)}, "`std` must be above 0"),
])
def test_bad_input(attack, error, changes, message):
    given = {"model": NET, "images": IMAGES, "target": TARGET} | FACTS | changes
    with pytest.raises(error, match=message): attack(**given)


@pytest.mark.parametrize(("error", "call", "message"), [
    (ValueError, lambda: fgsm(NET, IMAGES, TARGET, space="rgb", **FACTS), "`space` must be one of"),
    (ValueError, lambda: pgd(NET, IMAGES, TARGET, steps=0, **FACTS), "`steps` must be"),
    (ValueError, lambda: pgd(NET, IMAGES, TARGET, step=2, **FACTS), "`step` must be in"),
    (ValueError, lambda: pgd(NET, IMAGES, TARGET, start=IMAGES[:2], **FACTS), "`start` must have the shape"),
    (TypeError, lambda: pgd(NET, IMAGES, TARGET, generator=3, **FACTS), "`generator` must be"),
    (TypeError, lambda: random_signs(IMAGES, 0.1, generator=3, **FACTS), "`generator` must be"),
    (ValueError, lambda: under_attack(NET, Images(IMAGES, TARGET), (0, 300)), "`levels` must be"),
])
def test_bad_options(error, call, message):
    with pytest.raises(error, match=message): call()
