"Grids that are killed, that share a folder, that meet a full disk, and that run on Ray"
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sumix_nb.running import grid
from sumix_nb.data.sources import usable_cores
from sumix_nb.running.grid import CONTEXT, Grid, LocalEngine, attempt, clock, read_grid, recipe_grid, seconds_left
from sumix_nb.running.grid import state_of
from sumix_nb.training.resume import read_checkpoint
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records, write_record
from sumix_nb.training.train import train

CONTEXT.set_forkserver_preload(["sumix_nb.running.grid"])
TINY = {"width": 4, "limit": 60, "bs": 20, "lr": 0.02}
TWELVE = recipe_grid(mixer=["none", "cutmix", "mixup"], seed=range(4), epochs=6, **TINY)
FILE = "\n".join([*(f"{name} = {value}" for name, value in TINY.items()), "epochs = 6",
                  'mixer = ["none", "cutmix", "mixup"]', "seed = [0, 1, 2, 3]"])
HOT = Recipe(epochs=1, **TINY | {"lr": 1e30, "limit": 100})


def results(record):
    "What must not depend on how a run came about"
    return record["name"], record["recipe"], record["accuracy"], record["reliability"], record["ratio_curve"], [
        {key: value for key, value in epoch.items() if "seconds" not in key} for epoch in record["epochs"]]


def everything(folder):
    "The results in a folder, and proof that there is nothing else but locks"
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.parent.name != "locks"]
    records = load_records(folder)
    assert sorted(files) == sorted(Path(folder, f"{record['name']}.json") for record in records)
    return [results(record) for record in records]


@pytest.fixture(scope="module")
def undisturbed():
    "The twelve runs, trained one after the other in one process, and written nowhere"
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=train_alone, args=(sender,))
    child.start()
    found = receiver.recv()
    child.join()
    return found


def train_alone(sender):
    "In a child: the twelve runs without a grid"
    sender.send([results(attempt(recipe, threads=1)) for recipe in sorted(TWELVE, key=lambda recipe: recipe.name)])


def command(file, out, *words):
    "A grid in a process group of its own"
    return subprocess.Popen([sys.executable, "-m", "sumix_nb.running.grid", file, "--out", out, "--threads", "1", *words],
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_at_ten_random_moments_every_run_has_one_record(undisturbed, tmp_path):
    file, out, chance, seen = tmp_path / "grid.toml", tmp_path / "records", random.Random(0), [0]
    file.write_text(FILE)
    for _ in range(10):
        started = command(file, out)
        assert any("running 1" in line for line in started.stdout)  # reads until a run has begun
        time.sleep(chance.uniform(0, 1.5))
        assert started.poll() is None
        os.killpg(started.pid, signal.SIGKILL)
        started.communicate()
        seen.append(len([recipe for recipe in TWELVE if state_of(recipe, out) == "done"]))
        assert all(state_of(recipe, out) in ("done", "open") for recipe in TWELVE)
    assert seen == sorted(seen) and 0 < seen[-1] < 12
    said, _ = (last := command(file, out)).communicate()
    assert last.returncode == 0, said
    assert everything(out) == undisturbed


class Noting(LocalEngine):
    "Writes down what it starts, one run at a time"
    def __init__(self, file):
        super().__init__(threads=1)
        self.file = file

    def start(self, recipe, options):
        with open(self.file, "a") as file: print(recipe.name, file=file)
        return super().start(recipe, options)

    def wait(self, runs, timeout):
        assert len(runs) == self.slots == 1
        return super().wait(runs, timeout)


def run_twelve(file, out):
    "In a child: the twelve runs as a grid"
    Grid(TWELVE, out, Noting(file)).run(quiet=True)


def test_two_grids_share_a_folder_and_no_run_is_begun_twice(undisturbed, tmp_path):
    out, files = tmp_path / "records", [tmp_path / "one", tmp_path / "other"]
    pair = [CONTEXT.Process(target=run_twelve, args=(file, out)) for file in files]
    for child in pair: child.start()
    for child in pair: child.join()
    assert [child.exitcode for child in pair] == [0, 0]
    assert everything(out) == undisturbed
    begun = [file.read_text().split() for file in files]
    assert all(begun) and sorted(sum(begun, [])) == sorted(recipe.name for recipe in TWELVE)


def test_a_run_is_taken_over_from_a_grid_that_dies(tmp_path):
    recipe, = recipe_grid(epochs=300, **TINY)
    file = tmp_path / "grid.toml"
    file.write_text("\n".join([*(f"{name} = {value}" for name, value in TINY.items()), "epochs = 300"]))
    other = command(file, tmp_path, "--checkpoints", str(tmp_path / "running"))
    deadline = time.monotonic() + 120
    while not (tmp_path / "running" / f"{recipe.name}.ckpt").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ours = Grid([recipe], tmp_path, LocalEngine(threads=1))
    ours.begin(recipe.name)
    assert ours.named("waiting") == [recipe.name] and not ours.running
    os.killpg(other.pid, signal.SIGKILL)
    other.communicate()
    while not ours.running:
        assert time.monotonic() < deadline
        ours.begin(recipe.name)
        time.sleep(0.01)
    ours.stop()
    assert state_of(recipe, tmp_path) == "open"


def test_sigterm_ends_the_grid_and_its_run_with_a_checkpoint(tmp_path):
    recipe, = recipe_grid(epochs=100000, **TINY)
    file, running = tmp_path / "grid.toml", tmp_path / "running"
    file.write_text("\n".join([*(f"{name} = {value}" for name, value in TINY.items()), "epochs = 100000"]))
    started = command(file, tmp_path, "--checkpoints", str(running))
    deadline = time.monotonic() + 120
    while not (running / f"{recipe.name}.ckpt").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.terminate()
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM, said
    assert read_checkpoint(running / f"{recipe.name}.ckpt")["epoch"] >= 1
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "failed").exists()


def test_a_child_ends_with_its_parent(tmp_path):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    parent = CONTEXT.Process(target=start_and_wait, args=(sender, tmp_path))
    parent.start()
    pid = receiver.recv()
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start_and_wait(sender, folder):
    "In a child: a run that lasts"
    started = LocalEngine(threads=1).start(recipe_grid(epochs=100000, **TINY)[0], {})
    sender.send(started.process.pid)
    time.sleep(600)


def test_a_full_disk_ends_the_grid_and_earlier_records_stay(tmp_path, monkeypatch):
    recipes = recipe_grid(epochs=1, seed=[0, 1], **TINY)
    train(recipes[0], progress=False, folder=tmp_path)
    before = Path(tmp_path, f"{recipes[0].name}.json").read_bytes()
    def full(*arguments, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr(grid, "write_record", full)
    monkeypatch.setattr(LocalEngine, "same_disk", False)
    runs = Grid(recipes, tmp_path, LocalEngine(threads=1))
    with pytest.raises(OSError, match="No space left"): runs.run(quiet=True)
    assert not runs.running and Path(tmp_path, f"{recipes[0].name}.json").read_bytes() == before
    monkeypatch.undo()
    assert len(Grid(recipes, tmp_path, LocalEngine(threads=1)).run(quiet=True)) == 2
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_record_that_a_child_cannot_write_is_a_failure_and_ends_the_grid_if_that_cannot_be_written_either(tmp_path):
    recipe, = recipe_grid(epochs=1, **TINY)
    (tmp_path / "failed").write_text("in the way of the folder")
    (tmp_path / f"{recipe.name}.json").mkdir() # so that no file can take its name
    with pytest.raises(OSError): Grid([recipe], tmp_path, LocalEngine(threads=1)).run(quiet=True)


ORDINARY = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(ORDINARY) and shutil.which("setpriv") is None, reason="the administrator may write anywhere")
@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_folder_is_one_line_and_earlier_records_stay(tmp_path, begun):
    out, file = tmp_path / "out", tmp_path / "grid.toml"
    out.mkdir()
    first, _ = recipe_grid(epochs=1, seed=[0, 1], **TINY)
    record = write_record(train(first, progress=False), out)
    before = record.read_bytes()
    if begun: (out / "locks").mkdir()  # as an earlier grid left it
    file.write_text("epochs = 1\nseed = [0, 1]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in TINY.items()))
    out.chmod(0o500)
    done = subprocess.run([*ORDINARY, sys.executable, "-m", "sumix_nb.running.grid", file, "--out", out],
                          capture_output=True, text=True)
    out.chmod(0o700)
    assert done.returncode == 1 and "Permission denied" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("sumix_grid: ") and str(out) in done.stderr
    assert record.read_bytes() == before and [*out.glob("*.json")] == [record] and not [*out.rglob("*.tmp")]


def test_a_folder_that_is_none_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "grid.toml").write_text(FILE)
    with pytest.raises(SystemExit, match="sumix_grid: .*file"):
        grid.sumix_grid(str(tmp_path / "grid.toml"), out=str(tmp_path / "file"))


def test_a_mended_run_forgets_its_failure(tmp_path):
    recipe, = recipe_grid(epochs=1, **TINY)
    (tmp_path / "failed").mkdir()
    failed = tmp_path / "failed" / f"{recipe.name}.json"
    failed.write_text(json.dumps({"name": recipe.name, "error": "x", "recipe": {}}))
    assert Grid([recipe], tmp_path).run(quiet=True) == [] and failed.exists()
    record, = Grid([recipe], tmp_path, LocalEngine(threads=1), retry=True).run(quiet=True)
    assert record["name"] == recipe.name and not failed.exists()


def test_what_another_grid_has_mended_is_not_run_again(tmp_path):
    recipe, = recipe_grid(epochs=1, **TINY)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / f"{recipe.name}.json").write_text(json.dumps({"name": recipe.name, "error": "x"}))
    runs = Grid([recipe], tmp_path, LocalEngine(threads=1), retry=True)
    assert runs.named("waiting") == [recipe.name]
    train(recipe, progress=False, folder=tmp_path)  # by the other
    runs.begin(recipe.name)
    assert not runs.running and runs.named("done") == [recipe.name]


def test_what_another_grid_has_tried_again_is_not_tried_a_third_time(tmp_path):
    Grid([HOT], tmp_path, LocalEngine(threads=1)).run(quiet=True)
    pair = [Grid([HOT], tmp_path, LocalEngine(threads=1), retry=True) for _ in range(2)]
    first = (tmp_path / "failed" / f"{HOT.name}.json").stat().st_mtime_ns
    pair[0].run(quiet=True)
    second = (tmp_path / "failed" / f"{HOT.name}.json").stat().st_mtime_ns
    pair[1].begin(HOT.name)
    assert first < second and not pair[1].running and pair[1].named("failed") == [HOT.name]


class Interrupted(LocalEngine):
    "Ctrl-C, the first time that it waits"
    asked = 0

    def wait(self, runs, timeout):
        self.asked += 1
        if self.asked == 1: raise KeyboardInterrupt
        return super().wait(runs, timeout)


def test_a_grid_that_was_interrupted_can_be_run_again(tmp_path):
    recipe, = recipe_grid(epochs=1, **TINY)
    runs = Grid([recipe], tmp_path, Interrupted(threads=1))
    with pytest.raises(KeyboardInterrupt): runs.run(quiet=True)
    assert runs.named("waiting") == [recipe.name] and not runs.running
    record, = runs.run(quiet=True)
    assert record["name"] == recipe.name


def test_a_run_that_is_stopped_by_sigterm_is_no_failure_and_goes_on(tmp_path):
    recipe, = recipe_grid(epochs=200, **TINY)
    runs = Grid([recipe], tmp_path, LocalEngine(threads=1), checkpoints=tmp_path / "running")
    runs.begin(recipe.name)
    (started,), file = runs.running, tmp_path / "running" / f"{recipe.name}.ckpt"
    deadline = time.monotonic() + 120
    while not file.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.process.terminate()
    runs.finish(started)
    assert runs.named("waiting") == [recipe.name] and not (tmp_path / "failed").exists() and not runs.durations
    stopped = read_checkpoint(file)["epoch"]
    record, = runs.run(quiet=True)
    assert 0 < stopped < 200 == len(record["epochs"]) and not file.exists()


SCRIPT = """
from sumix_nb.running.grid import Grid, recipe_grid
{guard}Grid(recipe_grid(width=4, limit=60, bs=20, epochs=1, seed=[0, 1]), "records").run()
"""


@pytest.mark.parametrize("guard", ["", "if __name__ == '__main__': "])
def test_a_script_needs_a_main_part_and_is_told_so(tmp_path, guard):
    (tmp_path / "study.py").write_text(SCRIPT.format(guard=guard))
    done = subprocess.run([sys.executable, "study.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == bool(guard), done.stderr
    assert len([*tmp_path.rglob("*.json")]) == (2 if guard else 0)
    if not guard: assert done.stderr.count("RuntimeError: ") == 2 and '`if __name__ == "__main__":`' in done.stderr


def test_on_another_disk_the_checkpoint_is_kept_until_there_is_a_record(tmp_path, monkeypatch):
    recipe, = recipe_grid(epochs=1, **TINY)
    monkeypatch.setattr(LocalEngine, "same_disk", False)
    runs, write = Grid([recipe], tmp_path, LocalEngine(threads=1), checkpoints=tmp_path), grid.write_record
    checkpoint = tmp_path / f"{recipe.name}.ckpt"
    def full(*arguments): raise OSError(28, "No space left on device")
    monkeypatch.setattr(grid, "write_record", full)
    with pytest.raises(OSError): runs.run(quiet=True)
    assert checkpoint.is_file()
    monkeypatch.setattr(grid, "write_record", write)
    assert len(runs.run(quiet=True)) == 1 and not checkpoint.exists()


@pytest.mark.parametrize("options, message", [
    ({"data_dir": "x"}, "options must be among .*data_dir"), ({"every": 0}, "`every`"),
    ({"log": "tensorbord"}, "`log`"), ({"device": "gpu"}, "`device` must be known"),
    ({"device": "xpu:0"}, "`device` must be one of this machine"), ({"path": "nowhere"}, "no folder nowhere")])
def test_what_every_run_would_fail_with_is_an_error_before_the_first(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message): Grid([HOT], tmp_path, **options)
    assert not [*tmp_path.iterdir()]


def test_the_working_folder_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = Grid([HOT], "records", path=".", checkpoints="running")
    assert runs.options == {"path": tmp_path, "checkpoints": tmp_path / "running", "folder": tmp_path / "records"}


def test_what_became_of_a_run_is_told_whatever_has_happened_to_the_file(tmp_path):
    (tmp_path / "grid.toml").write_text("epochs = 1\nseed = [0, 1, 2, 3]\n" + "".join(
        f"{name} = {value}\n" for name, value in TINY.items()))
    recipes = recipe_grid(epochs=1, seed=range(4), **TINY)
    (tmp_path / "failed").mkdir()
    files = [tmp_path / f"{recipes[0].name}.json", *(tmp_path / "failed" / f"{r.name}.json" for r in recipes[1:])]
    for file, text in zip(files, ("{", "{", json.dumps({"name": "x", "recipe": {}}), "{}")): file.write_text(text)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(SystemExit) as told:
        grid.sumix_grid(str(tmp_path / "grid.toml"), out=str(tmp_path))
    lines = told.value.code.splitlines()
    assert [line.split(": ")[0].split(" is not")[0] for line in lines] == list(map(str, files))
    assert "damaged" in lines[0] and "not a whole record" in lines[1] and "no record of a failure" in lines[2]
    with pytest.warns(UserWarning): runs = Grid(recipes, tmp_path)
    for file in files[1:]: file.unlink()  # as another grid does that has mended them
    assert runs.failures() == [f"{files[0]}: damaged, and skipped"]


def test_a_disk_that_is_full_for_the_runs_too_is_one_line_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    first, second = recipe_grid(epochs=1, seed=[0, 1], **TINY)
    record = write_record(train(first, progress=False), tmp_path)
    before = record.read_bytes()
    (tmp_path / "grid.toml").write_text("epochs = 1\nseed = [0, 1]\n" + "".join(
        f"{name} = {value}\n" for name, value in TINY.items()))
    done = subprocess.run([sys.executable, "-B", "-m", "sumix_nb.running.grid", tmp_path / "grid.toml", "--out", tmp_path],
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),  # bytes a file
                          capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("sumix_grid: ") and f"{second.name}.json" in last
    assert record.read_bytes() == before and not [*tmp_path.rglob("*.tmp")]
    assert [*tmp_path.glob("*.json")] == [record]


def test_records_can_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try: file = write_record({"name": "x"}, tmp_path)
    finally: os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


def test_threads_are_shared_out_among_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr(grid, "usable_cores", lambda: 7)
    assert [LocalEngine(jobs).threads for jobs in (1, 2, 8)] == [7, 3, 1]
    if hasattr(os, "sched_getaffinity"): assert usable_cores() == len(os.sched_getaffinity(0))


def test_damaged_records_are_named_and_skipped(tmp_path):
    recipes = recipe_grid(epochs=1, seed=[0, 1], **TINY)
    damaged = tmp_path / f"{recipes[0].name}.json"
    for file in (damaged, tmp_path / "of_another_study.json"): file.write_text('{"name": ')
    with pytest.warns(UserWarning, match=recipes[0].name): runs = Grid(recipes, tmp_path, LocalEngine(threads=1))
    record, = runs.run(quiet=True)
    assert record["name"] == recipes[1].name and runs.named("damaged") == [recipes[0].name]
    assert damaged.read_text() == '{"name": '


def test_one_failure_leaves_the_others_alone(tmp_path):
    good, = recipe_grid(epochs=1, **TINY)
    runs = Grid([HOT, good, HOT], tmp_path, LocalEngine(threads=1))
    record, = runs.run(quiet=True)
    assert record["name"] == good.name and runs.named("failed") == [HOT.name] and len(runs.states) == 2
    failure, = load_records(tmp_path / "failed")
    assert failure["error"].startswith("FloatingPointError") and "Traceback" in failure["traceback"]


def test_progress_is_rewritten_in_a_terminal_and_added_elsewhere(capsys, monkeypatch):
    counts = {"done": 1, "running": 1, "waiting": 2}
    board = grid.Board()
    for left in (None, 60.0): board.show(counts, {"a run": 1.0}, left)
    assert capsys.readouterr().out == "done 1 | running 1 | waiting 2\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    board = grid.Board()
    for left in (None, 60.0): board.show(counts, {"a run": 3661.0}, left)
    first, second = "done 1 | running 1 | waiting 2", "done 1 | running 1 | waiting 2 | about 0:01:00 left"
    row = "\n  1:01:01  a run\n"
    assert capsys.readouterr().out == f"{first}{row}\x1b[2F\x1b[J{second}{row}"
    grid.Board(quiet=True).show(counts, {}, None)
    assert capsys.readouterr().out == ""


def test_estimates():
    assert seconds_left([10.0], [4.0], 0) == 6 and seconds_left([10.0], [], 2) == 20 and clock(59.6) == "0:01:00"


def test_reading_names_the_file(tmp_path):
    Path(tmp_path, "grid.toml").write_text("seed = [0, 1]\n", encoding="utf-8-sig")
    assert [recipe.seed for recipe in read_grid(tmp_path / "grid.toml")] == [0, 1]
    Path(tmp_path, "grid.toml").write_text("mixer = 'mixup'\nmixer_options = {quality = 1}\nalpha = [1, 1.0]\n")
    assert [recipe.mixer_options for recipe in read_grid(tmp_path / "grid.toml")] == [{"quality": 1}]
    for content in ("a =", "runs = 1", "mixr = 'cutmix'", "seed = []", "recipe = 'no'", "epochs = 0", "[[run]]", "[a]"):
        Path(tmp_path, "grid.toml").write_text(content)
        with pytest.raises(ValueError, match="grid.toml: "): read_grid(tmp_path / "grid.toml")
    with pytest.raises(FileNotFoundError): read_grid(tmp_path / "none.toml")


# ---------------------------------------------------------------- on Ray

@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_ray_gives_the_same_records(undisturbed, cluster, tmp_path):
    Grid(TWELVE, tmp_path, grid.RayEngine(cpus=1)).run(quiet=True)
    assert everything(tmp_path) == undisturbed


def test_ray_tries_a_run_again_whose_worker_died(cluster, tmp_path):
    import psutil
    recipe, = recipe_grid(epochs=60, **TINY)
    runs = Grid([recipe, HOT], tmp_path, grid.RayEngine(cpus=1))
    for name in runs.named("waiting"): runs.begin(name)
    def busy(): return [process for process in psutil.process_iter() if process.name().startswith("ray::attempt")]
    deadline = time.monotonic() + 120
    while not busy():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in busy(): process.kill()
    record, = runs.run(quiet=True)
    assert record["name"] == recipe.name and runs.named("failed") == [HOT.name]


def test_ray_reports_a_worker_that_dies_too_often(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "attempt", dies)
    engine = grid.RayEngine(cpus=1, retries=1)
    runs = Grid([HOT], tmp_path, engine)
    assert runs.run(quiet=True) == [] and runs.named("failed") == [HOT.name]
    failure, = load_records(tmp_path / "failed")
    assert "WorkerCrashedError" in failure["error"] and failure["recipe"]["lr"] == 1e30


def dies(recipe, **options): os._exit(1)


def test_ray_tries_a_run_again_that_was_stopped_by_sigterm(cluster, tmp_path):
    import psutil
    recipe, = recipe_grid(epochs=400, **TINY)
    runs, file = Grid([recipe], tmp_path, grid.RayEngine(cpus=1), checkpoints=tmp_path), f"{recipe.name}.ckpt"
    runs.begin(recipe.name)
    deadline = time.monotonic() + 120
    while not (tmp_path / file).is_file():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in psutil.process_iter():
        if process.name().startswith("ray::attempt"): process.terminate()
    record, = runs.run(quiet=True)
    assert len(record["epochs"]) == 400 and not (tmp_path / "failed").exists() and not (tmp_path / file).exists()


def test_ray_says_what_was_raised_in_a_worker(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "attempt", refuses)
    assert Grid([HOT], tmp_path, grid.RayEngine(cpus=1)).run(quiet=True) == []
    failure, = load_records(tmp_path / "failed")
    assert failure["error"] == "ModuleNotFoundError: No module named 'timm'" and "in refuses" in failure["traceback"]


def refuses(recipe, **options): raise ModuleNotFoundError("No module named 'timm'")


def test_ray_is_given_as_many_runs_as_the_cluster_holds(cluster):
    assert [grid.RayEngine(cpus=cpus).slots for cpus in (0.5, 1, 2)] == [4, 2, 1]
    with pytest.warns(UserWarning, match="no machine of the cluster has 1 cores and 1 GPUs"):
        assert grid.RayEngine(gpus=1).slots == 1


def test_engines_check_their_arguments(monkeypatch):
    for options in ({"jobs": 0}, {"jobs": 1.5}, {"threads": 0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))): LocalEngine(**options)
    for options in ({"cpus": -1}, {"gpus": "one"}, {"retries": -1}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))): grid.RayEngine(**options)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"sumix_nb\[grid\]"): grid.RayEngine()


def test_a_failure_out_of_a_callback_is_one_line(tmp_path):
    recipe = Recipe(**TINY | {"lr": 1e12}, mixer="cutmix", method="sumix", epochs=3)
    runs = Grid([recipe], tmp_path, LocalEngine(threads=1))
    runs.run(quiet=True)
    line, = runs.failures()
    assert "\n" not in line and f"{recipe.name}.json: FloatingPointError: " in line and "not finite: lower" in line
