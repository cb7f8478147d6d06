"Views of the recipes, and files that workers decode: every draw follows from a seed"
import pickle
import random
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage
from PIL import Image

from sumix_nb.data import files
from sumix_nb.data.files import OPERATIONS, VIEWS, ClassifiedSet, EraseBatch, FileSet, RandAugment
from sumix_nb.data.files import operate, seeded, test_view, train_view
from sumix_nb.data.loaders import FileDL, get_dls
from tests.data.oracles import tiny_model, white_noise

test_view.__test__ = False


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


def test_strengths_vary_around_the_level(monkeypatch):
    drawn = []
    monkeypatch.setattr(files, "operate", lambda image, *draws: (drawn.append(draws), image)[1])
    torch.manual_seed(0)
    for _ in range(3000): RandAugment(7)(white_noise(height=4, width=4))
    names, levels, _ = zip(*drawn)
    assert abs(len(levels) / 6000 - 0.5) < 0.03  # each is applied with probability 1/2
    assert abs(np.mean(levels) - 7) < 0.05 and abs(np.std(levels) - 0.5) < 0.05
    assert set(names) == set(OPERATIONS)
    drawn.clear()
    for _ in range(200): RandAugment(10)(white_noise(height=4, width=4))
    assert max(level for _, level, _ in drawn) == 10.0 and min(level for _, level, _ in drawn) > 7
    with pytest.raises(ValueError, match="`level` must be"): RandAugment(11)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("size", [24, 40])
def test_views_give_the_size_that_is_asked_for(name, size):
    torch.manual_seed(0)
    for height, width in ((40, 56), (90, 30), (20, 20)):
        image = white_noise(1, height, width)
        for view in (train_view(VIEWS[name], size), test_view(VIEWS[name], size)):
            assert view(image).size == (size, size) and view(image).mode == "RGB"


def test_mirrors_only_where_a_label_survives_it():
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint8), (40, 1))
    ramp = Image.fromarray(ramp).convert("RGB")
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


def test_global_random_states_are_left_alone(monkeypatch):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in FileDL(file_set(), bs=2, shuffle=True, num_workers=1): pass
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a card was seeded"))
    next(iter(FileDL(file_set(), bs=2, num_workers=0)))
    EraseBatch(1.0, torch.Generator()).encodes(TensorImage(torch.zeros(2, 3, 9, 9)))
    with seeded(4): torch.rand(3)
    assert (torch.get_rng_state() == states[0]).all() and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_erasing_on_a_card_repeats_and_leaves_its_generator_alone():
    images, state = TensorImage(torch.zeros(8, 3, 9, 9, device="cuda")), torch.cuda.get_rng_state()
    one, two = (EraseBatch(1.0, torch.Generator().manual_seed(0)).encodes(images) for _ in range(2))
    assert (one == two).all() and (one != 0).any() and (torch.cuda.get_rng_state() == state).all()


def test_worker_processes_end_with_the_loader():
    before = set(active_children())
    for _ in FileDL(file_set(), bs=2, num_workers=2): pass
    assert set(active_children()) <= before


def test_file_sets_name_damaged_files(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    views = train_view(VIEWS["swin"], 24), test_view(VIEWS["swin"], 24)
    broken = FileSet([tmp_path / "bad.jpg"], None, ["a"], *views)
    with pytest.raises(ValueError, match="bad.jpg"): next(iter(FileDL(broken, bs=1, num_workers=0)))
    with pytest.raises(Exception, match="bad.jpg"): next(iter(FileDL(broken, bs=1, num_workers=1)))


def test_sets_can_be_pickled_and_copied_without_images():
    items = pickle.loads(pickle.dumps(file_set(target=torch.tensor([0, 1, 0, 1, 0, 1]))))
    assert (items[3][0] == file_set()[3][0]).all() and items.decode(items[1])[1] == "b"
    assert len(items.new_empty()) == 0 and items.new_empty().c == 2
    assert isinstance(items, ClassifiedSet) and items.with_classes([1, 2]) == ([1, 2], None)


def test_a_learner_trains_exports_and_predicts(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths): white_noise(i).save(path)
    dls = get_dls("digits", view="deit", size=24, limit=60, bs=20, workers=0, device="cpu")
    learn = Learner(dls, tiny_model(), path=tmp_path)
    with learn.no_logging(): learn.fit(1)
    learn.export("small.pkl")
    loaded = load_learner(tmp_path / "small.pkl")
    probs, _ = loaded.get_preds(dl=loaded.dls.test_dl(paths, num_workers=0))
    assert loaded.predict(paths[1])[0] == loaded.dls.vocab[int(probs[1].argmax())]
    assert probs.shape == (3, 10) and len(loaded.dls.train_ds) == 0
