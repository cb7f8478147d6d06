"What TensorBoard and Weights & Biases are given, read back from their files"
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (teaches `Learner` `lr_find`)

from sumix_nb.training.recipe import Recipe
from sumix_nb.training.trackers import TRACKERS, LogShares, tracking
from sumix_nb.training.train import make_learner, train
from tests.conftest import ROOT, wait_until
from tests.training.oracles import Does, Interrupt

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                  reason="trackers need pip install tensorboard wandb")
wandb = pytest.importorskip("wandb", reason="trackers need pip install tensorboard wandb")
RECIPE = Recipe(mixer="cutmix", method="sumix", width=4, epochs=3, bs=20, limit=60, lr=0.02)
STEPS = 9  # 3 epochs of 3


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "No server, no login, and no folder but our own"
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT"): monkeypatch.delenv(name, raising=False)
    yield
    wandb.finish()


def chunks(data):
    "The records of a `.wandb` file: seven bytes, then LevelDB's log format, in blocks of 32 KiB"
    position, whole = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7: position += left
        if position + 7 > len(data): return
        _, length, kind = struct.unpack("<IHB", data[position:position + 7])
        whole += data[position + 7:position + 7 + length]
        if position + 7 + length > len(data): return  # not yet written
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def offline_run(folder):
    "What is in the only run of a folder, once its end is written, which is done by another process"
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    wait_until(lambda: read_run(file).exit_code is not None)
    return read_run(file)


def read_run(file):
    "Steps -> values, the settings, project, name and exit code"
    from wandb.proto.wandb_internal_pb2 import Record
    found = SimpleNamespace(history={}, config={}, exit_code=None)
    for chunk in chunks(file.read_bytes()):
        record = Record.FromString(chunk)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for item in record.history.item:
                values = found.history.setdefault(record.history.step.num, {})
                values[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            found.config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
        if kind == "run": found.name, found.project = record.run.display_name, record.run.project
        if kind == "exit": found.exit_code = record.exit.exit_code
    return found


def tensorboard_run(folder):
    sizes = {"histograms": 0, "scalars": 0}
    return accumulator.EventAccumulator(str(folder), size_guidance=sizes).Reload()


def steps_of(run, name): return [event.step for event in run.Scalars(name)]


def run(folder, log, fail_at=None, every=1):
    learn = make_learner(RECIPE, device="cpu")
    if fail_at is not None: learn.add_cb(Interrupt(fail_at, "before_batch"))
    options = {"checkpoints": folder / "running", "every": every, "log": log}
    record = train(RECIPE, folder=folder, progress=False, learn=learn, **options)
    return learn, record


def lasting(record): return [{k: v for k, v in epoch.items() if "second" not in k} for epoch in record["epochs"]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory): return run(tmp_path_factory.mktemp("plain"), None)


def test_tensorboard_gets_losses_metrics_both_histograms_and_the_terms(tmp_path, plain):
    learn, terms = make_learner(RECIPE, device="cpu"), []
    learn.add_cb(Does(after_batch=lambda learn: learn.training and terms.append(learn.sumix.terms)))
    train(RECIPE, folder=tmp_path, progress=False, learn=learn, log="tensorboard")
    found = tensorboard_run(tmp_path / "tensorboard" / RECIPE.name)
    assert steps_of(found, "train_loss") == steps_of(found, "lr_0") == list(range(1, STEPS + 1))
    for name in ("valid_loss", "accuracy"):
        assert [event.step for event in found.Scalars(name)] == [3, 6, 9]
        for event, epoch in zip(found.Scalars(name), plain[1]["epochs"]):
            assert event.value == pytest.approx(epoch[name], rel=1e-6)
    for name in ("lam", "ratio"):
        for event, epoch in zip(found.Histograms(name), plain[1]["epochs"], strict=True):
            assert event.histogram_value.num == 60
            assert event.histogram_value.sum / 60 == pytest.approx(epoch[name], rel=1e-5)
    for event, epoch in zip(found.Scalars("shift"), plain[1]["epochs"], strict=True):
        assert event.value == pytest.approx(epoch["shift"], rel=1e-5)
    for name in ("mixed_ce", "regulariser"):
        means = [sum(getattr(term, name).item() for term in terms[i:i + 3]) / 3 for i in (0, 3, 6)]
        assert [event.value for event in found.Scalars(name)] == pytest.approx(means, rel=1e-5)


def test_wandb_gets_losses_metrics_and_both_histograms(tmp_path, plain):
    run(tmp_path, "wandb")
    found = offline_run(tmp_path)
    assert (found.name, found.project, found.exit_code) == (RECIPE.name, "sumix_nb", 0)
    assert found.config["mixer"] == "cutmix" and found.config["xi"] == 0.5
    assert [step for step, values in found.history.items() if "train_loss" in values] == list(range(STEPS))
    ends = {step: values for step, values in found.history.items() if "valid_loss" in values}
    assert list(ends) == [2, 5, 8] and [values["epoch"] for values in ends.values()] == pytest.approx([1, 2, 3])
    for values, epoch in zip(ends.values(), plain[1]["epochs"]):
        assert values["accuracy"] == pytest.approx(epoch["accuracy"])
        for name in ("lam", "ratio"):
            counts, bins = (values.get(f"{name}.{part}", values.get(name, {}).get(part)) for part in ("values", "bins"))
            assert sum(counts) == 60 and len(counts) == 40 and (bins[0], bins[-1]) == (0, 1)
            mean = sum(n * (low + high) / 2 for n, low, high in zip(counts, bins, bins[1:])) / 60
            assert mean == pytest.approx(epoch[name], abs=1 / 80)


def interrupted(tmp_path, log, fail_at, every):
    "A run that is stopped, and the folder of its wandb run put aside"
    with pytest.raises(RuntimeError, match="interrupted"): run(tmp_path, log, fail_at, every)
    if log == "wandb": assert offline_run(tmp_path).exit_code == 1 and max(offline_run(tmp_path).history) == 6
    for folder in tmp_path.glob("wandb/offline-run-*"): folder.rename(tmp_path / "before")


def test_a_stopped_run_goes_on_in_tensorboard(tmp_path, plain):
    interrupted(tmp_path, "tensorboard", fail_at=7, every=2)
    assert lasting(run(tmp_path, "tensorboard")[1]) == lasting(plain[1])
    found = tensorboard_run(tmp_path / "tensorboard" / RECIPE.name)
    assert steps_of(found, "train_loss") == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9]  # step 7 is repeated
    values = [event.value for event in found.Scalars("train_loss")]
    assert values[6] == values[7]
    assert steps_of(found, "accuracy") == [event.step for event in found.Histograms("ratio")] == [3, 6, 9]


@pytest.mark.parametrize("first", TRACKERS)
def test_a_stopped_run_goes_on_in_wandb_with_its_own_steps_and_epochs(tmp_path, plain, first):
    interrupted(tmp_path, first, fail_at=7, every=1)
    _, record = run(tmp_path, "wandb")
    assert lasting(record) == lasting(plain[1])
    after = offline_run(tmp_path).history
    assert [step for step, values in after.items() if "train_loss" in values] == [6, 7, 8]
    assert after[8]["epoch"] == pytest.approx(3) and after[8]["accuracy"] == pytest.approx(record["accuracy"])
    assert after[6]["epoch"] == pytest.approx(7 / 3) and any(name.startswith("ratio") for name in after[8])


@pytest.mark.parametrize("logged", [False, True])
def test_a_run_that_is_under_way_is_used_and_left_open(tmp_path, logged):
    tmp_path.joinpath("mine").mkdir()
    mine = wandb.init(project="a sweep", name="seventh", dir=tmp_path / "mine")
    for n in range(5 * logged): wandb.log({"images": n})
    run(tmp_path, "wandb")
    assert wandb.run is mine and mine.config["mixer"] == "cutmix" and not (tmp_path / "wandb").exists()
    wandb.finish()
    history = offline_run(tmp_path / "mine").history
    ends = [step for step, values in history.items() if "accuracy" in values]
    assert ends == [step + 5 * logged for step in (2, 5, 8)]
    for step, epoch in zip(ends, (1, 2, 3)):
        assert history[step]["epoch"] == pytest.approx(epoch) and any(name.startswith("lam") for name in history[step])


@pytest.mark.parametrize("log", TRACKERS)
def test_validation_writes_nothing(tmp_path, log):
    learn = make_learner(RECIPE, device="cpu")
    with learn.no_bar(), learn.no_logging(), tracking(learn, log, "run", {}, tmp_path):
        learn.validate()
        learn.fit(1)
        learn.validate()
        learn.get_preds()
    if log == "tensorboard":
        assert [event.step for event in tensorboard_run(tmp_path / "tensorboard" / "run").Histograms("lam")] == [3]
    else:
        history = offline_run(tmp_path).history
        assert sum(any(name.startswith("lam") for name in values) for values in history.values()) == 1


def test_a_second_tracker_is_refused(tmp_path):
    learn = make_learner(RECIPE, device="cpu")
    with tracking(learn, "tensorboard", "run", {}, tmp_path), pytest.raises(ValueError, match="no tracker of its own"):
        with tracking(learn, "wandb", "run", {}, tmp_path): pass


@pytest.mark.slow
def test_without_login_the_command_ends_with_one_line(tmp_path):
    words = f"--width 4 --epochs 1 --limit 60 --bs 20 --device cpu --log wandb --out {tmp_path}".split()
    done = subprocess.run([sys.executable, "-m", "sumix_nb.running.shell", *words], env=os.environ | {
        "WANDB_MODE": "online"}, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and line.startswith("sumix_train: Weights & Biases: ") and "WANDB_MODE=offline" in line
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("log", TRACKERS)
def test_without_the_tool_the_way_out_is_named(tmp_path, monkeypatch, log):
    monkeypatch.setitem(sys.modules, log, None)
    monkeypatch.delitem(sys.modules, f"fastai.callback.{log}", raising=False)
    with pytest.raises(ImportError, match=f"{log} is missing: pip install {log}"): run(tmp_path, log)


def test_shares_need_a_tracker_and_are_not_written_by_searches_nor_without_a_mixer(tmp_path):
    alone = make_learner(RECIPE, device="cpu").add_cbs(LogShares())
    with alone.no_bar(), pytest.raises(ValueError, match="TensorBoardCallback"): alone.fit(1)
    learn = make_learner(RECIPE, device="cpu")
    with learn.no_bar(), learn.no_logging(), tracking(learn, "tensorboard", "search", {}, tmp_path):
        learn.lr_find(num_it=7, show_plot=False)
    assert not list(tmp_path.rglob("events*"))
    plain = Recipe(width=4, epochs=1, bs=20, limit=60)
    train(plain, device="cpu", folder=tmp_path, progress=False, log="tensorboard")
    found = tensorboard_run(tmp_path / "tensorboard" / plain.name).Tags()
    assert "accuracy" in found["scalars"] and not found["histograms"]
