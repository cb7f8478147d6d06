"Recipes, runs, records, the command line and the demo"
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from sumix_nb.training import train as training
from sumix_nb.training.steps import Autocast
from sumix_nb.training.recipe import METHODS, Recipe
from sumix_nb.training.records import load_records, write_record
from sumix_nb.training.train import make_learner, train
from tests.conftest import ROOT

TINY = Recipe(width=4, epochs=1, bs=50, limit=200, lr=0.02)


@pytest.mark.parametrize(("field", "value"), [
    ("mixer", "cutmx"), ("method", "mixup"), ("variant", "paper"), ("clean", "twice"), ("precision", "fp8"),
    ("epochs", 0), ("bs", 0), ("width", 0), ("lr", 0.0), ("lr", float("nan")), ("alpha", -1.0), ("view", "vit"),
    ("stats", "own"), ("optimizer", "adam"), ("schedule", "linear"), ("accumulate", 0), ("size", 0), ("clip", -1.0),
    ("smoothing", 1.5), ("ema", -0.1), ("warmup", 3.0), ("min_lr", 1.0)])
def test_recipe_refuses_and_names_a_wrong_field(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must"): Recipe(**{field: value})


@pytest.mark.parametrize("field", ["per_sample", "update_bn", "channels_last", "relabel", "compile", "pretrained",
                                   "drop_last", "spare_norms"])
def test_switches_of_a_recipe_are_true_or_false(field):
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match=f"`{field}` must be True or False"): Recipe(**{field: value})


@pytest.mark.parametrize(("field", "value", "pattern"), [
    ("data", "cifar1000", "cifar100"), ("model", "resnet", "resnet18"), ("stem", "big", "`stem`"), ("p", 2.0, "`p`"),
    ("xi", -1.0, "`xi`")])
def test_wrong_values_that_others_know_are_refused_before_training(field, value, pattern):
    with pytest.raises(ValueError, match=pattern):
        make_learner(replace(TINY, **{"mixer": "cutmix", "method": "sumix", field: value}))


def test_the_name_of_a_recipe_depends_on_every_field():
    base = replace(TINY, mixer="cutmix", schedule="cosine_step")
    changed = {"mixer": "mixup", "method": "sumix", "variant": "released", "clean": "concat", "precision": "bf16",
               "data": "cifar10", "stem": "standard", "z": "features", "model": "resnext50", "size": 48, "view": "deit",
               "stats": "cifar", "optimizer": "adamw", "schedule": "one_cycle", "mixer_options": {"a": 1}, "limit": 77,
               "valid": 0.3, "min_lr": 0.01}
    others = {bool: lambda value: not value, int: lambda value: 77, float: lambda value: 0.77}
    changed |= {name: others[type(value)](value) for name, value in asdict(base).items() if name not in changed}
    names = {replace(base, **{name: value}).name for name, value in changed.items()}
    assert len(names | {base.name}) == len(changed) + 1


@pytest.mark.parametrize("options", [{}, {"spare_norms": True, "ema": 0.9, "precision": "fp16", "clip": 1.0}])
def test_a_validation_outside_of_a_fit_is_no_epoch(options):
    learn = make_learner(replace(TINY, **options))
    with learn.no_bar():
        learn.validate()
        record = train(replace(TINY, **options), progress=False, learn=learn)
        assert abs(learn.validate()[1] - record["accuracy"]) < 1e-6
    assert len(learn.epoch_log.epochs) == 1


def test_a_search_is_no_epoch_and_a_used_learner_is_refused():
    recipe = replace(TINY, mixer="cutmix", method="sumix", epochs=2)
    learn = make_learner(recipe)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=9, show_plot=False)
    assert learn.epoch_log.epochs == []
    with pytest.raises(ValueError, match="`learn` must be fresh"): train(recipe, progress=False, learn=learn)
    learn = make_learner(recipe)
    train(recipe, progress=False, learn=learn)
    with pytest.raises(ValueError, match="`learn` must be fresh"): train(recipe, progress=False, learn=learn)
    assert len(learn.epoch_log.epochs) == 2


def test_a_diverged_training_says_so_with_sumix_too():
    for method in ("mce", "sumix"):
        with pytest.raises(FloatingPointError, match="lower"):
            train(replace(TINY, mixer="cutmix", method=method, lr=1e12, epochs=3), progress=False)


class Batches(Callback):
    "Keeps every training batch and mixture"
    run_valid, order = False, 40
    def before_fit(self): self.seen = []
    def after_loss(self):
        mix = next(cb for cb in self.learn.cbs if isinstance(cb, training.Mix))
        self.seen.append((mix.mixed.images.clone(), mix.mixed.lam.clone(), self.learn.y.clone()))


def test_all_methods_see_the_same_batches_and_mixtures_from_the_same_weights():
    seen, weights = {}, {}
    for method in METHODS:
        learn = make_learner(replace(TINY, mixer="cutmix", method=method))
        weights[method] = [p.clone() for name, p in learn.model.named_parameters() if "uncertainty" not in name]
        learn.add_cb(Batches())
        train(replace(TINY, mixer="cutmix", method=method), progress=False, learn=learn)
        seen[method] = learn.batches.seen
    assert len(seen["mce"]) == 4
    for method in METHODS[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights["mce"], weights[method], strict=True))
        for first, second in zip(seen["mce"], seen[method], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_records_are_still_found_under_the_names_of_their_recipes():
    records = load_records(ROOT / "results")
    assert len(records) > 20
    for record in records: assert Recipe(**record["recipe"]).name == record["name"]


def test_the_controls_pass_the_clean_batch_and_learn_from_it_only_if_told():
    trained = {}
    for method in ("mce", "mce_bn", "mce_clean"):
        recipe = replace(TINY, mixer="cutmix", method=method)
        learn = make_learner(recipe)
        train(recipe, progress=False, learn=learn)
        trained[method] = learn.model
    weights = {method: dict(model.named_parameters()) for method, model in trained.items()}
    statistics = {method: model.bn1.running_mean for method, model in trained.items()}
    for name, weight in weights["mce"].items():
        assert torch.equal(weight, weights["mce_bn"][name]) and not torch.equal(weight, weights["mce_clean"][name])
    assert not torch.equal(statistics["mce"], statistics["mce_bn"])


@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
@pytest.mark.parametrize("clean", ["no_grad", "concat", "separate"])
def test_every_variant_trains_in_bf16(variant, clean):
    recipe = replace(TINY, mixer="cutmix", method="sumix", variant=variant, clean=clean, precision="bf16")
    record = train(recipe, progress=False)
    epoch = record["epochs"][-1]
    assert all(torch.tensor(value).isfinite() for value in epoch.values())
    assert 0 < epoch["lam"] < 1 and 0 < epoch["ratio"] < 1 and epoch["shift"] > 0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_optimiser_has_the_momentum_of_its_recipe(momentum):
    "Two steps with a gradient of 1 everywhere: the second one is longer by the momentum"
    learn = make_learner(Recipe(width=4, bs=50, limit=50, momentum=momentum, weight_decay=0.0), device="cpu")
    learn.create_opt()
    learn.opt.set_hypers(lr=0.1, mom=momentum)
    before = [parameter.detach().clone() for parameter in learn.model.parameters()]
    for _ in range(2):
        for parameter in learn.model.parameters(): parameter.grad = torch.ones_like(parameter)
        learn.opt.step()
    for old, new in zip(before, learn.model.parameters(), strict=True):
        torch.testing.assert_close(old - new.detach(), torch.full_like(old, 0.1 * (2 + momentum)))


def test_a_record_says_what_was_run_and_survives_json(tmp_path):
    recipe = replace(TINY, mixer="mixup")
    record = train(recipe, progress=False, folder=tmp_path)
    assert json.loads((tmp_path / f"{recipe.name}.json").read_text()) == record == load_records(tmp_path)[0]
    assert Recipe(**record["recipe"]) == recipe and torch.__version__.startswith(record["versions"]["torch"])
    assert record["accuracy"] == record["epochs"][-1]["accuracy"] and record["ratio_curve"] is None
    assert record["epochs"][-1]["shift"] == 0
    assert record["commit"] is None or len(record["commit"].rstrip("+")) == 40


def test_a_failed_write_keeps_the_old_record_and_leaves_no_scraps(tmp_path, monkeypatch):
    write_record({"name": "run", "value": 1}, tmp_path)
    def full(*paths): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"): write_record({"name": "run", "value": 2}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["value"] == 1


def test_reading_records_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): load_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mixr"): load_records(tmp_path, mixr="cutmix")
    (tmp_path / "half.json").write_text('{"name": ')
    with pytest.raises(ValueError, match="half.json"): load_records(tmp_path)


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_no_record(tmp_path):
    with pytest.raises(FloatingPointError, match="`lr`"): train(replace(TINY, lr=1e30), progress=False, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_autocast_covers_forward_passes_only_and_ends_with_the_fit():
    learn = make_learner(replace(TINY, mixer="cutmix", method="sumix", precision="bf16"))
    dtypes = []
    learn.model.layer1.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    train(TINY, progress=False, learn=learn)
    assert set(dtypes) == {torch.bfloat16} and learn.recorder.losses[0].dtype == torch.float32
    learn.model(learn.dls.one_batch()[0])
    assert dtypes[-1] == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_autocast_is_off_after_an_interrupt_and_the_next_fit_hooks_once():
    class Stop(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn = make_learner(replace(TINY, precision="bf16"))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(): learn.fit(1, cbs=Stop())
    assert not torch.is_autocast_enabled("cpu")
    learn.remove_cbs(Stop)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not learn.model._forward_pre_hooks and not learn.model._forward_hooks


def test_autocast_hands_on_errors_of_the_network():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
        def forward(self, x): raise RuntimeError("broken on purpose")
    learn = make_learner(replace(TINY, precision="bf16"))
    learn.model = Broken()
    with pytest.raises(RuntimeError, match="broken on purpose"), learn.no_bar(): learn.fit(1)
    assert not torch.is_autocast_enabled("cpu") and isinstance(learn.autocast, Autocast)


def test_the_demo_writes_table_records_and_figure(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--epochs", "1", "--out", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "digits.png").stat().st_size > 10_000 and len(load_records(tmp_path)) == 3
    assert output.rstrip().endswith("digits.png") and "x CutMix" in output and "CutMix + SUMix" in output
