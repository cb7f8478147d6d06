"""What `make demo` does: short trainings with one seed, a table, a figure, and what longer trainings have found"""
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from fastcore.script import call_parse

from sumix_nb import CutMix, Recipe, load_records, make_learner, runs_frame, train
from sumix_nb.data.scenes import scenes
from sumix_nb.data.sources import SOURCES
from sumix_nb.evaluation.label_errors import AREA, label_errors, measure_mixtures
from sumix_nb.evaluation.mismatch import true_ratio, visible_objects
from sumix_nb.pictures import show_images
from sumix_nb.running.grid import read_grid
from sumix_nb.studies.cifar100_cpu import gains, study_runs
from sumix_nb.studies.statistics import accuracies, paired_interval
from sumix_nb.training.records import comparison_table, label_of, plot_curves

ROOT = Path(__file__).parents[1]
ARMS = ({"mixer": "none"}, {"mixer": "cutmix"}, {"mixer": "cutmix", "method": "sumix"})
SCENES = {"epochs": 5, "width": 8, "alpha": 0.2, "lr": 0.05}
DIGITS = {"epochs": 15, "lr": 0.05}
OTHERS = {"epochs": 4, "lr": 0.05, "limit": 10_000}


def train_arms(recipe, arms, data_dir, out):
    "The record of each arm, and the Learner of the last"
    records = []
    for arm in arms:
        current = replace(recipe, **arm)
        print(f"\n{label_of(vars(current))}", flush=True)
        try: learn = make_learner(current, data_dir)
        except (ValueError, OSError) as error: raise SystemExit(f"demo: {error}") from None
        records.append(train(current, folder=out, learn=learn, progress=sys.stdout.isatty()))
    return records, learn


def results(records):
    "Accuracy, calibration error and cost of each run"
    table = comparison_table(records)
    table.insert(1, "calibration error (%)", (100 * runs_frame(records).ece.to_numpy()).round(1))
    return table


def recorded():
    "What the records of the trainings on CIFAR-100 say"
    runs = study_runs(read_grid(ROOT / "nbs/studies/study.toml"), load_records(ROOT / "results"))
    added = gains(accuracies(runs))
    average = added[[arm for arm in added if "released" not in arm]].dropna().mean(axis=1)
    low, high = paired_interval(average)
    return (f"On record (results/, CIFAR-100, mean of five mixers, {len(average)} seeds): SUMix adds "
            f"{average.mean():.1f} points of accuracy, 95 % interval {low:.1f} to {high:.1f}.")


# ---------------------------------------------------------------- scenes: the truth is known, so labels can be wrong

COLORS = torch.tensor([[31, 119, 180], [255, 127, 14], [235, 235, 235]]) / 255  # First object, second object, neither


def mix_again(seen, mixer):
    "Mixtures that `measure_mixtures` made with the same seed, maps of their objects, and the shares lambda and lambda*"
    draws, parts = torch.Generator().manual_seed(0), []
    for rows in torch.randperm(len(seen), generator=draws).split(100):
        masks = seen.masks[rows]
        mixed, *visible = visible_objects(mixer, seen.images[rows] / 255, seen.target[rows], masks, generator=draws)
        first, second = mixed.mask * masks, (1 - mixed.mask) * masks[mixed.partner]
        shown = torch.cat([first, second, 1 - first - second], 1)
        parts.append((mixed.images, torch.einsum("nkhw,kc->nchw", shown, COLORS), mixed.lam, true_ratio(*visible)))
    return [torch.cat(part) for part in zip(*parts)]


def draw_corrected(seen, mixer, found):
    "A figure of the six mixtures whose label SUMix corrected most, above what is visible of their objects"
    images, objects, lam, truth = mix_again(seen, mixer)
    rows, shares = zip(*[(row, share) for row, share, *_ in found["helped"]])
    figure, axes = plt.subplots(2, 6, figsize=(8, 3.7), layout="constrained")
    titles = [f"area {lam[row]:.2f}\nSUMix {share:.2f}" for row, share in zip(rows, shares)]
    show_images(images[[*rows]], titles, axes[0])
    show_images(objects[[*rows]], [f"visible {truth[row]:.2f}" for row in rows], axes[1])
    figure.suptitle("Share of the first object (blue) in the six labels that SUMix corrected most", fontsize=10)
    return figure


def demo_scenes(recipe, data_dir, out):
    "Table, figure and remarks: CutMix with and without SUMix, and how wrong their labels are"
    records, learn = train_arms(recipe, ARMS[1:], data_dir, out)
    source, seen, mixer = SOURCES["scenes"], scenes(4000, seed=2), CutMix(per_sample=True)
    mixtures = measure_mixtures(learn.model, seen, mixer, mean=source.mean, std=source.std)
    shares = {"SUMix": mixtures.shares()[f"{recipe.variant}, logits"]}
    found = label_errors(mixtures, shares, details=True)
    table = results(records)
    table.insert(2, "label error", [round(found[label]["error"][0], 3) for label in (AREA, "SUMix")])
    gain, low, high = found["SUMix"]["gain"]
    remarks = (
        f"Label error: mean distance of the label's share from what is visible, over {len(seen)} mixtures.\n"
        f"SUMix's label is nearer to it than the area by {gain:.3f}, 95 % interval {low:.3f} to {high:.3f}.\n"
        "The accuracies hang on the seed, since after so short a training a network may hardly have begun to learn\n"
        f"(chance is {100 / len(seen.vocab):.0f} %). They do not say which method is better.")
    return table, draw_corrected(seen, mixer, found["SUMix"]), remarks


def demo_others(recipe, data_dir, out):
    "Table, figure and remarks: plain training, CutMix, and CutMix with SUMix"
    records, learn = train_arms(recipe, ARMS, data_dir, out)
    figure = plt.figure(figsize=(8, 5), layout="constrained")
    strip, curves = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    learn.sumix.show_mixed(6, strip.subplots(1, 6))
    plot_curves(records, curves.subplots())
    return results(records), figure, "An example, not evidence."


@call_parse
def main(
    data:str="scenes", # Data set: scenes, digits, cifar10 or cifar100
    data_dir:str=None, # Folder with train/ and test/ class folders, for cifar10 and cifar100
    epochs:int=None, # Epochs of each run; 5 on scenes, 15 on digits, 4 on others
    limit:int=None, # At most so many images of each split; all scenes and digits, 10000 of others
    out:str="demo", # Folder for records and figure
):
    "Train with the same seed in several ways, and compare"
    given = {name: value for name, value in (("epochs", epochs), ("limit", limit)) if value is not None}
    recipe = Recipe(data=data, per_sample=True, **{"scenes": SCENES, "digits": DIGITS}.get(data, OTHERS) | given)
    table, figure, remarks = (demo_scenes if data == "scenes" else demo_others)(recipe, data_dir, out)
    file = Path(out, f"{data}.png")
    figure.savefig(file, dpi=120)
    images = f"{recipe.limit} images" if recipe.limit else "all images"
    print(f"\n{data}, {images}, {recipe.epochs} epochs, one seed\n{table.to_string()}\n\n{remarks}\n{recorded()}")
    print(f"\nfigure: {file}")
