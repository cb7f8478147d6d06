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
from sumix_nb.data.loaders import get_dls
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
CASES = [
    # data
    ("data: name is no string", lambda: get_dls(7), ValueError, r"`name` must be one of .*, got 7"),
    ("data: bs 0", lambda: get_dls("digits", bs=0), ValueError, r"`bs` must be at least 1, got 0"),
    ("data: valid 1", lambda: get_dls("digits", valid=1.0), ValueError,
     r"`valid` must be .* between 0 and 1, got 1\.0"),
    # mixers
    *[(f"mixers: alpha {alpha}", partial(CutMix, alpha), ValueError,
       rf"`alpha` must be .*, got {alpha}") for alpha in (0, -1.0, NAN, INF)],
    *[(f"mixers: p {p}", partial(MixUp, p=p), ValueError, rf"`p` must be .*\[0, 1\], got {p}")
      for p in (-0.1, 1.1, NAN)],
    ("mixers: alpha a string", lambda: CutMix("1"), (TypeError, ValueError), r"`alpha` must be"),
    ("mixers: p a string", lambda: CutMix(p="often"), (TypeError, ValueError), r"`p` must be"),
    ("mixers: images no tensor", lambda: CutMix()([1, 2], TARGET), TypeError, r"`images` must be a tensor, got list"),
    ("mixers: target no tensor", lambda: CutMix()(IMAGES, [1, 2]), TypeError, r"`target` must be a tensor, got list"),
    ("mixers: one image without batch", lambda: MixUp()(IMAGES[0], TARGET), ValueError,
     r"`images` must have the shape \(N, C, H, W\).*\(3, 6, 6\)"),
    ("mixers: no images", lambda: MixUp()(IMAGES[:0], TARGET[:0]), ValueError,
     r"`images` must .*not be empty, got \(0, 3, 6, 6\)"),
    ("mixers: 0-d target", lambda: MixUp()(IMAGES, TARGET[0]), ValueError, r"`target` must have one row .*got \(\)"),
    ("mixers: target elsewhere", lambda: MixUp()(IMAGES, TARGET.to("meta")), ValueError,
     r"`target` must be on the device of `images` \(cpu\), got meta"),
    ("mixers: a seed as generator", lambda: MixUp()(IMAGES, TARGET, generator=3), TypeError,
     r"`generator` must be a torch\.Generator or None, got int"),
    ("mixers: box of an image without rows", lambda: mixing_box(0.5, 0, 4, (1, 1)), ValueError,
     r"`height` and `width` must be at least 1, got 0 and 4"),
    ("mixers: box without column", lambda: mixing_box(0.5, 4, 4, (1,)), ValueError, r"`center` must"),
    ("mixers: record, mask without channel", lambda: record(mask=torch.ones(4, 6, 6)), ValueError,
     r"`mask` must have one of the shapes .*\(4, 6, 6\)"),
    ("mixers: record, mask of two", lambda: record(mask=torch.ones(2, 1, 6, 6)), ValueError,
     r"`mask` must have one of the shapes"),
    *[(f"mixers: per_sample {value!r} of {kind.__name__}", partial(kind, per_sample=value), TypeError,
       r"`per_sample` must be True or False, got") for kind in (CutMix, ResizeMix) for value in (1, 0.5, "no")],
    *[(f"mixers: fmix decay {decay}", partial(FMix, decay=decay), ValueError, r"`decay` must")
      for decay in (-1, NAN, INF)],
    *[(f"mixers: fmix max_soft {soft}", partial(FMix, max_soft=soft), ValueError, r"`max_soft` must be in \[0, 0\.5\]")
      for soft in (-0.1, 0.6, NAN)],
    ("mixers: binarise an image without batch", lambda: binarise(torch.zeros(4, 4), 0.5), ValueError,
     r"`image` must have the shape \(N, H, W\), got \(4, 4\)"),
    ("mixers: binarise, too many shares", lambda: binarise(torch.zeros(3, 2, 2), torch.ones(2)), ValueError,
     r"`lam` must be 1 or 3 values, got 2"),
    ("mixers: paste partners of another size", lambda: paste_resized(IMAGES, IMAGES[..., :3], (0, 1, 0, 1)), ValueError,
     r"`partner_images` must have the shape of `images`, \(4, 3, 6, 6\), got \(4, 3, 6, 3\)"),
    ("mixers: means for too many channels", lambda: SaliencyMix(mean=(0,) * 3, std=(1,) * 3)(IMAGES[:, :1], TARGET),
     ValueError, r"`mean` and `std` must have 1 or 1 values each"),
    ("mixers: saliency of two channels", lambda: spectral_saliency(IMAGES[:, :2].byte()), ValueError,
     r"`images_uint8` must .*\(4, 2, 6, 6\)"),
    *[(f"mixers: gridmix {name} {value}", partial(GridMix, **{name: value}), (TypeError, ValueError), rf"`{name}` must")
      for name, value in (("columns", (0, 3)), ("columns", (2, 2.5)), ("columns", 3), ("area", (0.9, 0.5)),
                          ("area", (0, 2)), ("aspect", (0, 1)), ("aspect", (1, NAN)))],
    *[(f"mixers: smoothmix deviation {value}", partial(SmoothMix, deviation=value), (TypeError, ValueError),
       r"`deviation` must") for value in ((0, 1), (0.5, 0.2), "wide")],
    ("mixers: OneOf nothing", lambda: OneOf([]), TypeError, r"`mixers` must be a list of at least one mixer, got \[\]"),
    ("mixers: OneOf one mixer without list", lambda: OneOf(CutMix()), TypeError, r"`mixers` must be a list"),
    ("mixers: OneOf a name", lambda: OneOf(["cutmix"]), TypeError, r"`mixers` must be called as .*got 'cutmix'"),
    ("mixers: OneOf p negative", lambda: OneOf([CutMix()], [-0.5]), ValueError, r"`p` must be in \[0, 1\], got -0\.5"),
    ("mixers: OneOf per_sample", lambda: OneOf([CutMix()], per_sample="yes"), TypeError,
     r"`per_sample` must be True or"),
    # pictures
    ("pictures: no rows", lambda: example_batch(0, 5), ValueError,
     r"`height` must be at least 1, got 0"),
    ("pictures: too few titles", lambda: show_images(IMAGES, ["one"]), ValueError,
     r"`titles` must be 4, one for each image, got 1"),
    # ratio
    ("ratio: one row that would broadcast", lambda: VARIANTS["poster"].distance(LOGITS, LOGITS[:1]), ValueError,
     r"must have one shape \(N, D\)"),
    ("ratio: maps", lambda: check_encodings(IMAGES), ValueError,
     r"must have one shape \(N, D\), got \[\(4, 3, 6, 6\)\]"),
    *[(f"ratio: lam {lam}", partial(ratio_from_distances, lam, ONES, ONES), ValueError,
       r"`lam` must be in \[0, 1\], got values from") for lam in (-0.5, 2, NAN)],
    ("ratio: lam of another length", lambda: mix_ratio(LOGITS, LOGITS, LOGITS, ONES[:3]), ValueError,
     r"`lam` must be a number or have the shape \(4,\), got \(3,\)"),
    ("ratio: lam as a column", lambda: check_lam(ONES[:, None], ONES), ValueError,
     r"`lam` must be a number or have the shape \(4,\), got \(4, 1\)"),
    ("ratio: soft labels", lambda: check_labels(LOGITS, LOGITS), ValueError,
     r"SUMix needs class indices of the shape \(4,\) as labels, got \(4, 5\) torch\.float32"),
    ("ratio: labels as a list", lambda: check_labels([1, 2], LOGITS), ValueError, r"class indices .*got list"),
    # uncertainty
    ("uncertainty: no features", lambda: UncertaintyHead(0, 3), ValueError,
     r"`in_features`, `hidden` and `num_classes` must be integers of at least 1, got \(0, 3\)"),
    ("uncertainty: a float", lambda: UncertaintyHead(2.0, 3), ValueError, r"`in_features`.*must be integers"),
    ("uncertainty: hidden a number", lambda: UncertaintyHead(2, 3, 16), (TypeError, ValueError), r"`hidden`"),
    ("uncertainty: feature maps", lambda: UncertaintyHead(6, 3)(IMAGES), ValueError,
     r"`features` must have the shape \(N, 6\), got \(4, 3, 6, 6\)"),
    # models
    *[(f"models: {c!r} classes", partial(get_model, "resnet18", c), (TypeError, ValueError),
       r"`c` must be (a whole number|at least 1), got") for c in (0, -1, 2.0, "10")],
    ("models: no width", lambda: get_model("resnet18", 10, width=0), ValueError,
     r"`width` must be at least 1, got 0"),
    ("models: layer of another network", lambda: find_classifier(NET, nn.Linear(1, 1)), ValueError,
     r"`layer` must be one of the linear layers"),
    ("models: layer of another kind", lambda: find_classifier(NET, NET[0]), ValueError,
     r"`layer` must be one of the linear layers .*Flatten"),
    ("models: layer that is not last", lambda: logits_and_features(nn.Sequential(*NET, nn.Linear(5, 7)), IMAGES, "1"),
     ValueError, r"does not make the logits of the network: .*`layer`"),
    # loss
    ("loss: infinite xi", lambda: loss(xi=INF), ValueError, r"`xi` must"),
    ("loss: xi a string", lambda: loss(xi="much"), (TypeError, ValueError), r"`xi` must"),
    ("loss: head of other classes", lambda: loss(LOGITS, LOGITS, LOGITS[:, :3], LOGITS[:, :2]), ValueError,
     r"must have one shape \(N, D\)"),
    ("loss: head of one output that would broadcast",
     lambda: loss(LOGITS, LOGITS, *[LOGITS[:, :1]] * 2, variant="released"),
     ValueError, r"must have (one|the) shape"),
    ("loss: clean logits of another batch", lambda: loss(LOGITS, LOGITS[:2]), ValueError,
     r"must have one shape \(N, D\), got \[\(4, 5\), \(2, 5\)\]"),
    ("loss: released with encodings", lambda: loss(variant="released", encodings=(LOGITS, LOGITS)), ValueError,
     r"`encodings` must be None for variant=\"released\""),
    ("loss: encodings of different sizes", lambda: loss(encodings=(LOGITS, LOGITS[:, :2])), ValueError,
     r"must have one shape \(N, D\)"),
    ("loss: encodings of another batch", lambda: loss(encodings=(LOGITS[:2], LOGITS[:2])), ValueError,
     r"must have|`encodings`"),
    ("loss: record of another batch", lambda: sumix_loss(LOGITS[:2], LOGITS[:2], None, None, RECORD), ValueError,
     r"class indices of the shape \(2,\)"),
    ("loss: module, negative xi", lambda: SUMixLoss(UncertaintyHead(2, 3), xi=-0.1), ValueError,
     r"`xi` must .*, got -0\.1"),
    ("loss: not reduced", lambda: mixed_loss(nn.CrossEntropyLoss(reduction="none"), LOGITS, LOGITS, TARGET, TARGET,
                                             0.5), ValueError, r"`loss_func` must reduce by mean or sum, got 'none'"),
    ("loss: one number in all", lambda: per_sample_loss(one_number, LOGITS, TARGET), ValueError,
     r"`loss_func` must give one loss per sample, got 1 for 4"),
    ("loss: MCE, lam outside", lambda: mixed_cross_entropy(LOGITS, TARGET, TARGET, 1.5), ValueError,
     r"`lam` must be in \[0, 1\]"),
    # callback
    ("callback: mixer not callable", lambda: Mix(0.5), TypeError,
     r"`mixer` must be an object that is called, e\.g\. CutMix\(\), got 0\.5"),
    ("callback: negative xi", lambda: SUMix(CutMix(), xi=-1), ValueError, r"`xi` must .*, got -1"),
    ("callback: z", lambda: SUMix(CutMix(), z="pixels"), ValueError,
     r"`z` must be one of .*got 'pixels'"),
    ("callback: z of released", lambda: SUMix(CutMix(), z="features", variant="released"), ValueError,
     r'`z` must be "logits" for variant="released"'),
    ("callback: hidden a number", lambda: SUMix(CutMix(), hidden=16), (TypeError, ValueError), r"`hidden` must"),
    ("callback: hidden of 0", lambda: train(SUMix(CutMix(), hidden=(0,))), ValueError, r"`hidden`.*at least 1"),
    *[(f"callback: keep {keep!r}", partial(Mix, CutMix(), keep=keep), (TypeError, ValueError), r"`keep` must")
      for keep in (0, -1, 2.5, "all")],
    *[(f"callback: seed {seed!r}", partial(Mix, CutMix(), seed=seed), (TypeError, ValueError), r"`seed` must")
      for seed in (1.5, "a")],
    *[(f"callback: off_after {value!r}", partial(Mix, CutMix(), off_after=value), (TypeError, ValueError),
       r"`off_after` must") for value in (-0.1, 1.5, NAN, "late")],
    ("callback: an empty list", lambda: Mix([]), TypeError, r"`mixers` must be a list of at least one mixer"),
    ("callback: a list of classes", lambda: SUMix([CutMix]), TypeError, r"`mixer` must be an object"),
    ("callback: mixer returns something else", lambda: train(Mix(lambda images, target, model, generator: images)),
     TypeError, r"`mixer` must return a Mixed, got Tensor"),
    ("callback: two inputs", lambda: train(Mix(CutMix()), TwoInputs(), pairs=[(IMAGES[0], IMAGES[0], TARGET[0])] * 4,
                                           n_inp=2), ValueError,
     r"batches must be one tensor of images and one of labels, got 2 inputs and 1 targets"),
    ("callback: two targets", lambda: train(Mix(CutMix()), loss_func=lambda x, a, b: F.cross_entropy(x, a),
                                            pairs=[(IMAGES[0], TARGET[0], TARGET[0])] * 4, n_inp=1), ValueError,
     r"got 1 inputs and 2 targets"),
    ("callback: nothing was mixed", lambda: Mix(CutMix()).plot_ratio(), ValueError,
     r"nothing was mixed yet: `fit` first"),
    ("callback: nothing to show", lambda: SUMix(CutMix()).show_mixed(), ValueError,
     r"nothing to show yet: `fit` first"),
]


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_bad_input_is_refused_with_the_argument_and_the_rule(call, error, message):
    with pytest.raises(error) as raised: call()
    assert re.search(message, str(raised.value), re.DOTALL), f"{type(raised.value).__name__}: {raised.value}"


def test_the_table_covers_every_module():
    assert {case[0].split(":")[0] for case in CASES} == {"data", "mixers", "pictures", "ratio", "uncertainty", "models",
                                                         "loss", "callback"}
    assert len(CASES) >= 30 and len({case[0] for case in CASES}) == len(CASES)
