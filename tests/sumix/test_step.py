"`SUMixStep` in plain loops: equal to the callback, with outputs of any form, wrapped, saved, and refused clearly"
import copy
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.callback import TRAINING, SUMix
from sumix_nb.sumix.step import HEAD_NAME, SUMixStep
from tests.sumix.learners import K, Fixed, Spy, fit, learner, with_bn, without_bn


def batch(n=8, size=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(K, (n,), generator=generator)


@pytest.mark.parametrize("clean", TRAINING)
@pytest.mark.parametrize("options", [{}, {"variant": "released"}, {"z": "features", "hidden": (5,)}, {"relabel": False},
                                     {"xi": 2.0, "variant": "corrected"}])
def test_a_plain_loop_sees_the_losses_and_gradients_of_the_callback(options, clean):
    torch.manual_seed(1)
    spy, learn = Spy(), learner(SUMix(Fixed(), clean=clean, **options), lr=0.0)
    model = copy.deepcopy(learn.model)
    model[-1]._forward_pre_hooks.clear()
    fit(learn, cbs=spy)
    step = SUMixStep(model, Fixed(), clean=clean, **options)
    for (images, target), seen, gradients in zip(learn.dls.train, spy.batches, spy.gradients, strict=True):
        model.zero_grad()
        terms = step(images, target)
        terms.loss.backward()
        assert torch.equal(terms.loss.detach(), seen.loss)
        own = [p.grad for p in step.parameters() if p.grad is not None]
        assert len(own) == len(gradients) and all(torch.equal(a, b) for a, b in zip(own, gradients, strict=True))


def test_a_batch_that_was_not_mixed_is_passed_once_and_gives_the_usual_loss():
    model, passes, (images, target) = without_bn(), [], batch()
    step = SUMixStep(model, OneOf([CutMix()], p=[0.0]))
    model.register_forward_pre_hook(lambda model, inputs: passes.append(len(inputs[0])))
    terms = step(images, target)
    terms.loss.backward()
    assert passes == [8] and not any(p.grad.any() for p in step.head.parameters())
    torch.testing.assert_close(terms.loss, F.cross_entropy(model(images), target))


def test_a_second_step_takes_over_the_head_it_finds_unless_its_layers_differ():
    model = without_bn()
    first = SUMixStep(model, CutMix())
    assert SUMixStep(model, CutMix(), hidden=[]).head is first.head
    wider = SUMixStep(model, CutMix(), hidden=[7])
    assert wider.head is model[-1].uncertainty is not first.head and wider.head.sizes[1:] == (7, K)


class Returns(nn.Module):
    "A network that packs its logits and features"
    def __init__(self, pack): super().__init__(); self.net, self.pack = without_bn(), pack
    def forward(self, x):
        features = self.net[:-1](x)
        return self.pack(self.net[-1](features), features)


@pytest.mark.parametrize("clean", TRAINING)
@pytest.mark.parametrize("pack", [lambda z, f: (z,), lambda z, f: (f, z), lambda z, f: {"logits": z, "features": f},
                                  lambda z, f: {"out": z}, lambda z, f: SimpleNamespace(logits=z, loss=None)])
def test_logits_are_found_in_tuples_dictionaries_and_objects(pack, clean):
    images, target = batch()
    losses = []
    for model in (without_bn(), Returns(pack)):
        torch.manual_seed(1)
        losses.append(SUMixStep(model, Fixed(), clean=clean)(images, target).loss)
    torch.testing.assert_close(*losses)


def test_where_the_logits_could_be_two_things_it_is_asked():
    for pack in (lambda z, f: (z, z), lambda z, f: {"a": z, "b": z}, lambda z, f: "logits", lambda z, f: [f]):
        with pytest.raises(TypeError, match="`model` must return logits .* that could be it: wrap"):
            SUMixStep(Returns(pack), Fixed())(*batch())


def test_googlenet_trains_on_its_logits_and_leaves_its_auxiliary_outputs_out():
    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, num_classes=K, aux_logits=True, init_weights=False)
    step = SUMixStep(model, Fixed())
    terms = step(*batch(4, size=96))
    terms.loss.backward()
    assert step.classifier is model.fc and terms.loss.isfinite() and model.conv1.conv.weight.grad.abs().sum() > 0
    assert model.aux1.fc2.weight.grad is None


def test_the_head_is_saved_and_leaves_a_plain_network_behind():
    model = with_bn()
    step = SUMixStep(model, "cutmix")
    assert f"5.{HEAD_NAME}.layers.0.weight" in model.state_dict()
    assert any(p is q for p in step.head.parameters() for q in step.parameters())
    again = SUMixStep(model, "mixup")
    assert again.head is step.head
    plain = {key: value for key, value in model.state_dict().items() if f"{HEAD_NAME}." not in key}
    with_bn().load_state_dict(plain)
    again.detach()
    assert set(model.state_dict()) == set(plain)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_network_compiled_before_the_step_came_is_tapped_too(backend):
    losses, (images, target) = [], batch()
    for compiled in (False, True):
        torch._dynamo.reset()
        model = without_bn()
        if compiled: model = torch.compile(model, backend=backend)
        model(images)
        torch.manual_seed(1)
        losses.append(SUMixStep(model, Fixed())(images, target).loss.item())
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("error", "match", "make"), [
    (TypeError, "`generator` must be", lambda: SUMixStep(with_bn(), "cutmix", generator=3)),
    (TypeError, "unexpected keyword argument 'off_after'", lambda: SUMixStep(with_bn(), "cutmix", off_after=1)),
    (ValueError, "at least 2 classes", lambda: SUMixStep(with_bn(1), Fixed())(*batch()))])
def test_mistakes_are_named(error, match, make):
    with pytest.raises(error, match=match): make()
