"""Train with SUMix on scenes, and measure how its labels err when what is known of the clean images is some epochs old

Each run leaves a record with `evidence_age`: a list over the epochs of variant -> age in epochs (or "means", of the
class means; or "area", the label without evidence) -> mean error of the label. Runs that have a record are left out.
"""
import torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
from torchvision.transforms.functional import normalize

from sumix_nb import RULES, CutMix, Evidence
from sumix_nb.data.scenes import scenes
from sumix_nb.data.sources import HARD, SOURCES
from sumix_nb.evaluation.label_errors import LabelErrorLog
from sumix_nb.evaluation.label_rules import class_means, seen_by
from sumix_nb.evaluation.mismatch import true_ratio, visible_objects
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import unrecorded, write_record
from sumix_nb.training.train import make_learner, train

DATA, AGES, VARIANTS = "hard_scenes", (0, 1, 2, 4, 8), ("poster", "corrected")


class AgeLog(Callback):
    "Error of the labels before training and after each epoch, by the age of the clean logits, in `epochs`"
    order = LabelErrorLog.order

    def __init__(self, data, mean, std, bs=100):
        self.images, self.data, self.bs = normalize(data.images / 255, mean, std), data, bs
        self.clean, self.epochs = [], []

    def before_fit(self): self.measure()

    def after_epoch(self): self.measure()

    @torch.no_grad()
    def measure(self):
        "Remember today's clean logits, and label the same mixtures by what is known from each age"
        model, target = self.learn.model, self.data.target
        training, draws = model.training, torch.Generator().manual_seed(0)
        model.eval()
        self.clean.append(torch.cat([seen_by(model, part)[0] for part in self.images.split(self.bs)]))
        known = {str(age): self.clean[-1 - age] for age in AGES if age < len(self.clean)}
        known["means"] = class_means(known["0"], target)[target]
        gaps = {variant: {name: [] for name in ("area", *known)} for variant in VARIANTS}
        for rows in torch.arange(len(target)).split(self.bs):
            mixed, *seen = visible_objects(CutMix(per_sample=True), self.images[rows], target[rows],
                                           self.data.masks[rows], generator=draws)
            truth = true_ratio(*seen).masked_fill(mixed.target_a == mixed.target_b, torch.nan)
            evidence = Evidence(mixed, seen_by(model, mixed.images)[0])
            for variant, found in gaps.items():
                for name, logits in known.items():
                    share = RULES[variant](evidence._replace(clean_logits=logits[rows]))
                    found[name].append((share - truth).abs())
                found["area"].append((mixed.lam - truth).abs())
        model.train(training)
        self.epochs.append({variant: {name: torch.cat(parts).nanmean().item() for name, parts in found.items()}
                            for variant, found in gaps.items()})


@call_parse
def main(
    out:str="results/evidence_age", # Folder of the records
    seeds:int=3, # Seeds
    epochs:int=12, # Epochs of each run
    images:int=1000, # New images to mix
    limit:int=None, # Images to train with; all by default
    threads:int=1, # Threads of PyTorch
):
    "Train and measure"
    torch.set_num_threads(threads)
    source, data = SOURCES[DATA], scenes(images, seed=2, **HARD)
    runs = [Recipe(data=DATA, epochs=epochs, limit=limit, precision="bf16", validate_every=4, seed=seed, mixer="cutmix",
                   per_sample=True, p=0.5, method="sumix", variant="corrected", clean="eval") for seed in range(seeds)]
    for recipe in unrecorded(runs, out):
        learn = make_learner(recipe, device="cpu")
        log = AgeLog(data, source.mean, source.std)
        learn.add_cb(log)
        record = train(recipe, learn=learn, progress=False)
        print(write_record(record | {"evidence_age": log.epochs}, out), flush=True)
