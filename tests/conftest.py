"Shared by all tests: recorded numbers, small batches, and processes that end with the test whatever happens"
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests run in two processes on two cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts us with `&` ignores Ctrl-C, our children too

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("SUMIX_GOLDEN", ROOT.parent / "shared" / "golden"))
CONTEXT, SERVER = multiprocessing.get_context("forkserver"), multiprocessing.forkserver._forkserver
CONTEXT.set_forkserver_preload(["sumix_nb.running.grid", "matplotlib.pyplot", "nbdev.test"])
LIMIT = 300  # seconds after which something hangs: nothing that is tested here takes so long


class Cases:
    "The cases of one recorded file: `cases[case, name]` is a tensor, or a Python number for a scalar"
    def __init__(self, path):
        with np.load(path, allow_pickle=False) as arrays: self.arrays = dict(arrays)
        self.names = sorted({key.split("__")[0] for key in self.arrays if "__" in key})

    def __getitem__(self, key):
        value = self.arrays["__".join(key)]
        return value.item() if value.ndim == 0 else torch.from_numpy(value)

    def __contains__(self, key): return "__".join(key) in self.arrays


@pytest.fixture(scope="session")
def golden():
    "`golden(name)` loads a recorded file, or skips the test where there is none"
    def load(name):
        path = GOLDEN / name
        if not path.exists(): pytest.skip(f"{name} is not there: set SUMIX_GOLDEN to the folder of recorded numbers")
        return Cases(path)
    return load


@pytest.fixture
def batch():
    "A small batch on odd shapes: images (7, 3, 10, 6) and class indices of 5 classes"
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, 10, 6, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3, 0])


def enter(facts, target, arguments):
    "In a child: start further children from the server of the tests, where all is imported already"
    vars(SERVER).update(facts, ensure_running=lambda: None)
    target(*arguments)


@pytest.fixture
def start():
    "`start(function, *arguments)` calls a function in another process; `finish(process)` waits for its exit code"
    children = []

    def begin(target, *arguments):
        SERVER.ensure_running()
        names = {"_forkserver_address", "_forkserver_authkey"} & {*vars(SERVER)}
        facts = {name: getattr(SERVER, name) for name in names}
        children.append(CONTEXT.Process(target=enter, args=(facts, target, arguments)))
        children[-1].start()
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.join()


def finish(child):
    "The exit code of a process that ends by itself"
    child.join(LIMIT)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def wait_until(condition):
    "Return when `condition()` holds; an error if it never does"
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "this never happens"
        time.sleep(0.001)


@contextmanager
def commands():
    "`command(*words, **environment)` starts Python with these words, in a group of processes that ends with the block"
    started = []

    def begin(*words, cwd=None, preexec_fn=None, **environment):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        started.append(subprocess.Popen(
            [sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, cwd=cwd, preexec_fn=preexec_fn,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment))
        return started[-1]

    try: yield begin
    finally:
        for process in started:
            with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def command():
    "As `commands`, until the test ends"
    with commands() as command: yield command


def pytest_addoption(parser):
    "`--slow` runs what takes minutes, too"
    parser.addoption("--slow", action="store_true", help="run tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    "Without `--slow`, slow tests are skipped"
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))
