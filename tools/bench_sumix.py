"""Time the loss of SUMix against the released arithmetic in loops, and whole steps against CutMix's, in `make bench`

As in `bench.py` a ratio is the median over rounds of two times of the same round, and the methods take turns in random
order. A step is one of a fastai `Learner` with our callbacks: augmentation, mixing, passes, loss, backward, optimiser.
"""
from functools import partial

import torch
from bench import conditions, goal_line, goal_ratios, measure, median_ratio, summary, take_turns
from fastcore.script import call_parse
from torch.nn import functional as F

from sumix_nb.sumix.loss import sumix_loss
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.ratio import VARIANTS
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import write_record
from sumix_nb.training.train import make_learner

N, CLASSES = 100, 100
LOOPS = "released arithmetic, in loops"
# what is to be reached: a method, what it is compared with, and the ratio it should not exceed
LOSS_GOALS = [(f"sumix_loss, {variant}", LOOPS, 1 / 3) for variant in VARIANTS]
HALF = "CutMix at p 0.5"
STEP_GOALS = [("CutMix + SUMix, no_grad", "CutMix", 1.36), ("CutMix + SUMix, concat", "CutMix", 2.0),
              (f"{HALF} + SUMix", HALF, 1.18), ("AutoMix", "plain", 3.0), ("AdAutoMix", "plain", 5.0)]


def loops_loss(logits_mixed, logits, head_mixed, head, mixed, xi=0.5):
    "The loss as the released code computes it, sample by sample"
    n, lam = len(logits), mixed.lam[0].item()
    with torch.no_grad():
        probs, probs_mixed = logits.softmax(1), logits_mixed.softmax(1)
        sources = [probs.clone(), probs[mixed.partner].clone()]
        for i in range(n):
            sources[0][i, mixed.target_b[i]] = 0
            sources[1][i, mixed.target_a[i]] = 0
        alphas = [n * F.normalize((probs_mixed - source).softmax(1), dim=1) for source in sources]
        ratio = torch.zeros(n)
        for i in range(n):
            part_a = lam * torch.exp(-alphas[0][i, mixed.target_a[i]])
            part_b = (1 - lam) * torch.exp(-alphas[1][i, mixed.target_b[i]])
            ratio[i] = part_a / (part_a + part_b)
    u, u_mixed = (F.normalize(values.softmax(1), dim=1) for values in (head, head_mixed))
    inputs = [torch.exp(-(source + u_mixed + alpha)) for source, alpha in zip((u, u[mixed.partner]), alphas)]
    ce_a, ce_b = (F.cross_entropy(logits_mixed, target) for target in (mixed.target_a, mixed.target_b))
    regulariser = (lam * F.cross_entropy(inputs[0], mixed.target_a)
                   + (1 - lam) * F.cross_entropy(inputs[1], mixed.target_b))
    return (ce_a * ratio + ce_b * (1 - ratio)).mean() + xi * regulariser


def losses():
    "Forward and backward of each loss as a function without arguments, after a check that two of them agree"
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(N, CLASSES, generator=generator).requires_grad_() for _ in range(4)]
    target = torch.randint(CLASSES, (N,), generator=generator)
    mixed = CutMix()(torch.randn(N, 3, 4, 4), target, generator=generator)
    torch.testing.assert_close(sumix_loss(*logits, mixed, variant="released").loss, loops_loss(*logits, mixed))

    def both_ways(loss):
        for values in logits: values.grad = None
        loss(*logits, mixed).backward()

    ours = {f"sumix_loss, {variant}": lambda *args, v=variant: sumix_loss(*args, variant=v).loss
            for variant in VARIANTS}
    return {name: partial(both_ways, loss) for name, loss in (ours | {LOOPS: loops_loss}).items()}


def learners(precision, width):
    "A `Learner` for each way to train on batches of 100 x 3 x 32 x 32"
    options = {"CutMix": {"method": "mce"}, "CutMix + clean loss": {"method": "mce_clean"}}
    options |= {f"CutMix + SUMix, {clean}": {"method": "sumix", "clean": clean}
                for clean in ("no_grad", "concat", "separate")}
    options |= {HALF: {"p": 0.5}, f"{HALF} + SUMix": {"p": 0.5, "method": "sumix"}}
    options |= {"plain": {"mixer": "none"}, "AutoMix": {"mixer": "automix"}, "AdAutoMix": {"mixer": "adautomix"}}
    options |= {"AutoMix + SUMix": {"mixer": "automix", "method": "sumix"}}
    shared = {"mixer": "cutmix", "width": width, "limit": 2 * N, "precision": precision}
    return {name: make_learner(Recipe(**shared | option), device="cpu") for name, option in options.items()}


def base_of(name):
    "What a step is compared with: plain training for a mixer that learns, else CutMix"
    if "AutoMix" in name or name == "plain": return "plain"
    return HALF if name.startswith(HALF) else "CutMix"


def step_seconds(learn, epochs=1):
    "Seconds of one training step, mean over epochs; what is remembered is filled in an epoch before"
    remembers = any(getattr(getattr(cb, "passes", None), "memories", None) for cb in learn.cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs + remembers, lr=1e-3)
    return sum(epoch["seconds"] for epoch in learn.epoch_log.epochs[-epochs:]) / (epochs * len(learn.dls.train))


def ratios_to(seconds, base):
    "Milliseconds of each method and its ratio to the one that `base` names for it, printed and returned"
    ratios = {name: round(median_ratio(seconds, name, base(name)), 3) for name in seconds}
    methods = {name: found | {"ratio": ratios[name]} for name, found in summary(seconds).items()}
    for name, found in methods.items():
        print(f"  {name:<36}{found['ms']:>10.1f} ms{found['ratio']:>8.2f} x {base(name)}")
    return methods


def measure_steps(found, rounds):
    "Seconds of a step of each `Learner` in each round"
    for learn in found.values(): step_seconds(learn)  # warms up
    # with p 0.5 a coin decides whether a step mixes: both arms throw the same ones, and eight epochs even them out
    return take_turns({name: partial(step_seconds, learn, 8 if name.startswith(HALF) else 1)
                       for name, learn in found.items()}, rounds)


def print_goals(parts):
    "The goals of each part, and whether they are met"
    print("\ngoals")
    for part, found in parts.items():
        for goal in found["goals"]: print(f"  {part:<12}{goal_line(goal)}")


@call_parse
def main(
    rounds:int=31, # Rounds of the losses, of which the median is taken
    step_rounds:int=7, # Rounds of the steps
    width:int=64, # Channels of the first stage of the ResNet-18
    threads:int=2, # Threads of PyTorch
    out:str=None, # Folder for a record
):
    "Time the loss and the steps of SUMix in one run, and print the ratios"
    if rounds < 15 or step_rounds < 3: raise SystemExit("bench: medians need at least 15 `--rounds`, 3 `--step-rounds`")
    where = conditions(threads, ("torch", "torchvision", "fastai"))
    print(f"\nlosses, {N} x {CLASSES}, forward and backward, median of {rounds} rounds")
    seconds = measure(losses(), rounds)
    parts = {"loss": {"methods": summary(seconds), "goals": goal_ratios(seconds, LOSS_GOALS)}}
    for precision in ("fp32", "bf16"):
        print(f"\nsteps of a ResNet-18 of width {width}, {N} x 3 x 32 x 32, {precision}, {step_rounds} rounds")
        seconds = measure_steps(learners(precision, width), step_rounds)
        methods = ratios_to(seconds, base_of)
        parts[precision] = {"methods": methods, "goals": goal_ratios(seconds, STEP_GOALS)}
    print_goals(parts)
    if out:
        record = {"name": "sumix", "rounds": rounds, "step_rounds": step_rounds, "width": width, **where, **parts}
        print(f"\n{write_record(record, out)}")
