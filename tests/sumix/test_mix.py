"`Mix`, and those built on it, in real Learners: losses, metrics, precision, chance, and how mixtures look"
import copy
import gc
import math
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
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from fastai.losses import BCEWithLogitsLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastcore.foundation import L
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import CutMix as TorchvisionCutMix

from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.mixed import MixUp
from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.mix import Mix, MixedAccuracy
from tests.sumix.oracles import repeated_loss
from tests.sumix.learners import EIGHTHS, K, KINDS, LOSSES, N, WEIGHT, Fixed, Named, Spy, At, digits, fit
from tests.sumix.learners import learner, make_dls, mix_of, same, throw, weights, with_bn, without_bn


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


@pytest.mark.parametrize("kind", ["Mix", "SUMix no_grad"])
def test_a_mean_that_cannot_be_mixed_is_refused_before_any_weight_changes(kind):
    learn = learner(KINDS[kind](CutMix()), loss=LabelSmoothingCrossEntropyFlat(weight=WEIGHT))
    before = weights(learn.model)
    with pytest.raises(ValueError, match="`loss_func`.*mean.*cannot be mixed"): fit(learn)
    same({k: v for k, v in weights(learn.model).items() if "running" not in k and "num_b" not in k},
         {k: v for k, v in before.items() if "running" not in k and "num_b" not in k})


def test_multi_label_targets_are_refused_by_sumix():
    learn = learner(SUMix(Fixed()), loss=BCEWithLogitsLossFlat(), dls=make_dls(soft=True))
    before = weights(learn.model)
    with pytest.raises(ValueError, match="SUMix needs class indices.*`Mix` trains with"): fit(learn)
    same(weights(learn.model), before)  # not even the statistics of BatchNorm


@pytest.mark.parametrize("one", [Mix, SUMix])
@pytest.mark.parametrize("other", [FastaiMixUp, FastaiCutMix, lambda: Mix(MixUp()), lambda: SUMix(MixUp())])
def test_two_callbacks_that_mix_are_refused_before_any_weight_changes(one, other):
    for flip in (False, True):
        cbs = [one(CutMix()), other()]
        learn = learner(*(cbs[::-1] if flip else cbs))
        before = weights(learn.model)
        with pytest.raises(ValueError, match="cannot mix what .* mixes too: keep one of them"): fit(learn)
        same(weights(learn.model), before)


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
    if kind != "Mix": assert cb.passes.taps["features"].features is None


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_accuracy_in_training_counts_labels_by_share_and_in_validation_plainly(kind):
    spy = Spy()
    learn = learner(KINDS[kind](CutMix(), seed=0), spy, metrics=[MixedAccuracy(), accuracy])
    learn.remove_cb(learn.recorder)
    learn.add_cb(Recorder(train_metrics=True))
    fit(learn)
    assert learn.recorder.metric_names[1:-1] == ["train_loss", "train_mixed_accuracy", "train_accuracy", "valid_loss",
                                                 "valid_mixed_accuracy", "valid_accuracy"]
    _, train, _, _, valid, plain = learn.recorder.final_record
    right = []
    for batch in spy.batches:
        share = batch.terms.ratio if batch.terms else batch.mixed.lam
        columns = batch.pred.argmax(1), batch.mixed.target_a, batch.mixed.target_b, share
        right += [part * (p == a) + (1 - part) * (p == b) for p, a, b, part in zip(*(x.tolist() for x in columns))]
    assert len(right) == N and train == pytest.approx(sum(right) / N, abs=1e-6)
    assert valid == pytest.approx(plain, abs=1e-6)


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


@pytest.mark.parametrize("mixer", [CutMix, partial(MixUp, per_sample=True)])
def test_mix_and_sumix_with_one_seed_see_the_same_data_and_draw_the_same_mixtures(mixer):
    seen = {}
    for kind, make in KINDS.items():
        spy = Spy()
        learn = fit(learner(make(mixer(), seed=5), dls=digits(), model=with_bn(10)), 2, cbs=spy)
        cb = mix_of(learn)
        assert len(spy.batches) == 6
        seen[kind] = ([batch.xb[:16] for batch in spy.batches], [batch.y for batch in spy.batches],
                      [torch.tensor(lam) for lam, _ in cb.history])
    for found in seen.values():
        for one, other in zip(found, seen["Mix"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    images, _, lam = seen["Mix"]
    assert not torch.equal(images[0], images[3]) and not torch.equal(lam[0], lam[3]), "each epoch draws anew"


def test_a_later_fit_draws_on_and_does_not_repeat_the_first():
    learn = learner(Mix(CutMix(), seed=0))
    fit(learn), fit(learn)
    lam = [pair[0][0] for pair in learn.mix.history]
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


def test_the_history_is_as_long_as_keep_and_holds_the_last_batches():
    for make in (Mix, SUMix):
        whole, short = (fit(learner(make(CutMix(), seed=0, keep=keep))) for keep in (1000, 2))
        one, other = (mix_of(learn).history for learn in (whole, short))
        assert len(one) == 3 and len(other) == 2
        assert [pair[0] for pair in other] == [pair[0] for pair in one][1:]


@pytest.mark.parametrize("make", [Mix, SUMix])
def test_show_mixed_shows_the_mixture_in_its_own_colours_with_its_shares(make):
    learn = fit(learner(make(CutMix(), seed=0), dls=digits(), model=with_bn(10)))
    cb = mix_of(learn)
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


# ---- what is refused, and what it says --------------------------------------------------------------

@pytest.mark.parametrize("make", [Mix, SUMix])
@pytest.mark.parametrize("mixer", [FastaiCutMix(), FastaiCutMix, FastaiMixUp(), TorchvisionCutMix(num_classes=K),
                                   [CutMix(), FastaiCutMix()]])
def test_mixers_of_other_libraries_are_refused_at_once_and_the_import_order_named(make, mixer):
    with pytest.raises(TypeError, match="`from sumix_nb import (CutMix|MixUp)` after the imports of"): make(mixer)


@pytest.mark.parametrize("target", [torch.zeros(N, 6, 6).long(), torch.zeros(N, 6, 6), torch.ones(N, K).long()])
def test_masks_are_refused_before_anything_is_mixed(target):
    dls = make_dls()
    dls.train.dataset[:] = [(image, one) for (image, _), one in zip(dls.train.dataset, target, strict=True)]
    with pytest.raises(ValueError, match="labels must be one per image .*masks cannot be mixed"):
        fit(learner(Mix("cutmix"), dls=dls, loss=nn.MSELoss()))


class Wrapped(nn.Module):
    "Returns its logits in a tuple"
    def __init__(self): super().__init__(); self.net = with_bn()
    def forward(self, x): return (self.net(x),)


def first(model, inputs, output): return output[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_returns_a_tuple_is_refused_and_a_hook_that_returns_logits_helps(kind):
    learn = learner(KINDS[kind](CutMix()), model=Wrapped())
    with pytest.raises(TypeError, match="a tensor of logits.*got tuple: .*register_forward_hook"): fit(learn)
    learn.model.register_forward_hook(first)
    fit(learn)


# ---- what is kept --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_kept_for_each_step(kind):
    learn = learner(KINDS[kind](CutMix(), seed=0))
    learn.remove_cb(learn.recorder)  # keeps one itself
    def alive(): return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    counts = []
    for _ in range(4):  # in the first rounds what other tests left behind may still go
        fit(learn, 2)
        gc.collect()
        counts.append(alive())
    assert counts[2] == counts[3]
    assert all(isinstance(share, float) for pair in mix_of(learn).history for share in pair[0])


def test_show_mixed_works_with_plain_loaders_of_pytorch():
    learn = fit(learner(Mix("cutmix", seed=0), dls=make_dls(plain=True)))
    axes = learn.mix.show_mixed(3)
    shown, images = np.stack([ax.images[0].get_array() for ax in axes]), learn.mix.mixed.images[:3].permute(0, 2, 3, 1)
    np.testing.assert_allclose(shown, (images - images.min()) / (images.max() - images.min()), atol=1e-6)
    matplotlib.pyplot.close("all")
