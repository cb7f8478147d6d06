"What stops a training in tests, and what is compared"
import signal
from functools import partial

import torch
from fastai.callback.core import Callback

CLOCKS = ("seconds", "seconds_per_step", "started", "start_epoch", "log", "peak_memory")


class Interrupt(Callback):
    "Raises RuntimeError in one event of one training step, counted from 0"
    order, only_watches = 70, True

    def __init__(self, step, name):
        self.step = step
        setattr(self, name, self.interrupt)

    def interrupt(self):
        if self.learn.train_iter >= self.step: raise RuntimeError("interrupted")


class Signal(Callback):
    "Sends a real signal to this process in one training step, or in the validation after it"
    only_watches = True

    def __init__(self, step, number=signal.SIGTERM, training=True):
        self.step, self.number, self.wanted, self.sent = step, number, training, False

    def before_batch(self):
        if self.learn.train_iter != self.step or self.learn.training != self.wanted or self.sent: return
        self.sent = True
        signal.raise_signal(self.number)


class Counter(Callback):
    "Counts training steps in memory that another process can see"
    run_valid, only_watches = False, True
    def __init__(self, steps): self.steps = steps
    def after_batch(self): self.steps.value += 1


class Does(Callback):
    "Calls functions with the Learner, each in its event"
    only_watches = True

    def __init__(self, **functions):
        for name, function in functions.items(): setattr(self, name, partial(self.call, function))

    def call(self, function): function(self.learn)


def same(one, other, path="state"):
    "Whether two values of tensors and built-in types are equal to the last bit; clocks are left out"
    assert type(one) is type(other), f"{path}: {type(one)}, {type(other)}"
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return all(same(one[key], other[key], f"{path}[{key!r}]") for key in one if key not in CLOCKS)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        return all(same(*pair, f"{path}[{i}]") for i, pair in enumerate(zip(one, other)))
    equal = torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other
    assert equal, path
    return True
