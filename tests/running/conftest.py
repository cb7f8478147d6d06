"Processes of tests: whatever happens in a test, they end with it"
import multiprocessing.forkserver
import os
import signal
import subprocess
import time
from contextlib import suppress

import pytest

from sumix_nb.running.grid import CONTEXT

CONTEXT.set_forkserver_preload(["sumix_nb.running.grid"])
HANGS = 300  # seconds after which nothing will happen any more, even on a busy machine


@pytest.fixture
def command():
    "`command(*words)` starts a program in a process group of its own, which ends with the test"
    started = []

    def start(*words, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, start_new_session=True, **pipes | options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


SERVER = multiprocessing.forkserver._forkserver


def begin(facts, target, arguments):
    "In a child: start further children from the server of the tests, where all is imported already"
    vars(SERVER).update(facts, ensure_running=lambda: None)
    target(*arguments)


@pytest.fixture
def child():
    "`child(target, *arguments)` calls a function in a process that ends with the test"
    started = []

    def start(target, *arguments):
        SERVER.ensure_running()
        names = {"_forkserver_address", "_forkserver_authkey"} & {*vars(SERVER)}
        facts = {name: getattr(SERVER, name) for name in names}
        started.append(CONTEXT.Process(target=begin, args=(facts, target, arguments)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def wait_until():
    "`wait_until(condition)` returns when `condition()` holds; an error if it never does"
    def wait(condition):
        deadline = time.monotonic() + HANGS
        while not condition():
            assert time.monotonic() < deadline, "this never happens"
            time.sleep(0.01)
    return wait
