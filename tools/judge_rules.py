"""Train networks in three ways on scenes, and judge the labels of every rule before training and after each epoch

Each run leaves a record with `rule_errors`: a list over the epochs of mixer -> rule -> measures, as of `RuleErrorLog`.
Runs that have a record are left out, so the command goes on where it was stopped.
"""
import torch
from fastcore.script import call_parse

from sumix_nb.data.scenes import scenes
from sumix_nb.data.sources import HARD, SOURCES
from sumix_nb.evaluation.label_rules import RuleErrorLog
from sumix_nb.studies.label_errors import label_mixers
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import unrecorded, write_record
from sumix_nb.training.train import make_learner, train

DATA, SHARED = "hard_scenes", {"per_sample": True, "p": 0.5}
WAYS = {"plain": {}, "CutMix": {"mixer": "cutmix", **SHARED},
        "SUMix": {"mixer": "cutmix", "method": "sumix", "variant": "corrected", "clean": "eval", **SHARED}}


def runs(seeds, epochs=12, limit=None):
    "The recipes, a seed after the other"
    return [Recipe(data=DATA, epochs=epochs, limit=limit, precision="bf16", validate_every=4, seed=seed, **options)
            for seed in range(seeds) for options in WAYS.values()]


@call_parse
def main(
    out:str="results/rule_errors", # Folder of the records
    seeds:int=3, # Seeds of each way to train
    images:int=1000, # New images to mix, of each mixer
    threads:int=1, # Threads of PyTorch
):
    "Train and judge"
    torch.set_num_threads(threads)
    source, data = SOURCES[DATA], scenes(images, seed=2, **HARD)
    for recipe in unrecorded(runs(seeds), out):
        learn = make_learner(recipe, device="cpu")
        log = RuleErrorLog(data, label_mixers(source), mean=source.mean, std=source.std)
        learn.add_cb(log)
        record = train(recipe, learn=learn, progress=False)
        print(write_record(record | {"rule_errors": log.epochs}, out), flush=True)
