"What `test_processes.py` lets two processes do, and one: run as a script by a launcher, imported by the test"
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import SGD
from fastai.torch_core import no_random, num_distrib, rank_distrib
from torch import Tensor, nn

from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.mix import Mix, MixedAccuracy
from sumix_nb.training.resume import Preempted
from sumix_nb.data.augment import RandomCropFlip
from sumix_nb.data.loaders import get_dls
from sumix_nb.training.processes import distribute, leave_group, local_device
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.mixed import Mixed
from sumix_nb.models.networks import get_model
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner, train
from tests.training.oracles import Interrupt, Signal

KINDS = ("mix", "no_grad", "concat", "separate", "corrected", "accumulated")
BASE = Recipe(mixer="cutmix", width=4, epochs=4, bs=20, limit=101, lr=0.05)
RECIPES = {"mix": BASE, **{clean: replace(BASE, method="sumix", clean=clean) for clean in ("no_grad", "concat")},
           "all": replace(BASE, method="sumix", precision="bf16", ema=0.8, clip=1.0, accumulate=2, optimizer="adamw",
                          schedule="cosine_step", warmup=1.0, spare_norms=True, lr=0.005, drop_last=False)}
# The last of 6 batches has one image, so that each process trains in 5
N = 65  # images of each split: of the validation batches process 0 has three, process 1 two


class Neighbours:
    "Mixes each image with the one two places before it, so that the shares of two processes hold whole mixtures"
    def __call__(self, images, target, model=None, generator=None):
        partner = torch.arange(len(target)).roll(2 // max(num_distrib(), 1))
        lam = torch.full((len(target),), 0.7)
        return Mixed(0.7 * images + 0.3 * images[partner], target, target[partner], lam, partner)


class Steps(Callback):
    "Keeps losses and images of the training steps"
    run_valid, only_watches = False, True
    def before_fit(self): self.losses, self.images = [], []
    def before_batch(self): self.images.append(self.learn.xb[0].as_subclass(Tensor).clone())
    def after_batch(self): self.losses.append(self.learn.loss.item())


def network():
    "A small network without BatchNorm that is sure of what it says"
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    with torch.no_grad(): model[-1].weight *= 20
    return model


def learner(callbacks, model=None, metrics=None, bs=16):
    "A Learner without augmentation, the same in every process"
    dls = get_dls("digits", bs=bs, limit=N, device="cpu")
    transforms = dls.train.after_batch.fs
    transforms[:] = [transform for transform in transforms if not isinstance(transform, RandomCropFlip)]
    with no_random(0):
        return Learner(dls, model or network(), metrics=metrics or [accuracy, MixedAccuracy()],
                       cbs=[*callbacks, Steps()], opt_func=SGD)


def fit(learn, epochs=1, lr=0.02, **options):
    with learn.no_bar(), learn.no_logging(), distribute(learn, **options): learn.fit(epochs, lr)
    return learn


def callbacks_of(kind, mixer, **options):
    "Plain mixing, or SUMix in one of its ways"
    if kind == "mix": return [Mix(mixer, seed=0)]
    if kind == "accumulated": return [Mix(mixer, seed=0), GradientAccumulation(32)]
    return [SUMix(mixer, **({"variant": kind} if kind in ("corrected", "released") else {"clean": kind}), seed=0)]


def fixed(kind, model=None, lr=0.02):
    "One epoch in which nothing is left to chance: losses of the steps, metrics and final weights"
    with no_random(0): learn = fit(learner(callbacks_of(kind, Neighbours()), model), lr=lr)
    return {"losses": learn.steps.losses, "metrics": list(learn.recorder.values[-1]),
            "weights": learn.model.state_dict()}


def with_batchnorm():
    "As `fixed`, with BatchNorm, at a learning rate of 0"
    with no_random(0): model = get_model("resnet18", 10, width=4)
    return fixed("mix", model, lr=0.0)


def recorded(recipe, folder):
    "A recipe with all its dice, and what came of it in this process"
    learn = make_learner(recipe, device=local_device())
    learn.add_cb(Steps())
    mix = next(cb for cb in learn.cbs if isinstance(cb, Mix))
    record = train(recipe, folder=folder, progress=False, learn=learn)
    lam, _ = mix.shares()
    return {"weights": learn.model.state_dict(), "lam": lam[-(recipe.limit // 2):],
            "images": torch.cat(learn.steps.images), "last": record["epochs"][-1],
            "reliability": record["reliability"], "recipe": asdict(recipe)}


def resumed(recipe, folder, step, rank):
    "Weights after a training in which the process `rank` was stopped once"
    learn = make_learner(recipe, device=local_device())
    if rank_distrib() == rank: learn.add_cb(Signal(step))
    options = {"progress": False, "checkpoints": folder / "checkpoints"}
    error_of(Preempted, lambda: train(recipe, learn=learn, **options))
    learn = make_learner(recipe, device=local_device())
    train(recipe, learn=learn, **options)
    return learn.model.state_dict()


def error_of(error, action):
    "The text of an error that must come"
    with pytest.raises(error) as found: action()
    return str(found.value)


def refused():
    "What is refused, and whether it, and an interruption, leave the Learner as it was"
    learn = learner([Mix(CutMix())])
    model, loaders = learn.model, list(learn.dls.loaders)
    texts = {"sync_bn": error_of(ValueError, lambda: fit(learn, sync_bn=True)),
             "bs": error_of(ValueError, lambda: fit(learner([Mix(CutMix())], bs=15))),
             "metrics": error_of(TypeError, lambda: fit(learner([Mix(CutMix())], metrics=[F1Score(average="macro")])))}
    learn.add_cb(Interrupt(2, "after_batch"))
    error_of(RuntimeError, lambda: fit(learn))
    return texts | {"as before": learn.model is model and learn.dls.loaders == loaders
                    and "to_detach" not in vars(learn) and not hasattr(learn, "distributed")}


def other_trainings():
    "Two fits in one go with what fastai does after them, and steps in which the head has nothing to do"
    learn = learner([SUMix(CutMix(), seed=0)])
    torch.manual_seed(5)
    with learn.no_bar(), learn.no_logging(), distribute(learn):
        found = {"dice": torch.rand(3)}
        for _ in range(2): learn.fit(1, 0.02)
        found |= {"validate": list(learn.validate()), "last": list(learn.recorder.values[-1]),
                  "predictions": learn.get_preds()[0].as_subclass(Tensor)}
    found["dice afterwards"] = torch.rand(3)
    idle = fit(learner([SUMix(CutMix(p=0.5), xi=0.0, off_after=0.5, seed=0)]), epochs=2)
    return found | {"weights": learn.model.state_dict(), "idle": idle.model.state_dict()}


def plain_loaders():
    "A fastai loader with a worker process and a network, both seeded by rank: images seen, and final weights"
    torch.manual_seed(rank_distrib())
    images = [(torch.full((3, 32, 32), i / N), i % 10) for i in range(N)]
    train, valid = (TfmdDL(images, bs=bs, shuffle=bs == 16, drop_last=bs == 16, num_workers=1) for bs in (16, 32))
    learn = Learner(DataLoaders(train, valid, device="cpu"), network(), nn.CrossEntropyLoss(), metrics=accuracy,
                    opt_func=SGD, cbs=Steps())
    fit(learn)
    seen = (N * torch.cat([batch[:, 0, 0, 0] for batch in learn.steps.images])).round().long()
    return {"seen": seen, "weights": learn.model.state_dict()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {"fixed": {kind: fixed(kind) for kind in KINDS}, "with_batchnorm": with_batchnorm(),
             "released": fixed("released"),
             "recorded": {kind: recorded(recipe, folder) for kind, recipe in RECIPES.items()},
             "again": recorded(RECIPES["no_grad"], None)["weights"],
             "resumed": [resumed(RECIPES["no_grad"], folder, 7, rank=1), resumed(RECIPES["all"], folder, 10, rank=0)],
             "refused": refused(), "other": other_trainings(), "plain": plain_loaders()}
    torch.save(found, folder / f"{rank_distrib()}.pt")
    leave_group()
