"Two processes on the CPU, started by accelerate, against one"
import importlib.util
import json
import socket
import sys

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.metrics import accuracy
from PIL import Image
from torch import nn

from sumix_nb.training import processes as distributed
from sumix_nb.data.augment import RandomCropFlip
from sumix_nb.data.loaders import FileDL, ImageSet, TensorDL
from sumix_nb.training.processes import distribute, local_device, share
from sumix_nb.training.steps import Autocast
from sumix_nb.data.files import FileSet, View, train_view
from sumix_nb.training.resume import read_checkpoint
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner
from tests.training import two_processes
from tests.conftest import LIMIT, commands, wait_until
from tests.training.two_processes import KINDS, RECIPES, N, Neighbours, callbacks_of, fixed, with_batchnorm

MISSING = importlib.util.find_spec("accelerate") is None
REASON = "several processes need accelerate: pip install accelerate"
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def printed(process):
    "What a process prints until it ends well"
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where two processes left their results and records"
    if MISSING: pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("two")
    with commands() as command: printed(command(*LAUNCH, two_processes.__file__, folder, ACCELERATE_USE_CPU="true"))
    return folder


@pytest.fixture(scope="module")
def ranks(folder): return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def equal(weights, others):
    "Are all tensors equal to the bit?"
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def heads(weights): return [name for name in weights if "uncertainty" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does_where_nothing_is_left_to_chance(ranks, kind):
    first, second = (found["fixed"][kind] for found in ranks)
    one = fixed(kind)
    assert equal(first["weights"], second["weights"])
    assert len(heads(one["weights"])) == (0 if kind in ("mix", "accumulated") else 2)
    losses = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    torch.testing.assert_close(losses, one["losses"], rtol=0, atol=1e-5)
    assert first["losses"] != second["losses"] and first["metrics"] == second["metrics"]
    torch.testing.assert_close(torch.tensor(first["metrics"]), torch.tensor(one["metrics"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(dict(first["weights"]), dict(one["weights"]), rtol=0, atol=1e-5)


def test_the_head_is_trained_by_what_both_processes_saw(ranks):
    first = ranks[0]["fixed"]["no_grad"]["weights"]
    start = two_processes.learner(callbacks_of("mix", Neighbours())).model.state_dict()
    assert all((first[name] - start[name]).abs().max() > 1e-4 for name in start)
    still = fixed("no_grad", lr=0.0)["weights"]
    assert all((first[name] - still[name]).abs().max() > 1e-7 for name in heads(first))


def test_the_released_variant_and_batchnorm_depend_on_how_many_images_a_process_has(ranks):
    for name, one in (("released", fixed("released")), ("with_batchnorm", with_batchnorm())):
        losses = [(a + b) / 2 for a, b in zip(*(found[name]["losses"] for found in ranks), strict=True)]
        assert max(abs(a - b) for a, b in zip(losses, one["losses"], strict=True)) > 1e-4, name
        assert equal(*(found[name]["weights"] for found in ranks))


def test_running_statistics_are_those_of_all_processes(ranks):
    name, one = "bn1.running_mean", with_batchnorm()["weights"]  # of the images themselves, so a mean of means
    assert one[name].abs().max() > 1e-3
    torch.testing.assert_close(ranks[0]["with_batchnorm"]["weights"][name], one[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_ends_with_one_network_and_different_dice(ranks, kind):
    first, second = (found["recorded"][kind] for found in ranks)
    assert equal(first["weights"], second["weights"]) and len(heads(first["weights"])) == (0 if kind == "mix" else 2)
    assert len(first["lam"]) == len(second["lam"]) == RECIPES[kind].limit // 2  # of the last epoch
    assert (first["lam"] != second["lam"]).float().mean() > 0.9


def test_a_recipe_can_be_repeated(ranks):
    for found in ranks: assert equal(found["again"], found["recorded"]["no_grad"]["weights"])


@pytest.mark.parametrize(("i", "kind"), [(0, "no_grad"), (1, "all")])
def test_a_stopped_training_goes_on_to_the_same_end(ranks, i, kind):
    for found in ranks: assert equal(found["resumed"][i], found["recorded"][kind]["weights"])


@pytest.mark.parametrize("kind", RECIPES)
def test_metrics_are_those_of_the_whole_validation_set(ranks, kind):
    found = ranks[0]["recorded"][kind]
    learn = make_learner(Recipe(**found["recipe"]), device="cpu")
    learn.model.load_state_dict(found["weights"])
    judge = Learner(learn.dls, learn.model, learn.loss_func, metrics=accuracy, cbs=[Autocast()] * (kind == "all"))
    with judge.no_bar(), judge.no_logging(): expected = judge.validate()
    assert len(learn.dls.valid_ds) == RECIPES[kind].limit
    for last in (found["last"], ranks[1]["recorded"][kind]["last"]):
        assert [last["valid_loss"], last["accuracy"]] == pytest.approx(list(expected), rel=1e-5)
    for rank in ranks:
        curve = rank["recorded"][kind]["reliability"]
        assert sum(part["n"] for part in curve) == len(learn.dls.valid_ds)
        right = sum(part["n"] * part["accuracy"] for part in curve)
        assert right == pytest.approx(len(learn.dls.valid_ds) * expected[1])
    assert 0.05 < last["accuracy"] < 0.95


def test_there_is_one_record_of_both(folder, ranks):
    records = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert records.keys() == {recipe.name for recipe in RECIPES.values()}
    for kind, recipe in RECIPES.items():
        record, parts = records[recipe.name], [found["recorded"][kind] for found in ranks]
        assert record["processes"] == 2 and record["sync_bn"] is False and record["recipe"] == parts[0]["recipe"]
        assert record["epochs"][-1] == parts[0]["last"] and parts[1]["last"]["lam"] == parts[0]["last"]["lam"]
        lam = torch.cat([part["lam"] for part in parts]).mean().item()
        assert record["epochs"][-1]["lam"] == pytest.approx(lam, abs=1e-6)


def loader(n, bs, shuffle=False, pad=0):
    "A loader of `n` images that are all alike, labelled by their numbers, cropped at random"
    images = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5).expand(n, 3, 5, 5).contiguous()
    generator = torch.Generator()
    return TensorDL(ImageSet(images, torch.arange(n), range(n), 0), bs, shuffle, seed=3, drop_last=shuffle,
                    generator=generator, after_batch=[RandomCropFlip(pad, False, generator)])


@pytest.mark.parametrize(("n", "bs", "world"), [(11, 4, 2), (29, 6, 3), (64, 16, 4), (7, 7, 7)])
def test_shares_of_a_training_are_its_batches(n, bs, world):
    whole, shares = loader(n, bs, shuffle=True), [share(loader(n, bs, shuffle=True), r, world) for r in range(world)]
    for _ in range(3):
        steps = zip(*[[target.tolist() for _, target in dl] for dl in shares], strict=True)
        together = [[part[i] for i in range(bs // world) for part in step] for step in steps]
        assert together == [target.tolist() for _, target in whole]
    assert [len(dl) for dl in shares] == [len(whole)] * world


@pytest.mark.parametrize(("n", "bs", "world"), [(11, 4, 2), (12, 5, 3), (2, 4, 3), (65, 32, 2)])
def test_shares_of_a_validation_hold_each_image_once(n, bs, world):
    shares = [share(loader(n, bs), rank, world, even=False) for rank in range(world)]
    targets = [[target for _, target in dl] for dl in shares]
    assert sorted(torch.cat(sum(targets, [])).tolist()) == list(range(n))
    assert [len(dl) for dl in shares] == [len(batches) for batches in targets]
    with pytest.raises(ValueError, match=f"`bs`.*{world}, got {world + 1}"): share(loader(n, world + 1), 0, world)


@pytest.mark.parametrize("fits", [1, 2])
def test_image_files_are_shared_with_their_draws(fits):
    def files():
        images = [Image.fromarray(np.arange(i, i + 243, dtype=np.uint8).reshape(9, 9, 3)) for i in range(12)]
        view = train_view(View((0.2, 0.5)), 4)
        return FileDL(FileSet(images, torch.arange(12), range(12), view, view, 0), 4, True, seed=3, num_workers=1)
    whole, parts = files(), (files(), files())
    for _ in range(fits):  # each makes shares anew
        for one, *two in zip(whole, *(share(dl, rank, 2) for rank, dl in enumerate(parts)), strict=True):
            for together, *pieces in zip(one, *two): assert torch.equal(together, torch.stack(pieces, 1).flatten(0, 1))


def test_augmentation_differs_between_processes_and_epochs_and_can_be_repeated():
    def batches(rank):
        dl = share(loader(40, 40, shuffle=True, pad=2), rank, 2)
        return [next(iter(dl))[0] for _ in range(2)]
    first, again, second = batches(0), batches(0), batches(1)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], first[1])


def test_what_is_refused_is_named_and_leaves_the_learner_as_it_was(ranks):
    for found in ranks:
        refused = found["refused"]
        for name, part in (("sync_bn", "False on the CPU"), ("bs", "multiple of their number 2, got 15"),
                           ("metrics", "got f1_score")):
            assert f"`{name}`" in refused[name] and part in refused[name]
        assert refused["as before"]


def test_fits_in_a_row_and_predictions_of_the_whole_set(ranks):
    first, second = (found["other"] for found in ranks)
    assert equal(first["weights"], second["weights"]) and equal(first["idle"], second["idle"])
    assert first["validate"] == second["validate"] == pytest.approx(first["last"], rel=1e-6)
    assert first["predictions"].shape == (N, 10) and torch.equal(first["predictions"], second["predictions"])


def test_global_dice_differ_inside_and_agree_afterwards(ranks):
    first, second = (found["other"] for found in ranks)
    assert not torch.equal(first["dice"], second["dice"])
    assert torch.equal(first["dice afterwards"], second["dice afterwards"])


def test_loaders_with_dice_of_their_own_share_the_order_of_the_first_process(ranks):
    seen = torch.cat([found["plain"]["seen"] for found in ranks]).tolist()
    assert len(seen) == len(set(seen)) == 64 and set(seen) <= set(range(N))
    assert equal(*(found["plain"]["weights"] for found in ranks))


RUN = ("--data", "digits", "--width", "4", "--limit", "60", "--bs", "20", "--epochs", "1", "--lr", "0.02", "--mixer",
       "cutmix", "--method", "sumix", "--out")


def free_port():
    "A port that nobody listens at"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.skipif(MISSING, reason=REASON)
def test_two_launchers_join_as_two_machines(tmp_path, command):
    port = free_port()
    machines = [command("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
                        "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port,
                        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "sumix_nb.running.shell", *RUN,
                        tmp_path, "--log", "tensorboard", ACCELERATE_USE_CPU="true") for rank in (0, 1)]
    texts = [printed(machine) for machine in machines]
    [file] = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["processes"] == 2
    assert [text.count(file.name) for text in texts] == [1, 0]
    assert len([*tmp_path.glob(f"tensorboard/{file.stem}/events*")]) == 1


@pytest.mark.skipif(MISSING, reason=REASON)
def test_a_cluster_may_signal_the_launcher_and_its_processes_at_once(tmp_path, command):
    import psutil
    words = ("-m", "sumix_nb.running.shell", *RUN, tmp_path, "--epochs", "3000", "--checkpoints", tmp_path)
    started = command(*LAUNCH, *words, ACCELERATE_USE_CPU="true")
    wait_until(lambda: [*tmp_path.glob("*.ckpt")] or started.poll() is not None)
    launcher = psutil.Process(started.pid)
    for process in (launcher, *launcher.children(recursive=True)): process.terminate()
    said = started.communicate(timeout=LIMIT)[1]
    assert said.count("sumix_train: stopped by SIGTERM in epoch") == 2 and not list(tmp_path.glob("*.json"))
    assert started.returncode == 1
    [file] = tmp_path.glob("*.ckpt")
    assert len(read_checkpoint(file)["processes"]) == 2


NOTEBOOK = """
import sys
from accelerate import notebook_launcher
from sumix_nb import Recipe, train

def run(): train(Recipe(width=4, limit=60, bs=20, epochs=1, lr=0.02), folder=sys.argv[1], progress=False)

notebook_launcher(run, num_processes=2, use_port=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(MISSING, reason=REASON)
def test_the_launcher_of_notebooks_runs_two_processes(tmp_path, command):
    printed(command("-c", NOTEBOOK, tmp_path, free_port(), ACCELERATE_USE_CPU="true"))
    [file] = tmp_path.glob("*")
    assert json.loads(file.read_text())["processes"] == 2


def test_one_process_trains_as_ever():
    learn = two_processes.learner(callbacks_of("accumulated", Neighbours()))
    callbacks = list(learn.cbs)
    with distribute(learn, sync_bn=True) as same: assert same is learn and list(learn.cbs) == callbacks
    assert local_device() is None and learn.gradient_accumulation.n_acc == 32


def test_batchnorm_over_all_processes_takes_the_place_of_the_usual_one(monkeypatch):
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, init_sync: nn.DataParallel(model))
    monkeypatch.setattr(distributed.Distributed, "take_share", lambda self, even: None)
    learn = make_learner(Recipe(width=4, limit=60, bs=20, mixer="cutmix", method="sumix"), device="cpu")
    before, keys = [*learn.model.parameters()], [*learn.model.state_dict()]
    together = distributed.Distributed(sync_bn=True)
    together.learn, learn.train_iter = learn, 0
    together.before_train()
    layers = [layer for layer in learn.model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 20 and all(type(layer) is nn.SyncBatchNorm for layer in layers)
    together.after_fit()
    after = [*learn.model.parameters()]
    assert [*map(id, after)] == [*map(id, before)] and [*learn.model.state_dict()] == keys
    assert heads(learn.model.state_dict())


def test_without_accelerate_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install accelerate"): local_device()


@pytest.mark.skipif(MISSING, reason=REASON)
def test_a_process_that_finds_no_other_says_so(monkeypatch):
    from accelerate import PartialState
    monkeypatch.setattr(PartialState, "_shared_state", {})
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes, accelerate of 1"): local_device()
