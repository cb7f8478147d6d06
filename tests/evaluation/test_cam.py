"Class activation maps: equal to recorded ones, right where the reference is not, and for tokens too"
import pytest
import torch
from torch import nn

from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.cam import CAM_LAYERS, cam, layer_maps, looks_at_object, map_weights, pointing, share_inside
from sumix_nb.evaluation.cam import stretched
from sumix_nb.models.networks import get_model
from tests.evaluation.oracles import FACTS, Colours, Small

METHODS = {"gradcam": "gradcam", "gradcampp": "gradcam++"}
IMAGES, TARGET = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 3])


def close(found, wanted, rtol=1e-4):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-5 * max(1, wanted.abs().max()))


@pytest.mark.parametrize("layer", ["bn", "relu"])
@pytest.mark.parametrize("case", ["c0", "c1"])
def test_maps_equal_the_recorded_package(golden, case, layer):
    cases = golden("evaluation_official.npz")
    model, x, target = Small(cases, case, inplace=False), cases[case, "x"], cases[case, "target"]
    torch.testing.assert_close(model(x), cases[case, "logits"])
    maps, gradient = layer_maps(model, x, target, layer)
    close(maps, cases[case, f"{layer}_act"])
    close(gradient, cases[case, f"{layer}_grad"])
    for name, method in METHODS.items():
        weights = map_weights(maps, gradient, method)
        close(weights[:, :, 0, 0], cases[case, f"{layer}_{name}_weights"], 1e-3)
        raw = (weights * maps).sum(1)
        close(raw, cases[case, f"{layer}_{name}_raw"], 1e-3)
        close(stretched(raw.clamp(min=0)), cases[case, f"{layer}_{name}_norm_low"], 1e-3)
        close(cam(model, x, target, layer, method), cases[case, f"{layer}_{name}_map"], 1e-3)
        if name == "gradcam":
            close(raw, cases[case, f"{layer}_captum"], 1e-3)
            close(raw.clamp(min=0), cases[case, f"{layer}_captum_relu"], 1e-3)


def test_gradcam_is_that_of_captum():
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = get_model("resnet18", 5, width=8).eval()
    layer = model.get_submodule("layer3")
    wanted = attr.LayerGradCam(model, layer).attribute(IMAGES, target=TARGET, relu_attributions=True)
    wanted = torch.nn.functional.interpolate(wanted.detach(), IMAGES.shape[2:], mode="bilinear", align_corners=False)
    close(cam(model, IMAGES, TARGET, "layer3"), stretched(wanted[:, 0]), 1e-3)


@pytest.mark.parametrize("inplace", [True, False])
def test_in_place_sums_do_not_reach_the_kept_maps(golden, inplace):
    cases = golden("evaluation_official.npz")
    model = Small(cases, "r0", residual=True, inplace=inplace)
    maps, gradient = layer_maps(model, cases["r0", "x"], cases["r0", "target"], "bn")
    close(maps, cases["r0", "safe_act"])
    close(gradient, cases["r0", "safe_grad"])
    for name, method in METHODS.items():
        close(cam(model, cases["r0", "x"], cases["r0", "target"], "bn", method), cases["r0", f"safe_{name}_map"], 1e-3)
    assert (cases["r0", "inplace_act"] - maps).abs().max() > 0.1  # the package's fault on a CPU


@pytest.mark.parametrize(("name", "options"), [
    ("resnet18", {"width": 8}), ("resnext50", {"width": 16}), ("wrn28_8", {"width": 16}),
    ("deit_small", {"width": 64, "size": 64}), ("swin_tiny", {"width": 32, "size": 64})])
def test_every_network_of_the_experiments_has_a_layer(name, options):
    if name in ("deit_small", "swin_tiny"): pytest.importorskip("timm")
    model, size = get_model(name, 5, **options).train(), options.get("size", 32)
    images = torch.randn(2, 3, size, size)
    for method in METHODS.values():
        found = cam(model, images, TARGET, CAM_LAYERS[name], method)
        assert found.shape == (2, size, size) and found.min() >= 0 and found.max() <= 1
    assert model.training and all(p.grad is None for p in model.parameters()) and not found.requires_grad


def test_tokens_are_laid_out_as_places():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.fc = nn.Identity(), nn.Linear(4, 5)
        def forward(self, images):
            places = images[:, :1, ::8, ::8].expand(-1, 4, -1, -1).flatten(2).mT
            return self.fc(self.mix(torch.cat([places.mean(1, keepdim=True), places], 1)).mean(1))

    maps, _ = layer_maps(Tokens(), IMAGES, TARGET, "mix")
    assert torch.equal(maps[:, 2], IMAGES[:, 0, ::8, ::8])


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (32, 32)])
def test_the_last_dimension_is_recognised_as_channels(shape):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 5)
        def forward(self, images):
            return self.fc(self.norm(images[:, :1, ::4, ::4].expand(-1, 6, -1, -1).permute(0, 2, 3, 1)).mean((1, 2)))

    images = torch.randn(2, 3, *shape)
    assert layer_maps(Last(), images, TARGET, "norm")[0].shape == (2, 6, shape[0] // 4, shape[1] // 4)
    conv = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AvgPool2d(4), nn.Flatten(), nn.LazyLinear(5))
    conv(images)
    assert layer_maps(conv, images, TARGET, "1")[0].shape == (2, 6, shape[0] // 4, shape[1] // 4)


def test_frozen_networks_have_maps_and_hooks_go_away():
    model = get_model("resnet18", 5, width=8).requires_grad_(False)
    found = cam(model, IMAGES, TARGET, "layer4")
    assert torch.equal(found, cam(model, IMAGES, TARGET, "layer4")) and not model.layer4._forward_hooks
    with pytest.raises(ValueError, match="`layer`"): cam(model, IMAGES, TARGET, "layer5")
    with torch.no_grad(): assert torch.equal(found, cam(model, IMAGES, TARGET, "layer4"))


def test_scores_by_hand():
    maps = torch.rand(6, 5, 7, generator=torch.Generator().manual_seed(2))
    masks = torch.rand(6, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.5
    maps[3] = 0
    for i, (hit, share) in enumerate(zip(pointing(maps, masks), share_inside(maps, masks))):
        cells = [(maps[i, r, c].item(), masks[i, 0, r, c].item()) for r in range(5) for c in range(7)]
        if i == 3: assert not hit and share.isnan()
        else:
            assert hit.item() == max(cells)[1]
            inside = sum(value for value, on in cells if on)
            assert share.item() == pytest.approx(inside / sum(value for value, _ in cells), abs=1e-6)


def test_the_measure_is_the_mean_over_images():
    data, model = scenes(12, 32, seed=3), get_model("resnet18", 24, width=8)
    found = looks_at_object(model, data, "layer3", **FACTS, bs=5)
    mean, std = (torch.tensor(FACTS[name]).view(3, 1, 1) for name in FACTS)
    maps = cam(model, (data.images / 255 - mean) / std, data.target, "layer3")
    assert found["n"] == 12 and found["pointing"] == pytest.approx(pointing(maps, data.masks).double().mean().item())
    assert found["inside"] == pytest.approx(share_inside(maps, data.masks).nanmean().item(), abs=1e-5)
    assert found["object"] == pytest.approx(data.masks.double().mean().item())
    assert found["blank"] == pytest.approx((maps.amax((1, 2)) == 0).double().mean().item())


def test_maps_that_are_all_blank_have_no_share():
    model = Colours()
    conv = nn.Sequential(nn.Conv2d(3, 3, 1), model)
    nn.init.zeros_(conv[0].weight), nn.init.zeros_(conv[0].bias)
    found = looks_at_object(conv, scenes(4, 16), "0", **FACTS)
    assert found["inside"] is None and found["blank"] == 1 and found["pointing"] == 0


NET, MAPS, MASKS = get_model("resnet18", 5, width=8), torch.rand(2, 4, 4), torch.ones(2, 1, 4, 4).bool()


@pytest.mark.parametrize(("error", "call", "message"), [
    (ValueError, lambda: cam(NET, IMAGES, TARGET, "layer9"), "`layer` must be the name of a layer"),
    (ValueError, lambda: cam(NET, IMAGES, TARGET, ""), "`layer` must be the name of a layer"),
    (ValueError, lambda: cam(NET, IMAGES, TARGET, NET.layer4), "`layer` must be the name of a layer"),
    (ValueError, lambda: cam(NET, IMAGES, TARGET, "layer4", "score"), "`method` must be one of"),
    (TypeError, lambda: cam(NET, [1], TARGET, "layer4"), "`images` must be a tensor"),
    (ValueError, lambda: cam(NET, IMAGES[0], TARGET, "layer4"), "`images` must have the shape"),
    (ValueError, lambda: cam(NET, IMAGES.byte(), TARGET, "layer4"), "`images` must be floating point"),
    (ValueError, lambda: cam(NET, IMAGES, TARGET[:1], "layer4"), "`target` must have one row"),
    (ValueError, lambda: cam(NET, IMAGES, torch.rand(2), "layer4"), "`target` must be class indices"),
    (ValueError, lambda: cam(NET, IMAGES, TARGET + 2, "layer4"), r"`target` must be in \[0, 4\]"),
    (ValueError, lambda: cam(NET, IMAGES, -TARGET, "layer4"), r"`target` must be in \[0, 4\]"),
    (ValueError, lambda: cam(NET, IMAGES, TARGET, "fc"), "`layer` must put out maps or tokens"),
    (ValueError, lambda: pointing(MAPS, MASKS[:1]), "`masks` must be bool"),
    (ValueError, lambda: pointing(MAPS, MASKS.float()), "`masks` must be bool"),
    (ValueError, lambda: share_inside(MAPS[0], MASKS), r"`maps` must be \(N, H, W\)"),
    (ValueError, lambda: share_inside(-MAPS, MASKS), "not negative"),
    (ValueError, lambda: looks_at_object(NET, scenes(2), "layer4", **FACTS, bs=0), "`bs` must be at least 1"),
])
def test_bad_input(error, call, message):
    with pytest.raises(error, match=message): call()


def test_layers_that_have_no_part_in_the_answer():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.pair, self.fc = Pair(), nn.Linear(3, 5)
        def forward(self, images):
            self.unused(images)
            first, _ = self.pair(images)
            return self.fc(self.used(self.used(first)).mean((2, 3)))

    class Pair(nn.Module):
        def forward(self, images): return images, images

    reasons = {"unused": "must lead to the logits", "used": "one tensor, once", "pair": "one tensor, once"}
    for layer, message in reasons.items():
        with pytest.raises(ValueError, match=message): cam(Aside(), IMAGES, TARGET, layer)
