"The tap on torchvision, timm and fastai models and behind wrappers, and outputs of every form"
import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from sumix_nb.models.tap import FeatureTap, check_classifier, find_classifier, find_stage, logits_and_features, maps_of


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
               "regnet_y_400mf": "fc", "convnext_tiny": "classifier.2", "alexnet": "classifier.6"}
TIMM = {"resnet18": "fc", "deit_tiny_patch16_224": "head", "convnext_atto": "head.fc",
        "swin_tiny_patch4_window7_224": "head.fc", "mobilenetv3_small_050": "classifier"}


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


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_a_network_with_two_classifiers_is_refused(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=7, **({"img_size": 32} if "deit" in name else {}))
    with pytest.raises(ValueError, match="must have one classifier, but .* the mean of 2"): find_classifier(model)
    if "deit" not in name: return
    assert find_classifier(model.eval(), "head") is find_classifier(model, model.head) is model.head
    with pytest.raises(ValueError, match="does not make the logits"): logits_and_features(model, images(), "head")


def test_timm_is_asked_and_not_the_order_of_definition():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", pretrained=False, num_classes=7)
    model.auxiliary = torch.nn.Linear(512, 7)
    assert find_classifier(model) is model.fc


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_tells_the_right_layer_from_its_neighbour_and_lets_nan_pass(dtype):
    torch.manual_seed(0)
    right, wrong, features = nn.Linear(6, 5), nn.Linear(6, 5), torch.randn(7, 6).to(dtype)
    logits = copy.deepcopy(right).to(dtype)(features)
    check_classifier(right, features, logits)
    check_classifier(right, features * math.nan, logits * math.nan)
    for layer, values in ((wrong, features), (right, None), (nn.Linear(6, 4), features)):
        with pytest.raises(ValueError, match="does not make the logits of the network.*`layer`"):
            check_classifier(layer, values, logits)


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
        assert find_classifier(wrapped, "1") is find_classifier(wrapped, model[1]) is model[1]


def test_the_tap_keeps_the_last_input_until_it_is_removed():
    layer, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(1, 3)
    with pytest.raises(KeyError), FeatureTap(layer) as tap:
        layer(x), layer(y)
        assert tap.features is y
        raise KeyError
    assert tap.features is None and not layer._forward_pre_hooks


def test_outputs_that_do_not_come_from_the_layer_are_refused():
    class Unused(nn.Module):
        def __init__(self, c):
            super().__init__(); self.conv, self.extra, self.c = nn.Conv2d(3, 4, 1), nn.Linear(3, 5), c
        def forward(self, x):
            if self.c: self.extra(x.mean((2, 3)))
            return self.conv(x).mean((2, 3))
    for model in (Unused(0), Unused(5)):
        with pytest.raises(ValueError, match="does not make the logits.*`layer`"):
            logits_and_features(model, images())
        assert not model.extra._forward_pre_hooks


def test_tokens_become_maps_row_by_row():
    tokens = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    maps = maps_of(tokens, 3)
    for row in range(3):
        for col in range(3): assert torch.equal(maps[:, :, row, col], tokens[:, 1 + 3 * row + col])
    last = torch.rand(2, 4, 5, 3)
    assert torch.equal(maps_of(last, 3)[1, 2], last[1, :, :, 2]) and maps_of(last, 4) is last


@pytest.mark.parametrize("stage", ["layer9", "relu", "maxpool"])
def test_a_wrong_stage_is_an_error_that_names_it(stage):
    with pytest.raises(ValueError, match=f"`stage`.*{stage}"): find_stage(torchvision.models.resnet18(), stage)


def test_a_network_without_a_known_stage_asks_for_one():
    with pytest.raises(ValueError, match="`stage`"): find_stage(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)))


def test_maps_of_other_channels_are_an_error():
    with pytest.raises(ValueError, match="`stage`.*4 channels"): maps_of(torch.zeros(2, 8, 3, 3), 4)
