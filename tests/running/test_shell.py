"`sumix_train` from the shell and from Python"
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
import torch

from sumix_nb.running.evaluate import sumix_evaluate
from sumix_nb.running.grid import sumix_grid
from sumix_nb.running.shell import option_parser, read_recipe, read_valid, sumix_train
from sumix_nb.training import processes
from sumix_nb.training import train as training
from sumix_nb.training.published import find_recipe
from sumix_nb.training.recipe import GROUPS, Recipe
from sumix_nb.training.records import load_records
from sumix_nb.training.resume import Preempted
from sumix_nb.training.trackers import TRACKERS
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
    ("--recipe cifar100-resnet18-automix --ema 0.9", "`ema` must be 0 for a mixer that learns"),
    ("--mixer adautomix --method sumix --variant released", "`variant` must be"),
    ("--size 100000", "`size` must be in"),
    ("--device gpu", "`device` must be one that PyTorch finds here, got 'gpu'"),
    ("--model deit_small --width 100", "`width` must be a multiple of 64"),
    ("--mixer resizemix --mixer-options {\"mode\":\"cubic\"}", "`mode` must be one of"),
    ("--width 1000000000", "`width` must be in"), (f"--seed {2 ** 70}", "`seed` must be in"),
    ("--pretrained True --width 4", "published width"),
    ("--mixer cutmix --method sumix --lr 1e12 --width 4 --limit 60 --bs 20 --epochs 3", "not finite: lower")])
def test_what_cannot_be_run_ends_with_one_clear_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sumix_nb.models.networks.RESNETS", {"resnet18": FakeWeights})
    with pytest.raises(SystemExit) as error: sumix_train([*options.split(), "--out", str(tmp_path)])
    line = capsys.readouterr().err
    assert error.value.code == 1 and line.startswith("sumix_train: ") and line.count("\n") == 1
    assert re.search(message, line) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code", "line"), [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), 1, "CUDA out of memory. Tried 2 GiB"),
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"), (Preempted("stopped"), 143, "stopped")])
def test_whatever_ends_a_training_is_one_line(error, code, line, tmp_path, monkeypatch, capsys):
    left = []
    def fails(*args, **options): raise error
    monkeypatch.setattr(training, "train", fails)
    monkeypatch.setattr(processes, "leave_group", lambda: left.append(True))
    with pytest.raises(SystemExit) as end: sumix_train(["--out", str(tmp_path)])
    assert end.value.code == code and capsys.readouterr().err == f"sumix_train: {line}\n"
    assert left == [True] * (code == 143)  # after an error the others may never come


def run(*words):
    "What the command prints, by itself"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return subprocess.run([sys.executable, "-m", "sumix_nb.running.shell", *words], capture_output=True, text=True,
                          env=environment)


def test_help_and_typing_errors_are_answered_without_fastai():
    "Which modules are imported is seen, not timed"
    code = ("import sys, contextlib; from sumix_nb.running.shell import sumix_train\n"
            "with contextlib.suppress(SystemExit): sumix_train([sys.argv[1]])\n"
            "print(sorted({'fastai.learner', 'torchvision', 'sumix_nb.training.train'} & sys.modules.keys()))")
    for word in ("--help", "--mixr"):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_no_warning_comes_before_a_message_and_no_bar_goes_into_a_file(tmp_path):
    assert run("--mixer", "cutmx").stderr.count("\n") == run("--device", "gpu").stderr.count("\n") == 1
    done = run("--width", "4", "--epochs", "2", "--limit", "60,80", "--bs", "20", "--out", str(tmp_path))
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout and done.stdout.count("\n") <= 4


OTHERS = {"--mixup", "--cutmix", "--mixup-off-epoch", "--amp", "--torchcompile", "--resume",  # timm's
          "--multi_gpu", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip",
          "--main_process_port", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal",
          "--array", "--gres", "--time", "--requeue",  # of accelerate and SLURM
          "--slow", "--logdir", "--again"}  # of pytest and TensorBoard


def test_the_pages_name_only_options_that_exist():
    known = {word for action in option_parser()._actions for word in action.option_strings}
    for command in (sumix_grid, sumix_evaluate):
        known |= {f"--{name.replace('_', '-')}" for name in signature(command).parameters}
    known |= OTHERS
    named = {}
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] != "markdown": continue
            for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", "".join(cell["source"])): named[word] = notebook.name
    assert {"--recipe", "--sync-bn", "--retry-failed", "--log", "--weights", "--on"} <= named.keys()
    assert {word: page for word, page in named.items() if word not in known} == {}


class FakeWeights:
    "ImageNet's weights of the published ResNet-18, without a download"
    @staticmethod
    def get_state_dict(**options):
        from sumix_nb.models.networks import get_model
        return get_model("resnet18", 1000, width=64, stem="standard").state_dict()


@pytest.mark.parametrize("options", [["--mixr", "cutmix"], ["--epochs", "two"], ["--mixer-options", "mode"],
                                     ["--limit", "5,few"]])
def test_misspelt_options_end_with_the_usage(options, capsys):
    with pytest.raises(SystemExit) as error: sumix_train(options)
    assert error.value.code == 2 and "usage: sumix_train" in capsys.readouterr().err


def test_every_field_is_an_option_that_reads_its_type():
    parser = option_parser()
    values = {"valid": 0.5, "mixer_options": {}, "view": "deit", "size": 40, "stats": "cifar", "limit": 3}
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(field.name for field in fields(Recipe))
    assert parser._option_string_actions["--log"].choices == TRACKERS
    for field in fields(Recipe):
        value = values.get(field.name, getattr(Recipe(), field.name))
        read = vars(parser.parse_args([f"--{field.name.replace('_', '-')}", str(value)]))[field.name]
        assert read == value and type(read) is type(value), field.name
    assert read_valid("test") == "test" and read_valid("0.25") == 0.25
    pairs = {"5000,all": (5000, None), "all,7": (None, 7), "all": None, "3,4": (3, 4)}
    for text, limit in pairs.items(): assert vars(parser.parse_args(["--limit", text]))["limit"] == limit
    assert read_recipe({}) == Recipe()
