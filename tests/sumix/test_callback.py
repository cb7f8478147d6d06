"`Mix` and `SUMix` in real Learners: every pitfall of mixing in fastai that was found, one test or more each"
import copy
import math
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix as FastaiCutMix
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import fit_one_cycle, lr_find  # noqa: F401 (adds them to Learner)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper, SGD
from fastai.torch_core import params
from fastcore.foundation import L
from torch import nn
from torch.nn import functional as F

from sumix_nb.sumix.callback import CLEAN, HEAD_NAME, SUMix, attach_head, frozen_statistics, join_optimizer
from sumix_nb.sumix.callback import leave_optimizer
from sumix_nb.sumix.mix import Mix, MixedAccuracy
from sumix_nb.data.loaders import get_dls
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.mixed import MixUp, Mixed
from sumix_nb.models.tap import find_classifier
from sumix_nb.sumix.uncertainty import UncertaintyHead
from tests.sumix.oracles import repeated_loss, scalar_oracle

matplotlib.use("Agg")
N, K = 24, 4
KINDS = {"Mix": Mix, **{f"SUMix {clean}": partial(SUMix, clean=clean) for clean in CLEAN}}
EIGHTHS = [6, 1, 8, 3, 0, 5, 7, 2]


# ---- helpers -------------------------------------------------------------------------------------

def make_dls(n=N, bs=8, k=K, size=6, soft=False):
    "Loaders of random images in a fixed order; the last batch may be short"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator)
    if soft: target = torch.randint(2, (n, k), generator=generator).float()
    else: target = torch.randint(k, (n,), generator=generator)
    pairs = list(zip(images, target, strict=True))
    return DataLoaders(DataLoader(pairs, bs=bs, num_workers=0), DataLoader(pairs[:12], bs=8, num_workers=0),
                       device=torch.device("cpu"))


def with_bn(k=K):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, k))


def without_bn(k=K):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, k))


class Named(nn.Module):
    "A network with a named body and classifier"
    def __init__(self, k=K, features=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, features, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(features, k)
    def forward(self, x): return self.fc(self.body(x))


def learner(*cbs, model=None, loss=None, dls=None, tmp=None, **kwargs):
    "A quiet Learner"
    kwargs = {"loss_func": nn.CrossEntropyLoss() if loss is None else loss, "opt_func": partial(SGD, mom=0.9),
              "lr": 0.05} | kwargs
    learn = Learner(make_dls() if dls is None else dls, with_bn() if model is None else model, cbs=list(cbs), **kwargs)
    if hasattr(learn, "progress"): learn.remove_cb(learn.progress)
    learn.recorder.silent = True
    learn.logger = lambda *_: None
    if tmp is not None: learn.path = tmp
    return learn


def fit(learn, n=1, **kwargs):
    "Fit without output"
    with learn.no_logging(): learn.fit(n, **kwargs)
    return learn


class Fixed:
    "A mixer without dice: neighbours 2i and 2i + 1 are mixed by the given eighths"
    def __init__(self, eighths=EIGHTHS): self.eighths = eighths
    def __call__(self, images, target, *, model=None, generator=None):
        n = len(images)
        partner = torch.arange(n) ^ 1
        if n % 2: partner[-1] = n - 1
        lam = torch.tensor([self.eighths[i % len(self.eighths)] for i in range(n)]) / 8
        share = lam.view(-1, 1, 1, 1).to(images)
        return Mixed(share * images + (1 - share) * images[partner], target, target[partner], lam, partner)


class Spy(Callback):
    "Keeps what each training batch looked like after the callback under test"
    order, run_valid = 8, False
    def before_fit(self): self.batches, self.gradients = [], []
    def before_batch(self): self.seen = self.learn.xb[0].detach().clone()
    def after_loss(self):
        self.batches.append(SimpleNamespace(xb=self.seen, pred=self.learn.pred.detach().clone(),
                                            y=self.learn.yb[0].clone(),
                                            loss=self.learn.loss.clone(),
                                            loss_grad=self.learn.loss_grad.detach().clone()))
    def before_step(self):
        self.gradients.append([p.grad.clone() for p in self.learn.model.parameters() if p.grad is not None])


class At(Callback):
    "Calls `action` at one event of the given training batch"
    run_valid = False
    def __init__(self, event, action, batch=1, order=20):
        self.order, self.batch, self.action = order, batch, action
        setattr(self, event, self.once)
    def once(self):
        if self.learn.iter == self.batch: self.action()


def throw(error):
    def action(): raise error
    return action


def head_of(learn): return getattr(learn.sumix.classifier_layer, HEAD_NAME, None)
def weights(model): return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other, **kwargs):
    assert one.keys() == other.keys()
    for name in one: torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name, **kwargs)


def times_in_optimizer(learn, module):
    counts = [sum(p is q for group in learn.opt.param_lists for q in group) for p in module.parameters()]
    assert len(set(counts)) == 1
    return counts[0]


# ---- 1. interrupts and exceptions ----------------------------------------------------------------

@pytest.mark.parametrize("event", ["before_batch", "after_pred", "after_loss", "before_step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize("kind", ["Mix", "SUMix no_grad", "SUMix concat"])
def test_an_interrupted_fit_can_be_followed_by_another(kind, error, event):
    learn = learner(KINDS[kind](CutMix(), seed=0), metrics=accuracy)
    loss_func, hooks = learn.loss_func, [len(m._forward_pre_hooks) for m in learn.model.modules()]
    try: fit(learn, cbs=At(event, throw(error("stop"))))
    except KeyboardInterrupt as stopped: assert "stop" in str(stopped)
    else: assert error is CancelFitException
    assert learn.loss_func is loss_func
    spy, before = Spy(), weights(learn.model)
    fit(learn, cbs=spy)
    assert len(spy.batches) == 3 and all(batch.loss.isfinite() for batch in spy.batches)
    assert all(not torch.equal(p, before[name]) for name, p in learn.model.named_parameters() if "0.bias" not in name)
    assert [len(m._forward_pre_hooks) for m in learn.model.modules()] == hooks
    assert learn.loss_func is loss_func and math.isfinite(learn.validate()[0])


@pytest.mark.parametrize("kind", ["Mix", "SUMix no_grad", "SUMix separate", "SUMix concat"])
def test_an_exception_in_the_network_leaves_a_learner_that_trains_on(kind):
    class Breaks(Named):
        broken = None
        def forward(self, x):
            out = super().forward(x)
            if self.training and self.broken: self.broken -= 1
            if self.training and self.broken == 0: self.broken = None; raise RuntimeError("out of memory")
            return out
    for at in (2, 3):  # for two passes a batch: the mixed one and the clean one
        learn = learner(KINDS[kind](CutMix(), seed=0), model=Breaks())
        learn.model.broken = at
        with pytest.raises(RuntimeError, match="out of memory"): fit(learn)
        fit(learn)
        copy.deepcopy(learn.model)


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


# ---- 2, 4, 5. any loss, honoured exactly ---------------------------------------------------------

WEIGHT = torch.tensor([10.0, 1.0, 0.5, 2.0])
LOSSES = {
    "nn.CrossEntropyLoss": nn.CrossEntropyLoss(), "F.cross_entropy": F.cross_entropy, "fastai": CrossEntropyLossFlat(),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHT), "fastai class weights": CrossEntropyLossFlat(weight=WEIGHT),
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1), "fastai ignore_index": CrossEntropyLossFlat(ignore_index=1),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1), "sum": nn.CrossEntropyLoss(reduction="sum"),
    "all": nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.1),
    "partial": partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1),
    "fastai smoothing": LabelSmoothingCrossEntropyFlat(), "focal": FocalLossFlat(gamma=2.0),
    "focal, class weights": FocalLossFlat(gamma=2.0, weight=WEIGHT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_mix_trains_on_the_learners_own_loss_with_each_image_counted_by_its_shares(name):
    loss_func, spy = LOSSES[name], Spy()
    fit(learner(Mix(Fixed()), spy, loss=loss_func))
    assert len(spy.batches) == 3
    for batch in spy.batches:
        target_b = batch.y[torch.arange(8) ^ 1]
        expected = repeated_loss(loss_func, batch.pred, batch.y, target_b, EIGHTHS) / (8 if name == "sum" else 1)
        torch.testing.assert_close(batch.loss, expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.loss_grad, batch.loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
def test_sumix_trains_on_the_learners_own_loss(name, variant):
    loss_func, learn = LOSSES[name], learner(SUMix(Fixed(), xi=0.0, variant=variant), loss=LOSSES[name])
    kept = []
    class Keep(Spy):
        def after_loss(self):
            kept.append((self.learn.pred.detach().double(), self.learn.sumix.mixed, self.learn.sumix.terms,
                         self.learn.loss.clone()))
    fit(learn, cbs=Keep())
    for logits, mixed, terms, loss in kept:
        ratio = terms.ratio.mean().expand(8) if variant == "released" else terms.ratio
        # one row at a time and once per label, weighted and divided by hand
        above = below = 0.0
        for i in range(8):
            for target, share in ((mixed.target_a[i], ratio[i]), (mixed.target_b[i], 1 - ratio[i])):
                weight = getattr(loss_func, "weight", None)
                if weight is None and name in ("fastai class weights", "partial"): weight = WEIGHT
                weight = 1.0 if weight is None or "focal" in name else float(weight[target])
                if name in ("ignore_index", "fastai ignore_index", "all") and target == 1: weight = 0.0
                alone = 0.0 if weight == 0 else float(loss_func(logits[i:i + 1].float(), target[None])) * weight
                above, below = above + float(share) * alone, below + float(share) * weight
        assert loss.item() == pytest.approx(above if name == "sum" else above / below, rel=1e-4)


@pytest.mark.parametrize("kind", ["Mix", "SUMix no_grad"])
def test_a_mean_that_cannot_be_mixed_is_refused_before_any_weight_changes(kind):
    learn = learner(KINDS[kind](CutMix()), loss=LabelSmoothingCrossEntropyFlat(weight=WEIGHT))
    before = weights(learn.model)
    with pytest.raises(ValueError, match="`loss_func`.*mean.*cannot be mixed"): fit(learn)
    same({k: v for k, v in weights(learn.model).items() if "running" not in k and "num_b" not in k},
         {k: v for k, v in before.items() if "running" not in k and "num_b" not in k})


def test_a_loss_without_reduction_is_refused_and_named():
    def my_loss(logits, target): return F.cross_entropy(logits, target)
    learn = learner(Mix(CutMix()), loss=my_loss)
    with pytest.raises(ValueError, match="`loss_func` must have a `reduction`.*my_loss"): fit(learn)


@pytest.mark.parametrize("loss_func", [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat()])
def test_multi_label_targets_are_mixed_by_mix_and_refused_by_sumix(loss_func):
    spy, dls = Spy(), make_dls(soft=True)
    fit(learner(Mix(Fixed()), spy, loss=loss_func, dls=dls))
    for batch in spy.batches:
        expected = repeated_loss(loss_func, batch.pred, batch.y, batch.y[torch.arange(8) ^ 1], EIGHTHS)
        torch.testing.assert_close(batch.loss, expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="class indices"): fit(learner(SUMix(Fixed()), loss=loss_func, dls=dls))


@pytest.mark.parametrize("z", ["logits", "features"])
@pytest.mark.parametrize("clean", CLEAN)
@pytest.mark.parametrize("variant", ["poster", "corrected"])
def test_sumix_loss_ratio_and_gradients_in_a_learner_equal_loops_over_samples(variant, clean, z):
    learn, spy = learner(SUMix(Fixed(), xi=0.7, variant=variant, clean=clean, z=z), model=without_bn(), lr=0.0), Spy()
    terms = []
    class Keep(Spy):
        def after_loss(self): terms.append(self.learn.sumix.terms)
    fit(learn, cbs=[spy, Keep()])
    model = copy.deepcopy(learn.model).double()
    body, classifier, head = model[:-1], model[-1], model[-1].uncertainty
    generator_batches = [(x.double(), y) for x, y in learn.dls.train]
    for (images, target), batch, got, gradients in zip(generator_batches, spy.batches, terms, spy.gradients,
                                                       strict=True):
        mixed = Fixed()(images, target)
        features_mixed, features = body(mixed.images), body(images)
        if clean == "no_grad": features = features.detach()
        logits_mixed, logits = classifier(features_mixed), classifier(features)
        z_mixed, z_clean = (logits_mixed, logits) if z == "logits" else (features_mixed, features)
        outputs = [head.layers(part) for part in (features_mixed, features)]
        loss, ratio, mixed_ce, regulariser = scalar_oracle(logits_mixed, *outputs, z_mixed, z_clean, mixed.target_a,
                                                           mixed.target_b,
                                                           mixed.lam, mixed.partner, variant, 0.7)
        torch.testing.assert_close(batch.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.ratio.double(), ratio, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.regulariser.double(), regulariser.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.pred.double(), logits_mixed.detach(), rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


# ---- 3. other callbacks that mix -----------------------------------------------------------------

@pytest.mark.parametrize("one", [Mix, SUMix])
@pytest.mark.parametrize("other", [FastaiMixUp, FastaiCutMix, lambda: Mix(MixUp()), lambda: SUMix(MixUp())])
def test_two_callbacks_that_mix_are_refused_before_any_weight_changes(one, other):
    for flip in (False, True):
        cbs = [one(CutMix()), other()]
        learn = learner(*(cbs[::-1] if flip else cbs))
        before = weights(learn.model)
        with pytest.raises(ValueError, match="cannot mix what .* mixes too: keep one of them"): fit(learn)
        same(weights(learn.model), before)


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


# ---- 6. validation, metrics and predictions ------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_validation_loss_metrics_and_predictions_equal_the_plain_learners(kind):
    learn, plain = learner(KINDS[kind](CutMix(), seed=0), metrics=accuracy), learner(metrics=accuracy)
    fit(learn)
    plain.model.load_state_dict(learn.model.state_dict(), strict=False)
    assert list(learn.validate()) == list(plain.validate())
    assert learn.recorder.final_record[-2:] == plain.validate()
    for one, other in zip(learn.get_preds(), plain.get_preds(), strict=True): assert torch.equal(one, other)
    before = learn.get_preds()[0]
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Mix)])
    assert torch.equal(learn.get_preds()[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_uses_no_dice_and_leaves_no_features_behind(kind):
    cb = KINDS[kind](CutMix(), seed=0)
    learn = fit(learner(cb))
    draws, history, mixed = cb.generator.get_state(), list(cb.history), cb.mixed
    learn.validate(), learn.get_preds()
    assert torch.equal(draws, cb.generator.get_state()) and list(cb.history) == history and cb.mixed is mixed
    if kind != "Mix": assert cb.tap.features is None


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_accuracy_in_training_counts_labels_by_share_and_in_validation_plainly(kind):
    kept, metric = [], MixedAccuracy()
    class Keep(Callback):
        order, run_valid = 9, False
        def after_loss(self):
            cb = next(cb for cb in self.learn.cbs if isinstance(cb, Mix))
            kept.append((self.learn.pred.argmax(1), cb.mixed.target_a, cb.mixed.target_b, cb.history[-1][1]))
    learn = learner(KINDS[kind](CutMix(), seed=0), Keep(), metrics=[metric, accuracy])
    learn.remove_cb(learn.recorder)
    learn.add_cb(Recorder(train_metrics=True))
    fit(learn)
    assert learn.recorder.metric_names[1:-1] == ["train_loss", "train_mixed_accuracy", "train_accuracy", "valid_loss",
                                                 "valid_mixed_accuracy", "valid_accuracy"]
    _, train, _, _, valid, plain = learn.recorder.final_record
    right = [share * (p == a) + (1 - share) * (p == b)
             for batch in kept for p, a, b, share in zip(*(x.tolist() for x in batch), strict=True)]
    assert len(right) == N and train == pytest.approx(sum(right) / N, abs=1e-6)
    assert valid == pytest.approx(plain, abs=1e-6)


def test_mixed_accuracy_without_mixing_is_accuracy_and_without_batches_is_none():
    learn = learner(metrics=[MixedAccuracy(), accuracy])
    values = learn.validate()
    assert values[1] == pytest.approx(values[2])
    metric = MixedAccuracy()
    metric.reset()
    assert metric.value is None and metric.name == "mixed_accuracy"


# ---- 7. small batches and untouched input --------------------------------------------------------

@pytest.mark.parametrize("mixer", [CutMix, MixUp, partial(CutMix, per_sample=True), partial(MixUp, per_sample=True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_last_batch_of_one_sample_trains(kind, mixer):
    spy = Spy()
    fit(learner(KINDS[kind](mixer(), seed=0), spy, model=without_bn(), dls=make_dls(n=9)))
    last = spy.batches[-1]
    assert len(last.pred) == 1 and last.loss.isfinite()
    if kind == "Mix": torch.testing.assert_close(last.loss, F.cross_entropy(last.pred, last.y))


@pytest.mark.parametrize("mixer", [CutMix, MixUp, partial(CutMix, per_sample=True), partial(MixUp, per_sample=True)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_that_others_hold_is_not_written_to(kind, mixer):
    held = []
    class Hold(Callback):
        order, run_valid = 0, False
        def before_batch(self):
            held.append((self.learn.xb[0], self.learn.xb[0].clone(), self.learn.yb[0], self.learn.yb[0].clone()))
    spy = Spy()
    fit(learner(KINDS[kind](mixer(), seed=0), Hold(), spy))
    assert len(held) == 3
    for (images, kept, target, kept_target), batch in zip(held, spy.batches, strict=True):
        assert torch.equal(images, kept) and torch.equal(target, kept_target)
        assert not torch.equal(batch.xb[:8], kept), "nothing was mixed"
        if kind == "SUMix concat": assert torch.equal(batch.xb[8:], kept)
        assert torch.equal(batch.y, kept_target) and len(batch.pred) == 8


# ---- 8. gradient accumulation --------------------------------------------------------------------

@pytest.mark.parametrize("kind", [*KINDS, "Mix p=0"])
def test_accumulated_gradients_equal_those_of_one_large_batch(kind):
    gradients, losses = {}, {}
    for bs, extra in ((8, [GradientAccumulation(24)]), (24, [])):
        spy, cb = Spy(), Mix(CutMix(p=0.0)) if kind == "Mix p=0" else KINDS[kind](Fixed())
        learn = learner(cb, spy, *extra, model=without_bn(), dls=make_dls(bs=bs))
        if kind.startswith("SUMix"):
            for p in cb.uncertainty_head.parameters(): nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
        fit(learn)
        assert len(spy.batches) == (3 if extra else 1) and len(spy.gradients) == 1
        gradients[bs], losses[bs] = spy.gradients[-1], [batch.loss.item() for batch in spy.batches]
    for one, other in zip(gradients[8], gradients[24], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert sum(losses[8]) / 3 == pytest.approx(losses[24][0], rel=1e-5), "the logged loss must not be divided"


def test_the_gradient_is_divided_although_the_logged_loss_is_not():
    spy = Spy()
    fit(learner(Mix(Fixed()), spy, GradientAccumulation(24)))
    for batch in spy.batches: torch.testing.assert_close(batch.loss_grad, batch.loss / 3)


def test_the_callback_runs_before_gradient_accumulation_and_mixed_precision():
    assert Mix.order < GradientAccumulation.order < MixedPrecision.order and SUMix.order == Mix.order
    assert not Mix.run_valid and not SUMix.run_valid


# ---- 9, 10. autocast -----------------------------------------------------------------------------

class CpuPrecision(MixedPrecision):
    "fastai's mixed precision, on the CPU"
    def before_fit(self):
        dtype = torch.bfloat16 if self.amp_mode.value == "bf16" else torch.float16
        self.autocast = torch.autocast("cpu", dtype=dtype)
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
        self.scales = L()


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_run_inside_autocast_and_the_loss_is_float32(kind, mode):
    dtype, outputs = {"bf16": torch.bfloat16, "fp16": torch.float16}[mode], []
    learn, spy = learner(KINDS[kind](CutMix(), seed=0)), Spy()
    hook = learn.model[0].register_forward_hook(lambda m, i, o: outputs.append(o.dtype) if m.training else None)
    before, reference = weights(learn.model), learner(KINDS[kind](CutMix(), seed=0))
    reference.model.load_state_dict(learn.model.state_dict())
    fit(learn, cbs=[CpuPrecision(mode), spy])
    hook.remove()
    assert set(outputs) == {dtype} and len(outputs) == (6 if "no_grad" in kind or "separate" in kind else 3)
    assert not torch.is_autocast_enabled("cpu")
    assert all(batch.loss.dtype == torch.float32 and batch.loss.isfinite() for batch in spy.batches)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in learn.model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in learn.model.named_parameters() if name != "0.bias")
    full = Spy()
    fit(reference, cbs=full)
    assert spy.batches[0].loss.item() == pytest.approx(full.batches[0].loss.item(), rel=2e-2)


# ---- 11. BatchNorm -------------------------------------------------------------------------------

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


def test_statistics_frozen_in_the_clean_pass_do_not_change_what_it_computes():
    logits = {}
    for update_bn in (True, False):
        learn = learner(SUMix(Fixed(), update_bn=update_bn, xi=0.0), lr=0.0)
        fit(learn)
        logits[update_bn] = torch.cat([ratio for _, ratio in learn.sumix.history])
    torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=0)


def test_frozen_statistics_restores_layers_and_leaves_untracked_ones_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)).train()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) + 5
    with pytest.raises(KeyError), frozen_statistics(model):
        inside = model(x)
        raise KeyError
    assert model[0].num_batches_tracked == 0 and model[0].running_mean.tolist() == [0, 0, 0]
    assert model[0].track_running_stats and not model[1].track_running_stats
    torch.testing.assert_close(model(x), inside)
    assert model[0].num_batches_tracked == 1 and model[0].running_mean.abs().min() > 0


def test_layers_frozen_by_bnfreeze_stay_frozen():
    for update_bn in (True, False):
        learn = learner(SUMix(CutMix(), update_bn=update_bn), BnFreeze())
        for p in learn.model[1].parameters(): p.requires_grad_(False)
        before = learn.model[1].running_mean.clone()
        fit(learn)
        assert torch.equal(learn.model[1].running_mean, before) and learn.model[1].num_batches_tracked == 0


# ---- 13. the head and the optimiser --------------------------------------------------------------

@pytest.mark.parametrize("how", ["cbs=", "add_cb before create_opt", "add_cb after create_opt", "add_cb after fit",
                                 "fit(cbs=)", "second fit(cbs=)"])
@pytest.mark.parametrize("opt_func", [partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW)],
                         ids=["fastai SGD", "torch AdamW"])
def test_the_head_is_in_the_optimiser_exactly_once_and_is_trained(how, opt_func):
    cb = SUMix(CutMix(), seed=0, xi=5.0)
    learn = learner(*([cb] if how == "cbs=" else []), opt_func=opt_func)
    if how == "add_cb after create_opt": learn.create_opt()
    if how == "add_cb after fit": fit(learn)
    if how.startswith("add_cb"): learn.add_cb(cb)
    seen = []
    class Count(Callback):
        run_valid = False
        def after_step(self):
            seen.append((times_in_optimizer(learn, cb.uncertainty_head), weights(cb.uncertainty_head)))
    cbs = [Count(), *([cb] if "fit(cbs=)" in how else [])]
    fit(learn, cbs=cbs)
    if how.startswith("second"): fit(learn, cbs=[Count(), cb])
    assert len(seen) == (6 if how.startswith("second") else 3) and {count for count, _ in seen} == {1}
    assert all(not torch.equal(seen[0][1][name], seen[-1][1][name]) for name in seen[0][1])
    total = sum(len(group) for group in learn.opt.param_lists)
    assert total == len(list(learn.model.parameters()))
    if "fit(cbs=)" in how:
        assert HEAD_NAME not in learn.model[-1]._modules and times_in_optimizer(learn, cb.uncertainty_head) == 0
        assert set(learn.model.state_dict()) == set(with_bn().state_dict())
        fit(learn)


@pytest.mark.parametrize("opt_func", [partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW)],
                         ids=["fastai SGD", "torch AdamW"])
def test_the_optimiser_can_be_saved_after_the_head_was_taken_away(opt_func, tmp_path):
    learn = fit(learner(opt_func=opt_func, tmp=tmp_path), cbs=SUMix(CutMix(), seed=0))
    learn.save("after")
    learn.load("after")
    fit(learn)


@pytest.mark.parametrize("opt_func", [partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW)],
                         ids=["fastai SGD", "torch AdamW"])
def test_the_head_can_join_an_optimiser_whose_state_was_loaded(opt_func, tmp_path):
    learn = fit(learner(opt_func=opt_func, tmp=tmp_path))
    learn.save("plain")
    learn.load("plain")
    fit(learn, cbs=SUMix(CutMix(), seed=0))
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_the_state_of_the_other_parameters_survives_attaching_and_detaching():
    learn = fit(learner())
    model_parameters = list(learn.model.parameters())
    state = [copy.deepcopy(learn.opt.state[p]) for p in model_parameters]
    hypers = [dict(group) for group in learn.opt.hypers]
    assert all("grad_avg" in s for s in state)
    cb = SUMix(CutMix())
    for _ in range(2):
        learn.add_cb(cb)
        assert times_in_optimizer(learn, cb.uncertainty_head) == 1
        for p, kept in zip(model_parameters, state, strict=True):
            assert learn.opt.state[p].keys() == kept.keys()
            torch.testing.assert_close(learn.opt.state[p]["grad_avg"], kept["grad_avg"], rtol=0, atol=0)
        assert [dict(group) for group in learn.opt.hypers] == hypers
        learn.remove_cb(cb)
        assert times_in_optimizer(learn, cb.uncertainty_head) == 0
        assert [id(p) for group in learn.opt.param_lists for p in group] == [id(p) for p in model_parameters]


def test_parameters_frozen_by_hand_keep_their_place_in_the_optimiser():
    learn = fit(learner())
    first = learn.model[0].weight
    momentum, before = learn.opt.state[first]["grad_avg"].clone(), first.detach().clone()
    first.requires_grad_(False)
    learn.add_cb(SUMix(CutMix(), seed=0))
    first.requires_grad_(True)
    torch.testing.assert_close(learn.opt.state[first]["grad_avg"], momentum)
    fit(learn)
    assert not torch.equal(first, before)


def test_the_bias_of_a_head_that_joins_late_is_treated_as_that_of_one_that_was_there():
    early, late = learner(SUMix(CutMix()), wd_bn_bias=False), learner(wd_bn_bias=False)
    early.create_opt(), late.create_opt()
    late.add_cb(SUMix(CutMix()))
    one, other = (learn.opt.state[head_of(learn).layers[0].bias] for learn in (early, late))
    assert one["do_wd"] is False and one == other


def two_groups(model): return L(model.body, model.fc).map(params)


def test_one_cycle_with_discriminative_rates_moves_the_head_at_the_last_groups_rate():
    learn, rates = learner(SUMix(CutMix(), seed=0), model=Named(), splitter=two_groups), []
    class Rates(Callback):
        run_valid = False
        def after_step(self): rates.append([hyper["lr"] for hyper in learn.opt.hypers])
    head = weights(head_of(learn))
    with learn.no_logging(): learn.fit_one_cycle(1, slice(1e-4, 1e-2), cbs=Rates())
    assert [len(group) for group in learn.opt.param_lists] == [2, 4]
    assert all(any(p is q for q in learn.opt.param_lists[-1]) for p in head_of(learn).parameters())
    assert all(last == pytest.approx(100 * first) for first, last in rates)
    assert all(not torch.equal(head[name], value) for name, value in head_of(learn).state_dict().items())


def test_one_cycle_accepts_the_callback_as_an_argument_of_fit():
    learn = learner(model=Named(), splitter=two_groups)
    with learn.no_logging():
        learn.fit_one_cycle(1, slice(1e-4, 1e-2), cbs=SUMix(CutMix()))
        learn.fit_one_cycle(1, 1e-2)
    assert [len(group) for group in learn.opt.param_lists] == [2, 2]


def test_freeze_keeps_the_body_and_trains_the_head():
    for late in (False, True):
        cb = SUMix(CutMix(), seed=0, xi=5.0)
        learn = learner(*([] if late else [cb]), model=Named(), splitter=two_groups)
        learn.freeze()
        if late: learn.add_cb(cb)
        before = weights(learn.model)
        fit(learn)
        changed = {name for name, value in learn.model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"fc.weight", "fc.bias", "fc.uncertainty.layers.0.weight", "fc.uncertainty.layers.0.bias"}
        learn.unfreeze()
        fit(learn)
        assert all(not torch.equal(p, before[name]) for name, p in learn.model.named_parameters())


def test_fine_tune_of_a_fastai_vision_learner_trains_the_head_in_both_phases(tmp_path):
    from fastai.vision.learner import vision_learner
    from torchvision.models import resnet18
    dls = get_dls("digits", size=16, bs=8, limit=16, device="cpu")
    learn = vision_learner(dls, resnet18, pretrained=False, n_out=10, normalize=False,
                           cbs=SUMix(CutMix(), seed=0, xi=5.0), path=tmp_path)
    if hasattr(learn, "progress"): learn.remove_cb(learn.progress)
    heads, groups = [weights(head_of(learn))], []
    class Phase(Callback):
        def after_fit(self): heads.append(weights(head_of(learn))); groups.append(learn.opt.frozen_idx)
    body = learn.model[0][0].weight.clone()
    learn.add_cb(Phase())
    with learn.no_logging(): learn.fine_tune(1)
    assert len(heads) == 3 and groups[0] > 0 == groups[1]
    for one, other in zip(heads, heads[1:], strict=False):
        assert all(not torch.equal(one[name], other[name]) for name in one)
    assert any(p is q for p in head_of(learn).parameters() for q in learn.opt.param_lists[-1])
    assert not torch.equal(learn.model[0][0].weight, body)


def test_lr_find_gives_back_network_head_and_optimiser(tmp_path):
    for kind in ("SUMix no_grad", "SUMix concat"):
        learn = fit(learner(KINDS[kind](CutMix(), seed=0, xi=5.0), tmp=tmp_path))
        before, state = weights(learn.model), [learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()]
        assert any("uncertainty" in name for name in before)
        with learn.no_logging(), learn.no_bar(): learn.lr_find(start_lr=0.1, end_lr=5, num_it=5, show_plot=False)
        same(weights(learn.model), before)
        assert times_in_optimizer(learn, head_of(learn)) == 1 and len(state) == len(list(learn.model.parameters()))
        fit(learn)


def test_joining_and_leaving_an_optimiser_touches_nothing_but_the_head():
    learn = learner()
    classifier, head = find_classifier(learn.model), UncertaintyHead(32, K)
    attach_head(classifier, head)
    assert join_optimizer(learn, classifier, head) is None and learn.opt is None
    leave_optimizer(learn, head)
    classifier._modules.pop(HEAD_NAME)
    learn.create_opt()
    before = [list(group) for group in learn.opt.param_lists]
    classifier.add_module(HEAD_NAME, head)
    join_optimizer(learn, classifier, head)
    joined = [id(p) for group in learn.opt.param_lists for p in group]
    assert joined == [id(p) for p in learn.model.parameters()]
    leave_optimizer(learn, head)
    assert all(len(a) == len(b) and all(p is q for p, q in zip(a, b, strict=True))
               for a, b in zip(before, learn.opt.param_lists, strict=True))
    assert not any(parameter in learn.opt.state for parameter in head.parameters())


# ---- 13, 14. where the head lives ----------------------------------------------------------------

def test_the_head_moves_and_is_saved_with_the_network_but_is_not_executed_by_it():
    learn = learner(SUMix(CutMix()))
    cb, x = learn.sumix, torch.randn(2, 3, 6, 6)
    assert {f"5.{HEAD_NAME}.layers.0.weight", f"5.{HEAD_NAME}.layers.0.bias"} < set(learn.model.state_dict())
    called = []
    cb.uncertainty_head.register_forward_hook(lambda *_: called.append(1))
    plain = with_bn().eval()
    assert torch.equal(learn.model.eval()(x), plain(x)) and not called
    learn.model.double()
    assert {p.dtype for p in cb.uncertainty_head.parameters()} == {torch.float64}


def test_attach_head_lets_old_checkpoints_load_and_keeps_the_heads_own_values():
    layer, head = nn.Linear(5, 3), UncertaintyHead(5, 3)
    plain, own = nn.Linear(5, 3).state_dict(), weights(head)
    handle = attach_head(layer, head)
    assert layer.load_state_dict(plain) and torch.equal(layer.weight, plain["weight"])
    same(weights(head), own)
    other = UncertaintyHead(5, 3).state_dict()
    layer.load_state_dict(plain | {f"{HEAD_NAME}.{name}": value for name, value in other.items()})
    same(weights(head), dict(other))
    handle.remove()
    with pytest.raises(RuntimeError, match="Missing key"): layer.load_state_dict(plain)


@pytest.mark.parametrize("with_opt", [True, False])
def test_save_and_load_bring_back_network_head_and_optimiser(with_opt, tmp_path):
    learn = fit(learner(SUMix(CutMix(), seed=0), tmp=tmp_path))
    learn.save("mixed", with_opt=with_opt)
    before, state = weights(learn.model), [learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()]
    fit(learn)
    with warnings.catch_warnings():
        if with_opt: warnings.filterwarnings("error", category=UserWarning)
        learn.load("mixed", with_opt=with_opt)
        other = learner(SUMix(CutMix(), seed=0), tmp=tmp_path)
        other.create_opt()
        other.load("mixed", with_opt=with_opt)
    for loaded in (learn, other):
        same(weights(loaded.model), before)
        if with_opt:
            for p, kept in zip(loaded.model.parameters(), state, strict=True):
                torch.testing.assert_close(loaded.opt.state[p]["grad_avg"], kept)
        fit(loaded)


def test_save_model_callback_brings_back_the_head_of_the_best_epoch(tmp_path):
    learn = learner(SUMix(CutMix(), seed=0), tmp=tmp_path)
    fit(learn, 2, cbs=SaveModelCallback(fname="best"))
    saved = torch.load(tmp_path / "models" / "best.pth")
    same(weights(learn.model), saved)
    assert f"5.{HEAD_NAME}.layers.0.weight" in saved


def test_a_plain_checkpoint_loads_into_a_sumix_learner_and_keeps_the_head(tmp_path):
    plain, learn = fit(learner(tmp=tmp_path)), learner(SUMix(CutMix(), seed=0), tmp=tmp_path)
    plain.save("plain")
    head = weights(head_of(learn))
    learn.load("plain", with_opt=False)
    same(weights(head_of(learn)), head)
    same({name: value for name, value in weights(learn.model).items() if HEAD_NAME not in name}, weights(plain.model))
    fit(learn)
    learn.create_opt()
    with pytest.warns(UserWarning, match="Could not load the optimizer state"): learn.load("plain", with_opt=True)
    fit(learn)


def test_a_sumix_checkpoint_loads_into_a_plain_learner_when_asked_not_strictly(tmp_path):
    learn, plain = fit(learner(SUMix(CutMix(), seed=0), tmp=tmp_path)), learner(tmp=tmp_path)
    learn.save("mixed")
    plain.load("mixed", strict=False, with_opt=False)
    assert torch.equal(plain.get_preds()[0], learn.get_preds()[0])
    with learn.without_mixing(): learn.save("network", with_opt=False)
    fresh = learner(tmp=tmp_path)
    fresh.load("network", with_opt=False)
    assert torch.equal(fresh.get_preds()[0], learn.get_preds()[0])


# ---- 15. export ----------------------------------------------------------------------------------

def digits(bs=16, limit=48, **kwargs): return get_dls("digits", size=16, bs=bs, limit=limit, device="cpu", **kwargs)


def exported(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_learner(path)


@pytest.mark.parametrize("kind", ["Mix", "SUMix no_grad"])
def test_export_plain_leaves_no_trace_in_the_file_and_the_learner_as_it_was(kind, tmp_path):
    learn = fit(learner(KINDS[kind](CutMix(), seed=0), dls=digits(), model=with_bn(10), tmp=tmp_path))
    cb = next(cb for cb in learn.cbs if isinstance(cb, Mix))
    predictions, before, opt = learn.get_preds(), weights(learn.model), learn.opt
    learn.export_plain("plain.pkl")
    content = (tmp_path / "plain.pkl").read_bytes()
    assert b"sumix_nb.sumix.callback" not in content and b"sumix_nb.mixers" not in content and b"uncertainty" not in content
    assert b"FeatureTap" not in content and b"keep_own_values" not in content
    loaded = exported(tmp_path / "plain.pkl")
    assert not [c for c in loaded.cbs if isinstance(c, Mix)]
    assert set(loaded.model.state_dict()) == set(with_bn().state_dict())
    assert torch.equal(loaded.get_preds(dl=learn.dls.valid)[0], predictions[0])
    same(weights(learn.model), before)
    assert learn.opt is opt and cb in learn.cbs and len(learn.dls.train_ds) == 48
    if kind != "Mix": assert times_in_optimizer(learn, head_of(learn)) == 1
    fit(learn)


def test_without_mixing_keeps_the_optimisers_state_also_after_an_error():
    learn = fit(learner(SUMix(CutMix(), seed=0)))
    state, cbs = {p: learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()}, list(learn.cbs)
    with pytest.raises(KeyError), learn.without_mixing():
        assert not [cb for cb in learn.cbs if isinstance(cb, Mix)] and HEAD_NAME not in learn.model[-1]._modules
        assert not hasattr(learn, "sumix")
        raise KeyError
    assert set(learn.cbs) == set(cbs) and learn.sumix is not None
    for p in learn.model.parameters(): torch.testing.assert_close(learn.opt.state[p]["grad_avg"], state[p])
    fit(learn)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_export_of_fastai_works_too_and_predicts_the_same(kind, tmp_path):
    learn = fit(learner(KINDS[kind](CutMix(), seed=0), dls=digits(), model=with_bn(10), tmp=tmp_path))
    predictions = learn.get_preds()[0]
    learn.export("whole.pkl")
    loaded = exported(tmp_path / "whole.pkl")
    assert torch.equal(loaded.get_preds(dl=learn.dls.valid)[0], predictions)
    fit(learn)
    loaded.dls = learn.dls
    fit(loaded)
    assert torch.isfinite(loaded.model[0].weight).all()


def test_an_exported_learner_does_not_hold_training_images(tmp_path):
    sizes = {}
    for bs in (4, 40):
        learn = fit(learner(Mix(CutMix(), seed=0), dls=digits(bs=bs), model=with_bn(10), tmp=tmp_path))
        learn.export("whole.pkl")
        loaded = exported(tmp_path / "whole.pkl")
        sizes[bs] = getattr(loaded.mix, "mixed", None)
    assert sizes == {4: None, 40: None}


def test_a_learner_exported_after_an_interrupt_holds_no_images_either(tmp_path):
    learn = learner(SUMix(CutMix(), seed=0), dls=digits(), model=with_bn(10), tmp=tmp_path)
    for event, order in (("after_pred", 4), ("after_loss", 4)):
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At(event, throw(KeyboardInterrupt()), order=order))
        learn.export("whole.pkl")
        cb = exported(tmp_path / "whole.pkl").sumix
        assert [name for name in ("mixed", "clean_images", "passes") if getattr(cb, name) is not None] == []
        assert cb.tap.features is None


def test_the_callbacks_are_known_to_the_learner_by_readable_names():
    assert isinstance(learner(Mix(CutMix())).mix, Mix) and isinstance(learner(SUMix(CutMix())).sumix, SUMix)


# ---- many networks -------------------------------------------------------------------------------

def test_a_sequential_network_is_not_made_longer_by_the_head():
    learn = learner(SUMix(CutMix()))
    assert len(learn.model) == 6 and len(list(learn.model.children())) == 6


@pytest.mark.parametrize(("name", "kwargs", "place"), [
    ("resnet18", {}, "fc"), ("deit_tiny_patch16_224", {"img_size": 32}, "head"), ("convnext_atto", {}, "head.fc")])
def test_timm_networks_train_and_keep_their_predictions(name, kwargs, place):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=K, **kwargs)
    cb = SUMix(CutMix(), seed=0, xi=5.0)
    learn = learner(cb, model=model, dls=make_dls(n=4, bs=4, size=32), lr=1e-2)
    assert f"{place}.{HEAD_NAME}.layers.0.weight" in model.state_dict()
    assert cb.classifier_layer is model.get_classifier()
    before = weights(cb.uncertainty_head)
    fit(learn)
    assert all(not torch.equal(before[key], value) for key, value in cb.uncertainty_head.state_dict().items())
    predictions = learn.get_preds()[0]
    learn.remove_cb(cb)
    assert HEAD_NAME not in str(model.state_dict().keys()) and torch.equal(learn.get_preds()[0], predictions)


def test_a_distilled_deit_is_told_which_of_its_two_classifiers_to_use():
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, num_classes=K, img_size=32)
    assert learner(SUMix(CutMix()), model=model).sumix.classifier_layer is model.head_dist
    for layer in ("head", model.head):
        learn = learner(SUMix(CutMix(), layer=layer), model=model, dls=make_dls(n=4, bs=4, size=32))
        assert learn.sumix.classifier_layer is model.head
        assert [name for name, _ in model.named_modules() if name.endswith(HEAD_NAME)].count(f"head.{HEAD_NAME}") == 1
        fit(learn)


def test_a_network_that_classifies_by_convolution_is_refused_clearly():
    model = nn.Sequential(nn.Conv2d(3, K, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="`model` must have a linear layer as its classifier"):
        learner(SUMix(CutMix()), model=model)


def test_a_network_whose_last_linear_layer_is_not_its_classifier_is_refused_and_told_of_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(nn.Conv2d(3, K, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.unused = nn.Linear(6, K)
        def forward(self, x): return self.classifier(x) * (self.unused.weight.mean() + 1)
    class Squeeze(Gated):
        def forward(self, x): return self.classifier(x) * self.unused(x.mean((1, 2)))[:, :1]
    class Wrong(Squeeze):
        def __init__(self): super().__init__(); self.unused = nn.Linear(6, 5)
    for model in (Gated(), Wrong()):
        for clean in CLEAN:
            learn = learner(SUMix(CutMix(), clean=clean), model=model)
            before = weights(model)
            with pytest.raises(ValueError, match="does not make the logits.*`layer`"): fit(learn)
            same(weights(model), before)
            learn.remove_cb(learn.sumix)


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
    assert learn.sumix.classifier_layer is new.fc and head_of(learn).layers[0].in_features == 5
    assert times_in_optimizer(learn, new) == 1
    assert all(not torch.equal(value, new.state_dict()[name]) for name, value in before.items())
    heads = weights(head_of(learn))
    fit(learn)
    assert all(not torch.equal(value, head_of(learn).state_dict()[name]) for name, value in heads.items())


# ---- 20, 21. compile, copies ---------------------------------------------------------------------

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


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_step", "after_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_can_be_copied_within_a_batch(kind, event):
    copies = []
    learn = learner(KINDS[kind](CutMix(), seed=0))
    fit(learn, cbs=At(event, lambda: copies.append(copy.deepcopy(learn.model))))
    assert set(copies[0].state_dict()) == set(learn.model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert copies[0].eval()(x).shape == (2, K)


def test_a_copy_does_not_share_the_tap_nor_drag_the_learner_along():
    learn = fit(learner(SUMix(CutMix(), seed=0)))
    other = copy.deepcopy(learn.model).train()
    other(torch.randn(2, 3, 6, 6))
    assert learn.sumix.tap.features is None
    assert head_of(learn) is learn.sumix.uncertainty_head is not other[-1].uncertainty


def test_the_network_can_be_pickled_during_and_after_training():
    learn = fit(learner(SUMix(CutMix(), seed=0)))
    loaded = pickle.loads(pickle.dumps(learn.model))
    same(weights(loaded), weights(learn.model))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(loaded.eval()(x), learn.model.eval()(x))


def test_a_network_used_by_hand_in_training_mode_can_still_be_copied():
    learn = fit(learner(SUMix(CutMix(), seed=0)))
    learn.model.train()
    learn.model(torch.randn(2, 3, 6, 6)).sum().backward()
    copy.deepcopy(learn.model)


# ---- repeatability -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(kind):
    def train(seed):
        torch.manual_seed(3)
        learn = learner(KINDS[kind](CutMix(), seed=seed), dls=digits(), model=with_bn(10))
        torch.manual_seed(seed + 10)  # PyTorch's own dice are not used
        return weights(fit(learn, 2).model)
    torch.manual_seed(3)
    one, two, other = train(0), train(0), train(1)
    same(one, two)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_clean_variants_differ_only_by_gradient_and_batchnorm():
    found = {}
    for clean in CLEAN:
        torch.manual_seed(3)
        spy = Spy()
        fit(learner(SUMix(CutMix(), seed=0, clean=clean), spy, model=without_bn(), lr=0.0))
        found[clean] = ([batch.loss.item() for batch in spy.batches], spy.gradients[-1])
    for clean in ("no_grad", "concat"): assert found[clean][0] == pytest.approx(found["separate"][0], rel=1e-5)
    for one, other in zip(found["separate"][1], found["concat"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert (found["no_grad"][1][0] - found["separate"][1][0]).abs().max() > 1e-7


@pytest.mark.parametrize("mixer", [CutMix, partial(MixUp, per_sample=True)])
def test_mix_and_sumix_with_one_seed_see_the_same_data_and_draw_the_same_mixtures(mixer):
    seen = {}
    for kind, make in KINDS.items():
        spy = Spy()
        learn = fit(learner(make(mixer(), seed=5), dls=digits(), model=with_bn(10)), 2, cbs=spy)
        cb = next(cb for cb in learn.cbs if isinstance(cb, Mix))
        assert len(spy.batches) == 6
        seen[kind] = ([batch.xb[:16] for batch in spy.batches], [batch.y for batch in spy.batches],
                      [lam for lam, _ in cb.history])
    for found in seen.values():
        for one, other in zip(found, seen["Mix"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    images, _, lam = seen["Mix"]
    assert not torch.equal(images[0], images[3]) and not torch.equal(lam[0], lam[3]), "each epoch draws anew"


def test_a_later_fit_draws_on_and_does_not_repeat_the_first():
    learn = learner(Mix(CutMix(), seed=0))
    fit(learn), fit(learn)
    lam = [pair[0][0].item() for pair in learn.mix.history]
    assert len(lam) == 6 and lam[:3] != lam[3:]


def test_each_process_draws_from_its_own_seed(monkeypatch):
    def drawn(seed, rank):
        monkeypatch.setenv("RANK", str(rank))
        cb = Mix(CutMix(), seed=seed)
        cb.learn = SimpleNamespace(cbs=[cb])
        cb.before_fit()
        return torch.rand(3, generator=cb.generator).tolist()
    assert drawn(7, 0) == torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()
    assert drawn(7, 1) == drawn(8, 0) != drawn(7, 0)


def test_without_a_seed_pytorchs_own_decides():
    def drawn(seed):
        learn = learner(Mix(CutMix()))
        torch.manual_seed(seed)
        return [pair[0][0].item() for pair in fit(learn).mix.history]
    assert drawn(1) == drawn(1) != drawn(2)


# ---- options -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("clean", "mixer"), [("no_grad", CutMix()), ("concat", MixUp(per_sample=True)),
                                              ("separate", CutMix(p=0.5))])
@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
def test_every_variant_learns_the_digits_a_little_and_stays_finite(variant, clean, mixer):
    torch.manual_seed(0)
    cb, spy = SUMix(mixer, variant=variant, clean=clean, seed=0), Spy()
    learn = learner(cb, dls=digits(bs=24, limit=72), model=with_bn(10), lr=0.1)
    before = learn.validate()[0]
    fit(learn, 5, cbs=spy)
    assert len(spy.batches) == 15 and all(batch.loss.isfinite() for batch in spy.batches)
    assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.validate()[0] < before
    assert all(((ratio >= 0) & (ratio <= 1)).all() and not ratio.requires_grad for _, ratio in learn.sumix.history)


def test_the_learned_share_differs_from_the_area():
    learn = fit(learner(SUMix(CutMix(), seed=0)), 2)
    lam, ratio = (torch.cat([pair[i] for pair in learn.sumix.history]) for i in (0, 1))
    assert len(lam) == 2 * N and (lam - ratio).abs().max() > 1e-4 and len(set(ratio[:8].tolist())) > 1


def test_hidden_layers_and_other_encodings_are_used():
    learn = learner(SUMix(CutMix(), hidden=(16,), z="features", seed=0, xi=5.0))
    head = learn.sumix.uncertainty_head
    assert [tuple(p.shape) for p in head.parameters()] == [(16, 32), (16,), (K, 16), (K,)]
    before = weights(head)
    fit(learn)
    assert all(not torch.equal(before[name], value) for name, value in head.state_dict().items())
    ratios = {}
    for z in ("features", "logits"):
        torch.manual_seed(0)
        ratios[z] = torch.cat([ratio for _, ratio in fit(learner(SUMix(CutMix(), z=z, seed=0), lr=0.0)).sumix.history])
    assert (ratios["features"] - ratios["logits"]).abs().max() > 1e-4


def test_xi_weighs_the_regulariser():
    losses = {}
    for xi in (0.0, 2.0):
        torch.manual_seed(0)
        learn = fit(learner(SUMix(Fixed(), xi=xi), lr=0.0))
        losses[xi] = learn.sumix.terms
    assert losses[2.0].loss.item() == pytest.approx(losses[0.0].loss.item() + 2 * losses[0.0].regulariser.item(),
                                                    rel=1e-5)
    assert losses[0.0].loss.item() == pytest.approx(losses[0.0].mixed_ce.item())


def test_mix_with_a_mixer_that_never_mixes_trains_as_without_it():
    learn, plain = learner(Mix(CutMix(p=0.0))), learner()
    fit(learn), fit(plain)
    for (name, one), other in zip(learn.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_the_history_is_as_long_as_keep_and_holds_the_last_batches():
    for make in (Mix, SUMix):
        whole, short = (fit(learner(make(CutMix(), seed=0, keep=keep))) for keep in (1000, 2))
        one, other = (next(cb for cb in learn.cbs if isinstance(cb, Mix)).history for learn in (whole, short))
        assert len(one) == 3 and len(other) == 2
        assert [pair[0].tolist() for pair in other] == [pair[0].tolist() for pair in one][1:]


def test_mix_remembers_the_shares_that_it_used():
    learn = fit(learner(Mix(Fixed())))
    assert [(lam * 8).tolist() for lam, _ in learn.mix.history] == [EIGHTHS] * 3


# ---- figures -------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [Mix, SUMix])
def test_plots_before_any_training_are_refused(make):
    cb = make(CutMix())
    learner(cb)
    with pytest.raises(ValueError, match="nothing was mixed yet: `fit` first"): cb.plot_ratio()
    with pytest.raises(ValueError, match="nothing to show yet: `fit` first"): cb.show_mixed()


def test_show_mixed_after_a_fit_that_failed_in_its_first_batch_is_refused_as_before_any_training():
    learn = learner(SUMix(CutMix()), loss=LabelSmoothingCrossEntropyFlat(weight=WEIGHT), dls=make_dls())
    with pytest.raises(ValueError, match="cannot be mixed"): fit(learn)
    with pytest.raises(ValueError, match="nothing to show yet"): learn.sumix.show_mixed()


def test_show_mixed_after_an_interrupt_shows_images_with_their_own_shares():
    learn = learner(Mix(CutMix(per_sample=True), seed=0), dls=digits(), model=with_bn(10))
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At("before_backward", throw(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At("after_pred", throw(KeyboardInterrupt()), order=4))
    mixed, _ = learn.mix.last
    assert mixed is not learn.mix.mixed, "the interrupted batch had no loss, and is not shown"
    axes = learn.mix.show_mixed(3)
    for i, ax in enumerate(axes):
        assert ax.get_title() == f"λ {mixed.lam[i].item():.2f}"
        wanted = (mixed.images[i] * 0.3237 + 0.3054).permute(1, 2, 0).clip(0, 1).numpy()
        np.testing.assert_allclose(ax.images[0].get_array(), wanted, atol=0.01)


@pytest.mark.parametrize("make", [Mix, SUMix])
def test_plot_ratio_counts_every_sample_and_draws_where_it_is_told(make):
    learn = fit(learner(make(CutMix(), seed=0)))
    cb = next(cb for cb in learn.cbs if isinstance(cb, Mix))
    ax = matplotlib.pyplot.subplots()[1]
    assert cb.plot_ratio(ax) is ax and np.nansum(ax.collections[0].get_array()) == N
    assert "lambda" in ax.get_xlabel() and "tilde" in ax.get_ylabel()
    assert cb.plot_ratio() is not ax
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("make", [Mix, SUMix])
def test_show_mixed_shows_the_mixture_in_its_own_colours_with_its_shares(make):
    learn = fit(learner(make(CutMix(), seed=0), dls=digits(), model=with_bn(10)))
    cb = next(cb for cb in learn.cbs if isinstance(cb, Mix))
    axes = cb.show_mixed(3)
    lam, ratio = cb.history[-1]
    assert len(axes) == 3
    for i, ax in enumerate(axes):
        wanted = (cb.mixed.images[i] * 0.3237 + 0.3054).permute(1, 2, 0).clip(0, 1).numpy()
        np.testing.assert_allclose(ax.images[0].get_array(), wanted, atol=1.5 / 255)
        title = f"λ {lam[i]:.2f}" + ("" if make is Mix else f", λ~ {ratio[i]:.2f}")
        assert ax.get_title() == title
    given = matplotlib.pyplot.subplots(1, 2)[1]
    assert cb.show_mixed(2, axes=given) is given and all(len(ax.images) == 1 for ax in given)
    matplotlib.pyplot.close("all")
