"Processes that a test starts, and that end with it whatever happens"
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sumix_nb.training.train"])
LIMIT = 300  # seconds after which something hangs: nothing that is tested here takes so long


@pytest.fixture
def start():
    "`start(function, *arguments)` calls a function in another process; `finish(process)` waits for its exit code"
    children = []

    def begin(function, *arguments):
        children.append(CONTEXT.Process(target=function, args=arguments))
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


@contextmanager
def commands():
    "`command(*words, **environment)` starts Python with these words, in a group of processes that ends with the block"
    started = []

    def begin(*words, **environment):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        started.append(subprocess.Popen(
            [sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment))
        return started[-1]

    try: yield begin
    finally:
        for process in started:
            try: os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            process.communicate()


@pytest.fixture
def command():
    "As `commands`, until the test ends"
    with commands() as command: yield command
