"Networks and what is read from them: torchvision, timm and fastai models, wrappers, the networks of the experiments"
import copy
import inspect

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import sumix_nb.models.networks
from sumix_nb.sumix.callback import HEAD_NAME, attach_head
from sumix_nb.models.networks import MODELS, RESNETS, get_model, resnet18
from sumix_nb.models.tap import STAGES, FeatureTap, as_maps, find_classifier, logits_and_features, named_linears
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner
from sumix_nb.sumix.uncertainty import UncertaintyHead


def images(n=2, size=32): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def check_logits_and_features(model, layer, size=32, **kwargs):
    "The features, sent through the classifier by hand, must give the network's own outputs"
    model.eval()
    x, hooks = images(2, size), len(layer._forward_pre_hooks)
    with torch.no_grad(): logits, features = logits_and_features(model, x, **kwargs)
    with torch.no_grad(): torch.testing.assert_close(logits, model(x), rtol=0, atol=0)
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(logits, features @ layer.weight.T + bias, rtol=1e-4, atol=1e-5)
    assert len(layer._forward_pre_hooks) == hooks, "the tap must not stay behind"


TORCHVISION = {"resnet18": "fc", "mobilenet_v3_small": "classifier.3", "shufflenet_v2_x0_5": "fc",
               "regnet_y_400mf": "fc",
               "convnext_tiny": "classifier.2", "alexnet": "classifier.6"}
TIMM = {"resnet18": "fc", "deit_tiny_patch16_224": "head", "convnext_atto": "head.fc",
        "swin_tiny_patch4_window7_224": "head.fc",
        "mobilenetv3_small_050": "classifier"}


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_classifier_of_torchvision_networks_is_found_and_read(name):
    model = getattr(torchvision.models, name)(weights=None, num_classes=7)
    layer = find_classifier(model)
    assert layer is model.get_submodule(TORCHVISION[name]) and layer.out_features == 7
    check_logits_and_features(model, layer, 64)


@pytest.mark.parametrize("name", TIMM)
def test_the_classifier_of_timm_networks_is_found_and_read(name):
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 32} if "deit" in name else {"img_size": 32, "window_size": 4} if "swin" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=7, **kwargs)
    layer = find_classifier(model)
    assert layer is model.get_submodule(TIMM[name]) is model.get_classifier()
    check_logits_and_features(model, layer)


def test_a_distilled_network_needs_layer():
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, num_classes=7, img_size=32)
    assert find_classifier(model) is model.head_dist
    assert find_classifier(model, "head") is find_classifier(model, model.head) is model.head


def test_the_classifier_of_a_fastai_vision_learner_is_found_and_read():
    from fastai.vision.learner import create_vision_model
    model = create_vision_model(torchvision.models.resnet18, 7, pretrained=False)
    layer = find_classifier(model)
    assert layer is model[1][-1] and layer.bias is None
    check_logits_and_features(model, layer)


def test_wrappers_of_compile_and_data_parallel_are_looked_through():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5), nn.ReLU(), nn.Linear(5, 2))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model),
                    torch.compile(nn.DataParallel(model), backend="eager"),
                    nn.DataParallel(torch.compile(model, backend="eager"))):
        assert find_classifier(wrapped) is model[3]
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model),
                    torch.compile(nn.DataParallel(model), backend="eager")):
        assert find_classifier(wrapped, "1") is find_classifier(wrapped, model[1]) is model[1]


def test_a_child_that_is_called_module_is_an_ordinary_child():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(48, 6)), nn.Linear(6, 2)
        def forward(self, x): return self.fc(self.module(x))
    net = Net()
    assert find_classifier(net) is net.fc and find_classifier(net, "fc") is net.fc


def test_linear_layers_are_listed_by_name_and_not_looked_into():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)))
    model[1][1].add_module("extra", nn.Linear(9, 9))
    assert [(name, layer) for name, layer in named_linears(model)] == [("0", model[0]), ("1.1", model[1][1])]
    assert find_classifier(model) is model[1][1]
    alone = nn.Linear(2, 3)
    assert list(named_linears(alone)) == [("", alone)] and find_classifier(alone) is alone
    assert [name for name, _ in named_linears(alone, "head")] == ["head"]


def test_the_tap_keeps_the_last_input_until_it_is_removed():
    layer, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(1, 3)
    tap = FeatureTap(layer)
    assert tap.features is None
    layer(x), layer(y)
    assert tap.features is y
    tap.remove()
    assert tap.features is None and not layer._forward_pre_hooks
    layer(x)
    assert tap.features is None
    with pytest.raises(KeyError), FeatureTap(layer) as tap:
        layer(x)
        assert tap.features is x
        raise KeyError
    assert tap.features is None and not layer._forward_pre_hooks


def test_the_tap_for_training_only_ignores_evaluation():
    layer = nn.Linear(3, 2)
    tap, x = FeatureTap(layer, training_only=True), torch.randn(4, 3)
    layer.eval()(x)
    assert tap.features is None
    layer.train()(x)
    assert tap.features is x


def test_features_carry_gradient_to_the_body_and_the_network_is_unchanged():
    model = get_model("resnet18", 3, width=4)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name
              and "num" not in name}
    logits, features = logits_and_features(model, images(size=8))
    features.sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0 and model.fc.weight.grad is None
    assert logits.shape == (2, 3) and features.shape == (2, 32)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_outputs_that_do_not_come_from_the_layer_are_refused():
    class Unused(nn.Module):
        def __init__(self, c):
            super().__init__(); self.conv, self.extra, self.c = nn.Conv2d(3, 4, 1), nn.Linear(3, 5), c
        def forward(self, x):
            if self.c: self.extra(x.mean((2, 3)))
            return self.conv(x).mean((2, 3))
    for model in (Unused(0), Unused(5)):
        with pytest.raises(ValueError, match="outputs of `model` must come from.*Linear.*`layer`"):
            logits_and_features(model, images())
        assert not model.extra._forward_pre_hooks


@pytest.mark.parametrize("size", [8, 17, 32])
@pytest.mark.parametrize("stem", ["small", "standard"])
@pytest.mark.parametrize(("width", "c"), [(4, 2), (8, 10), (5, 1)])
def test_networks_of_every_width_stem_size_and_number_of_classes_run(width, c, stem, size):
    model = get_model("resnet18", c, width=width, stem=stem)
    check_logits_and_features(model, model.fc, size)
    assert (model.fc.in_features, model.fc.out_features) == (8 * width, c)
    assert model.conv1.out_channels == width
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    model(images(2, size))
    side = size if stem == "small" else (size + 3) // 4
    for i, shape in enumerate(seen):
        assert shape == (2, width * 2**i, side, side)
        side = (side + 1) // 2


def test_resnet18_has_the_published_number_of_parameters():
    def count(model): return sum(p.numel() for p in model.parameters())
    assert count(resnet18(1000, stem="standard")) == count(torchvision.models.resnet18(weights=None)) == 11689512
    assert count(resnet18(100)) == 11220132
    assert MODELS["resnet18"] is resnet18 and count(get_model("resnet18", 100)) == 11220132  # as published by default


def test_the_standard_network_computes_what_torchvisions_does():
    ours, theirs = resnet18(5, stem="standard").eval(), torchvision.models.resnet18(weights=None, num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad(): torch.testing.assert_close(ours(images(size=64)), theirs(images(size=64)))


def test_initial_weights_follow_pytorchs_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(get_model("resnet18", 3, width=4).conv1.weight)
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


@pytest.mark.parametrize("stem", ["small", "standard"])
def test_training_lowers_the_loss_and_reaches_every_parameter(stem):
    torch.manual_seed(0)
    model, x, target = get_model("resnet18", 4, width=4, stem=stem), images(8, 16), torch.arange(8) % 4
    opt, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(8):
        loss = F.cross_entropy(model(x), target)
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_networks_can_be_copied_and_run_in_double_and_bfloat16():
    model = copy.deepcopy(get_model("resnet18", 3, width=4)).eval()
    exact = copy.deepcopy(model).double()(images(size=8).double())
    torch.testing.assert_close(model(images(size=8)).double(), exact, rtol=1e-3, atol=1e-4)
    half = copy.deepcopy(model).bfloat16()(images(size=8).bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_every_public_name_is_there_and_documented():
    for name in sumix_nb.models.networks.__all__:
        value = getattr(sumix_nb.models.networks, name)
        assert not callable(value) or inspect.getdoc(value), name


SMALL = {"resnet18": {"width": 4}, "resnext50": {"width": 16}, "wrn28_8": {"width": 16},
         "deit_small": {"width": 64, "size": 32}, "swin_tiny": {"width": 32, "size": 32}}


@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_narrow_on_request_trains_and_shows_features_and_maps(name):
    torch.manual_seed(0)
    model, x, target = get_model(name, 7, **SMALL[name]), images(4, 32), torch.arange(4)
    logits, features = logits_and_features(model, x)
    classifier = find_classifier(model)
    assert logits.shape == (4, 7) and features.shape == (4, classifier.in_features)
    torch.testing.assert_close(logits, classifier(features))
    F.cross_entropy(logits, target).backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    seen = []
    model.get_submodule(STAGES[name]).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.eval()(x)
    maps = as_maps(seen[0], channels_last=name == "swin_tiny")
    assert maps.ndim == 4 and maps.shape[2] == maps.shape[3] and maps.shape[0] == 4


def test_tokens_become_maps_row_by_row():
    tokens = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    maps = as_maps(tokens)
    for row in range(3):
        for col in range(3): assert torch.equal(maps[:, :, row, col], tokens[:, 1 + 3 * row + col])
    last = torch.rand(2, 4, 5, 3)
    assert torch.equal(as_maps(last, channels_last=True)[1, 2], last[1, :, :, 2]) and as_maps(last) is last


@pytest.mark.parametrize("name", RESNETS)
def test_imagenet_weights_fill_all_but_the_classifier(name, monkeypatch):
    published, asked = MODELS[name](1000, stem="standard"), []

    def get_state_dict(self, **options):
        asked.append(options)
        return published.state_dict()

    monkeypatch.setattr(type(RESNETS[name]), "get_state_dict", get_state_dict)
    model = get_model(name, 5, stem="standard", pretrained=True)
    assert asked == [{"progress": False, "check_hash": True, "weights_only": True}]
    for key, value in model.state_dict().items():
        if key.startswith("fc."):
            assert value.shape[0] == 5 and (not value.any() if key == "fc.bias" else 0.008 < value.std() < 0.012)
        else: assert torch.equal(value, published.state_dict()[key])
    recipe = Recipe(model=name, width=64, stem="standard", pretrained=True, mixer="cutmix", method="sumix", limit=20,
                    bs=10)
    head = make_learner(recipe, device="cpu").sumix.uncertainty_head.layers[0]
    assert 0.008 < head.weight.std() < 0.012 and not head.bias.any()
    with pytest.raises(ValueError, match="`pretrained` needs the published width"): get_model(name, 5, pretrained=True)
    with pytest.raises(ValueError, match="`pretrained` needs"):
        get_model(name, 5, width=16, stem="standard", pretrained=True)


def test_without_timm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sumix_nb.models.networks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install .sumix_nb\[models\]"): get_model("swin_tiny", 10)


@pytest.mark.parametrize("name", ["resnext50", "wrn28_8", "deit_small", "swin_tiny"])
def test_the_uncertainty_head_fits_every_network(name):
    model = get_model(name, 7, **SMALL[name]).eval()
    before, classifier = model(images(2, 32)), find_classifier(model)
    attach_head(classifier, UncertaintyHead(classifier.in_features, 7))
    assert HEAD_NAME in dict(classifier.named_children()) and torch.equal(model(images(2, 32)), before)
