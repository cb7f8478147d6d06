"Views of the recipes, files that workers decode, and the published sets from disk to batch"
import pickle
import random
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import InterpolationMode

from sumix_nb.data import layouts, loaders as data
from sumix_nb.sumix.callback import SUMix
from sumix_nb.data.loaders import STATS, FileDL, ImageDataLoaders, SeededDL, TensorDL, get_dls
from sumix_nb.data.sources import SOURCES
from sumix_nb.data.files import OPERATIONS, VIEWS, ClassifiedSet, EraseBatch, FileSet, RandAugment, View, moved
from sumix_nb.data.files import open_image, operate, seeded, test_view, train_view
from sumix_nb.data.layouts import SETS
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.models.networks import get_model
from tests.data.test_layouts import MAKERS

test_view.__test__ = False


@pytest.fixture
def few(monkeypatch):
    "Every published set has three classes"
    monkeypatch.setattr(layouts, "SETS", {name: (3, source) for name, (_, source) in SETS.items()})


def white_noise(seed=0, height=40, width=56):
    "An image of random bytes"
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_set(n=6, view=VIEWS["deit"], split_idx=0, target=None):
    "Random images through a view at 24 pixels"
    views = train_view(view, 24), test_view(view, 24)
    return FileSet([white_noise(i) for i in range(n)], target, ["a", "b"], *views, split_idx)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0, 3.7, 10])
def test_operations_keep_size_and_mode_and_never_write(name, level):
    image = white_noise()
    for negative in (False, True):
        result = operate(image, name, level, negative)
        assert result.size == image.size and result.mode == "RGB"
    assert image.tobytes() == white_noise().tobytes()


@pytest.mark.parametrize("name", ["identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_level_zero_of_a_motion_changes_nothing(name):
    assert np.abs(np.asarray(operate(white_noise(), name, 0)).astype(int) - np.asarray(white_noise())).max() <= 1


def test_motions_go_both_ways():
    image = Image.new("RGB", (40, 40), "white")
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        one, two = (np.asarray(operate(image, name, 8, negative)) for negative in (False, True))
        assert (one != two).any() and (one != 255).any() and (two != 255).any(), name
    right = np.asarray(moved(image, translate=[10, 0]))
    assert (right[:, :10] == (114, 123, 125)).all() and (right[:, 10:] == 255).all()


def test_strengths_vary_around_the_level(monkeypatch):
    from sumix_nb.data import files as large_images
    levels, names = [], []
    monkeypatch.setattr(large_images, "operate", lambda image, name, level, negative: (
        levels.append(level), names.append(name), image)[-1])
    torch.manual_seed(0)
    augment = RandAugment(7, n=3)
    for _ in range(2000): augment(white_noise())
    assert abs(len(levels) / 6000 - 0.5) < 0.03  # each is applied with probability 1/2
    assert abs(np.mean(levels) - 7) < 0.05 and abs(np.std(levels) - 0.5) < 0.05
    assert set(names) == set(OPERATIONS)
    levels.clear()
    for _ in range(200): RandAugment(10)(white_noise())
    assert max(levels) == 10.0 and min(levels) > 7


@pytest.mark.parametrize("argument,value", [("level", 11), ("level", -1), ("n", 0), ("spread", -0.1)])
def test_rand_augment_refuses(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be"): RandAugment(**{"level": 5} | {argument: value})


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [24, 40])
def test_views_give_the_size_that_is_asked_for(name, size):
    torch.manual_seed(0)
    for height, width in ((40, 56), (90, 30), (20, 20)):
        image = white_noise(1, height, width)
        for view in (train_view(VIEWS[name], size), test_view(VIEWS[name], size)):
            assert view(image).size == (size, size) and view(image).mode == "RGB"


@pytest.mark.parametrize("name,bicubic,area", [
    ("tiny_imagenet", True, (0.08, 1.0)), ("imagenet", True, (0.08, 1.0)), ("fine_grained", False, (0.5, 1.0)),
    ("deit", True, (0.8, 1.0)), ("swin", True, (0.8, 1.0))])
def test_views_are_those_of_the_recipes(name, bicubic, area):
    crop = next(step for step in getattr(train_view(VIEWS[name], 224), "transforms", ()) if hasattr(step, "scale"))
    assert crop.scale == area and crop.ratio == (3 / 4, 4 / 3)
    assert crop.interpolation == (InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR)
    assert View() == View((1.0, 1.0), True, None, None, None, 0.0)


def test_mirrors_only_where_a_label_survives_it():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8), (40, 1))).convert("RGB")
    torch.manual_seed(0)
    def mirrored(flip):
        crops = [np.asarray(train_view(VIEWS["imagenet"], 24, flip)(ramp)) for _ in range(60)]
        return [crop[0, 0, 0] > crop[0, -1, 0] for crop in crops]
    assert not any(mirrored(False)) and 15 < sum(mirrored(True)) < 45


def test_draws_of_an_item_follow_from_seed_epoch_and_number():
    items = file_set()
    assert (items.item(2, (0, 1))[0] == items.item(2, (0, 1))[0]).all()
    others = [items.item(2, (0, 2)), items.item(2, (1, 1)), items.item(3, (0, 1))]
    assert all((items.item(2, (0, 1))[0] != other[0]).any() for other in others)
    test_items = file_set(split_idx=1)
    assert (test_items.item(2, (0, 1))[0] == test_items.item(2, (5, 7))[0]).all()


def test_global_random_states_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = FileDL(file_set(), bs=2, shuffle=True, num_workers=1)
    for _ in loader: pass
    next(iter(FileDL(file_set(), bs=2, num_workers=0)))
    EraseBatch(1.0, torch.Generator()).encodes(TensorImage(torch.zeros(2, 3, 9, 9)))
    with seeded(4): torch.rand(3)
    assert (torch.get_rng_state() == states[0]).all() and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_worker_processes_end_with_the_loader():
    before = set(active_children())
    for _ in FileDL(file_set(), bs=2, num_workers=2): pass
    assert set(active_children()) <= before


def test_file_sets_refuse_and_name_damaged_files(tmp_path):
    with pytest.raises(ValueError, match=r"`target` must have shape \(6,\)"): file_set(target=torch.zeros(2))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    broken = FileSet([tmp_path / "bad.jpg"], None, ["a"], train_view(VIEWS["swin"], 24), test_view(VIEWS["swin"], 24))
    with pytest.raises(ValueError, match="bad.jpg"): next(iter(FileDL(broken, bs=1, num_workers=0)))
    with pytest.raises(Exception, match="bad.jpg"): next(iter(FileDL(broken, bs=1, num_workers=1)))
    with pytest.raises(ValueError, match="more than 8 bits"): open_image(Image.new("I", (4, 4)))
    with pytest.raises(FileNotFoundError): open_image(tmp_path / "none.png")


def test_sets_can_be_pickled_and_copied_without_images():
    items = pickle.loads(pickle.dumps(file_set(target=torch.tensor([0, 1, 0, 1, 0, 1]))))
    assert (items[3][0] == file_set()[3][0]).all() and items.decode(items[1])[1] == "b"
    assert len(items.new_empty()) == 0 and items.new_empty().c == 2
    assert isinstance(items, ClassifiedSet) and items.with_classes([1, 2]) == ([1, 2], None)


@pytest.mark.parametrize("name", MAKERS)
def test_published_sets_from_disk_to_batch(name, tmp_path, few, monkeypatch):
    make, read = MAKERS[name]
    root = make(tmp_path / name)
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path))
    dls = get_dls(name, bs=2, workers=0, device="cpu", drop_last=False)
    size, split = SOURCES[name].size, read(root)[0]
    assert isinstance(dls, ImageDataLoaders) and isinstance(dls.train, FileDL) and dls.c == 3
    assert len(dls.train_ds) == len(split["train"][0]) and len(dls.valid_ds) == len(split["test"][0])
    seen = torch.cat([target for _, target in dls.valid]).tolist()
    assert seen == split["test"][1].tolist()
    mean, std = (torch.tensor(values)[:, None, None] for values in STATS["imagenet"])
    for loader in dls:
        for images, target in loader:
            assert images.shape[1:] == (3, size, size)
            shade = ((images.as_subclass(torch.Tensor) * std + mean) * 255)
            files, classes = split["train"] if loader is dls.train else split["test"]
            shades = {int(k): np.asarray(Image.open(file))[0, 0, 0] for file, k in zip(files, classes, strict=True)}
            for image, k in zip(shade, target.tolist(), strict=True): assert (image - int(shades[k])).abs().max() < 4
    with pytest.raises(FileNotFoundError, match="the set is at http"): get_dls(name, path=tmp_path / "nowhere")
    monkeypatch.delenv("SUMIX_DATA")
    with pytest.raises(FileNotFoundError, match=f"no folder for {name}"): get_dls(name)


def test_views_and_statistics_of_any_set():
    dls = get_dls("digits", view="imagenet", stats="cifar", size=20, limit=60, bs=7, workers=1, device="cpu")
    assert dls.one_batch()[0].shape == (7, 3, 20, 20) and len(dls.train) == 8
    assert len(get_dls("digits", view="imagenet", limit=60, bs=7, workers=0, drop_last=False).train) == 9
    assert len(get_dls("digits", limit=60, bs=7, drop_last=False).train) == 9
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    for stats, value in ((None, (1 - 0.3054) / 0.3237), ("imagenet", (1 - 0.485) / 0.229)):
        batch, = next(iter(get_dls("digits", stats=stats, limit=60, bs=7).test_dl(white)))
        assert abs(batch[0, 0, 0, 0].item() - value) < 1e-4
    assert isinstance(get_dls("digits", limit=60, bs=7).train, TensorDL) and issubclass(TensorDL, SeededDL)


@pytest.mark.parametrize("argument,value,error", [
    ("view", "vit", ValueError), ("stats", "own", ValueError), ("workers", -1, ValueError),
    ("workers", 1.5, TypeError)])
def test_wrong_options(argument, value, error):
    with pytest.raises(error, match=f"`{argument}` must be"): get_dls("digits", **{argument: value})


def test_too_little_memory_is_noticed_before_decoding(monkeypatch):
    monkeypatch.setattr(data.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    monkeypatch.setattr(data, "decode_images", lambda *args: pytest.fail("nothing may be decoded"))
    with pytest.raises(MemoryError, match="1797 decoded images of 32 x 32"): get_dls("digits")


def test_too_little_memory_of_another_device_is_noticed_too(monkeypatch):
    class Card:
        def mem_get_info(self, device): return 10**6, 10**9
    monkeypatch.setattr(data.torch, "get_device_module", lambda device: Card())
    with pytest.raises(MemoryError, match="1797 decoded images of 32 x 32 .* GiB are free on cuda:1"):
        data._check_memory(1797, 32, torch.device("cuda:1"))
    data._check_memory(300, 32, torch.device("cuda:1"))
    monkeypatch.setattr(data.torch, "get_device_module", lambda device: object())  # one that cannot tell
    data._check_memory(1797, 32, torch.device("mps"))


def test_a_learner_trains_exports_and_predicts(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files): white_noise(i).save(file)
    dls = get_dls("digits", view="deit", size=24, limit=60, bs=20, workers=0, device="cpu")
    learn = Learner(dls, get_model("resnet18", 10, width=4), cbs=SUMix(CutMix(), seed=0), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export_plain("small.pkl")
    loaded = load_learner(tmp_path / "small.pkl")
    with loaded.no_bar():
        probs, _ = loaded.get_preds(dl=loaded.dls.test_dl(files, num_workers=0))
        assert loaded.predict(files[1])[0] == loaded.dls.vocab[int(probs[1].argmax())]
    assert probs.shape == (3, 10) and len(loaded.dls.train_ds) == 0 and isinstance(loaded.model, nn.Module)
