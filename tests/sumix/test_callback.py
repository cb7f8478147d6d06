"`SUMix` in real Learners: its loss, the clean pass, its options, and the networks it meets"
import copy
import math

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze
from torch import nn
from torch.nn import functional as F

from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.callback import TRAINING, SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.sumix.step import HEAD_NAME
from tests.sumix.oracles import scalar_oracle
from tests.sumix.learners import K, KINDS, LOSSES, WEIGHT, At, Fixed, Named, Spy, fit, head_of, learner, make_dls
from tests.sumix.learners import released_label, same, throw, times_in_optimizer, weights, with_bn, without_bn


def test_an_exception_in_the_clean_pass_leaves_batchnorm_remembering():
    class Breaks(nn.Module):
        def __init__(self): super().__init__(); self.calls, self.net = 0, with_bn()
        def forward(self, x):
            self.calls += self.training
            if self.calls == 2: raise KeyboardInterrupt
            return self.net(x)
    learn = learner(SUMix(CutMix(), update_bn=False), model=Breaks())
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert learn.model.net[1].track_running_stats is True


def test_an_exception_between_the_forward_pass_and_the_callback_leaves_a_network_that_can_be_copied():
    learn = learner(SUMix(CutMix()))
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At("after_pred", throw(KeyboardInterrupt()), order=0))
    copy.deepcopy(learn.model)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
def test_sumix_trains_on_the_learners_own_loss(name, variant):
    loss_func, spy = LOSSES[name], Spy()
    fit(learner(SUMix(Fixed(), xi=0.0, variant=variant), loss=loss_func), cbs=spy)
    for batch in spy.batches:
        mixed, ratio = batch.mixed, batch.terms.ratio
        if variant == "released": ratio = released_label(ratio, mixed.lam)
        # one row at a time and once per label, weighted and divided by hand
        above = below = 0.0
        for i in range(8):
            for target, share in ((mixed.target_a[i], ratio[i]), (mixed.target_b[i], 1 - ratio[i])):
                weight = getattr(loss_func, "weight", None)
                if weight is None and name in ("fastai class weights", "partial"): weight = WEIGHT
                weight = 1.0 if weight is None or "focal" in name else float(weight[target])
                if name in ("ignore_index", "fastai ignore_index", "all") and target == 1: weight = 0.0
                alone = 0.0 if weight == 0 else float(loss_func(batch.pred[i:i + 1], target[None])) * weight
                above, below = above + float(share) * alone, below + float(share) * weight
        assert batch.loss.item() == pytest.approx(above if name == "sum" else above / below, rel=1e-4)


@pytest.mark.parametrize("z", ["logits", "features"])
@pytest.mark.parametrize("clean", TRAINING)
@pytest.mark.parametrize("variant", ["poster", "corrected"])
def test_sumix_loss_ratio_and_gradients_in_a_learner_equal_loops_over_samples(variant, clean, z):
    learn, spy = learner(SUMix(Fixed(), xi=0.7, variant=variant, clean=clean, z=z), model=without_bn(), lr=0.0), Spy()
    fit(learn, cbs=spy)
    model = copy.deepcopy(learn.model).double()
    body, classifier, head = model[:-1], model[-1], model[-1].uncertainty
    for (images, target), batch, gradients in zip(learn.dls.train, spy.batches, spy.gradients, strict=True):
        images = images.double()
        mixed = Fixed()(images, target)
        features_mixed, features = body(mixed.images), body(images)
        if clean == "no_grad": features = features.detach()
        logits_mixed, logits = classifier(features_mixed), classifier(features)
        z_mixed, z_clean = (logits_mixed, logits) if z == "logits" else (features_mixed, features)
        outputs = [head.layers(part) for part in (features_mixed, features)]
        loss, ratio, _, regulariser = scalar_oracle(logits_mixed, *outputs, z_mixed, z_clean, mixed, variant, 0.7)
        torch.testing.assert_close(batch.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.terms.ratio.double(), ratio, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.terms.regulariser.double(), regulariser.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.pred.double(), logits_mixed.detach(), rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", ["Mix", "SUMix no_grad"])
def test_after_taking_the_second_mixer_away_the_first_trains_with_its_head(other):
    first, second = SUMix(CutMix(), seed=0), KINDS[other](CutMix(), seed=0)
    learn = learner(first)
    learn.add_cb(second)
    with pytest.raises(ValueError, match="keep one"): fit(learn)
    learn.remove_cb(second)
    fit(learn)
    assert learn.model[-1]._modules.get(HEAD_NAME) is first.uncertainty_head is not None
    assert times_in_optimizer(learn, first.uncertainty_head) == 1


@pytest.mark.parametrize(("clean", "update_bn", "updates"), [("no_grad", True, 6), ("no_grad", False, 3),
                                                             ("separate", True, 6),
                                                             ("separate", False, 3), ("concat", True, 3)])
def test_batchnorm_remembers_what_the_option_says(clean, update_bn, updates):
    learn, spy = learner(SUMix(Fixed(), clean=clean, update_bn=update_bn), lr=0.0), Spy()
    fresh = with_bn()
    fit(learn, cbs=spy)
    fresh.train()
    for (images, target), batch in zip(learn.dls.train, spy.batches, strict=True):
        if clean == "concat": torch.testing.assert_close(batch.xb, torch.cat([Fixed()(images, target).images, images]))
        fresh(batch.xb)
        if clean != "concat" and update_bn: fresh(images)
    norm, wanted = learn.model[1], fresh[1]
    assert norm.num_batches_tracked == wanted.num_batches_tracked == updates
    torch.testing.assert_close(norm.running_mean, wanted.running_mean)
    torch.testing.assert_close(norm.running_var, wanted.running_var)
    assert norm.track_running_stats


def test_layers_frozen_by_bnfreeze_stay_frozen():
    for update_bn in (True, False):
        learn = learner(SUMix(CutMix(), update_bn=update_bn), BnFreeze())
        for p in learn.model[1].parameters(): p.requires_grad_(False)
        before = learn.model[1].running_mean.clone()
        fit(learn)
        assert torch.equal(learn.model[1].running_mean, before) and learn.model[1].num_batches_tracked == 0


def test_hidden_layers_are_trained():
    learn = learner(SUMix(CutMix(), hidden=(16,), z="features", seed=0, xi=5.0))
    head = learn.sumix.uncertainty_head
    assert [tuple(p.shape) for p in head.parameters()] == [(16, 32), (16,), (K, 16), (K,)]
    before = weights(head)
    fit(learn)
    assert all(not torch.equal(before[name], value) for name, value in head.state_dict().items())


@pytest.mark.parametrize(("name", "kwargs", "place"), [
    ("resnet18", {}, "fc"), ("deit_tiny_patch16_224", {"img_size": 32}, "head"), ("convnext_atto", {}, "head.fc")])
def test_timm_networks_train_and_keep_their_predictions(name, kwargs, place):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=K, **kwargs)
    cb = SUMix(CutMix(), seed=0, xi=5.0)
    learn = learner(cb, model=model, dls=make_dls(n=4, bs=4, size=32), lr=1e-2)
    assert f"{place}.{HEAD_NAME}.layers.0.weight" in model.state_dict()
    assert cb.passes.classifier is model.get_classifier()
    before = weights(cb.uncertainty_head)
    fit(learn)
    assert all(not torch.equal(before[key], value) for key, value in cb.uncertainty_head.state_dict().items())
    predictions = learn.get_preds()[0]
    learn.remove_cb(cb)
    assert HEAD_NAME not in str(model.state_dict().keys()) and torch.equal(learn.get_preds()[0], predictions)


def test_data_parallel_is_refused_and_the_way_out_named():
    learn = learner(SUMix(CutMix()), model=nn.DataParallel(with_bn()))
    with pytest.raises(ValueError, match="DataParallel.*distribute"): fit(learn)


def test_a_network_given_to_the_learner_later_gets_the_head_and_the_old_one_loses_it():
    learn = fit(learner(SUMix(CutMix(), seed=0, xi=5.0)))
    old, new = learn.model, Named(features=5)
    learn.model = new
    before = weights(new)
    fit(learn)
    assert HEAD_NAME not in old[-1]._modules and not old[-1]._forward_pre_hooks
    assert learn.sumix.passes.classifier is new.fc and head_of(learn).layers[0].in_features == 5
    assert times_in_optimizer(learn, new) == 1
    assert all(not torch.equal(value, new.state_dict()[name]) for name, value in before.items())
    heads = weights(head_of(learn))
    fit(learn)
    assert all(not torch.equal(value, head_of(learn).state_dict()[name]) for name, value in heads.items())


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("when", ["attach first", "attach after a compiled fit"])
def test_a_compiled_network_trains_as_the_plain_one(how, when):
    losses = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = without_bn()
        if compiled and how == "torch.compile": model = torch.compile(model, backend="aot_eager")
        if compiled and how == "model.compile": model.compile(backend="aot_eager")
        learn, spy = learner(model=model, dls=make_dls(n=16)), Spy()
        if when != "attach first": fit(learn)
        torch.manual_seed(1)
        fit(learn, cbs=[SUMix(CutMix(), seed=0), spy])
        losses[compiled] = [batch.loss.item() for batch in spy.batches]
    torch._dynamo.reset()
    assert len(losses[True]) == 2 and losses[True] == pytest.approx(losses[False], rel=1e-4)


# ---- batches that are not mixed ------------------------------------------------------------------------

@pytest.mark.parametrize("clean", TRAINING)
def test_batches_that_the_coin_leaves_alone_cost_one_pass_and_one_update_of_batchnorm(clean):
    cb, passes = SUMix(OneOf([CutMix()], p=[0.5]), seed=0, clean=clean), []
    learn = learner(cb, dls=make_dls(n=160))
    learn.model.register_forward_pre_hook(lambda model, inputs: passes.append(len(inputs[0]) * model.training))
    untouched, gradients = [], []
    class Note(Callback):
        order, run_valid = Mix.order + 1, False
        def after_loss(self):
            untouched.append(cb.mixed.untouched)
            if untouched[-1]:
                usual = F.cross_entropy(self.learn.pred, self.learn.y)
                torch.testing.assert_close(self.learn.loss, usual.as_subclass(torch.Tensor).detach())
                assert cb.terms.regulariser == 0 and torch.equal(cb.terms.mixed_ce, cb.terms.loss)
        def before_step(self):
            if untouched[-1]: gradients.extend(p.grad.abs().max() for p in cb.uncertainty_head.parameters())
    fit(learn, cbs=Note())
    mixed = untouched.count(False)
    assert 5 < mixed < 15 and sum(passes) == 8 * (20 + mixed) and not any(gradients)
    assert learn.model[1].num_batches_tracked == 20 + (0 if clean == "concat" else mixed)


# ---- the layer and the labels --------------------------------------------------------------------------

class Auxiliary(Named):
    "An unused layer of the same size is defined last"
    def __init__(self): super().__init__(); self.auxiliary = nn.Linear(8, K)
    def forward(self, x):
        features = self.body(x)
        return self.fc(features) + 0 * self.auxiliary(features)


@pytest.mark.parametrize("clean", TRAINING)
def test_an_auxiliary_layer_of_the_right_size_is_not_taken_for_the_classifier(clean):
    learn = learner(SUMix(CutMix(), clean=clean), model=Auxiliary())
    before = weights(learn.model)
    with pytest.raises(ValueError, match="does not make the logits.*`layer`"): fit(learn)
    same(weights(learn.model), before)
    fit(learner(SUMix(CutMix(), clean=clean, layer="fc"), model=Auxiliary()))


def test_one_logit_is_refused_before_any_weight_changes():
    learn = learner(SUMix(CutMix()), model=with_bn(1), loss=nn.BCEWithLogitsLoss())
    before = weights(learn.model)
    with pytest.raises(ValueError, match="at least 2 classes.*1 outputs: `Mix` trains with .*binary"): fit(learn)
    same(weights(learn.model), before)


def test_logits_that_are_not_finite_are_named():
    learn = learner(SUMix(CutMix()), model=without_bn())
    torch.nn.init.constant_(learn.model[0].weight, math.nan)
    with pytest.raises(FloatingPointError, match="lower the learning rate"): fit(learn)
