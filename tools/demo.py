"""Three short runs (plain, CutMix, CutMix + SUMix) with one seed, a table, and a figure: what `make demo` does"""
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from fastcore.script import call_parse

from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import comparison_table, label_of, plot_curves
from sumix_nb.training.train import make_learner, train

RUNS = (("none", "mce"), ("cutmix", "mce"), ("cutmix", "sumix"))


@call_parse
def main(
    data:str="digits", # Data set: digits, cifar10 or cifar100
    data_dir:str=None, # Folder with train/ and test/ class folders, for cifar10 and cifar100
    epochs:int=None, # Epochs of each run; 15 on digits, 4 on others
    limit:int=None, # At most so many images of each split; all digits, 10000 of others
    out:str="demo", # Folder for records and figure
):
    "Train three times and compare"
    small = data == "digits"
    limit = limit or (None if small else 10_000)
    recipe = Recipe(data=data, per_sample=True, epochs=epochs or (15 if small else 4), limit=limit, lr=0.05)
    records = []
    for mixer, method in RUNS:
        current = replace(recipe, mixer=mixer, method=method)
        print(f"\n{label_of({'mixer': mixer, 'method': method})}")
        try: learn = make_learner(current, data_dir)
        except (ValueError, OSError) as error: raise SystemExit(f"demo: {error}") from None
        records.append(train(current, folder=out, learn=learn, progress=sys.stdout.isatty()))
    figure = plt.figure(figsize=(8, 5), layout="constrained")
    strip, curves = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    learn.sumix.show_mixed(6, strip.subplots(1, 6))
    plot_curves(records, curves.subplots())
    file = Path(out, f"{data}.png")
    figure.savefig(file, dpi=120)
    images = f"{recipe.limit} images" if recipe.limit else "all images"
    print(f"\n{data}, {images}, {recipe.epochs} epochs, one seed: an example, not evidence")
    print(f"{comparison_table(records)}\n\nfigure: {file}")
