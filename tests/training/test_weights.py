"Final weights: what is in the file, what comes back, and files that are no weights"
import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from sumix_nb.models.networks import get_model
from sumix_nb.running.grid import recipe_grid, run_grid
from sumix_nb.running.shell import sumix_train
from sumix_nb.training.records import load_records
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner, train
from sumix_nb.training.weights import plain_weights, trained_model, weights_digest, write_weights

TINY = {"width": 4, "limit": 60, "bs": 20, "epochs": 1, "lr": 0.02}
RECIPE = Recipe(mixer="cutmix", method="sumix", **TINY)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"width": 8}, {"data": "scenes", "size": 24},
                                     {"mixer": "automix", "mixer_options": {"base": 0.5}, "epochs": 2}])
def test_the_network_comes_back_as_it_was(changes, tmp_path):
    recipe = replace(RECIPE, **changes)
    learn = make_learner(recipe)
    record = train(recipe, progress=False, learn=learn, weights=tmp_path)
    found, model = trained_model(tmp_path / f"{recipe.name}.safetensors")
    with learn.without_mixing(): left = weights_digest(learn.model)
    assert found == recipe and not model.training and weights_digest(model) == left
    right = n = 0
    for images, target in learn.dls.valid:
        with torch.no_grad(): right += (model(images).argmax(1) == target).sum().item()
        n += len(target)
    assert right / n == pytest.approx(record["accuracy"], abs=1e-6)


def test_wrappers_and_the_head_leave_no_trace():
    learn = make_learner(RECIPE)
    learn.model.compile()
    inside = plain_weights(torch.nn.DataParallel(learn.model))
    assert set(inside) == set(get_model("resnet18", 10, width=4).state_dict()) < set(learn.model.state_dict())
    inside["fc.bias"].fill_(7)
    assert not (learn.model.fc.bias == 7).any()


def test_the_file_names_its_recipe_and_nothing_else_is_left(tmp_path):
    file = write_weights(get_model("resnet18", 10, width=4), RECIPE, tmp_path / "new")
    assert file.name == f"{RECIPE.name}.safetensors" and [*file.parent.iterdir()] == [file]
    with safe_open(file, "pt") as opened: assert json.loads(opened.metadata()["recipe"]) == asdict(RECIPE)


def test_nothing_is_kept_by_default(tmp_path):
    train(replace(RECIPE, mixer="none", method="mce"), progress=False, folder=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


def test_shell_and_grid_keep_weights(tmp_path):
    sumix_train(f"--width 4 --limit 60 --bs 20 --epochs 1 --out {tmp_path} --weights {tmp_path / 'shell'}".split())
    record, = load_records(tmp_path)
    assert [file.stem for file in (tmp_path / "shell").iterdir()] == [record["name"]]
    run_grid(recipe_grid(**TINY), tmp_path / "grid", quiet=True, weights=tmp_path / "kept")
    record, = load_records(tmp_path / "grid")
    assert [file.stem for file in (tmp_path / "kept").iterdir()] == [record["name"]]


def test_a_folder_that_cannot_be_written_stops_before_the_training(tmp_path):
    (tmp_path / "taken").write_text("")
    learn = make_learner(RECIPE)
    with pytest.raises(OSError): train(RECIPE, progress=False, learn=learn, weights=tmp_path / "taken")
    assert learn.opt is None


WEIGHTS = plain_weights(get_model("resnet18", 10, width=4))
FACTS = {"recipe": json.dumps(asdict(RECIPE))}


@pytest.mark.parametrize(("tensors", "facts"), [
    (WEIGHTS, None), (WEIGHTS, {"other": "x"}), (WEIGHTS, {"recipe": "{"}), (WEIGHTS, {"recipe": "[]"}),
    (WEIGHTS, {"recipe": json.dumps({"epochs": 0})}), (WEIGHTS, {"recipe": json.dumps({"speed": 1})}),
    ({"fc.bias": torch.zeros(10)}, FACTS), (WEIGHTS | {"fc.bias": torch.zeros(9)}, FACTS)])
def test_files_that_are_no_weights_of_a_run(tensors, facts, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors", facts)
    with pytest.raises(ValueError, match="a.safetensors does not hold the weights of a run"):
        trained_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", save(WEIGHTS, FACTS)[:-1], save(WEIGHTS, FACTS)[:100]])
def test_damaged_files(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the weights of a run"):
        trained_model(tmp_path / "a.safetensors")
