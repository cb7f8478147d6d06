"The networks of the experiments: sizes, training, weights, and what is read from them"

import pytest
import torch
from torch.nn import functional as F

import sumix_nb.models.networks
from sumix_nb.models.networks import MODELS, RESNETS, get_model
from sumix_nb.models.tap import STAGES, find_classifier, find_stage, logits_and_features, maps_of, outputs_of
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner


def images(n=2, size=32): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [8, 17, 32])
@pytest.mark.parametrize("stem", ["small", "standard"])
@pytest.mark.parametrize(("width", "c"), [(4, 2), (8, 10), (5, 1)])
def test_networks_of_every_width_stem_size_and_number_of_classes_run(width, c, stem, size):
    model = get_model("resnet18", c, width=width, stem=stem)
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
    layer, channels = find_stage(model)
    with outputs_of(layer) as outputs: model.eval()(x)
    maps = maps_of(outputs[0], channels)
    assert layer is model.get_submodule(STAGES[name]) and not layer._forward_hooks
    assert maps.shape == (4, channels, maps.shape[2], maps.shape[2])


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
    for mixer, callback in (("cutmix", "sumix"), ("automix", "automix")):
        recipe = Recipe(model=name, width=64, stem="standard", pretrained=True, mixer=mixer, method="sumix", limit=20,
                        bs=10)
        head = getattr(make_learner(recipe, device="cpu"), callback).uncertainty_head.layers[0]
        assert 0.008 < head.weight.std() < 0.012 and not head.bias.any()
    with pytest.raises(ValueError, match="`pretrained` needs the published width"): get_model(name, 5, pretrained=True)
    with pytest.raises(ValueError, match="`pretrained` needs"):
        get_model(name, 5, width=16, stem="standard", pretrained=True)


def test_without_timm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sumix_nb.models.networks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="swin.* comes from timm: pip install timm"): get_model("swin_tiny", 10)
