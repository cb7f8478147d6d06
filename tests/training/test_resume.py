"Trainings that are killed, stopped and resumed: nothing may differ from those that were left alone"
import io
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (teaches `Learner` `fit_one_cycle` and `lr_find`)
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import no_random
from torch import nn

from sumix_nb.training import resume as checkpoints, resume as state_module, train as training
from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.training.resume import Checkpoint, Preempted
from sumix_nb.running.shell import sumix_train
from sumix_nb.data.loaders import get_dls
from sumix_nb.training.steps import LossScaler, WeightAverage
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.mixed import MixUp
from sumix_nb.models.networks import get_model
from sumix_nb.training.resume import KEPT, kept, plain, random_state, read_checkpoint, set_random_state
from sumix_nb.training.resume import write_checkpoint
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records
from sumix_nb.training.train import make_learner, train

RECIPE = Recipe(mixer="cutmix", method="sumix", width=4, epochs=3, bs=20, limit=60, lr=0.02)
STEPS = 9  # 3 epochs of 3


# ---------------------------------------------------------------- what stops a training, and what is compared

class Interrupt(Callback):
    "Raises KeyboardInterrupt in one event of one training step, counted from 0"
    order = 70

    def __init__(self, step, name):
        self.step = step
        setattr(self, name, self.interrupt)

    def interrupt(self):
        if self.learn.train_iter >= self.step: raise KeyboardInterrupt


class Terminate(Callback):
    "Sends a real SIGTERM to this process in one training step, or in the validation after it"
    def __init__(self, step, training=True): self.step, self.wanted, self.sent = step, training, False

    def before_batch(self):
        if self.learn.train_iter != self.step or self.learn.training != self.wanted or self.sent: return
        self.sent = True
        signal.raise_signal(signal.SIGTERM)


class Counter(Callback):
    "Counts training steps in memory that another process can see"
    run_valid = False
    def __init__(self, steps): self.steps = steps
    def after_batch(self): self.steps.value += 1


class Does(Callback):
    "Calls functions with the Learner, each in its event"
    def __init__(self, **functions):
        for name, function in functions.items(): setattr(self, name, partial(self.call, function))

    def call(self, function): function(self.learn)


@pytest.fixture(autouse=True)
def known_callbacks(monkeypatch):
    for name in ("Interrupt", "Terminate", "Counter", "Does", "Scaled"): monkeypatch.setitem(KEPT, name, ())


def same(one, other, path="state"):
    "Whether two plain values are equal to the last bit; clocks are left out"
    if path.endswith("['seconds']") or path.endswith("['seconds_per_step']"): return True
    if type(one) is not type(other): raise AssertionError(f"{path}: {type(one)}, {type(other)}")
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return all(same(one[key], other[key], f"{path}[{key!r}]") for key in one)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        return all(same(*pair, f"{path}[{i}]") for i, pair in enumerate(zip(one, other)))
    equal = torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other
    assert equal, path
    return True


def run(recipe, folder, *callbacks):
    "The Learner and its last checkpoint, or None where it was stopped"
    learn = make_learner(recipe, device="cpu")
    keeper = Checkpoint(folder, recipe.name)
    with learn.no_bar(), learn.no_logging(), no_random(recipe.seed):
        try: learn.fit_one_cycle(recipe.epochs, recipe.lr, cbs=[keeper, *callbacks])
        except (KeyboardInterrupt, Preempted): return None
    return learn, read_checkpoint(keeper.file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory): return run(RECIPE, tmp_path_factory.mktemp("undisturbed"))


# ---------------------------------------------------------------- in one process

def test_a_checkpoint_changes_nothing(undisturbed):
    learn = make_learner(RECIPE, device="cpu")
    record, (watched, _) = train(RECIPE, progress=False, learn=learn), undisturbed
    assert same(plain(learn.model), plain(watched.model)) and same(plain(learn.opt), plain(watched.opt))
    assert same(record["epochs"], watched.epoch_log.epochs)


EVENTS = ("after_batch", "before_batch", "after_pred", "after_loss", "before_step", "after_step", "before_validate",
          "after_validate", "after_epoch")


@pytest.mark.parametrize("step", range(STEPS))
def test_an_exception_in_any_step_loses_nothing(step, undisturbed, tmp_path):
    assert run(RECIPE, tmp_path, Interrupt(step, EVENTS[step])) is None
    learn, state = run(RECIPE, tmp_path)
    assert same(state, undisturbed[1]) and same(learn.epoch_log.epochs, undisturbed[0].epoch_log.epochs)
    for name in ("ratio_curve", "reliability"):
        assert getattr(learn.epoch_log, name) == getattr(undisturbed[0].epoch_log, name)


@pytest.mark.parametrize(("step", "in_training"), [*((step, True) for step in range(STEPS)), (3, False), (9, False)])
def test_a_signal_in_any_step_loses_nothing(step, in_training, undisturbed, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert run(RECIPE, tmp_path, Terminate(step, in_training)) is None
    state = read_checkpoint(tmp_path / f"{RECIPE.name}.ckpt")
    done = step + 1 if in_training else step
    assert 3 * state["epoch"] + state["step"] == done and signal.getsignal(signal.SIGTERM) == before
    learn, state = run(RECIPE, tmp_path)
    assert same(state, undisturbed[1]) and same(learn.epoch_log.epochs, undisturbed[0].epoch_log.epochs)
    assert [cb.run for cb in learn.cbs] == [True] * len(learn.cbs)


def test_a_training_may_be_stopped_again_and_again(undisturbed, tmp_path):
    for step in (0, 1, 2, 4, 5, 8): assert run(RECIPE, tmp_path, Terminate(step)) is None
    assert same(run(RECIPE, tmp_path)[1], undisturbed[1])


def test_callbacks_differ_in_nothing_but_clocks(undisturbed, tmp_path):
    "Compares every attribute that is a plain value, not only those that `KEPT` names"
    run(RECIPE, tmp_path, Terminate(4))
    resumed = run(RECIPE, tmp_path)[0]
    for one, other in zip(undisturbed[0].cbs, resumed.cbs, strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name in vars(one).keys() - {"started", "start_epoch", "seconds", "last", "mixed"}:
            try: values = plain(vars(one)[name]), plain(vars(other)[name])
            except (TypeError, AttributeError): continue
            assert same(*values, f"{one}.{name}"), (one, name)
    counters = ("pct_train", "train_iter", "epoch", "n_epoch", "n_iter", "iter")
    assert all(getattr(undisturbed[0], name) == getattr(resumed, name) for name in counters)


class Scaled(Callback):
    "Scales the loss for float16 as fastai's MixedPrecision does, but anywhere"
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.learn.loss_grad)
    def before_step(self): self.learn.scaler.step(self)
    def after_step(self): self.learn.scaler.update()
    @property
    def param_groups(self): return self.learn.opt.param_groups
    def step(self): pass


class Noisy(torch.utils.data.Dataset):
    "Vectors with a fresh noise at each look, from PyTorch's, Python's and NumPy's global generators"
    c = 3
    def __len__(self): return 30
    def __getitem__(self, i):
        noise = torch.randn(6) + random.random() + torch.from_numpy(np.random.rand(6)).float()
        return noise + i % 3, torch.tensor(i % 3)


def dropping_learner(dls, **options):
    "A network with dropout"
    with no_random(0):
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        return Learner(dls, network, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **options)


def image_learner(*callbacks, view=None, size=None, workers=0, **options):
    dls = get_dls("digits", bs=20, limit=60, device="cpu", view=view, size=size, workers=workers)
    options = {"opt_func": partial(SGD, mom=0.9), "metrics": accuracy} | options
    with no_random(0): return Learner(dls, get_model("resnet18", 10, width=4), cbs=list(callbacks), **options)


def own_loaders(kind, **options):
    with no_random(0): loaders = [kind(Noisy(), 10, shuffle=shuffle, **options) for shuffle in (True, False)]
    return DataLoaders(*loaders, device="cpu")


def with_train_metrics():
    learn = image_learner(Mix(MixUp(), seed=1), metrics=[accuracy, F1Score(average="macro")])
    learn.recorder.train_metrics = True
    return learn


SETUPS = {
    "gradient accumulation": lambda: image_learner(GradientAccumulation(n_acc=40), SUMix(CutMix(), seed=0)),
    "Adam": lambda: image_learner(opt_func=Adam),
    "PyTorch's optimiser": lambda: image_learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    "metrics in training": with_train_metrics,
    "several mixers": lambda: image_learner(Mix(OneOf([CutMix(), MixUp()], [0.5, 0.3], True), off_after=0.6, keep=2)),
    "scaler": lambda: image_learner(Scaled()),
    "scaler of ours": lambda: image_learner(LossScaler(init_scale=8.0)),
    "average of weights": lambda: image_learner(WeightAverage(0.7)),
    "images from files": lambda: image_learner(Mix(CutMix(), seed=0), view="deit", size=24, workers=1),
    "PyTorch's loader": lambda: dropping_learner(own_loaders(torch.utils.data.DataLoader)),
    "fastai's loader": lambda: dropping_learner(own_loaders(DataLoader)),
    "worker processes": lambda: dropping_learner(own_loaders(torch.utils.data.DataLoader, num_workers=1)),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_whatever_holds_state_gets_it_back(setup, tmp_path):
    def attempt(name, *callbacks):
        learn, keeper = SETUPS[setup](), Checkpoint(tmp_path / name, "run")
        with learn.no_bar(), learn.no_logging(), no_random(3):
            try: learn.fit_one_cycle(4, 0.02, cbs=[keeper, *callbacks])
            except Preempted: return None
        return read_checkpoint(keeper.file)
    whole = attempt("whole")
    for step, in_training in ((4, True), (6, False)):
        assert attempt(f"at {step}", Terminate(step, in_training)) is None
        assert same(attempt(f"at {step}"), whole)


@pytest.mark.parametrize("step", [2, 5, 8])
def test_trackers_go_on_counting(step, tmp_path, monkeypatch):
    "A value that never gets better: a tenth of the learning rate from the third epoch on, and the end after the fourth"
    def attempt(*callbacks):
        never = {"monitor": "accuracy", "comp": np.less, "min_delta": 1.0}
        trackers = EarlyStoppingCallback(patience=3, **never), ReduceLROnPlateau(patience=2, **never)
        learn = dropping_learner(own_loaders(DataLoader), cbs=trackers)
        with learn.no_bar(), learn.no_logging():
            try: learn.fit(6, 0.01, cbs=[Checkpoint(tmp_path, "run"), *callbacks])
            except Preempted: return None
        return [round(lr, 6) for lr in learn.recorder.lrs]
    assert attempt(Terminate(step)) is None
    assert attempt() == [0.01] * 9 + [0.001] * 3


def test_gradients_are_kept_between_two_steps_of_the_optimiser(tmp_path):
    learn, keeper = image_learner(GradientAccumulation(n_acc=40)), Checkpoint(tmp_path, "run")
    with pytest.raises(Preempted), learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[keeper, Terminate(2)])
    gradients = {name: parameter.grad for name, parameter in learn.model.named_parameters()}
    assert all(gradient.any() for gradient in gradients.values())
    assert same(read_checkpoint(keeper.file)["gradients"], gradients)


def test_a_scaler_goes_on_with_its_scale(tmp_path):
    learn = image_learner(Scaled())
    with pytest.raises(Preempted), learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=[Checkpoint(tmp_path, "run"), Terminate(3)])
    scale = read_checkpoint(tmp_path / "run.ckpt")["processes"][0]["learner"]["scaler"]["scale"]
    assert scale == 8.0 * 2 ** 2  # four steps, doubled after every second


def test_a_finished_training_is_given_back_without_training(undisturbed, tmp_path):
    first = run(RECIPE, tmp_path)
    learn = make_learner(RECIPE, device="cpu")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 0.02, cbs=[Checkpoint(tmp_path, RECIPE.name), Interrupt(0, "after_pred")])
    assert same(plain(learn.model), plain(first[0].model))
    assert same(learn.epoch_log.epochs, undisturbed[0].epoch_log.epochs)


def test_epochs_of_an_earlier_life_are_shown_again(tmp_path):
    run(RECIPE, tmp_path, Terminate(7))
    learn, rows = make_learner(RECIPE, device="cpu"), []
    learn.logger = rows.append
    with learn.no_bar(), no_random(0): learn.fit_one_cycle(3, 0.02, cbs=Checkpoint(tmp_path, RECIPE.name))
    assert [row[0] for row in rows] == [0, 1, 2] and [row[-1] for row in rows[:2]] == ["before", "before"]
    assert [list(row[1:-1]) for row in rows] == [list(values) for values in learn.recorder.values]


@pytest.mark.parametrize(("every", "written"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_the_file_is_written_after_every_so_many_epochs_and_the_last(every, written, tmp_path, monkeypatch):
    epochs = []
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda state, file: epochs.append(state["epoch"]))
    learn = dropping_learner(own_loaders(DataLoader))
    with learn.no_bar(), learn.no_logging(): learn.fit(5, cbs=Checkpoint(tmp_path, "run", every))
    assert epochs == written


def test_train_removes_the_checkpoint_when_the_record_is_written(tmp_path, monkeypatch):
    seen = []
    def write(record, folder): seen.extend(path.name for path in (tmp_path / "running").iterdir())
    monkeypatch.setattr(training, "write_record", write)
    record = train(replace(RECIPE, epochs=1), progress=False, folder=tmp_path, checkpoints=tmp_path / "running")
    assert seen == [f"{record['name']}.ckpt"] and not list((tmp_path / "running").iterdir())


def test_seconds_of_a_resumed_epoch_are_those_of_both_parts(tmp_path):
    pause = Does(before_backward=lambda learn: time.sleep(0.2))
    assert run(RECIPE, tmp_path, Terminate(4), pause) is None
    log = run(RECIPE, tmp_path)[0].epoch_log.epochs
    assert log[0]["seconds"] > 0.6 and 0.4 < log[1]["seconds"] < 10 and log[2]["seconds"] > 0


# ---------------------------------------------------------------- signals

def wrong(learn): raise RuntimeError("wrong")


@pytest.mark.parametrize(("end", "expected"), [
    (None, None), (Interrupt(1, "after_pred"), KeyboardInterrupt), (Terminate(1), Preempted),
    (Does(after_step=wrong), RuntimeError)])
def test_the_handler_is_restored_however_the_fit_ends(end, expected, tmp_path):
    def mine(number, frame): pass
    before, during = signal.signal(signal.SIGTERM, mine), []
    learn = dropping_learner(own_loaders(DataLoader))
    watch = Does(before_batch=lambda learn: during.append(signal.getsignal(signal.SIGTERM)))
    try:
        with pytest.raises(expected) if expected else nullcontext(), learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=[Checkpoint(tmp_path, "run"), watch, *([end] if end else [])])
        assert during[0] is not mine and signal.getsignal(signal.SIGTERM) is mine
    finally: signal.signal(signal.SIGTERM, before)


def test_further_signals_change_nothing_until_the_fit_has_ended(tmp_path):
    def twice(learn):
        for _ in range(2): signal.raise_signal(signal.SIGTERM)
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        learn = dropping_learner(own_loaders(DataLoader))
        with pytest.raises(Preempted), learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=[Does(before_batch=twice), Checkpoint(tmp_path, "run")])
        assert calls == []
        signal.raise_signal(signal.SIGTERM)
        assert calls == [signal.SIGTERM]
    finally: signal.signal(signal.SIGTERM, before)


def test_a_forked_process_dies_of_the_signal(tmp_path):
    statuses = []
    def fork(learn):
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        statuses.append(os.waitpid(child, 0)[1])
    learn = dropping_learner(own_loaders(DataLoader))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[Does(before_validate=fork), Checkpoint(tmp_path, "run")])
    assert [os.WTERMSIG(status) for status in statuses] == [signal.SIGTERM]


def test_outside_of_the_main_thread_there_is_no_handler(tmp_path):
    seen, before = [], signal.getsignal(signal.SIGTERM)
    def work():
        learn = dropping_learner(own_loaders(DataLoader))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoint(tmp_path, "run"))
        seen.append(learn.recorder.values)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen) == 1 and signal.getsignal(signal.SIGTERM) == before and (tmp_path / "run.ckpt").exists()


def test_preempted_says_where_and_is_no_silent_end(tmp_path):
    learn = make_learner(RECIPE, device="cpu")
    with pytest.raises(Preempted, match=r"in epoch 2 of 3.*\.ckpt") as error:
        learn.add_cb(Terminate(4))
        train(RECIPE, progress=False, learn=learn, folder=tmp_path, checkpoints=tmp_path / "running")
    assert isinstance(error.value, CancelFitException) and not list(tmp_path.glob("*.json"))


# ---------------------------------------------------------------- a callback that stays with its Learner

def test_evaluation_and_lr_find_do_not_touch_the_checkpoint(tmp_path):
    learn = image_learner()
    learn.add_cb(Checkpoint(tmp_path, "run"))
    def everything(): return plain(learn.model), [(path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.*")]
    def evaluate():
        before = everything()
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=6, show_plot=False)
        with learn: pass  # the events with which `tta` begins
        assert same(before, everything()) and all(cb.run for cb in learn.cbs)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with learn.no_bar(), learn.no_logging():
        evaluate()
        with pytest.raises(Preempted): learn.fit(2, cbs=Terminate(4))
        evaluate()
        learn.fit(2)
        assert len(learn.recorder.values) == 2 and read_checkpoint(tmp_path / "run.ckpt")["epoch"] == 2
        evaluate()


def test_an_interrupt_while_batches_are_skipped_leaves_no_callback_asleep(tmp_path):
    assert run(RECIPE, tmp_path, Terminate(5)) is None
    learn = make_learner(RECIPE, device="cpu")
    loader, draw = learn.dls.train, learn.dls.train.create_batches
    def broken(samples):
        for i, batch in enumerate(draw(samples)):
            if i == 1: raise KeyboardInterrupt
            yield batch
    loader.create_batches = broken
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 0.02, cbs=Checkpoint(tmp_path, RECIPE.name))
    assert all(cb.run for cb in learn.cbs) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    loader.create_batches = draw
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 0.02)
    assert len(learn.recorder.losses) == 3


# ---------------------------------------------------------------- files that are wrong

def refused(learn, file, pattern, epochs=3):
    "A fit that must end in a ValueError before anything has changed"
    before, no_step = plain(learn.model), Does(after_pred=wrong)
    with pytest.raises(ValueError, match=pattern) as error, learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 0.02, cbs=[Checkpoint(file.parent, file.stem), no_step])
    assert str(file) in str(error.value) and same(plain(learn.model), before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and all(cb.run for cb in learn.cbs)


@pytest.fixture
def file(undisturbed, tmp_path):
    "A checkpoint of `RECIPE`"
    path = tmp_path / f"{RECIPE.name}.ckpt"
    write_checkpoint(undisturbed[1], path)
    return path


def test_the_checkpoint_of_another_recipe_is_refused(file):
    other = replace(RECIPE, xi=0.25)
    moved = file.rename(file.with_name(f"{other.name}.ckpt"))
    refused(make_learner(other, device="cpu"), moved, f"name: {RECIPE.name} there, {other.name} here")


def test_the_checkpoint_of_another_network_is_refused(file):
    wider = make_learner(replace(RECIPE, width=8), device="cpu")
    refused(wider, file, r"network's .*: torch.float32 \(4, .* there, torch.float32 \(8, .* here.*and \d+ more")
    without = make_learner(replace(RECIPE, method="mce"), device="cpu")
    refused(without, file, r"network's .*uncertainty.* here")
    halved = make_learner(RECIPE, device="cpu")
    halved.model.fc.to(torch.bfloat16)
    refused(halved, file, r"network's fc.weight: torch.float32 \(10, 32\) there, torch.bfloat16 \(10, 32\) here")


def test_the_checkpoint_of_other_classes_is_refused(file):
    learn = make_learner(RECIPE, device="cpu")
    learn.dls.train.dataset.c = 7
    refused(learn, file, "number of classes: 10 there, 7 here")


def test_the_checkpoint_of_another_schedule_or_loader_is_refused(file):
    refused(make_learner(RECIPE, device="cpu"), file, "number of epochs: 3 there, 4 here", epochs=4)
    refused(make_learner(replace(RECIPE, bs=10), device="cpu"), file, "batches per epoch: 3 there, 6 here; batch size")
    refused(make_learner(replace(RECIPE, momentum=0.0), device="cpu"), file, "optimiser: l2_reg average_grad")
    accumulating = make_learner(RECIPE, device="cpu").add_cbs(GradientAccumulation(n_acc=40))
    refused(accumulating, file, r"state in: \['EpochLog', .* there, \['EpochLog', 'GradientAccumulation', .* here")


def test_a_damaged_checkpoint_is_refused(file):
    whole = file.read_bytes()
    weight = read_checkpoint(file)["network"]["fc.weight"].numpy().tobytes()
    place = whole.find(weight)
    flipped = whole[:place + 5] + bytes([whole[place + 5] ^ 16]) + whole[place + 6:]
    assert place > 0 and len(torch.load(io.BytesIO(flipped))) == 8  # PyTorch does not notice
    for content in (whole[:-1], whole[:len(whole) // 2], flipped, b"", b"PK"):
        file.write_bytes(content)
        refused(make_learner(RECIPE, device="cpu"), file, "not a whole checkpoint")


@pytest.mark.parametrize("content", [{"network": {}}, [1, 2], {"format": 99}])
def test_a_file_of_another_kind_is_refused(content, file):
    torch.save(content, file)
    refused(make_learner(RECIPE, device="cpu"), file, "format 1")


def test_a_program_in_a_file_does_not_run(file, tmp_path):
    class Program:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"format": 1, "facts": Program()}, file)
    refused(make_learner(RECIPE, device="cpu"), file, "not a whole checkpoint")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_kept_is_an_error_before_training(tmp_path, monkeypatch):
    class Secretive(Callback):
        def __init__(self): self.state = object()
    learn = dropping_learner(own_loaders(DataLoader), cbs=Secretive())
    with pytest.raises(ValueError, match="KEPT.*'Secretive'"), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Checkpoint(tmp_path, "run"))
    monkeypatch.setitem(KEPT, "Secretive", ("state",))
    with pytest.raises(TypeError, match="plain value"), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Checkpoint(tmp_path, "run"))
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_arguments_are_checked():
    for name in ("", ".", "..", "a/b", None):
        with pytest.raises(ValueError, match="`name`"): Checkpoint("folder", name)
    for every, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`every`"): Checkpoint("folder", "run", every)


def test_a_full_disk_ends_the_training_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    replaced, rename = [], os.replace
    def full(*paths):
        if replaced: raise OSError(28, "No space left on device")
        replaced.append(rename(*paths))
    monkeypatch.setattr(state_module.os, "replace", full)
    learn = dropping_learner(own_loaders(DataLoader))
    with pytest.raises(OSError, match="No space"), learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=Checkpoint(tmp_path, "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]
    assert read_checkpoint(tmp_path / "run.ckpt")["epoch"] == 1


def test_scraps_of_this_run_alone_are_removed(tmp_path):
    for name in ("run.ckpt.a1.tmp", "run.ckpt.b2.tmp", "run2.ckpt.c3.tmp", "run.json"): (tmp_path / name).touch()
    learn = dropping_learner(own_loaders(DataLoader))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoint(tmp_path, "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.ckpt", "run.json", "run2.ckpt.c3.tmp"]


@pytest.mark.parametrize(("count", "expected"), [(1, []), (2, ["device 1"])])
def test_the_generator_of_an_accelerator_is_kept(count, expected, monkeypatch):
    "With a stand-in, as there may be none here"
    class Device(str): type = "cuda"
    calls, parameter = [], SimpleNamespace(device=Device("device 1"))
    module = SimpleNamespace(device_count=lambda: count, get_rng_state=lambda *which: ["state", *which],
                             set_rng_state=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    model = SimpleNamespace(parameters=lambda: iter([parameter]))
    learn = SimpleNamespace(model=model, dls=SimpleNamespace(loaders=[]))
    state = random_state(learn)
    set_random_state(learn, state)
    assert state["device"] == ["state", *expected] and calls == [(state["device"], *expected)]


def test_kept_of_a_subclass_is_that_of_its_parents():
    class Stopper(EarlyStoppingCallback): pass
    stopper = Stopper()
    stopper.wait, stopper.new_best = 2, False
    assert kept(stopper) == {"best": None, "new_best": False, "wait": 2}


# ---------------------------------------------------------------- in processes of their own

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sumix_nb.training.train"])


def in_child(recipe, folder, steps, torn):
    "Train with checkpoints in `folder` and leave all that came of it there; `torn` says where to hang in a write"
    torch.set_num_threads(1)
    KEPT["Counter"] = ()
    learn, save = make_learner(recipe, device="cpu"), torch.save
    learn.add_cb(Counter(steps))
    def hang(state, file):
        content = io.BytesIO()
        save(state, content)
        file.write(content.getvalue()[:int(torn * content.tell())])
        file.flush()
        steps.value = 1000
        time.sleep(600)
    if torn is not None: state_module.torch.save = hang
    record = train(recipe, progress=False, folder=folder, learn=learn, checkpoints=folder)
    save({"network": plain(learn.model), "optimiser": plain(learn.opt), "record": record}, Path(folder, "end.pt"))


def start(*arguments):
    "A child that trains, and its counter"
    steps = CONTEXT.Value("i", 0)
    child = CONTEXT.Process(target=in_child, args=(*arguments[:2], steps, *(arguments[2:] or (None,))))
    child.start()
    return child, steps


def wait_for(steps, count, child):
    "Look on until the child has made so many steps"
    deadline = time.monotonic() + 60
    while steps.value < count:
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.0005)


CIFAR100 = pytest.mark.skipif(not Path(os.environ.get("SUMIX_DATA", "/nowhere"), "cifar100").is_dir(),
                              reason="needs $SUMIX_DATA/cifar100")


@pytest.mark.parametrize("changes", [{"limit": 80}, pytest.param(
    {"data": "cifar100", "width": 8, "bs": 100, "limit": 400, "precision": "bf16"}, marks=CIFAR100)])
def test_killed_at_ten_random_moments_a_training_ends_as_if_left_alone(changes, tmp_path):
    recipe, chance = replace(RECIPE, epochs=9, **changes), random.Random(0)  # 9 epochs of 4 steps
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    child, _ = start(recipe, alone)
    child.join()
    expected, = load_records(alone)
    file, positions, scraps = killed / f"{recipe.name}.ckpt", [], []
    for life in range(10):
        torn = chance.choice([0.0, 0.3, 0.9, 1.0]) if life in (1, 4, 6) else None  # share of the file that is written
        child, steps = start(recipe, killed, torn)
        wait_for(steps, 1000 if torn is not None else chance.randint(1, 5), child)
        time.sleep(chance.uniform(0, 2) * expected["seconds_per_step"])
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        scraps.append(len(list(killed.glob("*.tmp"))))
        if file.exists(): positions.append(read_checkpoint(file)["epoch"])  # whole, with all its checksums
    assert positions == sorted(positions) and positions[-1] >= 2
    assert max(scraps) == 1 and all(scraps[life] for life in (1, 4, 6))
    child, _ = start(recipe, killed)
    child.join()
    assert same(*(torch.load(folder / "end.pt") | {"record": None} for folder in (alone, killed)))
    found, = load_records(killed)
    clocks = ("seconds", "seconds_per_step", "peak_memory")
    assert same(*({key: value for key, value in record.items() if key not in clocks} for record in (expected, found)))
    assert sorted(path.name for path in killed.iterdir()) == sorted(["end.pt", f"{recipe.name}.json"])


def command_in_child(options, steps):
    "`sumix_train` as from the shell, with a counter"
    torch.set_num_threads(1)
    KEPT["Counter"], make = (), training.make_learner
    def counted(*arguments): return make(*arguments).add_cbs(Counter(steps))
    training.make_learner = counted
    sumix_train(options)


def test_the_command_stops_at_a_signal_and_goes_on_when_called_again(tmp_path, undisturbed):
    options = (f"--mixer cutmix --method sumix --width 4 --epochs 3 --bs 20 --limit 60 --lr 0.02 --device cpu "
               f"--out {tmp_path} --checkpoints {tmp_path / 'running'}").split()
    steps = CONTEXT.Value("i", 0)
    child = CONTEXT.Process(target=command_in_child, args=(options, steps))
    child.start()
    wait_for(steps, 4, child)
    child.terminate()
    child.join()
    file = tmp_path / "running" / f"{RECIPE.name}.ckpt"
    assert child.exitcode == 143 and not list(tmp_path.glob("*.json"))
    assert read_checkpoint(file)["epoch"] >= 1
    child = CONTEXT.Process(target=command_in_child, args=(options, steps))
    child.start()
    child.join()
    record, = load_records(tmp_path)
    assert child.exitcode == 0 and not file.exists() and same(record["epochs"], undisturbed[0].epoch_log.epochs)


def in_group(rank, folder, stop_at, address):
    "One of two processes that train one network, each with its own mixtures; the second one gets the signal"
    torch.set_num_threads(1)
    KEPT["Terminate"] = ()
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    learn = image_learner(Mix(CutMix(), seed=rank))
    learn.model = nn.parallel.DistributedDataParallel(learn.model)
    stoppers = [Terminate(stop_at)] if rank == 1 and stop_at is not None else []
    with learn.no_bar(), learn.no_logging(), no_random(rank):
        try: learn.fit_one_cycle(3, 0.02, cbs=[Checkpoint(folder, "run"), *stoppers])
        except Preempted: pass
    torch.save({"losses": torch.stack(learn.recorder.losses), "network": plain(learn.model)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_go_on_each_with_its_own_chance(tmp_path):
    def together(folder, stop_at):
        folder.mkdir(exist_ok=True)
        address = tmp_path / f"meet {folder.name} {stop_at}"
        children = [CONTEXT.Process(target=in_group, args=(rank, folder, stop_at, address)) for rank in range(2)]
        for child in children: child.start()
        for child in children: child.join(120)
        assert [child.exitcode for child in children] == [0, 0]
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    alone = together(tmp_path / "alone", None)
    assert same(alone[0]["network"], alone[1]["network"]) and not torch.equal(alone[0]["losses"], alone[1]["losses"])
    assert len(together(tmp_path / "stopped", 4)[0]["losses"]) == 5
    state = read_checkpoint(tmp_path / "stopped" / "run.ckpt")
    assert (state["epoch"], state["step"], len(state["processes"])) == (1, 2, 2)
    generators = [own["holders"]["Mix"][0]["generator"] for own in state["processes"]]
    assert not torch.equal(*generators)
    assert same(together(tmp_path / "stopped", None), alone)
    shutil.copy(tmp_path / "alone" / "run.ckpt", tmp_path / "run.ckpt")
    refused(image_learner(), tmp_path / "run.ckpt", "number of processes: 2 there, 1 here")
