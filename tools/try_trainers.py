"""Run the code of the page about other trainers as it stands there, with the real packages, and record what came of it

    pip install lightning transformers timm
    python tools/try_trainers.py --out results/trainers --timm-script path/to/timm/train.py

Each training is of a small network on handwritten digits, on the CPU. timm's script is run with two lines changed: the
import of `SUMixTask`, and its name in the place of `ClassificationTask`.
"""
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from fastcore.script import call_parse
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from sumix_nb import get_model

PAGE = Path(__file__).parents[1] / "nbs/tutorials/60_use_it_with.ipynb"


def shown(start, page=PAGE):
    "The code on the page, in a cell or in a fenced block, that starts so"
    sources = ["".join(cell["source"]) for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]]
    blocks = [block for source in sources for block in [source, *re.findall(r"```python\n(.*?)```", source, re.DOTALL)]]
    [found] = [block for block in blocks if block.startswith(start)]
    return found


def defined(start, name, **names):
    "What that code defines by this name, if it knows those"
    exec(compile(shown(start), f"<{name} on the page>", "exec"), names)
    return names[name]


def digits():
    "Training and validation digits as data sets of (3, 8, 8) images and their classes"
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    target = torch.tensor(data.target)
    return [TensorDataset(images[rows], target[rows]) for rows in (slice(1297), slice(1297, None))]


def lightning_run(epochs, mixer="cutmix", **options):
    "The module of the page and the Trainer, after a training"
    import lightning
    lightning.seed_everything(0)
    loaders = [DataLoader(part, 64, shuffle=not i, drop_last=not i) for i, part in enumerate(digits())]
    module = defined("import lightning", "Classifier")(get_model("resnet18", 10, width=8), mixer)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, *loaders)
    return module, trainer


def try_lightning(epochs=4):
    "Train by Lightning"
    _, trainer = lightning_run(epochs)
    return {"trainer": "Lightning", "network": "ResNet-18 of width 8", "epochs": epochs,
            "accuracy": trainer.callback_metrics["accuracy"].item()}


def hugging_face_trainer(folder, **options):
    "A `SUMixTrainer` with a small vision transformer and the digits"
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
    set_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=8,
        patch_size=2, num_labels=10))
    parts = [[{"pixel_values": image, "labels": label} for image, label in part] for part in digits()]
    arguments = TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
                                  **options)
    return defined("from sumix_nb import SUMixStep\nfrom transformers", "SUMixTrainer")(
        model, arguments, train_dataset=parts[0], eval_dataset=parts[1],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())})


def try_transformers(epochs=30):
    "Train by the Trainer of Hugging Face"
    with tempfile.TemporaryDirectory() as folder:
        trainer = hugging_face_trainer(folder, num_train_epochs=epochs, per_device_train_batch_size=32,
                                       gradient_accumulation_steps=2, learning_rate=3e-3, logging_strategy="no")
        trainer.train()
        return {"trainer": "Hugging Face `Trainer`", "network": "vision transformer, 2 blocks of width 64",
                "epochs": epochs, "accuracy": trainer.evaluate()["eval_accuracy"]}


def try_timm(script, epochs=6):
    "Train by timm's script, with `SUMixTask` in the place of its own"
    import timm  # noqa: F401 (an early error where it is missing)
    text = Path(script).read_text(encoding="utf-8")
    assert text.count("task = ClassificationTask(") == 1, "this version of the script makes its task in another way"
    task = "from timm.task import ClassificationTask\nfrom torch import nn\nfrom sumix_nb import SUMixStep\n\n"
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        here.joinpath("sumix_task.py").write_text(task + shown("class SUMixTask"), encoding="utf-8")
        changed = text.replace("task = ClassificationTask(", "task = SUMixTask(")
        changed = changed.replace("\nimport torch\n", "\nimport torch\nfrom sumix_task import SUMixTask\n", 1)
        here.joinpath("train.py").write_text(changed, encoding="utf-8")
        for split, part in zip(("train", "val"), digits()):
            for i, (image, label) in enumerate(part):
                path = here / split / str(label.item()) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(path)
        options = ("--model resnet10t --num-classes 10 --input-size 3 32 32 --mean .5 .5 .5 --std .5 .5 .5 --no-aug "
                   f"--crop-pct 1 --batch-size 64 --workers 1 --epochs {epochs} --warmup-epochs 0 --opt adamw "
                   "--lr 3e-3 --model-ema --model-ema-decay .9 --device cpu --output out --experiment run").split()
        path = os.pathsep.join([folder, str(PAGE.parents[2]), os.environ.get("PYTHONPATH", "")])
        subprocess.run([sys.executable, "train.py", folder, *options], cwd=folder, check=True,
                       env=os.environ | {"PYTHONPATH": path})
        with here.joinpath("out/run/summary.csv").open(encoding="utf-8") as file: *_, last = csv.DictReader(file)
    return {"trainer": "timm's `train.py`", "network": "ResNet-10-T", "epochs": epochs,
            "accuracy": float(last["eval_top1"]) / 100}


@call_parse
def main(
    out:str="results/trainers", # Folder for the records
    timm_script:str=None, # timm's train.py, of the version that is installed; without it only the others are run
):
    "Run the code of the page about other trainers, and record what came of it"
    tries = {"lightning": try_lightning, "transformers": try_transformers}
    if timm_script: tries["timm"] = lambda: try_timm(timm_script)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, attempt in tries.items():
        versions = {package: version(package) for package in (name, "torch")}
        record = attempt() | {"versions": versions, "device": "cpu"}
        Path(out, f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {record['accuracy']:.1%} of the digits are right")
