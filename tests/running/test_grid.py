"Grids that are killed, that share a folder, that meet a full disk, and that run on Ray"
import _thread
import json
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import pytest

from sumix_nb.running import grid
from sumix_nb.running.grid import LocalEngine, claim, failure_file, failures, read_grid
from sumix_nb.running.grid import recipe_grid, run_grid, run_one, state_of, run_alone
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records, write_record
from sumix_nb.training.resume import read_checkpoint
from sumix_nb.training.train import train
from tests.conftest import CONTEXT, LIMIT, wait_until

TINY = {"width": 4, "limit": 60, "bs": 20, "lr": 0.02}
TWELVE = recipe_grid(mixer=["none", "cutmix", "mixup"], seed=range(4), epochs=8, **TINY)
ONE, TWO = recipe_grid(epochs=1, seed=[0, 1], **TINY)
HOT = Recipe(epochs=1, **TINY | {"lr": 1e30, "limit": 100})
LONG = Recipe(epochs=100000, **TINY)
GRID = ["-m", "sumix_nb.running.grid"]


def toml(file, **values):
    "Write a grid file of tiny runs"
    lines = [f"{name} = {json.dumps(value)}" for name, value in (TINY | values).items()]
    file.write_text("\n".join(lines))
    return file


def results(record):
    "What must not depend on how a run came about"
    names = ("name", "recipe", "accuracy", "reliability", "ratio_curve")
    epochs = [{key: value for key, value in epoch.items() if "seconds" not in key}
              for epoch in record["epochs"]]
    return [record[name] for name in names], epochs


def everything(folder):
    "The results in a folder, and proof that there is nothing else but locks"
    files = [path for path in Path(folder).rglob("*.*") if path.suffix != ".lock"]
    records = load_records(folder)
    assert sorted(files) == sorted(Path(folder, f"{record['name']}.json") for record in records)
    return [results(record) for record in records]


class Here:
    "An engine that trains in this process, one run at a time, and keeps the names of its runs"
    slots = 1

    def __init__(self, jobs=1, threads=1): self.begun, self.ended = [], []

    def __call__(self, recipe, options):
        self.begun.append(recipe.name)
        return grid.run_alone(recipe, 1, options)

    def end(self, number): self.ended.append(number)


@pytest.fixture
def here(monkeypatch):
    "Grids run in this process"
    engine = Here()
    monkeypatch.setattr(grid, "LocalEngine", lambda jobs, threads: engine)
    return engine


# ---------------------------------------------------------------- kills, and two grids at once

@pytest.fixture(scope="module")
def undisturbed():
    "The twelve runs without a grid, one after the other, and written nowhere"
    return [results(run_alone(recipe, 1, {})) for recipe in sorted(TWELVE, key=lambda recipe: recipe.name)]


class Noting(LocalEngine):
    "Writes down what it starts"
    def __init__(self, file, jobs, threads):
        super().__init__(jobs, threads)
        self.file = file

    def __call__(self, recipe, options):
        with open(self.file, "a") as file: print(recipe.name, file=file)
        return super().__call__(recipe, options)


def run_twelve(file, out, jobs=1, checkpoints=None):
    "In a child: the twelve runs as a grid"
    grid.LocalEngine = partial(Noting, file)
    run_grid(TWELVE, out, jobs, threads=1, quiet=True, checkpoints=checkpoints)


def test_killed_at_fifteen_moments_every_run_has_one_record(
        undisturbed, tmp_path, start):
    out, chance, done, killed = tmp_path / "records", random.Random(0), set(), 0
    for moment in range(16):
        file, jobs = tmp_path / str(moment), chance.choice([1, 2])
        file.touch()
        process = start(run_twelve, file, out, jobs, tmp_path / "running")
        if moment == 15: process.join()
        else:
            wait_until(lambda: file.read_text() or process.exitcode is not None)  # noqa: B023
            time.sleep(chance.uniform(0, 0.4))
            process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        begun = file.read_text().split()
        assert len(begun) == len(set(begun)) and not done & set(begun)
        states = {recipe.name: state_of(recipe, out) for recipe in TWELVE}
        assert set(states.values()) <= {"done", "waiting"}
        now = {name for name, state in states.items() if state == "done"}
        assert done <= now and len(set(begun) - now) <= jobs
        done = now
    assert killed == 15 and process.exitcode == 0 and everything(out) == undisturbed


def test_two_grids_share_a_folder_and_no_run_is_begun_twice(undisturbed, tmp_path, start):
    out, files = tmp_path / "records", [tmp_path / "one", tmp_path / "other"]
    pair = [start(run_twelve, file, out) for file in files]
    for process in pair: process.join()
    assert [process.exitcode for process in pair] == [0, 0] and everything(out) == undisturbed
    begun = [file.read_text().split() for file in files]
    assert all(begun) and sorted(sum(begun, [])) == sorted(recipe.name for recipe in TWELVE)


def start_and_wait(sender):
    "In a child: a child that lasts"
    with LocalEngine(1, 1).process() as pool:
        sender.send(pool.submit(os.getpid).result())
        time.sleep(600)


def test_a_child_ends_with_its_parent(start):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    parent = start(start_and_wait, sender)
    pid = receiver.recv()
    assert psutil.pid_exists(pid)
    parent.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize("number, group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stopped_grid_says_one_line_and_keeps_its_checkpoint(
        tmp_path, command, number, group):
    file, running = toml(tmp_path / "grid.toml", epochs=LONG.epochs), tmp_path / "running"
    started = command(*GRID, file, "--out", tmp_path, "--checkpoints", running)
    checkpoint = running / f"{LONG.name}.ckpt"
    wait_until(lambda: checkpoint.is_file() or started.poll() is not None)
    (os.killpg if group else os.kill)(started.pid, number)  # a terminal sends Ctrl-C to the group
    said, errors = started.communicate(timeout=LIMIT)
    assert started.returncode == 128 + number and said == "running 1\n", errors
    assert errors.endswith("sumix_grid: stopped; the same command goes on\n") and "Traceback" not in errors
    assert read_checkpoint(checkpoint)["epoch"] >= 1
    assert not [*tmp_path.glob("*.json")] and not (tmp_path / "failed").exists()


@pytest.mark.parametrize("number, state", [(signal.SIGTERM, "waiting"), (signal.SIGKILL, "failed")])
@pytest.mark.parametrize("kept", [False, True])
def test_sigterm_to_a_run_is_no_failure_and_sigkill_is(tmp_path, number, state, kept):
    "Also at once, before the child has begun to train"
    engine, recipe = LocalEngine(1, 1), Recipe(epochs=40, **TINY)
    checkpoint = tmp_path / "running" / f"{recipe.name}.ckpt"
    options = {"folder": tmp_path} | ({"checkpoints": checkpoint.parent} if kept else {})
    (tmp_path / "locks").mkdir()
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_one, recipe, tmp_path, engine, options)
        wait_until(checkpoint.is_file if kept else lambda: engine.children)
        os.kill(*engine.children.values(), number)
        assert run.result() == state == state_of(recipe, tmp_path)
    if state == "failed": assert "the process was killed" in failures([recipe], tmp_path)[0]
    elif kept:
        assert 0 < read_checkpoint(checkpoint)["epoch"] < 40
        assert run_one(recipe, tmp_path, engine, options) == "done" and not checkpoint.exists()


def test_a_grid_that_was_interrupted_can_be_run_again(tmp_path, here, monkeypatch):
    train = grid.train
    monkeypatch.setattr(grid, "train", lambda *_, **given: _thread.interrupt_main() or time.sleep(1))
    with pytest.raises(KeyboardInterrupt): run_grid([ONE, TWO], tmp_path, quiet=True)
    assert here.begun == [ONE.name] and here.ended == [signal.SIGTERM, signal.SIGKILL]
    monkeypatch.setattr(grid, "train", train)
    failed = failure_file(ONE, tmp_path)
    wait_until(failed.is_file)  # our `train` gives no record, and its thread outlives the interrupt by a second
    failed.unlink()
    assert len(run_grid([ONE, TWO], tmp_path, quiet=True)) == 2


SCRIPT = """
from sumix_nb.running.grid import recipe_grid, run_grid
{guard}run_grid(recipe_grid(width=4, limit=60, bs=20, epochs=1, seed=[0, 1]), "records")
"""


@pytest.mark.parametrize("guard", ["", "if __name__ == '__main__': "])
def test_a_script_needs_a_main_part_and_is_told_so(tmp_path, command, guard):
    (tmp_path / "study.py").write_text(SCRIPT.format(guard=guard))
    started = command("study.py", cwd=tmp_path)
    _, errors = started.communicate(timeout=LIMIT)
    assert (started.returncode == 0) == bool(guard), errors
    assert len([*tmp_path.rglob("*.json"), *tmp_path.rglob("*.txt")]) == (2 if guard else 0)
    if not guard: assert "if __name__ == '__main__':" in errors


# ---------------------------------------------------------------- disks and folders

def full(*arguments, **options): raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_grid_and_earlier_records_stay(tmp_path, here, monkeypatch):
    before = write_record(train(ONE, progress=False), tmp_path).read_bytes()
    for name in ("train", "write_whole"): monkeypatch.setattr(grid, name, full)
    with pytest.raises(OSError, match="No space left"): run_grid([ONE, TWO], tmp_path, quiet=True)
    assert Path(tmp_path, f"{ONE.name}.json").read_bytes() == before and here.begun == [TWO.name]
    monkeypatch.undo()
    assert len(run_grid([ONE, TWO], tmp_path, threads=1, quiet=True)) == 2
    assert not [*tmp_path.rglob("*.tmp")] and not failures([ONE, TWO], tmp_path)


def test_a_record_that_cannot_be_written_is_a_failure(tmp_path, here):
    (tmp_path / f"{ONE.name}.json").mkdir()  # so that no file can take its name
    assert run_grid([ONE], tmp_path, quiet=True) == []
    assert "IsADirectoryError" in failures([ONE], tmp_path)[0]


def test_a_cluster_keeps_the_checkpoint_until_there_is_a_record(tmp_path, monkeypatch):
    checkpoint, write = tmp_path / f"{ONE.name}.ckpt", grid.write_record
    options = {"checkpoints": tmp_path}  # no folder: the grid writes the record
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(grid, "write_record", full)
    assert run_one(ONE, tmp_path, Here(), options) == "failed" and checkpoint.is_file()
    failure_file(ONE, tmp_path).unlink()
    monkeypatch.setattr(grid, "write_record", write)
    assert run_one(ONE, tmp_path, Here(), options) == "done" and not checkpoint.exists()


def test_a_disk_that_is_full_for_the_runs_too_is_one_line_that_names_the_run(tmp_path, command):
    resource = pytest.importorskip("resource")
    record = write_record(train(ONE, progress=False), tmp_path)
    before, file = record.read_bytes(), toml(tmp_path / "grid.toml", epochs=1, seed=[0, 1])
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # bytes of a file
    started = command("-B", *GRID, file, "--out", tmp_path, preexec_fn=limit)
    _, errors = started.communicate(timeout=LIMIT)
    last = errors.splitlines()[-1]
    assert started.returncode == 1 and last.startswith("sumix_grid: ") and f"{TWO.name}.txt" in last
    assert record.read_bytes() == before and [*tmp_path.glob("*.json")] == [record]
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("options, message", [
    ({"data_dir": "x"}, "data_dir"), ({"every": 0}, "`every`"), ({"jobs": 0}, "`jobs`"),
    ({"workers": -1}, "`workers`"), ({"threads": 0}, "`threads`"), ({"log": "tensorbord"}, "`log`"),
    ({"checkpoints": __file__}, "File exists"), ({"out": __file__}, "File exists"),
    ({"device": "gpu"}, "`device`"), ({"device": "xpu:0"}, "`device`"), ({"path": "no"}, "no folder"),
    ({"engine": "slurm"}, "`engine`"), ({"gpus": 1}, "`gpus`"),
    ({"engine": "ray", "gpus": -1}, "`gpus`"), ({"engine": "ray", "log": "tensorboard"}, "`log`")])
def test_what_every_run_would_fail_with_is_an_error_before_the_first(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError, OSError), match=message):
        run_grid([HOT], **{"out": tmp_path} | options)
    assert not [*tmp_path.iterdir()]


def test_the_working_folder_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = grid.check_grid([HOT], "local", {"path": ".", "checkpoints": "running", "log": None})
    assert found == {"path": tmp_path, "checkpoints": tmp_path / "running"}


# ---------------------------------------------------------------- what is done, and what has failed

@pytest.mark.parametrize("change", [
    "", "[1]", "[" * 200000, {"name": TWO.name}, {"recipe": asdict(TWO)}, {"accuracy": None},
    {"accuracy": float("nan")}, {"epochs": []}, {"epochs": ["?"]}], ids=range(9))
def test_damaged_records_are_named_and_skipped(tmp_path, here, capsys, change):
    good = train(ONE, progress=False)
    text = change if isinstance(change, str) else json.dumps(good | change)
    file = tmp_path / f"{ONE.name}.json"
    for path in (file, tmp_path / "of_another_study.json"): path.write_text(text)
    assert run_grid([ONE], tmp_path) == here.begun == [] and file.read_text() == text
    with pytest.raises(SystemExit, match=f"^{file}: damaged, and skipped$"):
        grid.sumix_grid(str(toml(tmp_path / "grid.toml", epochs=1)), out=str(tmp_path))
    record, = run_grid([ONE], tmp_path, retry=True)
    assert results(record) == results(good) and file.with_suffix(".damaged").read_text() == text
    assert capsys.readouterr().out.split("\n") == ["damaged 1"] * 2 + ["running 1", "done 1", ""]


def test_one_failure_leaves_the_others_alone_and_waits_for_retry(tmp_path, here, capsys):
    record, = run_grid([HOT, ONE, HOT], tmp_path)
    assert record["name"] == ONE.name and here.begun == [HOT.name, ONE.name]
    assert capsys.readouterr().out.splitlines() == [
        "running 1 | waiting 1", "failed 1 | running 1", "done 1 | failed 1"]
    line, = failures([HOT, ONE], tmp_path)
    assert line.startswith(f"{failure_file(HOT, tmp_path)}: FloatingPointError: ")
    text = failure_file(HOT, tmp_path).read_text()
    assert "Traceback" in text and repr(HOT) in text and text.splitlines()[0] in line
    run_grid([HOT, ONE], tmp_path, quiet=True)
    assert here.begun == [HOT.name, ONE.name]
    run_grid([HOT, ONE], tmp_path, quiet=True, retry=True)
    assert here.begun == [HOT.name, ONE.name, HOT.name]


@pytest.mark.parametrize("recipe, state", [(ONE, "done"), (HOT, "failed")])
def test_what_another_grid_has_tried_in_the_meantime_is_not_tried_again(
        tmp_path, here, monkeypatch, recipe, state):
    alone = grid.run_alone

    def meanwhile(first, *options):
        monkeypatch.setattr(grid, "run_alone", alone)
        assert run_one(recipe, tmp_path, Here(), {}) == state
        return alone(first, *options)

    run_grid([recipe], tmp_path, quiet=True) if state == "failed" else None
    monkeypatch.setattr(grid, "run_alone", meanwhile)
    run_grid([TWO, recipe], tmp_path, quiet=True, retry=True)
    assert state_of(recipe, tmp_path) == state and here.begun[-1] == TWO.name


def test_a_busy_run_is_passed_over_and_waited_for(tmp_path, here, monkeypatch):
    (tmp_path / "locks").mkdir()
    held = claim(ONE, tmp_path)
    held.__enter__()
    monkeypatch.setattr(grid.time, "sleep", lambda seconds: held.__exit__(None, None, None))
    names = [record["name"] for record in run_grid([ONE, TWO], tmp_path, quiet=True)]
    assert here.begun == [TWO.name, ONE.name] and names == [ONE.name, TWO.name]


def test_threads_are_shared_out_among_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(grid, "usable_cores", lambda: 7)
    assert [LocalEngine(jobs).threads for jobs in (1, 2, 8)] == [7, 3, 1]


def test_reading_names_the_file(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text("seed = [0, 1]\n", encoding="utf-8-sig")
    assert [recipe.seed for recipe in read_grid(file)] == [0, 1]
    file.write_text("mixer = 'mixup'\nmixer_options = {quality = 1}\nalpha = [1, 1.0]\n")
    assert [recipe.mixer_options for recipe in read_grid(file)] == [{"quality": 1}]
    for text in ("a =", "runs = 1", "mixr = 1", "seed = []", "recipe = 'no'", "[[run]]", "[a]"):
        file.write_text(text)
        with pytest.raises(ValueError, match="grid.toml: "): read_grid(file)
    with pytest.raises(FileNotFoundError): read_grid(tmp_path / "none.toml")


# ---------------------------------------------------------------- on Ray

@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    for _ in range(5):  # on a busy machine Ray's own limit of 30 seconds is too short
        try: ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        except Exception: ray.shutdown()
        else: break
    if not ray.is_initialized(): pytest.skip("Ray does not start here")
    yield ray
    ray.shutdown()


def workers():
    "Processes that train on Ray"
    return [process for process in psutil.process_iter() if process.name().startswith("ray::train")]


def test_ray_gives_the_same_records_by_the_same_call(cluster, tmp_path):
    assert [grid.RayEngine(*given).slots for given in ((), (1, 1), (None, 2))] == [2, 1, 1]
    with pytest.raises(ValueError, match="fit into the cluster"): grid.RayEngine(gpus=1)
    recipes, folders = [TWELVE[0], TWELVE[4], HOT], [tmp_path / "ray", tmp_path / "local"]
    run_grid(recipes, folders[0], engine="ray", quiet=True)
    run_grid(recipes, folders[1], threads=1, quiet=True)
    found, expected = (list(map(results, load_records(folder))) for folder in folders)
    assert found == expected and len(found) == 2
    lines = [failures(recipes, folder)[0].rpartition("/")[2] for folder in folders]
    assert lines[0] == lines[1] and "FloatingPointError" in lines[0]
    assert "in run_alone" in failure_file(HOT, folders[0]).read_text()  # where it happened


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ray_tries_a_run_again_whose_worker_died(cluster, tmp_path, number):
    recipe = Recipe(epochs=400, **TINY)
    with ThreadPoolExecutor() as pool:
        options = {"engine": "ray", "quiet": True, "checkpoints": tmp_path}
        run = pool.submit(run_grid, [recipe, HOT], tmp_path, **options)
        wait_until((tmp_path / f"{recipe.name}.ckpt").is_file)
        for process in workers(): process.send_signal(number)
        record, = run.result()
    assert len(record["epochs"]) == 400 and state_of(HOT, tmp_path) == "failed"
    assert not (tmp_path / f"{recipe.name}.ckpt").exists()


@pytest.mark.slow
def test_ray_reports_a_worker_that_dies_too_often(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "run_alone", dies)
    assert run_grid([HOT], tmp_path, engine="ray", quiet=True) == []
    assert "WorkerCrashedError" in failures([HOT], tmp_path)[0]


def dies(*arguments): os._exit(1)


@pytest.mark.slow
def test_a_grid_that_ends_cancels_its_runs_on_ray(cluster, tmp_path):
    engine = grid.RayEngine()
    (tmp_path / "locks").mkdir()
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_one, LONG, tmp_path, engine, {"checkpoints": tmp_path})
        wait_until((tmp_path / f"{LONG.name}.ckpt").is_file)
        engine.end(signal.SIGTERM)
        assert run.result() == "waiting" and not (tmp_path / "failed").exists()
    wait_until(lambda: not workers())


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="pip install ray"):
        run_grid([ONE], tmp_path, engine="ray")
