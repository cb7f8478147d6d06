"""Time our mixers against torchvision's, timm's and fastai's in one run, all in turn: what `make bench` does

A ratio is the median over all rounds of the two times measured in the same round, so that a busy moment hits both. In
each round the methods take turns in a new order, and a turn lasts at least two milliseconds.
Whoever mixes in place gets a fresh copy of the batch. Making the labels is included: torchvision and timm return soft
labels, fastai and we return both labels.
"""
import math
import os
import platform
import random
import statistics
import time
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import torch
from fastai.callback import mixup as fastai_mixup
from fastcore.script import call_parse
from timm.data.mixup import Mixup
from torchvision.transforms import v2

from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.fmix import FMix
from sumix_nb.mixers.gridmix import GridMix, SmoothMix
from sumix_nb.mixers.mixed import MixUp
from sumix_nb.mixers.puzzlemix import PuzzleMix
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.mixers.saliencymix import SaliencyMix
from sumix_nb.mixers.cutmix import box_mask, mixing_box
from sumix_nb.mixers.mixed import blend_, sample_lam, sample_partner, take_images
from sumix_nb.mixers.gridmix import grid_lines
from sumix_nb.mixers.resizemix import shrink
from sumix_nb.mixers.saliency import fine_grained_saliency, to_uint8
from sumix_nb.training.records import git_commit, write_record

SIZES = ((100, 3, 32, 32), (32, 3, 224, 224))
CLASSES = 100
OURS = (MixUp, CutMix, FMix, ResizeMix, SaliencyMix, GridMix, SmoothMix)
TV_MIXUP, TV_CUTMIX = "torchvision MixUp", "torchvision CutMix"
# what is to be reached: a method, what it is compared with, and the ratio it should not exceed
GOALS = [("MixUp", TV_MIXUP, 0.8), ("CutMix", TV_CUTMIX, 0.8), ("MixUp per sample", "MixUp", 1.3),
         ("CutMix per sample", "CutMix", 1.3), ("MixUp per sample", "timm MixUp per sample", 0.25),
         ("CutMix per sample", "timm CutMix per sample", 0.25), ("FMix", TV_CUTMIX, 1.5), ("ResizeMix", TV_CUTMIX, 1.5),
         ("GridMix", TV_CUTMIX, 1.5), ("SaliencyMix", TV_CUTMIX, 2.5), ("PuzzleMix 4 x 4", TV_MIXUP, 12),
         ("PuzzleMix 8 x 8", TV_MIXUP, 60)]
ONLY_SMALL = {"SaliencyMix", "PuzzleMix 4 x 4", "PuzzleMix 8 x 8"}  # whose goals are for 32 pixels


def timm_mixer(cutmix, mode):
    "timm's `Mixup`, which writes to its batch, as a function"
    mixer = Mixup(mixup_alpha=0.0 if cutmix else 1.0, cutmix_alpha=float(cutmix), mode=mode, num_classes=CLASSES)
    return lambda images, target: mixer(images.clone(), target)


def fastai_step(callback, copy):
    "The mixing step of one of fastai's callbacks, on a stand-in for a `Learner`"
    def step(images, target):
        images = images.clone() if copy else images
        callback.learn = SimpleNamespace(x=images, y=target, xb=(images,), yb=(target,))
        callback.stack_y = True
        callback.before_batch()
    return step


def methods(images, target):
    "Every method as a function without arguments"
    generator = torch.Generator().manual_seed(0)
    peers = {TV_MIXUP: v2.MixUp(alpha=1.0, num_classes=CLASSES), TV_CUTMIX: v2.CutMix(alpha=1.0, num_classes=CLASSES),
             "timm MixUp": timm_mixer(False, "batch"), "timm CutMix": timm_mixer(True, "batch"),
             "timm MixUp per sample": timm_mixer(False, "elem"), "timm CutMix per sample": timm_mixer(True, "elem"),
             "fastai MixUp": fastai_step(fastai_mixup.MixUp(1.0), copy=False),
             "fastai CutMix": fastai_step(fastai_mixup.CutMix(1.0), copy=True)}
    ours = {mixer.__name__ + " per sample" * per_sample: partial(mixer(per_sample=per_sample), generator=generator)
            for mixer in OURS for per_sample in (False, True)}
    saliency = images.square().mean(1)  # the pass of a network that makes it is not timed
    ours |= {f"PuzzleMix {b} x {b}": partial(PuzzleMix(blocks=(b,)), generator=generator, saliency=saliency)
             for b in (4, 8)}
    return {name: partial(method, images, target) for name, method in (peers | ours).items()}


def parts(images, target):
    "Steps of our mixers as functions without arguments, and a plain copy of the batch"
    (n, _, height, width), generator = images.shape, torch.Generator().manual_seed(0)
    partner, others = sample_partner(n, generator), images.clone()
    lam, row, col = torch.rand(n, dtype=torch.float64), torch.randint(height, (n,)), torch.randint(width, (n,))
    box = mixing_box(lam, height, width, (row, col))
    half, place = torch.tensor([0.5], dtype=torch.float64), torch.rand(1, 2, dtype=torch.float64)
    mask = box_mask(box, height, width)
    return {"copy of the batch": images.clone, "draw N shares": lambda: sample_lam(1.0, n, generator),
            "N boxes": lambda: mixing_box(lam, height, width, (row, col)),
            "N masks": lambda: box_mask(box, height, width), "fetch partners": lambda: take_images(images, partner),
            "shrink to half the sides": lambda: shrink(images, (0, height // 2, 0, width // 2), "nearest"),
            "one grid": lambda: grid_lines(half, height, width, torch.tensor([4]), half, half, place),
            "one saliency map": lambda: fine_grained_saliency(to_uint8(images[:1])),
            "blend, one weight per image": lambda: blend_(others, images, mask[..., :1, :1]),
            "blend, one weight per pixel": lambda: blend_(others, images, mask)}


def seconds_of(function, calls):
    "Mean seconds of one of some calls in a row"
    start = time.perf_counter()
    for _ in range(calls): function()
    return (time.perf_counter() - start) / calls


def take_turns(clocks, rounds):
    "What each clock, a function that returns seconds, says in each round; all take their turn in a new order"
    order, seconds = random.Random(0), {name: [] for name in clocks}
    for _ in range(rounds):
        for name in order.sample(list(clocks), len(clocks)): seconds[name].append(clocks[name]())
    return seconds


def measure(functions, rounds, turn=2e-3):
    "Seconds of each function in each round, each called as often in a turn as fills `turn`"
    for function in functions.values(): seconds_of(function, 3)  # warms up
    calls = {name: math.ceil(turn / seconds_of(function, 3)) for name, function in functions.items()}
    return take_turns({name: partial(seconds_of, functions[name], calls[name]) for name in functions}, rounds)


def median_ratio(seconds, name, base):
    "Median over rounds of how many times longer `name` took than `base`"
    return statistics.median(one / two for one, two in zip(seconds[name], seconds[base], strict=True))


def summary(seconds):
    "Median milliseconds of each method, and its ratios to torchvision's two"
    bases = [base for base in (TV_MIXUP, TV_CUTMIX) if base in seconds]
    return {name: {"ms": round(1e3 * statistics.median(times), 4),
                   "ratios": {base: round(median_ratio(seconds, name, base), 3) for base in bases}}
            for name, times in seconds.items()}


def goal_ratios(seconds, goals):
    "The measured ratio of each goal, beside what it should not exceed"
    return [{"method": name, "base": base, "most": round(most, 3), "ratio": round(median_ratio(seconds, name, base), 3)}
            for name, base, most in goals]


def goal_line(goal):
    "A goal and its ratio as a line of text"
    sign = "<=" if goal["ratio"] <= goal["most"] else "> "
    return f"  {goal['method']:<28}/ {goal['base']:<32}{goal['ratio']:>6.2f}  {sign} {goal['most']}"


def conditions(threads, packages):
    "Sets the threads, warns of a busy machine, and returns what a record has to say of machine and versions"
    load = os.getloadavg()[0]
    if load > 0.5: print(f"the machine is busy (load {load:.1f}): ratios will be rough")
    torch.set_num_threads(threads)
    return {"device": f"cpu, {threads} threads", "load": load, "commit": git_commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}}}


def batch(shape):
    "A batch of random images and classes"
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), torch.randint(CLASSES, shape[:1], generator=generator)


def scaling(shapes, rounds):
    "Median milliseconds of our mixers and torchvision's CutMix for each shape"
    wanted = (*(mixer.__name__ for mixer in OURS), TV_CUTMIX)
    rows = []
    for shape in shapes:
        functions = methods(*batch(shape))
        seconds = measure({name: functions[name] for name in wanted}, rounds)
        rows.append({"shape": list(shape), "ms": {name: found["ms"] for name, found in summary(seconds).items()}})
    return rows


@call_parse
def main(
    rounds:int=31, # Rounds, of which the median is taken
    threads:int=2, # Threads of PyTorch
    out:str=None, # Folder for a record
):
    "Time all mixers and their peers in one run, and print the ratios"
    if rounds < 15: raise SystemExit("bench: `--rounds` must be at least 15 for a median to mean something")
    where = conditions(threads, ("torch", "torchvision", "timm", "fastai"))
    torch.manual_seed(0)
    sizes, goals = {}, []
    for shape in SIZES:
        label = " x ".join(map(str, shape))
        seconds = measure(methods(*batch(shape)), rounds)
        sizes[label] = {"methods": summary(seconds), "parts": summary(measure(parts(*batch(shape)), rounds))}
        print(f"\n{label}, median of {rounds} rounds{'ms':>25}{'x tv MixUp':>14}{'x tv CutMix':>14}")
        for name, found in sizes[label]["methods"].items():
            ratios = "".join(f"{ratio:>14.2f}" for ratio in found["ratios"].values())
            print(f"  {name:<54}{found['ms']:>10.3f}{ratios}")
        wanted = [goal for goal in GOALS if shape == SIZES[0] or goal[0] not in ONLY_SMALL]
        goals += [{"size": label} | goal for goal in goal_ratios(seconds, wanted)]
    print("\ngoals")
    for goal in goals: print(f"  {goal['size']:<20}{goal_line(goal)}")
    by_batch = scaling([(n, 3, 32, 32) for n in (8, 32, 128, 512)], rounds)
    by_side = scaling([(32, 3, side, side) for side in (32, 64, 128, 224)], rounds)
    if out:
        record = {"name": "mixers", "rounds": rounds, **where, "sizes": sizes, "goals": goals, "by_batch": by_batch,
                  "by_side": by_side}
        print(f"\n{write_record(record, out)}")
