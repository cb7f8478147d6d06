"""Let networks that were trained on CIFAR-100 judge the labels of every rule on photographs whose objects are known

For each file of weights whose training has a record, that record is written again with `rule_errors`: mixer -> rule ->
measures, over mixtures of CIFAR-100's photographs on white in six orders, and `judged`, the commit that measured.
"""
import json
from pathlib import Path

import torch
from fastcore.script import call_parse

from sumix_nb.data.sources import SOURCES
from sumix_nb.evaluation.label_rules import Judged, judge, rule_errors
from sumix_nb.studies.label_errors import label_mixers
from sumix_nb.studies.photographs import cifar100_objects
from sumix_nb.training.records import git_commit, write_record
from sumix_nb.training.weights import trained_model

ORDERS = 6  # How often the photographs are mixed with each other


def judged_in_orders(model, data, mixer, **facts):
    "All that `judge` finds in several orders of the images, together"
    shares, *others = zip(*(judge(model, data, mixer, bs=len(data), seed=seed, **facts) for seed in range(ORDERS)))
    return Judged({rule: torch.cat([share[rule] for share in shares]) for rule in shares[0]},
                  *(torch.cat(other, 1) for other in others))


@call_parse
def main(
    weights:str, # Folder of the networks, from `sumix_grid --weights`
    records:str, # Folder of their records
    out:str="results/rule_photographs", # Folder of what is found
    data_dir:str=None, # Folder of CIFAR-100; else $SUMIX_DATA/cifar100
    threads:int=1, # Threads of PyTorch
):
    "Judge"
    torch.set_num_threads(threads)
    data, source = cifar100_objects(data_dir), SOURCES["cifar100"]
    for file in sorted(Path(weights).glob("*.safetensors")):
        told = Path(records, f"{file.stem}.json")
        if not told.is_file(): continue
        _, model = trained_model(file)
        found = {name: rule_errors(judged_in_orders(model, data, mixer, mean=source.mean, std=source.std))
                 for name, mixer in label_mixers(source).items()}
        record = json.loads(told.read_text()) | {"rule_errors": found, "judged": git_commit()}
        print(write_record(record, out), flush=True)
