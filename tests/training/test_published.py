"The published recipes: each against the table of sources, and each trained for two steps at a reduced size"
import csv

import pytest
import torch

from sumix_nb.training.published import PUBLISHED
from sumix_nb.training.train import make_learner, train
from tests.conftest import GOLDEN

SPEC = GOLDEN.parent / "spec"
NAMES = {"CIFAR-100": "cifar100", "Tiny-ImageNet": "tiny_imagenet", "ImageNet-1K": "imagenet", "CUB-200": "cub200",
         "FGVC-Aircraft": "aircraft", "ResNet18": "resnet18", "ResNeXt50": "resnext50", "WRN-28-8": "wrn28_8",
         "DeiT-S": "deit_small", "Swin-T": "swin_tiny"}
WHOLE = [name for name, row in PUBLISHED.items() if name.endswith("-cutmix-sumix") or row.mixer.endswith("automix")]
SIZES = {"resnet18": (4, 32), "resnext50": (16, 32), "wrn28_8": (4, 16), "deit_small": (64, 32), "swin_tiny": (32, 32)}


def table(file_name):
    "Rows of a file of the specification, by the name of the recipe"
    if not (SPEC / file_name).is_file(): pytest.skip(f"needs {file_name} beside the golden folder")
    with open(SPEC / file_name, newline="") as file: rows = list(csv.DictReader(file))
    def name(row):
        parts = NAMES[row["dataset"]], NAMES[row["network"]], row["method"].lower()
        return "-".join(parts) + "-sumix" * (row["sumix"] == "true")
    return [(name(row), row) for row in rows if row["network"] in NAMES and row["dataset"] in NAMES]


def test_every_field_is_that_of_the_specification():
    rows = dict(table("recipes.csv"))
    assert rows.keys() == PUBLISHED.keys()
    for name, row in rows.items():
        ours, published = PUBLISHED[name].settings, PUBLISHED[name]
        assert (published.table, published.status) == (row["table"], row["status"]), name
        assert published.config == row["config_path"].removeprefix("configs/classification/"), name
        numbers = {"batch_size": "bs", "epochs": "epochs", "lr": "lr", "weight_decay": "weight_decay",
                   "mix_alpha": "alpha", "grad_clip": "clip", "min_lr": "min_lr", "label_smoothing": "smoothing"}
        for theirs, field in numbers.items():
            assert float(row[theirs] or 0) == ours.get(field, 0), (name, theirs)
        if row["xi"]: assert float(row["xi"]) == ours["xi"], name
        size = {"crop": 32, "tiny_imagenet": 64}.get(ours["view"], 224)
        assert int(row["input_size"]) == size == ours.get("size", size), name
        assert (row["pretrained"] != "no") == ours.get("pretrained", False), name
        assert (row["drop_last"] == "true") == ours["drop_last"], name
        adamw = row["optimizer"] == "AdamW"
        assert adamw == (ours.get("optimizer") == "adamw") == ours.get("spare_norms", False), name
        assert row["lr_schedule"] == {"cosine_epoch": "cosine per epoch", "cosine_step": "cosine per iteration"}[
            ours["schedule"]], name
        assert (20.0 if row["warmup"].startswith("20 epochs") else 0) == ours.get("warmup", 0), name
        assert row["norm"].startswith("0.4914" if ours.get("stats") == "cifar" else "0.485"), name
        if "bilinear" in row["mixer_args"] and published.mixer == "resizemix":
            assert ours["mixer_options"] == {"mode": "bilinear"}, name
        words = row["report_rule"].split()
        if words[0] in ("median", "best"): assert published.rule == (words[0], int(words[3])), name


def test_every_figure_is_that_of_the_poster():
    figures = {name: float(row["value"]) for name, row in table("paper_tables.csv") if row["metric"] == "top1"}
    assert figures == {name: row.figure for name, row in PUBLISHED.items()}


def test_views_match_the_augmentation_in_words():
    words = {"crop": "RandomCrop32", "tiny_imagenet": "RandomResizedCrop64 scale(0.08,1) bicubic",
             "imagenet": "RandomResizedCrop224 scale(0.08,1) bicubic",
             "fine_grained": "Resize256; RandomResizedCrop224 scale(0.5,1); HFlip",
             "deit": "RandAug n2 m9 std0.5; RandomErasing 0.25", "swin": "RandAug n2 m7 std0.5"}
    for name, row in table("recipes.csv"): assert words[PUBLISHED[name].settings["view"]] in row["train_aug"], name


CASES = [(name, False) for name in PUBLISHED]
CASES += [pytest.param(name, True, marks=pytest.mark.slow) for name in WHOLE]


@pytest.mark.parametrize(("name", "full"), CASES)
def test_two_steps_at_a_reduced_or_full_size_are_finite_and_change_the_weights(name, full):
    row = PUBLISHED[name]
    view, (width, size) = row.settings["view"], SIZES[row.settings["model"]]
    sizes = {"size": {"crop": 32, "tiny_imagenet": 64}.get(view, 224)} if full else {"width": width, "size": size}
    bs = 2 if full else 8
    recipe = row.recipe(data="digits", epochs=1, bs=bs, limit=2 * bs, pretrained=False, **sizes)
    learn = make_learner(recipe, device="cpu", workers=0)
    before = {key: value.clone() for key, value in learn.model.state_dict().items() if value.is_floating_point()}
    record = train(recipe, progress=False, learn=learn)
    after = learn.model.state_dict()
    assert len(learn.recorder.losses) == 2 and torch.tensor(record["epochs"][0]["train_loss"]).isfinite()
    assert all(after[key].isfinite().all() for key in before)
    trained = {key for key, _ in learn.model.named_parameters()}
    still = {key for key in before if key in trained and torch.equal(before[key], after[key])}
    assert len(still) <= 0.1 * len(trained), still
    assert any("uncertainty" in key for key in trained - still) == name.endswith("-sumix")
