"Image sets as `DataLoaders`: choices, determinism, errors, and the whole of fastai's `Learner`"
import copy
import pickle
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from sumix_nb.data import loaders
from sumix_nb.data.choosing import balanced_subset, choose_images, limits_of
from sumix_nb.data.loaders import STATS, FileDL, ImageDataLoaders, ImageSet, TensorDL, check_memory, get_dls
from sumix_nb.data.sources import SOURCES, read_digits, read_folders
from tests.data.oracles import MAKERS, NAMES, tiny_model, write_image


def batches(loader): return [tuple(part.clone() for part in batch) for batch in loader]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


targets = hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 4)).map(torch.from_numpy)


@settings(max_examples=50, deadline=None)
@given(targets, st.integers(1, 50), st.integers(0, 5))
def test_balanced_subset_is_as_equal_as_possible(target, limit, seed):
    index = balanced_subset(target, limit, torch.Generator().manual_seed(seed))
    assert len(set(index.tolist())) == len(index) == min(limit, len(target))
    assert index.tolist() == sorted(index.tolist())
    available, kept = Counter(target.tolist()), Counter(target[index].tolist())
    most = max(kept.values())
    assert all(kept[k] in (most - 1, most) or kept[k] == available[k] for k in available)


def test_valid_fraction_leaves_the_test_split_alone(folders):
    shutil.rmtree(folders / "test")
    def new(seed): return get_dls("cifar10", path=folders, bs=5, valid=1 / 3, seed=seed, device="cpu")
    dls = new(4)
    assert torch.bincount(dls.train_ds.target).tolist() == [4] * 10
    assert torch.bincount(dls.valid_ds.target).tolist() == [2] * 10
    everything = torch.cat([dls.train_ds.images, dls.valid_ds.images])[:, :, 0, 0]
    assert len(everything.unique(dim=0)) == 60 and (everything[:, 2] == 0).all()
    assert torch.equal(new(4).valid_ds.images, dls.valid_ds.images)
    assert not torch.equal(new(5).valid_ds.images, dls.valid_ds.images)


@pytest.mark.parametrize("limit, n_train, n_valid", [
    (1, 1, 1), (7, 7, 7), (45, 45, 30), (1000, 60, 30), ((20, None), 20, 30), ((None, 7), 60, 7), ((8, 9), 8, 9),
    ((None, None), 60, 30), ([20, 3], 20, 3)])
def test_limit(folders, limit, n_train, n_valid):
    dls = get_dls("cifar10", path=folders, bs=1, limit=limit, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (n_train, n_valid, 10)
    counts = torch.bincount(dls.train_ds.target, minlength=10)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("valid", ["test", 0.2])
def test_a_pair_chooses_the_training_images_that_a_number_chooses(valid):
    data, _ = read_digits()
    one, two, whole = (choose_images(data, valid, limit, torch.Generator().manual_seed(7))
                       for limit in (100, (100, None), None))
    assert one[0].items == two[0].items and torch.equal(one[0].target, two[0].target)
    assert two[1].items == whole[1].items and len(one[1].items) == 100
    assert limits_of(None) == (None, None) and limits_of(np.int64(3)) == (3, 3)


def test_one_image_in_a_class_cannot_be_held_out(folders):
    for i in range(1, 6): (folders / "train" / "class0" / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="at least 2"):
        get_dls("cifar10", path=folders, bs=5, valid=0.1)


@pytest.mark.parametrize("arguments, error, text", [
    (dict(name=7), ValueError, "`name` must be one of ('digits', 'scenes', 'hard_scenes', 'cifar10',"),
    (dict(bs=0), ValueError, "`bs` must be at least 1, got 0"),
    (dict(bs=True), TypeError, "`bs` must be a whole number"),
    (dict(bs=1798), ValueError, "`bs` is 1798, but there are only 1442 training images"),
    (dict(bs=11, limit=10), ValueError, "only 10 training images"),
    (dict(device="gpu"), ValueError, "`device` must be one that PyTorch finds here, got 'gpu': Expected"),
    (dict(size=0), ValueError, "`size` must be at least 1"),
    (dict(seed=2**70), ValueError, "`seed` must be in [0, 4294967295]"),
    (dict(limit=0), ValueError, "`limit` must be at least 1"),
    (dict(limit=10.), TypeError, "`limit` must be a whole number"),
    (dict(limit=(5, 0)), ValueError, "`limit` must be at least 1, got 0"),
    (dict(limit=("5000", "all")), TypeError, "`limit` must be a whole number"),
    (dict(limit=(1, 2, 3)), ValueError, "`limit` must be a number or a pair (training, validation)"),
    (dict(valid="train"), ValueError, '`valid` must be "test" or a fraction'),
    (dict(valid=1.0), ValueError, "between 0 and 1, got 1.0"),
    (dict(valid=float("nan")), ValueError, "between 0 and 1"),
    (dict(valid=True), TypeError, "`valid`"),
    (dict(path="somewhere"), ValueError, "`path` has no meaning for digits"),
    (dict(view="vit"), ValueError, "`view` must be one of"),
    (dict(stats="own"), ValueError, "`stats` must be one of"),
    (dict(workers=-1), ValueError, "`workers` must be at least 0"),
    (dict(drop_last="no"), TypeError, "`drop_last` must be True or False"),
])
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error) as caught: get_dls(**{"name": "digits", "device": "cpu"} | arguments)
    assert text in str(caught.value)


BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("images, target", [
    (BYTES.float(), torch.zeros(2).long()), (BYTES[:, :1], torch.zeros(2).long()), (BYTES[0], torch.zeros(3).long()),
    (BYTES, torch.zeros(3).long()), (BYTES, torch.zeros(2, 1).long()), (BYTES, torch.zeros(2)),
    (BYTES, torch.tensor([0, 2])), (BYTES, torch.tensor([-1, 0]))])
def test_image_set_errors(images, target):
    with pytest.raises(ValueError, match="`images`|`target`"): ImageSet(images, target, ["a", "b"])


def test_too_little_memory_is_noticed_before_decoding(monkeypatch):
    monkeypatch.setattr(loaders.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    monkeypatch.setattr(loaders, "decode_images", lambda *args: pytest.fail("nothing may be decoded"))
    with pytest.raises(MemoryError, match="1797 decoded images of 32 x 32"): get_dls("digits")
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    with pytest.raises(MemoryError): check_memory(1797, 32, torch.device("cuda:1"))
    check_memory(300, 32, torch.device("cuda:1"))


def digits(seed=3): return get_dls("digits", bs=64, seed=seed, limit=300, device="cpu")


def test_same_seed_same_epochs_and_global_generators_untouched():
    def states(): return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    before, first = states(), digits()
    epochs = [batches(first.train), batches(first.train)]
    batches(first.valid)
    first.one_batch()
    after = states()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]

    torch.manual_seed(99)
    random.seed(99)
    second = digits()
    assert same(epochs[0], batches(second.train))
    torch.rand(5)
    assert same(epochs[1], batches(second.train))
    assert not same(*epochs)
    assert not same(epochs[0], batches(digits(seed=4).train))


def test_epochs_do_not_depend_on_what_came_before():
    plain, disturbed, resumed = (digits().train for _ in range(3))
    epochs = [batches(plain) for _ in range(3)]
    disturbed.one_batch()
    seen = []
    for batch in disturbed:
        seen.append(tuple(part.clone() for part in batch))
        disturbed.one_batch()
    assert same(epochs[0], seen) and disturbed.epoch == 1
    next(iter(disturbed))  # an epoch that ends after one batch
    disturbed.show_batch(show=False)
    batches(disturbed.new(shuffle=False, drop_last=False))
    assert same(epochs[2], batches(disturbed))
    resumed.epoch = 1
    assert same(epochs[1], batches(resumed))


@pytest.mark.parametrize("n, bs", [(7, 3), (6, 3), (5, 5), (4, 1)])
def test_every_image_once_and_drop_last(n, bs):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4)
    part = ImageSet(images, torch.arange(n), [str(k) for k in range(n)])
    train, valid = TensorDL(part, bs, shuffle=True, drop_last=True), TensorDL(part, bs)
    assert len(train) == n // bs and len(valid) == -(-n // bs)
    left_out = set()
    for _ in range(100):
        seen = [(int(image[0, 0, 0]), int(k)) for batch in train for image, k in zip(*batch, strict=True)]
        assert len(set(seen)) == len(seen) == n // bs * bs and all(a == b for a, b in seen)
        left_out |= set(range(n)) - {a for a, _ in seen}
    assert len(left_out) == (n if n % bs else 0)
    assert torch.cat([batch[1] for batch in valid]).tolist() == list(range(n))


def test_batches_have_fastai_types_and_the_right_values(folders):
    dls, source = get_dls("cifar10", path=str(folders), bs=10, device="cpu"), SOURCES["cifar10"]
    images, target = dls.one_batch()
    assert type(images) is TensorImage and type(target) is TensorCategory
    assert images.dtype == torch.float32 and target.dtype == torch.int64 and images.is_contiguous()
    assert list(dls.vocab) == NAMES and dls.valid.bs == 20 and len(dls.valid) == 2
    assert dls.train.after_batch[0].flip and dls.train.after_batch[0].pad == 4
    assert not digits().train.after_batch[0].flip and digits().train.after_batch[0].pad == 2
    for channel, expected in ((0, 10 * target), (2, torch.zeros(10))):  # images of one colour
        values = images[:, channel, 0, 0].as_subclass(torch.Tensor)
        raw = (values * source.std[channel] + source.mean[channel]) * 255
        torch.testing.assert_close(raw, expected.as_subclass(torch.Tensor).float(), rtol=0, atol=1e-3)
    order = torch.cat([target for _, target in dls.train])
    assert not torch.equal(order, dls.train_ds.target)
    assert sorted(order.tolist()) == dls.train_ds.target.tolist()


def test_augmentation_reaches_training_batches_and_no_others():
    dls = get_dls("digits", bs=100, seed=1, device="cpu")
    assert dls.valid.one_batch()[1].tolist() == dls.valid_ds.target[:200].tolist()
    plain = dls.train.new(shuffle=False, drop_last=False)
    plain.dataset = copy.copy(plain.dataset)
    plain.dataset.split_idx = 1
    unmoved, moved = plain.one_batch()[0], dls.train.new(shuffle=False).one_batch()[0]
    differs = (unmoved - moved).abs().amax((1, 2, 3)) > 0
    assert 0.9 < differs.float().mean() < 1.01


@pytest.mark.parametrize("size", [1, 33])
def test_size_resizes_everything(folders, size):
    write_image(folders / "train" / NAMES[3] / "wide.png", (1, 2, 3), size=(50, 20))
    dls = get_dls("cifar10", path=folders, bs=61, size=size, device="cpu")
    assert dls.one_batch()[0].shape == (61, 3, size, size)


def test_views_and_statistics_of_any_set():
    dls = get_dls("digits", view="imagenet", stats="cifar", size=20, limit=60, bs=7, workers=1, device="cpu")
    assert dls.one_batch()[0].shape == (7, 3, 20, 20) and len(dls.train) == 8
    for view in ("imagenet", None):
        loader = get_dls("digits", view=view, limit=60, bs=7, workers=0, drop_last=False).train
        assert len(loader) == 9 and isinstance(loader, FileDL if view else TensorDL)
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    for stats, value in ((None, (1 - 0.3054) / 0.3237), ("imagenet", (1 - 0.485) / 0.229)):
        batch, = next(iter(get_dls("digits", stats=stats, limit=60, bs=7).test_dl(white)))
        assert abs(batch[0, 0, 0, 0].item() - value) < 1e-4


@pytest.mark.parametrize("name", MAKERS)
def test_published_sets_from_disk_to_batch(name, tmp_path, few, monkeypatch):
    root, source = MAKERS[name][0](tmp_path / name), SOURCES[name]
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path))
    dls, (data, _) = get_dls(name, bs=2, workers=0, device="cpu", drop_last=False), read_folders(source, root)
    assert isinstance(dls, ImageDataLoaders) and isinstance(dls.train, FileDL) and dls.c == 3
    assert torch.cat([target for _, target in dls.valid]).tolist() == data["test"].target.tolist()
    mean, std = (torch.tensor(values)[:, None, None] for values in STATS["imagenet"])
    for loader, split in zip(dls, data.values(), strict=True):
        assert len(loader.dataset) == len(split.items)
        shades = {int(k): np.asarray(Image.open(file))[0, 0, 0] for file, k in zip(*split, strict=True)}
        for images, target in loader:
            assert images.shape[1:] == (3, source.size, source.size)
            for image, k in zip((images.as_subclass(torch.Tensor) * std + mean) * 255, target, strict=True):
                assert (image - int(shades[int(k)])).abs().max() < 4
    decoded = get_dls(name, bs=2, view="crop", device="cpu")  # of another size than the table's
    assert decoded.train_ds.images.shape[1:] == (3, source.size, source.size)
    monkeypatch.delenv("SUMIX_DATA")
    with pytest.raises(FileNotFoundError, match=f"no folder for {name}.*the set is at http"): get_dls(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_sees_the_same_batches():
    on_gpu, on_cpu = (get_dls("digits", limit=300, device=device).train for device in ("cuda", "cpu"))
    for (images, target), (images_cpu, target_cpu) in zip(on_gpu, on_cpu, strict=True):
        assert images.device.type == "cuda"
        torch.testing.assert_close(images.cpu(), images_cpu)
        assert torch.equal(target.cpu(), target_cpu)


@pytest.fixture
def learn(folders):
    torch.manual_seed(0)
    dls = get_dls("cifar10", path=folders, bs=20, device="cpu")
    learn = Learner(dls, tiny_model(), metrics=accuracy, path=folders)
    with learn.no_logging(): learn.fit(2, 1e-2)
    return learn


def test_test_dl_takes_paths_images_and_tensors(learn, folders):
    expected, target = learn.get_preds()
    assert torch.equal(target, TensorCategory(learn.dls.valid_ds.target))
    files = [file for name in NAMES for file in sorted((folders / "test" / name).iterdir())]
    opened = [Image.open(file) for file in files]
    for items in (files, [str(file) for file in files], opened, learn.dls.valid_ds.images, tuple(files)):
        loader = learn.dls.test_dl(items, bs=7)
        preds, none = learn.get_preds(dl=loader)
        assert none is None and loader.bs == 7
        torch.testing.assert_close(preds, expected)
    loader = learn.dls.test_dl(files)
    assert len(loader.decode_batch(loader.one_batch(), max_n=4)) == 4


def test_test_dl_with_labels(learn, folders):
    pairs = [(file, file.parent.name) for file in sorted((folders / "test").rglob("*.png"))]
    preds, target = learn.get_preds(dl=learn.dls.test_dl(pairs, with_labels=True))
    assert [learn.dls.vocab[k] for k in target] == [name for _, name in pairs]
    torch.testing.assert_close(preds, learn.get_preds()[0])
    found = learn.validate(dl=learn.dls.test_dl(pairs, with_labels=True))
    assert list(found) == pytest.approx(list(learn.validate()))
    with pytest.raises(ValueError, match="not in `vocab`"):
        learn.dls.test_dl([(pairs[0][0], "zebra")], with_labels=True)


@pytest.mark.parametrize("items, error, text", [
    ("one.png", TypeError, "must be a list"),
    ([3.5], TypeError, "path or a Pillow image, got float"),
    (["nowhere.png"], FileNotFoundError, "nowhere.png"),
    (torch.zeros(2, 3, 32, 32), ValueError, "uint8"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ValueError, "`items` must be images (3, 32, 32)"),
])
def test_test_dl_errors(items, error, text):
    dls = get_dls("digits", limit=100, device="cpu")
    with pytest.raises(error) as caught: dls.test_dl(items)
    assert text in str(caught.value)


def test_predict_and_show(learn, folders, tmp_path):
    import matplotlib.pyplot as plt

    write_image(tmp_path / "photo.jpg", (90, 40, 255), size=(70, 50), mode="RGB")
    for item in (tmp_path / "photo.jpg", Image.open(folders / "test" / "class3" / "1.png")):
        label, index, probs = learn.predict(item)
        assert label == learn.dls.vocab[int(index)] and probs.argmax() == index
    learn.dls.show_batch()
    learn.dls.valid.show_batch(max_n=4)
    learn.dls.test_dl([tmp_path / "photo.jpg"]).show_batch()
    learn.show_results(max_n=4)
    plt.close("all")


def test_export_holds_no_images(folders, tmp_path):
    dls = get_dls("digits", limit=500, device="cpu")
    learn = Learner(dls, tiny_model(), metrics=accuracy, path=tmp_path)
    with learn.no_logging(): learn.fit(1, 1e-2)
    learn.export("model.pkl")
    assert (tmp_path / "model.pkl").stat().st_size < 100_000
    assert len(learn.dls.train_ds) == 500
    loaded = load_learner(tmp_path / "model.pkl")
    assert len(loaded.dls.train_ds) == len(loaded.dls.valid_ds) == 0
    assert list(loaded.dls.vocab) == list(dls.vocab)
    images, pairs = dls.valid_ds.images[:30], [(folders / "test" / "class1" / "0.png", "7")]
    torch.testing.assert_close(loaded.get_preds(dl=loaded.dls.test_dl(images))[0],
                               learn.get_preds(dl=dls.test_dl(images))[0])
    assert loaded.get_preds(dl=loaded.dls.test_dl(pairs, with_labels=True))[1].tolist() == [7]
    assert loaded.predict(pairs[0][0])[0] in dls.vocab
    with learn.no_logging(): learn.fit(1, 1e-2)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_repeat_the_next_epoch(clone):
    dls = get_dls("digits", bs=32, limit=100, device="cpu")
    batches(dls.train)
    twin = clone(dls)
    assert twin.train.generator is twin.train.after_batch[0].generator
    assert same(batches(dls.train), batches(twin.train))


def test_masks_come_with_their_images_and_a_loader_says_which_those_are():
    dls = get_dls("scenes", bs=50, limit=(120, 60), device="cpu", masks=True)
    plain = get_dls("scenes", bs=50, limit=(120, 60), device="cpu")
    for loader, other in zip(dls, plain, strict=True):
        for (images, target), (same, same_target) in zip(loader, other, strict=True):
            assert torch.equal(images, same) and torch.equal(target, same_target)
            assert loader.masks.shape == (len(images), 1, 32, 32) and loader.masks.dtype == torch.bool
            assert torch.equal(loader.index, other.index) and other.masks is None
            assert torch.equal(loader.dataset.target[loader.index], target.as_subclass(torch.Tensor))
    assert torch.equal(dls.valid.masks, dls.valid_ds.masks[dls.valid.index])
    assert not torch.equal(dls.train.masks, dls.train_ds.masks[dls.train.index])  # moved as their images are
    with pytest.raises(ValueError, match="`masks` must be False for digits"): get_dls("digits", masks=True)
