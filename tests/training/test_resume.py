"Trainings that are killed, stopped and resumed: nothing may differ from those that were left alone"
import io
import os
import random
import shutil
import signal
import threading
import time
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

from sumix_nb.data.loaders import get_dls
from sumix_nb.mixers.choosing import OneOf
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.mixers.mixed import MixUp
from sumix_nb.models.networks import get_model
from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.training import resume
from sumix_nb.training import train as training
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records
from sumix_nb.training.resume import Checkpoint, Preempted, read_checkpoint
from sumix_nb.training.state import generators, plain
from sumix_nb.training.steps import WeightAverage
from sumix_nb.training.train import make_learner, train
from tests.conftest import CONTEXT, LIMIT, finish, wait_until
from tests.training.oracles import Counter, Does, Interrupt, Signal, same

RECIPE = Recipe(mixer="cutmix", method="sumix", width=4, epochs=3, bs=20, limit=60, lr=0.02)
STEPS = 9  # 3 epochs of 3
TERM, INT = signal.SIGTERM, signal.SIGINT


def quietly(learn, epochs, *callbacks, seed=0, lr=0.02):
    "Fit, and whether it came to its end"
    with learn.no_bar(), learn.no_logging(), no_random(seed):
        try: learn.fit_one_cycle(epochs, lr, cbs=list(callbacks))
        except (RuntimeError, Preempted): return False
    return True


def run(recipe, folder, *callbacks):
    "The Learner and its last checkpoint, or None where it was stopped"
    learn, keeper = make_learner(recipe, device="cpu"), Checkpoint(folder, recipe.name)
    done = quietly(learn, recipe.epochs, keeper, *callbacks)
    return (learn, read_checkpoint(keeper.file)) if done else None


def weights(learn): return plain(learn.model.state_dict())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory): return run(RECIPE, tmp_path_factory.mktemp("undisturbed"))


# ---------------------------------------------------------------- in one process

def test_a_checkpoint_changes_nothing(undisturbed):
    learn = make_learner(RECIPE, device="cpu")
    record, (watched, _) = train(RECIPE, progress=False, learn=learn), undisturbed
    assert same(weights(learn), weights(watched))
    assert same(plain(learn.opt.state_dict()), plain(watched.opt.state_dict()))
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


@pytest.mark.parametrize(("step", "number", "training"), [
    *((step, (TERM, INT)[step % 2], True) for step in (0, 2, 3, 5, 8)), (3, INT, False), (6, TERM, False)])
def test_a_signal_loses_nothing(step, number, training, undisturbed, tmp_path):
    before = [signal.getsignal(n) for n in (TERM, INT)]
    assert run(RECIPE, tmp_path, Signal(step, number, training)) is None
    file = tmp_path / f"{RECIPE.name}.ckpt"
    assert file.exists() == (step >= 3) and (step < 3 or read_checkpoint(file)["epoch"] == step // 3)
    assert [signal.getsignal(n) for n in (TERM, INT)] == before
    learn, state = run(RECIPE, tmp_path)
    assert same(state, undisturbed[1]) and same(learn.epoch_log.epochs, undisturbed[0].epoch_log.epochs)


class Noisy(torch.utils.data.Dataset):
    "Vectors with a fresh noise at each look, from PyTorch's, Python's and NumPy's global generators"
    c = 3
    def __len__(self): return 30
    def __getitem__(self, i):
        noise = torch.randn(6) + random.random() + torch.from_numpy(np.random.rand(6)).float()
        return noise + i % 3, torch.tensor(i % 3)


def vectors(kind=DataLoader, **options):
    with no_random(0): loaders = [kind(Noisy(), 10, shuffle=shuffle, **options) for shuffle in (True, False)]
    return DataLoaders(*loaders, device="cpu")


def dropping_learner(dls=None, **options):
    "A network with dropout"
    with no_random(0):
        network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        return Learner(dls or vectors(), network, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **options)


def image_learner(*callbacks, view=None, size=None, workers=0, **options):
    dls = get_dls("digits", bs=20, limit=60, device="cpu", view=view, size=size, workers=workers)
    options = {"opt_func": partial(SGD, mom=0.9), "metrics": accuracy} | options
    with no_random(0): return Learner(dls, get_model("resnet18", 10, width=4), cbs=list(callbacks), **options)


def with_train_metrics():
    learn = image_learner(Mix(MixUp(), seed=1), metrics=[accuracy, F1Score(average="macro")])
    learn.recorder.train_metrics = True
    return learn


class Scaled(Callback):
    "Scales the loss for float16 as fastai's MixedPrecision does, but anywhere"
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.learn.loss_grad)
    def before_step(self): self.learn.scaler.step(self)
    def after_step(self): self.learn.scaler.update()
    @property
    def param_groups(self): return self.learn.opt.param_groups
    def step(self): pass


class Unheard(Callback):
    "A callback that nobody told of: it disturbs weights by numbers, arrays, text, tensors, a scheduler and generators"
    def __init__(self):
        self.n, self.seen, self.text, self.sums, self.array = 0, {"last": [0.0]}, "", None, np.zeros(2)
        self.dice, self.chance, self.layer = torch.Generator().manual_seed(3), random.Random(4), nn.Linear(1, 1)
        self.layer.load_state_dict({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})

    def after_step(self):
        loss, weight = self.learn.loss.item(), next(self.learn.model.parameters()).data
        self.n, self.text, self.array[0] = self.n + 1, self.text + "x", self.array[0] + loss
        self.seen["last"].append(loss)
        self.sums = weight.sum() if self.sums is None else self.sums + weight.sum()
        self.layer.weight.data += loss
        weight += 1e-4 * (len(self.text) + self.n + self.array[0] + sum(self.seen["last"]) + self.sums.item())
        weight += 1e-4 * (self.chance.random() + torch.rand((), generator=self.dice) + self.layer.weight.item())


SETUPS = {
    "gradient accumulation": lambda: image_learner(GradientAccumulation(n_acc=40), SUMix(CutMix(), seed=0)),
    "Adam": lambda: image_learner(opt_func=Adam),
    "PyTorch's optimiser": lambda: image_learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    "metrics in training": with_train_metrics,
    "several mixers": lambda: image_learner(Mix(OneOf([CutMix(), MixUp()], [0.5, 0.3], True), off_after=0.6, keep=2)),
    "off": lambda: image_learner(SUMix(CutMix(p=0.5), off_after=0.4)),
    "scaler": lambda: image_learner(Scaled()),
    "average of weights": lambda: image_learner(WeightAverage(0.7)),
    "images from files": lambda: image_learner(Mix(CutMix(), seed=0), view="deit", size=24, workers=1),
    "counts of trackers": lambda: dropping_learner(cbs=[
        tracker(patience=3, comp=np.less, min_delta=1.0) for tracker in (EarlyStoppingCallback, ReduceLROnPlateau)]),
    "a callback nobody knows": lambda: dropping_learner(cbs=Unheard()),
    "PyTorch's loader": lambda: dropping_learner(vectors(torch.utils.data.DataLoader)),
    "worker processes": lambda: dropping_learner(vectors(torch.utils.data.DataLoader, num_workers=1)),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_whatever_holds_state_gets_it_back(setup, tmp_path):
    def attempt(name, *callbacks):
        keeper = Checkpoint(tmp_path / name, "run")
        return read_checkpoint(keeper.file) if quietly(SETUPS[setup](), 4, keeper, *callbacks, seed=3) else None
    whole = attempt("whole")
    for step in (4, 10):
        assert attempt(f"at {step}", Signal(step)) is None
        assert same(attempt(f"at {step}"), whole)


def test_a_finished_training_is_given_back_without_training(undisturbed, tmp_path):
    first, learn = run(RECIPE, tmp_path), make_learner(RECIPE, device="cpu")
    assert quietly(learn, 3, Checkpoint(tmp_path, RECIPE.name), Interrupt(0, "after_pred"))
    assert "_do_fit" not in vars(learn)
    assert same(weights(learn), weights(first[0]))
    assert same(learn.epoch_log.epochs, undisturbed[0].epoch_log.epochs)


@pytest.mark.parametrize(("every", "written"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_the_file_is_written_after_every_so_many_epochs_and_the_last(every, written, tmp_path, monkeypatch):
    epochs, replaced = [], os.replace
    def noted(scrap, file): epochs.append(replaced(scrap, file) or read_checkpoint(file)["epoch"])
    monkeypatch.setattr(resume.os, "replace", noted)
    assert quietly(dropping_learner(), 5, Checkpoint(tmp_path, "run", every))
    assert epochs == written


def test_train_removes_the_checkpoint_when_the_record_is_written(tmp_path, monkeypatch):
    seen = []
    def write(record, folder): seen.extend(path.name for path in (tmp_path / "running").iterdir())
    monkeypatch.setattr(training, "write_record", write)
    record = train(replace(RECIPE, epochs=1), progress=False, folder=tmp_path, checkpoints=tmp_path / "running")
    assert seen == [f"{record['name']}.ckpt"] and not list((tmp_path / "running").iterdir())


# ---------------------------------------------------------------- signals

def wrong(learn): raise RuntimeError("wrong")


def fit_with(tmp_path, **functions):
    learn = dropping_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Does(**functions), Checkpoint(tmp_path, "run")])


def sends(*numbers):
    def send(learn):
        for number in numbers: signal.raise_signal(number)
    return send


def test_further_signals_change_nothing_but_a_second_ctrl_c(tmp_path):
    for numbers in ((TERM, TERM), (INT, TERM), (TERM, INT)):
        with pytest.raises(Preempted): fit_with(tmp_path, before_batch=sends(*numbers))
    with pytest.raises(KeyboardInterrupt): fit_with(tmp_path, before_batch=sends(INT, INT))


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(INT, signal.SIG_IGN)
    try: fit_with(tmp_path, before_batch=sends(INT))
    finally: signal.signal(INT, before)
    assert read_checkpoint(tmp_path / "run.ckpt")["epoch"] == 1


def test_a_forked_process_dies_of_sigterm_and_leaves_ctrl_c_to_us(tmp_path):
    statuses = []
    def fork(learn):
        child = os.fork()
        if child == 0:
            try:
                for number in (INT, TERM): signal.raise_signal(number)
            finally: os._exit(0) # whatever happens, the child must not go on with the tests
        statuses.append(os.waitpid(child, 0)[1])
    before = signal.signal(TERM, signal.SIG_DFL) # another test may have left a handler
    try: fit_with(tmp_path, before_validate=fork)
    finally: signal.signal(TERM, before)
    assert [os.waitstatus_to_exitcode(status) for status in statuses] == [143]


def test_outside_of_the_main_thread_there_is_no_handler(tmp_path):
    seen, before = [], signal.getsignal(TERM)
    def work(): seen.append(quietly(dropping_learner(), 1, Checkpoint(tmp_path, "run")))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True] and signal.getsignal(TERM) == before and (tmp_path / "run.ckpt").exists()


@pytest.mark.parametrize(("number", "step", "text"), [
    (TERM, 4, r"stopped by SIGTERM in epoch 2 of 3; the same call goes on from .*\.ckpt"),
    (INT, 1, "stopped by Ctrl-C in epoch 1 of 3; the same call begins anew")])
def test_preempted_says_where_and_is_no_silent_end(number, step, text, tmp_path):
    learn = make_learner(RECIPE, device="cpu")
    learn.add_cb(Signal(step, number))
    with pytest.raises(Preempted, match=text) as error:
        train(RECIPE, progress=False, learn=learn, folder=tmp_path, checkpoints=tmp_path / "running")
    assert isinstance(error.value, CancelFitException) and error.value.number == number
    assert not list(tmp_path.glob("*.json"))


def test_evaluation_and_lr_find_do_not_touch_the_checkpoint(tmp_path):
    learn, handler = image_learner(), signal.getsignal(TERM)
    learn.add_cb(Checkpoint(tmp_path, "run"))
    def everything(): return weights(learn), [(path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("*.*")]
    def evaluate():
        before = everything()
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=6, show_plot=False)
        with learn: pass  # the events with which `tta` begins
        assert same(before, everything()) and signal.getsignal(TERM) == handler
    with learn.no_bar(), learn.no_logging():
        evaluate()
        with pytest.raises(Preempted): learn.fit(2, cbs=Signal(4))
        evaluate()
        learn.fit(2)
        assert len(learn.recorder.values) == 2 and read_checkpoint(tmp_path / "run.ckpt")["epoch"] == 2
        evaluate()


# ---------------------------------------------------------------- files that are wrong

def refused(learn, file, pattern, epochs=3, error=ValueError):
    "A fit that must end in an error before anything has changed"
    before, handler = weights(learn), signal.getsignal(TERM)
    with pytest.raises(error, match=pattern), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 0.02, cbs=[Checkpoint(file.parent, file.stem), Does(after_pred=wrong)])
    assert same(weights(learn), before) and signal.getsignal(TERM) == handler


@pytest.fixture
def file(undisturbed, tmp_path):
    "A checkpoint of `RECIPE`"
    path = tmp_path / f"{RECIPE.name}.ckpt"
    torch.save(undisturbed[1], path)
    return path


def changed(**changes): return make_learner(replace(RECIPE, **changes), device="cpu")


def test_the_checkpoint_of_another_training_is_refused(file):
    refused(changed(width=8), file, r"network's .*: torch.float32 \(4, .* there, torch.float32 \(8, .* and \d+ more")
    refused(changed(method="mce"), file, r"callbacks: \[.*'SUMix'.* there")
    refused(changed(xi=0.25), file, "SUMix's xi: 0.5 there, 0.25 here")
    refused(changed(alpha=0.2), file, r"SUMix's mixer: CutMix\(alpha=1.0.* there, CutMix\(alpha=0.2")
    refused(changed(), file, "number of epochs: 3 there, 4 here", epochs=4)
    refused(changed(bs=10), file, "batches per epoch: 3 there, 6 here; batch size")
    refused(changed(momentum=0.0), file, r"optimiser: \['l2_reg', 'average_grad'")
    refused(changed().add_cbs(GradientAccumulation(n_acc=40)), file, "callbacks: .* here.*GradientAccumulation's n_acc")
    learn = changed()
    learn.dls.train.dataset.c = 7
    refused(learn, file, "number of classes: 10 there, 7 here")
    moved = file.rename(file.with_name("other.ckpt"))
    refused(changed(), moved, f"name: {RECIPE.name} there, other here")


@pytest.mark.parametrize(("one", "other", "words"), [
    ({"label_rule": "drawn"}, {"label_rule": "permuted"}, "Relabel's rule: 'drawn' there, 'permuted' here"),
    ({"label_rule": "corrected"}, {"label_rule": "corrected", "clean": "eval"},
     "Relabel's clean: 'no_grad' there, 'eval' here")])
def test_the_checkpoint_of_another_rule_is_refused(one, other, words, tmp_path):
    learn = changed(method="mce", **one)
    with pytest.raises(RuntimeError, match="interrupted"), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 0.02, cbs=[Checkpoint(tmp_path, "run"), Interrupt(3, "before_epoch")])
    refused(changed(method="mce", **other), tmp_path / "run.ckpt", words)


def test_a_damaged_or_foreign_file_is_refused(file):
    whole = file.read_bytes()
    weight = read_checkpoint(file)["network"]["fc.weight"].numpy().tobytes()
    place = whole.find(weight)
    flipped = whole[:place + 5] + bytes([whole[place + 5] ^ 16]) + whole[place + 6:]
    assert place > 0 and len(torch.load(io.BytesIO(flipped))) == 5  # PyTorch does not notice
    for content in (whole[:-1], whole[:len(whole) // 2], flipped, b"", b"PK"):
        file.write_bytes(content)
        refused(changed(), file, "not a whole checkpoint: .*Delete it")
    for content, pattern in (([1, 2], "not a whole"), ({"network": {}}, "format: missing there, 3 here"),
                             ({"processes": [{"facts": {"format": 2}}]}, "format: 2 there, 3 here")):
        torch.save(content, file)
        refused(changed(), file, pattern)


def test_a_program_in_a_file_does_not_run(file, tmp_path):
    class Program:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"network": Program()}, file)
    refused(changed(), file, "not a whole checkpoint")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_kept_is_an_error_and_never_lost(tmp_path):
    class Secret: pass
    class Holds(Callback):
        def __init__(self, value): self.value = value
    for value in (Secret(), [Secret()], {"a": torch.Generator()}, np.random.default_rng(0), [nn.Linear(1, 1)],
                  {1, 2}, [b"4"], {"a": frozenset()}, 1j):
        refused(dropping_learner(cbs=Holds(value)), tmp_path / "run.ckpt", "cannot keep this", error=TypeError)
        assert not list(tmp_path.iterdir())
    def late(learn): learn.holds.value = nn.Linear(1, 1)
    callbacks = Checkpoint(tmp_path, "run"), Does(after_step=late), Signal(4)
    assert not quietly(dropping_learner(cbs=Holds(None)), 3, *callbacks)
    refused(dropping_learner(cbs=Holds(None)), tmp_path / "run.ckpt", "make `value` of Holds before the first step")


def test_arguments_are_checked():
    for name in ("", ".", "..", "a/b", None):
        with pytest.raises(ValueError, match="`name`"): Checkpoint("folder", name)
    for every, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`every`"): Checkpoint("folder", "run", every)


def test_a_full_disk_ends_the_training_with_one_line_and_keeps_the_last_checkpoint(tmp_path):
    "A limit of the size of files stands in for the disk: PyTorch's own writer names neither reason nor file"
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(learn): resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))
    try:
        with pytest.raises(OSError, match="File too large.*run.ckpt"):
            quietly(dropping_learner(), 3, Checkpoint(tmp_path, "run"), Does(before_epoch=lambda learn: (
                full(learn) if learn.epoch else None)))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]
    assert read_checkpoint(tmp_path / "run.ckpt")["epoch"] == 1


@pytest.mark.parametrize(("count", "expected"), [(1, {}), (2, {"device": "device 1"})])
def test_the_generator_of_an_accelerator_is_kept(count, expected, monkeypatch):
    "With a stand-in, as there may be none here"
    class Device(str): type = "cuda"
    calls, parameter = [], SimpleNamespace(device=Device("device 1"))
    module = SimpleNamespace(device_count=lambda: count, get_rng_state=lambda **which: ["state", which],
                             set_rng_state=lambda state, **which: calls.append((state, which)))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    read, write = generators(SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([parameter]))))[-1]
    write(read())
    assert calls == [(["state", expected], expected)]


# ---------------------------------------------------------------- in processes of their own

def in_child(recipe, folder, steps, torn=None):
    "Train with checkpoints in `folder` and leave the result there; `torn` is the share of a file at which to hang"
    torch.set_num_threads(1)
    write = resume.write_whole
    def hang(file, content):
        def stop(scrap, file):
            os.truncate(scrap, int(torn * len(content)))
            steps.value = 1000
            time.sleep(2 * LIMIT)
        resume.os.replace = stop
        write(file, content)
    if torn is not None: resume.write_whole = hang
    learn = make_learner(recipe, device="cpu").add_cbs(Counter(steps))
    record = train(recipe, progress=False, folder=folder, learn=learn, checkpoints=folder)
    torch.save({"network": weights(learn), "optimiser": plain(learn.opt.state_dict()), "record": record},
               Path(folder, "end.pt"))


@pytest.mark.parametrize("changes", [
    {}, {"method": "mce"}, {"accumulate": 3, "ema": 0.8, "precision": "bf16", "optimizer": "adamw", "lr": 0.005}])
def test_killed_at_ten_random_moments_a_training_ends_as_if_left_alone(changes, tmp_path, start):
    recipe, chance = replace(RECIPE, **{"epochs": 9, "limit": 80} | changes), random.Random(0)  # 9 epochs of 4 steps
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert finish(start(in_child, recipe, alone, CONTEXT.Value("i", 0))) == 0
    expected, = load_records(alone)
    file, positions, scraps = killed / f"{recipe.name}.ckpt", [], []
    for life in range(10):
        torn = chance.choice([0.0, 0.3, 0.9, 1.0]) if life in (1, 4, 6) else None  # share of the file that is written
        steps = CONTEXT.Value("i", 0)
        child = start(in_child, recipe, killed, steps, torn)
        goal = 1000 if torn is not None else chance.randint(1, 9)
        wait_until(lambda: steps.value >= goal or not child.is_alive())  # noqa: B023
        time.sleep(chance.uniform(0, 2) * expected["seconds_per_step"])
        child.kill()
        if finish(child) == 0: break  # it was quicker
        scraps.append(len(list(killed.glob("*.tmp"))))
        if file.exists(): positions.append(read_checkpoint(file)["epoch"])  # whole, with all its checksums
    assert positions == sorted(positions) and positions[-1] >= 2
    assert max(scraps) == 1 and all(scraps[life] for life in (1, 4, 6) if life < len(scraps))
    assert finish(start(in_child, recipe, killed, CONTEXT.Value("i", 0))) == 0
    assert same(*(torch.load(folder / "end.pt") | {"record": None} for folder in (alone, killed)))
    assert same(expected, *load_records(killed))
    assert sorted(path.name for path in killed.iterdir()) == sorted(["end.pt", f"{recipe.name}.json"])


def command_in_child(options, steps, waits):
    "`sumix_train` as from the shell, with a counter; it waits after four steps until a signal is noted"
    def wait(learn):
        while waits and learn.train_iter > 3 and not learn.checkpoint.noted: time.sleep(0.001)
    from sumix_nb.running.shell import sumix_train
    torch.set_num_threads(1)
    make = training.make_learner
    training.make_learner = lambda *arguments: make(*arguments).add_cbs([Counter(steps), Does(after_batch=wait)])
    sumix_train(options)


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)])
def test_the_command_stops_at_a_signal_and_goes_on_when_called_again(number, code, tmp_path, undisturbed, start):
    options = (f"--mixer cutmix --method sumix --width 4 --epochs 3 --bs 20 --limit 60 --lr 0.02 --device cpu "
               f"--out {tmp_path} --checkpoints {tmp_path / 'running'}").split()
    steps = CONTEXT.Value("i", 0)
    child = start(command_in_child, options, steps, True)
    wait_until(lambda: steps.value >= 4 or not child.is_alive())
    os.kill(child.pid, number)
    assert finish(child) == code and not list(tmp_path.glob("*.json"))
    assert read_checkpoint(tmp_path / "running" / f"{RECIPE.name}.ckpt")["epoch"] >= 1
    assert finish(start(command_in_child, options, steps, False)) == 0
    record, = load_records(tmp_path)
    assert not list((tmp_path / "running").iterdir()) and same(record["epochs"], undisturbed[0].epoch_log.epochs)


def in_group(rank, folder, stop_at, address):
    "One of two processes that train one network, each with its own mixtures; the second one gets the signal"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    learn = image_learner(Mix(CutMix(), seed=rank))
    learn.model = nn.parallel.DistributedDataParallel(learn.model)
    stoppers = [Signal(stop_at)] if rank == 1 and stop_at is not None else []
    quietly(learn, 3, Checkpoint(folder, "run"), *stoppers, seed=rank)
    losses = torch.tensor([float(loss) for loss in learn.recorder.losses])
    torch.save({"losses": losses, "network": weights(learn)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_go_on_each_with_its_own_chance(tmp_path, start):
    def together(folder, stop_at):
        folder.mkdir(exist_ok=True)
        address = tmp_path / f"meet {folder.name} {stop_at}"
        children = [start(in_group, rank, folder, stop_at, address) for rank in range(2)]
        assert [finish(child) for child in children] == [0, 0]
        return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    alone = together(tmp_path / "alone", None)
    assert not torch.equal(alone[0]["losses"], alone[1]["losses"])
    assert len(together(tmp_path / "stopped", 4)[0]["losses"]) == 5
    state = read_checkpoint(tmp_path / "stopped" / "run.ckpt")
    assert (state["epoch"], len(state["processes"])) == (1, 2)
    chances = [own["callbacks"]["Mix"][0]["generator"]["state of an object"] for own in state["processes"]]
    assert not torch.equal(*chances)
    assert same(together(tmp_path / "stopped", None), alone)
    shutil.copy(tmp_path / "alone" / "run.ckpt", tmp_path / "run.ckpt")
    refused(image_learner(Mix(CutMix(), seed=0)), tmp_path / "run.ckpt", "number of processes: 2 there, 1 here")
