"Bad input from a caller: what is raised, and that the message names the argument and the rule"
import re
from functools import partial

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
from torch.nn import functional as F

from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.sumix.loss import SUMixLoss, sumix_loss
from sumix_nb.sumix.mixed_loss import mixed_cross_entropy, mixed_loss, per_sample_loss
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.fmix import FMix
from sumix_nb.mixers.gridmix import GridMix, SmoothMix
from sumix_nb.mixers.mixed import MixUp, Mixed
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from sumix_nb.mixers.cutmix import mixing_box
from sumix_nb.mixers.fmix import binarise
from sumix_nb.mixers.resizemix import paste_resized
from sumix_nb.mixers.saliency import spectral_saliency
from sumix_nb.models.networks import get_model
from sumix_nb.models.tap import find_classifier, logits_and_features
from sumix_nb.checks import check_encodings, check_labels, check_lam
from sumix_nb.sumix.ratio import VARIANTS, mix_ratio, ratio_from_distances
from sumix_nb.pictures import example_batch, show_images
from sumix_nb.sumix.uncertainty import UncertaintyHead

IMAGES, TARGET, LOGITS = torch.zeros(4, 3, 6, 6), torch.arange(4), torch.zeros(4, 5)
ONES, PARTNER = torch.ones(4), torch.tensor([1, 0, 3, 2])
RECORD = Mixed(IMAGES, TARGET, TARGET[PARTNER], ONES / 2, PARTNER)
NET = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))


def loss(*args, **kwargs):
    "`sumix_loss` on zeros, with `args` in place of the first arguments"
    return sumix_loss(*args, *[LOGITS, LOGITS, LOGITS, LOGITS, RECORD][len(args):], **kwargs)


def one_number(logits, target, reduction="mean"): return F.cross_entropy(logits, target)


def record(**changes):
    return Mixed(**({"images": IMAGES, "target_a": TARGET, "target_b": TARGET, "lam": ONES,
                     "partner": PARTNER} | changes))


def train(cb, model=None, loss_func=None, pairs=None, n_inp=None):
    "One epoch of a Learner with `cb`"
    pairs = list(zip(IMAGES, TARGET, strict=True)) if pairs is None else pairs
    loader = DataLoader(pairs, bs=2, num_workers=0)
    if n_inp: loader.n_inp = n_inp
    learn = Learner(DataLoaders(loader, loader, device=torch.device("cpu")), NET if model is None else model,
                    loss_func=loss_func or nn.CrossEntropyLoss(), cbs=cb)
    if hasattr(learn, "progress"): learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, lr=0.0)


class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(108, 5)
    def forward(self, one, two): return self.fc((one + two).flatten(1))


class Conv(nn.Sequential):
    def __init__(self): super().__init__(nn.Conv2d(3, 5, 6), nn.Flatten())


NAN, INF = float("nan"), float("inf")
VALUES = {  # what is wrong, the call, and what its `ValueError` says
    # mixers
    **{f"alpha {alpha}": (partial(CutMix, alpha), f"`alpha` must be .*, got {alpha}") for alpha in (0, -1.0, NAN, INF)},
    **{f"p {p}": (partial(MixUp, p=p), rf"`p` must be .*\[0, 1\], got {p}") for p in (-0.1, 1.1, NAN)},
    "one image without batch": (lambda: MixUp()(IMAGES[0], TARGET), r"`images` must have the shape .*\(3, 6, 6\)"),
    "no images": (lambda: MixUp()(IMAGES[:0], TARGET[:0]), r"`images` must .*not be empty, got \(0, 3, 6, 6\)"),
    "0-d target": (lambda: MixUp()(IMAGES, TARGET[0]), r"`target` must have one row .*got \(\)"),
    "target elsewhere": (lambda: MixUp()(IMAGES, TARGET.to("meta")), r"`target` must .* \(cpu\), got meta"),
    "box of an image without rows": (lambda: mixing_box(0.5, 0, 4, (1, 1)), "`height` and `width` .*, got 0 and 4"),
    "box without column": (lambda: mixing_box(0.5, 4, 4, (1,)), "`center` must"),
    "mask without channel": (lambda: record(mask=torch.ones(4, 6, 6)), r"`mask` must have one .*\(4, 6, 6\)"),
    "mask of two": (lambda: record(mask=torch.ones(2, 1, 6, 6)), "`mask` must have one of the shapes"),
    **{f"fmix {name} {value}": (partial(FMix, **{name: value}), f"`{name}` must") for name, value in (
        ("decay", -1), ("decay", NAN), ("decay", INF), ("max_soft", -0.1), ("max_soft", 0.6), ("max_soft", NAN))},
    "binarise an image without batch": (lambda: binarise(torch.zeros(4, 4), 0.5), r"`image` must .*, got \(4, 4\)"),
    "binarise, too many shares": (lambda: binarise(IMAGES[:, 0], ONES[:2]), "`lam` must be 1 or 4 values, got 2"),
    "partners of another size": (lambda: paste_resized(IMAGES, IMAGES[..., :3], (0, 1, 0, 1)),
                                 r"`partner_images` must have .*\(4, 3, 6, 6\), got \(4, 3, 6, 3\)"),
    "means for too many channels": (lambda: SaliencyMix(mean=(0,) * 3, std=(1,) * 3)(IMAGES[:, :1], TARGET),
                                    "`mean` and `std` must have 1 or 1 values each"),
    "saliency of two channels": (lambda: spectral_saliency(IMAGES[:, :2].byte()), r"`images_uint8` .*\(4, 2, 6, 6\)"),
    **{f"gridmix {name} {value}": (partial(GridMix, **{name: value}), rf"`{name}` must") for name, value in (
        ("columns", (0, 3)), ("area", (0.9, 0.5)), ("area", (0, 2)),
        ("aspect", (0, 1)), ("aspect", (1, NAN)))},
    **{f"smoothmix deviation {value}": (partial(SmoothMix, deviation=value), "`deviation` must")
       for value in ((0, 1), (0.5, 0.2))},
    "OneOf p negative": (lambda: OneOf([CutMix()], [-0.5]), r"`p` must be in \[0, 1\], got -0\.5"),
    # pictures
    "no rows": (lambda: example_batch(0, 5), "`height` must be at least 1, got 0"),
    "too few titles": (lambda: show_images(IMAGES, ["one"]), "`titles` must be 4, one for each image, got 1"),
    # ratio and uncertainty
    "one row that would broadcast": (lambda: VARIANTS["poster"].distance(LOGITS, LOGITS[:1]), r"one shape \(N, D\)"),
    "maps": (lambda: check_encodings(IMAGES), r"must have one shape \(N, D\), got \[\(4, 3, 6, 6\)\]"),
    **{f"lam {lam}": (partial(ratio_from_distances, lam, ONES, ONES), r"`lam` must be in \[0, 1\], got values from")
       for lam in (-0.5, 2, NAN)},
    "lam of another length": (lambda: mix_ratio(LOGITS, LOGITS, LOGITS, ONES[:3]), r"`lam` must .*\(4,\), got \(3,\)"),
    "lam as a column": (lambda: check_lam(ONES[:, None], ONES), r"`lam` must be .* shape \(4,\), got \(4, 1\)"),
    "soft labels": (lambda: check_labels(LOGITS, LOGITS), r"class indices of the shape \(4,\) .*, got \(4, 5\)"),
    "labels as a list": (lambda: check_labels([1, 2], LOGITS), "class indices .*got list"),
    "no features": (lambda: UncertaintyHead(0, 3), r"`in_features`, .* integers of at least 1, got \(0, 3\)"),
    "a float": (lambda: UncertaintyHead(2.0, 3), "`in_features`.*must be integers"),
    "feature maps": (lambda: UncertaintyHead(6, 3)(IMAGES), r"`features` must .*\(N, 6\), got \(4, 3, 6, 6\)"),
    # models
    **{f"{c} classes": (partial(get_model, "resnet18", c), f"`c` must be at least 1, got {c}") for c in (0, -1)},
    "no width": (lambda: get_model("resnet18", 10, width=0), "`width` must be at least 1, got 0"),
    "layer of another network": (lambda: find_classifier(NET, nn.Linear(1, 1)), "`layer` must be one of the linear"),
    "layer of another kind": (lambda: find_classifier(NET, NET[0]), "`layer` must be one of the linear .*Flatten"),
    "layer that is not last": (lambda: logits_and_features(nn.Sequential(*NET, nn.Linear(5, 7)), IMAGES, "1"),
                               "does not make the logits of the network: .*`layer`"),
    # loss
    "infinite xi": (lambda: loss(xi=INF), "`xi` must"),
    "head of other classes": (lambda: loss(LOGITS, LOGITS, LOGITS[:, :3], LOGITS[:, :2]), r"one shape \(N, D\)"),
    "head of one output that would broadcast": (
        lambda: loss(LOGITS, LOGITS, *[LOGITS[:, :1]] * 2, variant="released"), "must have (one|the) shape"),
    "clean logits of another batch": (lambda: loss(LOGITS, LOGITS[:2]), r"one shape .*got \[\(4, 5\), \(2, 5\)\]"),
    "released with encodings": (lambda: loss(variant="released", encodings=(LOGITS, LOGITS)),
                                "`encodings` must be None for variant=\"released\""),
    "encodings of different sizes": (lambda: loss(encodings=(LOGITS, LOGITS[:, :2])), r"must have one shape \(N, D\)"),
    "encodings of another batch": (lambda: loss(encodings=(LOGITS[:2], LOGITS[:2])), "must have|`encodings`"),
    "record of another batch": (lambda: sumix_loss(LOGITS[:2], LOGITS[:2], None, None, RECORD), r"the shape \(2,\)"),
    "module, negative xi": (lambda: SUMixLoss(UncertaintyHead(2, 3), xi=-0.1), r"`xi` must .*, got -0\.1"),
    "not reduced": (lambda: mixed_loss(nn.CrossEntropyLoss(reduction="none"), LOGITS, LOGITS, TARGET, TARGET, 0.5),
                    "`loss_func` must reduce by mean or sum, got 'none'"),
    "one number in all": (lambda: per_sample_loss(one_number, LOGITS, TARGET),
                          "`loss_func` must give one loss per sample, got 1 for 4"),
    "MCE, lam outside": (lambda: mixed_cross_entropy(LOGITS, TARGET, TARGET, 1.5), r"`lam` must be in \[0, 1\]"),
    # callbacks
    "negative xi": (lambda: SUMix(CutMix(), xi=-1), "`xi` must .*, got -1"),
    "z": (lambda: SUMix(CutMix(), z="pixels"), "`z` must be one of .*got 'pixels'"),
    "z of released": (lambda: SUMix(CutMix(), z="features", variant="released"), '`z` must be "logits" for variant='),
    "hidden of 0": (lambda: train(SUMix(CutMix(), hidden=(0,))), "`hidden`.*at least 1"),
    **{f"{name} {value!r}": (partial(Mix, CutMix(), **{name: value}), f"`{name}` must") for name, value in (
        ("keep", 0), ("keep", -1), ("off_after", -0.1), ("off_after", 1.5), ("off_after", NAN))},
    "two inputs": (lambda: train(Mix(CutMix()), TwoInputs(), pairs=[(IMAGES[0], IMAGES[0], TARGET[0])] * 4, n_inp=2),
                   "batches must be one tensor of images and one of labels, got 2 inputs and 1 targets"),
    "two targets": (lambda: train(Mix(CutMix()), loss_func=lambda x, a, b: F.cross_entropy(x, a),
                                  pairs=[(IMAGES[0], TARGET[0], TARGET[0])] * 4, n_inp=1), "1 inputs and 2 targets"),
    "nothing was mixed": (lambda: Mix(CutMix()).plot_ratio(), "nothing was mixed yet: `fit` first"),
    "nothing to show": (lambda: SUMix(CutMix()).show_mixed(), "nothing to show yet: `fit` first"),
}
KINDS = {  # the same for a `TypeError`
    "alpha a string": (lambda: CutMix("1"), "`alpha` must be a number"),
    "images no tensor": (lambda: CutMix()([1, 2], TARGET), "`images` must be a tensor, got list"),
    "target no tensor": (lambda: CutMix()(IMAGES, [1, 2]), "`target` must be a tensor, got list"),
    "a seed as generator": (lambda: MixUp()(IMAGES, TARGET, generator=3), r"`generator` must be .* or None, got int"),
    **{f"per_sample {value!r} {kind.__name__}": (partial(kind, per_sample=value), "`per_sample` must be True or False")
       for kind in (CutMix, ResizeMix) for value in (1, 0.5, "no")},
    **{f"fmix quirk {value!r}": (partial(FMix, quirk=value), "`quirk` must be True or") for value in ("no", 1, None)},
    **{f"gridmix columns {value}": (partial(GridMix, columns=value), "`columns` must be") for value in ((2, 2.5), 3)},
    "smoothmix deviation a word": (lambda: SmoothMix(deviation="wide"), "`deviation` must be two numbers"),
    **{f"{c!r} classes": (partial(get_model, "resnet18", c), "`c` must be a whole number, got") for c in (2.0, "10")},
    **{f"{name} {value!r}": (partial(Mix, CutMix(), **{name: value}), f"`{name}` must be a") for name, value in (
        ("keep", 2.5), ("keep", "all"), ("seed", 1.5), ("seed", "a"), ("off_after", "late"))},
    "OneOf nothing": (lambda: OneOf([]), r"`mixers` must be a list of at least one mixer, got \[\]"),
    "OneOf one mixer without list": (lambda: OneOf(CutMix()), "`mixers` must be a list"),
    "OneOf a name": (lambda: OneOf(["cutmix"]), "`mixers` must be called as .*got 'cutmix'"),
    "OneOf per_sample": (lambda: OneOf([CutMix()], per_sample="yes"), "`per_sample` must be True or"),
    "hidden a number": (lambda: UncertaintyHead(2, 3, 16), "`hidden`"),
    "xi a string": (lambda: loss(xi="much"), "`xi` must"),
    "mixer not callable": (lambda: Mix(0.5), r"`mixer` must be an object that is called, e\.g\. CutMix\(\), got 0\.5"),
    "hidden of SUMix a number": (lambda: SUMix(CutMix(), hidden=16), "`hidden` must"),
    "an empty list": (lambda: Mix([]), "`mixers` must be a list of at least one mixer"),
    "a list of classes": (lambda: SUMix([CutMix]), "`mixer` must be an object"),
    "mixer returns something else": (lambda: train(Mix(lambda images, target, model, generator: images)),
                                     "`mixer` must return a Mixed, got Tensor"),
}


@pytest.mark.parametrize(("error", "call", "message"), [
    pytest.param(error, *case, id=what) for error, cases in ((ValueError, VALUES), (TypeError, KINDS))
    for what, case in cases.items()])
def test_bad_input_is_refused_with_the_argument_and_the_rule(error, call, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)): call()
