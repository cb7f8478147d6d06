"Every mixer inside `Mix` and `SUMix`: the loss it is trained with, any kind of target, its options, and when it stops"
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from torch import Tensor, nn
from torch.nn import functional as F

from sumix_nb.sumix.callback import TRAINING, SUMix
from sumix_nb.sumix.mix import Mix, normalisation
from sumix_nb.data.loaders import get_dls
from sumix_nb.training.steps import Autocast
from sumix_nb.sumix.loss import sumix_loss
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.fmix import FMix
from sumix_nb.mixers.gridmix import GridMix, SmoothMix
from sumix_nb.mixers.mixed import MixUp, Mixed
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import MIXERS, label_of
from sumix_nb.training.train import make_learner, train
from tests.sumix.learners import K, N, Spy, fit, learner, make_dls, with_bn

FAMILY = [kind(per_sample=per_sample) for kind in (MixUp, CutMix, FMix, ResizeMix, SaliencyMix, GridMix, SmoothMix)
          for per_sample in (False, True)]
FAMILY += [OneOf([CutMix(), FMix(), MixUp()], p=[0.4, 0.2, 0.2], per_sample=per_sample) for per_sample in (False, True)]
each_mixer = pytest.mark.parametrize("mixer", [pytest.param(mixer, id=repr(mixer)) for mixer in FAMILY])


def run(callback, target=None, loss_func=None, epochs=1, cbs=()):
    "Train without output; the Learner, and logits, mixture and loss of every training batch"
    spy = Spy()
    learn = fit(learner(callback, spy, *cbs, loss=loss_func, dls=make_dls(target=target)), epochs)
    return learn, [(batch.pred, batch.mixed, batch.loss) for batch in spy.batches]


def one_hot(target): return F.one_hot(target, K).float()


def soft_label(mixed, target_a, target_b):
    "The label of each mixed image as (N, K) numbers"
    return mixed.lam[:, None] * target_a + (1 - mixed.lam[:, None]) * target_b


# ---- the loss of the plain mixer, exactly ----------------------------------------------------------

@each_mixer
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_class_indices_the_loss_is_cross_entropy_of_the_soft_label_smoothing_included(mixer, smoothing):
    _, batches = run(Mix(mixer, seed=0), loss_func=nn.CrossEntropyLoss(label_smoothing=smoothing))
    for logits, mixed, loss in batches:
        label = soft_label(mixed, one_hot(mixed.target_a), one_hot(mixed.target_b))
        expected = F.cross_entropy(logits, label, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@each_mixer
def test_soft_and_multi_label_targets_give_the_loss_of_their_mean(mixer):
    generator = torch.Generator().manual_seed(2)
    soft, many = torch.rand(N, K, generator=generator).softmax(1), torch.randint(2, (N, K), generator=generator).float()
    for target, loss_func in ((soft, nn.CrossEntropyLoss()), (many, nn.BCEWithLogitsLoss())):
        _, batches = run(Mix(mixer, seed=0), target, loss_func)
        for logits, mixed, loss in batches:
            label = soft_label(mixed, mixed.target_a, mixed.target_b)
            torch.testing.assert_close(loss, loss_func(logits, label), rtol=1e-4, atol=1e-5)


# ---- SUMix on top ----------------------------------------------------------------------------------

@each_mixer
@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
def test_sumix_trains_on_every_mixer_with_finite_losses_and_moves_its_head(mixer, variant):
    callback = SUMix(mixer, seed=0, variant=variant)
    learn, batches = run(callback)
    assert all(loss.isfinite() for _, _, loss in batches) and len(batches) == 3
    ratios = callback.shares()[1]
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in learn.model[-1].parameters())


@pytest.mark.parametrize("clean", TRAINING)
def test_sumix_takes_a_list_and_its_loss_is_that_of_the_mixture_that_was_made(clean):
    callback, seen = SUMix([CutMix(), FMix(per_sample=True)], seed=0, clean=clean), []
    class Keep(Callback):
        order, run_valid = Mix.order - 1, False
        def after_loss(self):
            seen_by, logits = callback.evidence, self.learn.pred.as_subclass(Tensor)
            heads = [callback.uncertainty_head(part) for part in (seen_by.features, seen_by.clean_features)]
            seen.append(sumix_loss(logits, seen_by.clean_logits, *heads, seen_by.mixed).loss.detach())
    _, batches = run(callback, cbs=[Keep()])
    assert isinstance(callback.mixer, OneOf) and len(seen) == 3
    torch.testing.assert_close(torch.stack([loss for _, _, loss in batches]).as_subclass(Tensor), torch.stack(seen))


@pytest.mark.parametrize("kind", [Mix, SUMix])
def test_any_object_that_follows_the_call_will_do(kind):
    class Half:
        def __call__(self, images, target, *, model=None, generator=None):
            partner, half = torch.randperm(len(images), generator=generator), torch.full((len(images),), 0.5)
            return Mixed((images + images[partner]) / 2, target, target[partner], half, partner)
    _, batches = run(kind(Half(), seed=0))
    assert all(mixed.lam.eq(0.5).all() and loss.isfinite() for _, mixed, loss in batches)
    _, batches = run(kind([Half(), CutMix()], seed=0))
    assert len(batches) == 3


# ---- what a mixer is told, and when it stops ----------------------------------------------------------

def test_mixers_learn_from_the_dataloaders_how_images_were_normalised_and_stay_as_they_were():
    dls = get_dls("digits", bs=64, device="cpu")
    mean, std = normalisation(dls)
    normalise = next(transform for transform in dls.train.after_batch.fs if isinstance(transform, Normalize))
    assert mean == normalise.mean.flatten().tolist() and std == normalise.std.flatten().tolist()
    mixer = SaliencyMix()
    callback = Mix([mixer, CutMix()], seed=0)
    learn = fit(learner(callback, model=with_bn(dls.c), dls=dls))
    assert callback.informed.mixers[0].mean == mean and mixer.mean is None and callback.mixer.mixers[0] is mixer
    own = Mix(SaliencyMix(mean=(0.1,), std=(0.2,)), seed=0)
    learn.remove_cb(callback)
    fit(learn, cbs=own)
    assert own.informed.mean == (0.1,)
    assert normalisation(make_dls()) is None and normalisation(None) is None


@pytest.mark.parametrize("kind", [Mix, *(partial(SUMix, clean=clean) for clean in TRAINING)])
def test_after_off_after_nothing_is_mixed_and_the_loss_is_the_usual_one(kind):
    callback, usual = kind(CutMix(per_sample=True), seed=0, off_after=0.5), []
    class Usual(Callback):
        order, run_valid = Mix.order - 1, False
        def after_loss(self): usual.append((self.learn.xb[0].as_subclass(Tensor), self.learn.loss.detach().clone()))
    learn, batches = run(callback, epochs=4, cbs=[Usual()])
    images = [batch.as_subclass(Tensor) for batch, _ in learn.dls.train]
    assert len(batches) == 12 and all(mixed.lam.lt(1).any() for _, mixed, _ in batches[:6])
    for i, ((seen, plain), (_, mixed, loss)) in enumerate(zip(usual[6:], batches[6:], strict=True)):
        assert mixed.lam.eq(1).all() and torch.equal(seen, images[i % 3])
        torch.testing.assert_close(loss, plain)
    assert all(part.grad is not None for part in learn.model.parameters())
    if isinstance(callback, SUMix):
        assert all(part.grad.eq(0).all() for part in callback.uncertainty_head.parameters())
    assert set(callback.history[-1][0]) == {1}


# ---- recipes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in MIXERS])
@pytest.mark.parametrize("method", ["mce", "sumix"])
def test_every_mixer_has_a_recipe_that_trains_under_bf16(name, method):
    recipe = Recipe(mixer=name, method=method, width=4, epochs=1, bs=16, limit=64, precision="bf16", per_sample=True)
    learn = make_learner(recipe, device="cpu")
    assert any(isinstance(cb, Autocast) for cb in learn.cbs)
    record = train(recipe, learn=learn, progress=False)
    assert torch.tensor(record["epochs"][0]["train_loss"]).isfinite()
    callback = learn.mix if method == "mce" else learn.sumix
    assert label_of(record["recipe"]).startswith(type(callback.mixer).__name__)
