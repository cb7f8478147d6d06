"""Time a training step with each rule for the label, and with each origin of SUMix's clean logits, in `make bench`

Everything is as in `bench_sumix.py`. What is remembered is refreshed in one of four steps, so an epoch has a multiple
of four; at width 16 it has twelve, since so short a step is timed well only as the mean of many.
"""
from bench import conditions, goal_ratios
from bench_sumix import N, measure_steps, print_goals, ratios_to
from fastcore.script import call_parse

from sumix_nb.labels import RULES
from sumix_nb.sumix.evidence import CLEAN
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import write_record
from sumix_nb.training.train import make_learner

SUMIX = "CutMix + SUMix, {}"
STEPS = {16: 12, 64: 4}  # width -> steps of an epoch
GOALS = [(SUMIX.format(clean), "CutMix", most) for clean, most in (("eval", 1.24), ("means", 1.05), ("bank", 1.05))]


def learners(width, steps, precision):
    "A `Learner` for CutMix, for each rule of its label, and for SUMix with each origin of its clean logits"
    options = {"CutMix": {}} | {f"CutMix, {rule}": {"label_rule": rule} for rule in RULES if rule != "area"}
    options |= {SUMIX.format(clean): {"method": "sumix", "clean": clean} for clean in CLEAN}
    for rule in ("oracle", "oracle_relative"): options[f"CutMix, {rule}"]["data"] = "scenes"  # they have masks
    shared = {"mixer": "cutmix", "per_sample": True, "width": width, "limit": (steps * N, N), "precision": precision}
    return {name: make_learner(Recipe(**shared, **option), device="cpu") for name, option in options.items()}


@call_parse
def main(
    rounds:int=7, # Rounds, of which the median is taken
    threads:int=2, # Threads of PyTorch
    precision:str="bf16", # Number format; "fp32" where a processor has no instructions for bf16
    out:str=None, # Folder for a record
):
    "Time the steps, and print their ratios to a step of CutMix labelled by the area"
    if rounds < 3: raise SystemExit("bench: medians need at least 3 `--rounds`")
    where, parts = conditions(threads, ("torch", "torchvision", "fastai")), {}
    for width, steps in STEPS.items():
        print(f"\nlabels, steps of a ResNet-18 of width {width}, {N} x 3 x 32 x 32, {precision}, {rounds} rounds")
        seconds = measure_steps(learners(width, steps, precision), rounds)
        parts[f"width {width}"] = {"methods": ratios_to(seconds, lambda name: "CutMix"),
                                   "goals": goal_ratios(seconds, GOALS)}
    print_goals(parts)
    record = {'name': 'labels', 'rounds': rounds, 'precision': precision, **where, **parts}
    if out: print(f"\n{write_record(record, out)}")
