"Small loaders, networks and Learners, a mixer without chance, and callbacks that watch"
from functools import partial
from types import SimpleNamespace

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F

from sumix_nb.data.loaders import get_dls
from sumix_nb.mixers.mixed import Mixed
from sumix_nb.sumix.callback import TRAINING, SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.sumix.step import HEAD_NAME

N, K = 24, 4
KINDS = {"Mix": Mix, **{f"SUMix {clean}": partial(SUMix, clean=clean) for clean in TRAINING}}
EIGHTHS = [6, 1, 8, 3, 0, 5, 7, 2]
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


def make_dls(n=N, bs=8, k=K, size=6, soft=False, plain=False, target=None):
    "Loaders of random images, with random targets by default, in a fixed order; the last batch may be short"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator)
    if soft: target = torch.randint(2, (n, k), generator=generator).float()
    elif target is None: target = torch.randint(k, (n,), generator=generator)
    pairs = list(zip(images, target, strict=True))
    if plain: return DataLoaders(*(torch.utils.data.DataLoader(part, bs) for part in (pairs, pairs[:12])))
    return DataLoaders(DataLoader(pairs, bs=bs, num_workers=0), DataLoader(pairs[:12], bs=8, num_workers=0),
                       device=torch.device("cpu"))


def digits(bs=16, limit=48, **kwargs): return get_dls("digits", size=16, bs=bs, limit=limit, device="cpu", **kwargs)


def with_bn(k=K, norm=True):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *norms, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, k))


def without_bn(k=K): return with_bn(k, norm=False)


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
    "A mixer without chance: neighbours 2i and 2i + 1 are mixed by the given eighths"
    def __init__(self, eighths=EIGHTHS): self.eighths = eighths
    def __call__(self, images, target, *, model=None, generator=None):
        n = len(images)
        partner = torch.arange(n) ^ 1
        if n % 2: partner[-1] = n - 1
        lam = torch.tensor([self.eighths[i % len(self.eighths)] for i in range(n)]) / 8
        share = lam.view(-1, 1, 1, 1).to(images)
        return Mixed(share * images + (1 - share) * images[partner], target, target[partner], lam, partner)


class Spy(Callback):
    "Keeps what each training batch looked like after the callback under test, and the parts of SUMix's loss"
    order, run_valid = 8, False
    def before_fit(self): self.batches, self.gradients = [], []
    def before_batch(self): self.seen = self.learn.xb[0].detach().clone()
    def after_loss(self):
        learn, mix = self.learn, next((cb for cb in self.learn.cbs if isinstance(cb, Mix)), None)
        self.batches.append(SimpleNamespace(xb=self.seen, pred=learn.pred.detach().clone(), y=learn.yb[0].clone(),
                                            loss=learn.loss.clone(), loss_grad=learn.loss_grad.detach().clone(),
                                            mixed=mix and mix.mixed, terms=getattr(mix, "terms", None)))
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


def mix_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, Mix))
def head_of(learn): return getattr(learn.sumix.passes.classifier, HEAD_NAME, None)
def weights(model): return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one: torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


def times_in_optimizer(learn, module):
    counts = [sum(p is q for group in learn.opt.param_lists for q in group) for p in module.parameters()]
    assert len(set(counts)) == 1
    return counts[0]


def released_label(ratio, lam):
    "One label for all that is mixed, by a loop"
    mixtures = [float(ratio[i]) for i in range(len(ratio)) if 0 < lam[i] < 1]
    return torch.tensor([sum(mixtures) / len(mixtures) if 0 < share < 1 else float(share) for share in lam])
