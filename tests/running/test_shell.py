"`sumix_train` from the shell and from Python"
import json
import re
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch

from sumix_nb.running import shell as command_line
from sumix_nb.training.resume import Preempted
from sumix_nb.running.shell import option_parser, read_recipe, read_valid, sumix_train
from sumix_nb.running.grid import sumix_grid
from sumix_nb.training.published import find_recipe
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records
from tests.conftest import ROOT


@pytest.mark.parametrize("command", [[str(Path(sys.executable).with_name("sumix_train"))],
                                     [sys.executable, "-m", "sumix_nb.running.shell"]])
def test_the_command_trains_and_names_its_record(tmp_path, command):
    command += ["--mixer", "cutmix", "--method", "sumix", "--epochs", "1", "--width", "4", "--limit", "200",
                "--update-bn", "False", "--valid", "0.2", "--out", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    record, = load_records(tmp_path)
    assert record["name"] in output and "CutMix + SUMix" in output
    assert record["recipe"]["update_bn"] is False and record["recipe"]["valid"] == 0.2


def test_a_published_recipe_runs_cut_short(tmp_path):
    sumix_train(["--recipe", "cifar100-resnet18-cutmix-sumix", "--epochs", "1", "--limit", "100", "--data", "digits",
                 "--width", "4", "--out", str(tmp_path)])
    record, = load_records(tmp_path)
    recipe = find_recipe("cifar100-resnet18-cutmix-sumix").recipe(epochs=1, limit=100, data="digits", width=4)
    assert Recipe(**record["recipe"]) == recipe and recipe.schedule == "cosine_epoch" and recipe.alpha == 0.2


@pytest.mark.parametrize(("options", "message"), [
    ("--mixer cutmx", "`mixer` must be one of"),
    ("--method sumix", "`mixer` must not"),
    ("--data digit", "`data` must be one of .*'digits'"),
    ("--data cifar100 --data-dir missing", "no folder missing.*`--data-dir` in a shell.*downloaded from https://"),
    ("--data tiny_imagenet --data-dir missing", "no folder missing.*tiny-imagenet-200.zip"),
    ("--valid 0.2.1", '`valid` must be "test" or a fraction'),
    ("--recipe cifar100-resnet18-cutmx", "such as cifar100-resnet18-cutmix"),
    ("--recipe cifar100-resnet18-automix", "cannot be run: this package has no `mixer` 'automix'"),
    ("--size 100000", "GiB are free"),
    ("--device gpu", "`device` must be one that PyTorch finds here, got 'gpu'"),
    ("--model deit_small --width 100", "`width` must be a multiple of 64"),
    ("--mixer resizemix --mixer-options {\"mode\":\"cubic\"}", "`mode` must be one of"),
    ("--pretrained True --width 4", "published width")])
def test_what_cannot_be_run_ends_with_one_clear_line(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("sumix_nb.models.networks.RESNETS", {"resnet18": FakeWeights})
    with pytest.raises(SystemExit, match=message) as error: sumix_train([*options.split(), "--out", str(tmp_path)])
    assert str(error.value).startswith("sumix_train: ") and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_runs_out_of_memory_is_one_line(tmp_path, monkeypatch):
    def fails(*args, **options): raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    monkeypatch.setattr("sumix_nb.running.shell.train", fails)
    with pytest.raises(SystemExit, match="sumix_train: CUDA out of memory. Tried to allocate 2 GiB"):
        sumix_train(["--out", str(tmp_path)])


OTHERS = {"--multi_gpu", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip",
          "--main_process_port", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal",
          "--requeue", "--slow", "--logdir"}  # of accelerate, SLURM, pytest and TensorBoard


def test_the_pages_name_only_options_that_exist():
    known = {word for action in option_parser()._actions for word in action.option_strings}
    known |= {f"--{name.replace('_', '-')}" for name in signature(sumix_grid).parameters} | OTHERS
    named = {}
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] != "markdown": continue
            for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", "".join(cell["source"])): named[word] = notebook.name
    assert {"--recipe", "--sync-bn", "--retry-failed", "--log"} <= named.keys()
    assert {word: page for word, page in named.items() if word not in known} == {}


class FakeWeights:
    "ImageNet's weights of the published ResNet-18, without a download"
    @staticmethod
    def get_state_dict(**options):
        from sumix_nb.models.networks import get_model
        return get_model("resnet18", 1000, width=64, stem="standard").state_dict()


@pytest.mark.parametrize("options", [["--mixr", "cutmix"], ["--epochs", "two"], ["--mixer-options", "mode"]])
def test_misspelt_options_end_with_the_usage(options, capsys):
    with pytest.raises(SystemExit) as error: sumix_train(options)
    assert error.value.code == 2 and "usage: sumix_train" in capsys.readouterr().err


def test_every_field_is_an_option_that_reads_its_type():
    parser = option_parser()
    values = {"valid": 0.5, "mixer_options": {}, "view": "deit", "size": 40, "stats": "cifar", "limit": 3}
    for field in fields(Recipe):
        value = values.get(field.name, getattr(Recipe(), field.name))
        read = vars(parser.parse_args([f"--{field.name.replace('_', '-')}", str(value)]))[field.name]
        assert read == value and type(read) is type(value), field.name
    assert read_valid("test") == "test" and read_valid("0.25") == 0.25
    assert read_recipe({}) == Recipe()


def test_an_error_out_of_a_callback_is_one_line_too(tmp_path):
    words = f"--mixer cutmix --method sumix --lr 1e12 --width 4 --limit 60 --bs 20 --epochs 3 --out {tmp_path}".split()
    with pytest.raises(SystemExit, match="^sumix_train: .*not finite: lower") as error: sumix_train(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stops", [False, True])
def test_the_command_parts_from_other_processes_unless_an_error_ended_it(tmp_path, monkeypatch, stops):
    left = []
    monkeypatch.setattr(command_line, "leave_group", lambda: left.append(True))
    if stops: monkeypatch.setattr(command_line, "train", lambda *args, **options: preempt())
    words = ["--epochs", "1", "--width", "4", "--limit", "60", "--bs", "20", "--out", str(tmp_path)]
    if stops:
        with pytest.raises(SystemExit) as error: sumix_train(words)
        assert error.value.code == 143
    else: sumix_train(words)
    assert left == [True]
    monkeypatch.undo()
    monkeypatch.setattr(command_line, "leave_group", lambda: left.append(True))
    with pytest.raises(SystemExit, match="no folder"): sumix_train([*words, "--data=cifar100", "--data-dir=missing"])
    assert left == [True]


def preempt(): raise Preempted("stopped")
