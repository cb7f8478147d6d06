"Image sets as `DataLoaders`: layouts on disk, errors, determinism, downloads, and the whole of fastai's `Learner`"

import copy
import hashlib
import http.server
import io
import os
import pickle
import random
import shutil
import tarfile
import threading
from collections import Counter
from pathlib import Path

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
from torch import nn

from sumix_nb.data import loaders as data
from sumix_nb.data.augment import RandomCropFlip, crop_flip, reflect_index, sample_crop_flip
from sumix_nb.data.loaders import ImageSet, TensorDL, balanced_subset, get_dls, hold_out
from sumix_nb.data.sources import SOURCES, DataSource, decode_images, download, find_root, list_images, rank_in_class
from sumix_nb.data.sources import read_image
from sumix_nb.data.scenes import scenes

NAMES = [f"class{k}" for k in range(10)]


def write_image(file, value, size=(32, 32), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(file)


@pytest.fixture(scope="module")
def folder_template(tmp_path_factory):
    "Ten classes with 6 training and 3 test images; the pixel values tell class, number and split"
    root = tmp_path_factory.mktemp("data") / "cifar10"
    for k, name in enumerate(NAMES):
        for i in range(6): write_image(root / "train" / name / f"{i}.png", (10 * k, 20 * i, 0))
        for i in range(3): write_image(root / "test" / name / f"{i}.png", (10 * k, 20 * i, 255))
    return root


@pytest.fixture
def folders(folder_template, tmp_path, monkeypatch):
    "A copy that a test may damage, and no SUMIX_DATA"
    monkeypatch.delenv("SUMIX_DATA", raising=False)
    return shutil.copytree(folder_template, tmp_path / "cifar10")


def tiny_model(n_classes=10):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, n_classes))


def batches(loader): return [tuple(part.clone() for part in batch) for batch in loader]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for batch_a, batch_b in pairs for a, b in zip(batch_a, batch_b, strict=True))


# --- crops ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crop_flip_pixel_by_pixel(drawn):
    height, width = drawn.draw(st.integers(1, 9)), drawn.draw(st.integers(1, 9))
    pad = drawn.draw(st.integers(0, min(height, width) - 1))
    n, channels = drawn.draw(st.integers(0, 3)), drawn.draw(st.integers(1, 4))
    images = torch.arange(n * channels * height * width).view(n, channels, height, width)
    offset = torch.tensor(drawn.draw(st.lists(st.tuples(*[st.integers(0, 2 * pad)] * 2), min_size=n, max_size=n)))
    offset = offset.view(n, 2).long()
    flip = torch.tensor(drawn.draw(st.lists(st.booleans(), min_size=n, max_size=n))).bool()

    def mirror(i, size): return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    out = crop_flip(images, offset, flip, pad)
    assert out.shape == images.shape
    for k in range(n):
        for i in range(height):
            for j in range(width):
                across = width - 1 - j if flip[k] else j
                row = mirror(i + int(offset[k, 0]) - pad, height)
                col = mirror(across + int(offset[k, 1]) - pad, width)
                assert torch.equal(out[k, :, i, j], images[k, :, row, col])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_crop_flip_dtype_and_no_writing(dtype):
    images = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7).to(dtype)
    kept = images.clone()
    out = crop_flip(images, torch.tensor([[0, 4], [2, 2]]), torch.tensor([True, False]), 2)
    assert out.dtype == dtype and torch.equal(images, kept)
    assert torch.equal(out[1], images[1])
    assert out.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("pad, offset, flip", [
    (5, (2, 2), (2,)), (-1, (2, 2), (2,)), (1, (1, 2), (2,)), (1, (2, 2), (1,)), (1, (2,), (2,)), (1, (2, 2), (2, 1)),
])
def test_crop_flip_errors(pad, offset, flip):
    with pytest.raises(ValueError, match="`pad`|`offset`"):
        crop_flip(torch.zeros(2, 3, 5, 7), torch.zeros(offset).long(), torch.zeros(flip).bool(), pad)


def test_reflect_index_is_numpy_reflect():
    for size in range(1, 7):
        pad = size - 1
        expected = np.pad(np.arange(size), pad, mode="reflect")
        np.testing.assert_array_equal(reflect_index(torch.arange(-pad, size + pad), size).numpy(), expected)


def test_draws_cover_all_windows_and_need_no_global_generator():
    state = torch.get_rng_state()
    offset, flip = sample_crop_flip(5000, 2, generator=torch.Generator().manual_seed(0))
    assert {tuple(pair) for pair in offset.tolist()} == {(r, c) for r in range(5) for c in range(5)}
    assert 0.45 < flip.float().mean() < 0.55
    assert torch.equal(state, torch.get_rng_state())
    assert not sample_crop_flip(1000, 2, flip=False)[1].any()
    assert sample_crop_flip(0, 4)[0].shape == (0, 2)


def test_augmentation_is_for_training_only():
    augment = RandomCropFlip(1, True, torch.Generator())
    images = TensorImage(torch.randint(256, (9, 3, 4, 6), dtype=torch.uint8))
    out = augment(images, split_idx=0)
    assert isinstance(out, TensorImage) and out.dtype == torch.uint8 and not torch.equal(out, images)
    assert augment(images, split_idx=1) is images


# --- splits -----------------------------------------------------------------------------------------------------------

targets = hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 4)).map(torch.from_numpy)


@settings(max_examples=50, deadline=None)
@given(targets, st.integers(0, 5))
def test_rank_in_class_numbers_each_class(target, seed):
    for generator in (None, torch.Generator().manual_seed(seed)):
        rank = rank_in_class(target, generator)
        for k in target.unique():
            ranks = rank[target == k].tolist()
            assert sorted(ranks) == list(range(len(ranks)))
            assert generator is not None or ranks == sorted(ranks)


@settings(max_examples=50, deadline=None)
@given(targets, st.integers(1, 50), st.integers(0, 5))
def test_balanced_subset_is_as_equal_as_possible(target, limit, seed):
    index = balanced_subset(target, limit, torch.Generator().manual_seed(seed))
    assert len(set(index.tolist())) == len(index) == min(limit, len(target))
    assert index.tolist() == sorted(index.tolist())
    available, kept = Counter(target.tolist()), Counter(target[index].tolist())
    most = max(kept.values())
    assert all(kept[k] in (most - 1, most) or kept[k] == available[k] for k in available)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_hold_out_is_stratified(fraction):
    target = torch.tensor([0] * 40 + [1] * 8 + [2] * 2)[torch.randperm(50)]
    held = hold_out(target, fraction, torch.Generator().manual_seed(0))
    counts = torch.bincount(target[held], minlength=3).tolist()
    for n, n_held in zip((40, 8, 2), counts, strict=True):
        assert 1 <= n_held <= n - 1 and abs(n_held - n * fraction) <= 1
    assert torch.equal(held, hold_out(target, fraction, torch.Generator().manual_seed(0)))
    assert not torch.equal(held, hold_out(target, fraction, torch.Generator().manual_seed(1)))


def test_digits_test_split_is_fixed_and_real():
    dls = [get_dls("digits", seed=seed, device="cpu") for seed in (0, 1)]
    assert torch.equal(dls[0].valid_ds.images, dls[1].valid_ds.images)
    assert len(dls[0].train_ds) + len(dls[0].valid_ds) == 1797
    everything = torch.cat([dls[0].train_ds.images, dls[0].valid_ds.images])
    assert len(everything.flatten(1).unique(dim=0)) == 1797  # no image in both splits
    assert (everything[:, 0] == everything[:, 1]).all() and everything.max() == 255
    share = torch.bincount(dls[0].valid_ds.target) / torch.bincount(dls[0].train_ds.target)
    assert (share - 0.25).abs().max() < 0.02


def test_valid_fraction_leaves_the_test_split_alone(folders):
    shutil.rmtree(folders / "test")
    dls = get_dls("cifar10", path=folders, bs=5, valid=1 / 3, seed=4, device="cpu")
    assert torch.bincount(dls.train_ds.target).tolist() == [4] * 10
    assert torch.bincount(dls.valid_ds.target).tolist() == [2] * 10
    everything = torch.cat([dls.train_ds.images, dls.valid_ds.images])[:, :, 0, 0]
    assert len(everything.unique(dim=0)) == 60 and (everything[:, 2] == 0).all()
    again = get_dls("cifar10", path=folders, bs=5, valid=1 / 3, seed=4, device="cpu")
    assert torch.equal(again.valid_ds.images, dls.valid_ds.images)
    other = get_dls("cifar10", path=folders, bs=5, valid=1 / 3, seed=5, device="cpu")
    assert not torch.equal(other.valid_ds.images, dls.valid_ds.images)


@pytest.mark.parametrize("limit, n_train, n_valid", [(1, 1, 1), (7, 7, 7), (20, 20, 20), (45, 45, 30), (1000, 60, 30)])
def test_limit(folders, limit, n_train, n_valid):
    dls = get_dls("cifar10", path=folders, bs=1, limit=limit, device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds)) == (n_train, n_valid)
    counts = torch.bincount(dls.train_ds.target, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert dls.c == 10


# --- folders ----------------------------------------------------------------------------------------------------------

def test_labels_match_pixels(folders):
    dls = get_dls("cifar10", path=str(folders), bs=7, device="cpu")
    assert list(dls.vocab) == NAMES and dls.c == 10
    for part, n, blue in ((dls.train_ds, 60, 0), (dls.valid_ds, 30, 255)):
        assert part.images.shape == (n, 3, 32, 32) and part.images.dtype == torch.uint8
        assert torch.equal(part.images[:, 0, 5, 9].long(), 10 * part.target)
        assert (part.images[:, 2] == blue).all()


def test_super_classes(folders, tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(NAMES):
            group = tmp_path / "grouped" / split / ("one" if k % 3 else "two")
            group.mkdir(parents=True, exist_ok=True)
            (folders / split / name).rename(group / name)
    dls = get_dls("cifar10", path=tmp_path / "grouped", bs=7, device="cpu")
    assert list(dls.vocab) == NAMES
    assert torch.equal(dls.train_ds.images[:, 0, 0, 0].long(), 10 * dls.train_ds.target)


def test_sumix_data_is_used_and_hidden_files_are_not(folders, monkeypatch):
    (folders / "train" / ".cache").mkdir()
    (folders / "train" / NAMES[0] / "._0.png").write_bytes(b"rubbish")
    (folders / "labels.txt").write_text("x")
    monkeypatch.setenv("SUMIX_DATA", str(folders.parent))
    assert len(get_dls("cifar10", bs=60, device="cpu").train_ds) == 60
    assert find_root(SOURCES["cifar10"], folders.parent) == folders.parent  # `path` comes first


def test_kinds_of_image_files(folders):
    place = folders / "train" / NAMES[0]
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for i, mode in enumerate(("L", "P", "1", "RGBA", "LA")): colours.convert(mode).save(place / f"{i}.png")
    (place / "5.png").unlink()
    colours.save(place / "5.JPG", format="JPEG", quality=95)
    dls = get_dls("cifar10", path=folders, bs=60, device="cpu")
    assert len(dls.train_ds) == 60
    for i, mode in enumerate(("L", "P", "1", "RGBA", "LA")):
        expected = np.asarray(colours.convert(mode).convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(dls.train_ds.images[i].numpy(), expected)
    grey = dls.train_ds.images[0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("size", [1, 7, 33])
def test_size_resizes_everything(folders, size):
    write_image(folders / "train" / NAMES[3] / "wide.png", (1, 2, 3), size=(50, 20))
    dls = get_dls("cifar10", path=folders, bs=61, size=size, device="cpu")
    assert dls.one_batch()[0].shape == (61, 3, size, size)
    assert get_dls("digits", size=size, device="cpu").valid.one_batch()[0].shape == (200, 3, size, size)


def test_decoding_keeps_the_order_of_many_images():
    images = [Image.new("RGB", (2, 2), (i % 256, i // 256, 7)) for i in range(1000)]
    out = decode_images(images, 2)
    assert torch.equal(out[:, 0, 0, 0].long() + 256 * out[:, 1, 1, 1].long(), torch.arange(1000))
    assert out.is_contiguous() and decode_images([], 2).shape == (0, 3, 2, 2)


# --- errors -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, error, text", [
    (dict(name="cifar-10"), ValueError, "did you mean 'cifar10'"),
    (dict(name="Digits"), ValueError, "did you mean 'digits'"),
    (dict(name="nonsense"), ValueError, "There are digits, scenes, cifar10, cifar100"),
    (dict(name=None), TypeError, "`name` must be a string"),
    (dict(name=["digits"]), TypeError, "`name` must be a string"),
    (dict(bs=0), ValueError, "`bs` must be at least 1, got 0"),
    (dict(bs=-3), ValueError, "`bs` must be at least 1"),
    (dict(bs=2.5), TypeError, "`bs` must be a whole number"),
    (dict(bs=None), TypeError, "`bs` must be a whole number"),
    (dict(bs=True), TypeError, "`bs` must be a whole number"),
    (dict(bs=1798), ValueError, "`bs` is 1798, but there are only 1442 training images"),
    (dict(bs=11, limit=10), ValueError, "only 10 training images"),
    (dict(device="gpu"), ValueError, "`device` must be one that PyTorch finds here, got 'gpu': Expected one of cpu"),
    (dict(size=0), ValueError, "`size` must be at least 1"),
    (dict(size="32"), TypeError, "`size` must be a whole number"),
    (dict(seed=-1), ValueError, "`seed` must be at least 0"),
    (dict(seed=None), TypeError, "`seed` must be a whole number"),
    (dict(limit=0), ValueError, "`limit` must be at least 1"),
    (dict(limit=10.), TypeError, "`limit` must be a whole number"),
    (dict(valid="train"), ValueError, '`valid` must be "test" or a fraction'),
    (dict(valid=0), ValueError, "between 0 and 1, got 0"),
    (dict(valid=1.), ValueError, "between 0 and 1"),
    (dict(valid=-.1), ValueError, "between 0 and 1"),
    (dict(valid=float("nan")), ValueError, "between 0 and 1"),
    (dict(valid=None), TypeError, "`valid`"),
    (dict(valid=True), TypeError, "`valid`"),
    (dict(valid=[0.1]), TypeError, "`valid`"),
    (dict(path="somewhere"), ValueError, "`path` has no meaning for 'digits'"),
])
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error) as caught: get_dls(**{"name": "digits", "device": "cpu"} | arguments)
    assert text in str(caught.value)


def damage(root, how):
    train = root / "train"
    if how == "no train": shutil.rmtree(train)
    if how == "no test": shutil.rmtree(root / "test")
    if how == "empty split":
        shutil.rmtree(root / "test")
        (root / "test").mkdir()
    if how == "empty class": [file.unlink() for file in (train / "class4").iterdir()]
    if how == "only other files":
        for file in (train / "class4").iterdir(): file.rename(file.with_suffix(".txt"))
    if how == "class only in test": write_image(root / "test" / "extra" / "0.png", (0, 0, 0))
    if how == "class only in train": shutil.rmtree(root / "test" / "class7")
    if how == "nine classes":
        for split in ("train", "test"): shutil.rmtree(root / split / "class9")
    if how == "truncated": cut(train / "class2" / "3.png", 50)
    if how == "flipped byte": flip_byte(train / "class2" / "3.png")
    if how == "empty file": (train / "class2" / "3.png").write_bytes(b"")
    if how == "no image": (train / "class2" / "3.png").write_text("hello")
    if how == "one larger": write_image(train / "class2" / "3.png", (0, 0, 0), size=(48, 36))
    if how == "16 bits": Image.fromarray(np.full((32, 32), 999, np.uint16)).save(train / "class2" / "3.png")
    if how == "twice": shutil.copytree(train / "class2", train / "group" / "class2")
    if how == "mixed levels": shutil.copytree(train / "class2", train / "class3" / "inner")
    if how == "too deep": shutil.copytree(train, train / "a" / "b")


def cut(file, n_bytes): file.write_bytes(file.read_bytes()[:n_bytes])


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize("how, error, texts", [
    ("no train", FileNotFoundError, ("train", "<class>/*.png")),
    ("no test", FileNotFoundError, ("test", "<class>/*.png")),
    ("empty split", ValueError, ("no class folder", "test")),
    ("empty class", ValueError, ("no image", "class4")),
    ("only other files", ValueError, ("no image (.png, .jpg, .jpeg)", "class4")),
    ("class only in test", ValueError, ("only one of train/ and test/", "extra")),
    ("class only in train", ValueError, ("only one of train/ and test/", "class7")),
    ("nine classes", ValueError, ("cifar10 has 10 classes", "has 9")),
    ("truncated", ValueError, ("cannot decode", "3.png")),
    ("flipped byte", ValueError, ("cannot decode", "3.png")),
    ("empty file", ValueError, ("cannot decode", "3.png")),
    ("no image", ValueError, ("cannot decode", "3.png")),
    ("one larger", ValueError, ("3.png has 48 x 36", "expected 32 x 32", "`size=` resizes")),
    ("16 bits", ValueError, ("3.png", "more than 8 bits")),
    ("twice", ValueError, ("named 'class2'",)),
    ("mixed levels", ValueError, ("images and folders", "class3")),
    ("too deep", ValueError, ("no image",)),
])
def test_damaged_folders(folders, how, error, texts):
    damage(folders, how)
    with pytest.raises(error) as caught: get_dls("cifar10", path=folders, bs=10, device="cpu")
    assert all(text in str(caught.value) for text in texts), str(caught.value)


@pytest.mark.parametrize("by", ["path", "environment"])
def test_missing_folder_says_what_to_do_and_downloads_nothing(tmp_path, monkeypatch, by):
    monkeypatch.setattr(data, "download", lambda *args: pytest.fail("downloaded"))
    monkeypatch.setenv("SUMIX_DATA", str(tmp_path / "shared"))
    with pytest.raises(FileNotFoundError) as caught:
        get_dls("cifar100", path=tmp_path / "mine" if by == "path" else None)
    assert all(text in str(caught.value) for text in ("SUMIX_DATA", "path=", "train/<class>/*.png"))
    assert ("mine" if by == "path" else str(Path("shared", "cifar100"))) in str(caught.value)


def test_one_image_in_a_class_cannot_be_held_out(folders):
    for i in range(1, 6): (folders / "train" / "class0" / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="at least 2"): get_dls("cifar10", path=folders, bs=5, valid=0.1)


@pytest.mark.parametrize("images, target", [
    (torch.zeros(2, 3, 4, 4), torch.zeros(2)),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2)),
    (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3)),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3)),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1)),
])
def test_image_set_errors(images, target):
    with pytest.raises(ValueError, match="`images`|`target`"): ImageSet(images, target, ["a"])


# --- loaders ----------------------------------------------------------------------------------------------------------

def test_same_seed_same_epochs_and_global_generators_untouched():
    def states(): return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    before = states()
    first = get_dls("digits", bs=64, seed=3, limit=300, device="cpu")
    epochs = [batches(first.train), batches(first.train)]
    batches(first.valid)
    first.one_batch()
    after = states()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]

    torch.manual_seed(99)
    random.seed(99)
    second = get_dls("digits", bs=64, seed=3, limit=300, device="cpu")
    assert same(epochs[0], batches(second.train))
    torch.rand(5)
    assert same(epochs[1], batches(second.train))
    assert not same(*epochs)
    assert not same(epochs[0], batches(get_dls("digits", bs=64, seed=4, limit=300, device="cpu").train))


def test_epochs_do_not_depend_on_what_came_before():
    def new(): return get_dls("digits", bs=64, seed=3, limit=300, device="cpu").train
    plain = new()
    epochs = [batches(plain) for _ in range(3)]
    disturbed = new()
    disturbed.one_batch()
    assert same(epochs[0], batches(disturbed))
    next(iter(disturbed))  # an epoch that ends after one batch
    disturbed.show_batch(show=False)
    batches(disturbed.new(shuffle=False, drop_last=False))
    assert same(epochs[2], batches(disturbed))
    resumed = new()
    resumed.epoch = 1
    assert same(epochs[1], batches(resumed))


def test_looking_at_a_batch_in_the_middle_of_an_epoch_changes_nothing():
    loader, other = (get_dls("digits", bs=64, seed=3, limit=300, device="cpu").train for _ in range(2))
    expected, seen = batches(loader), []
    for batch in other:
        seen.append(tuple(part.clone() for part in batch))
        other.one_batch()
    assert same(expected, seen) and other.epoch == 1


@pytest.mark.parametrize("n, bs", [(7, 3), (6, 3), (5, 5), (4, 1)])
def test_every_image_once_and_drop_last(n, bs):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4)
    part = ImageSet(images, torch.arange(n), [str(k) for k in range(n)])
    train, valid = TensorDL(part, bs, shuffle=True, drop_last=True), TensorDL(part, bs)
    assert len(train) == n // bs and len(valid) == -(-n // bs)
    left_out = set()
    for _ in range(100):
        seen = [(int(image[0, 0, 0]), int(label)) for batch in train for image, label in zip(*batch, strict=True)]
        assert len(set(seen)) == len(seen) == n // bs * bs and all(a == b for a, b in seen)
        left_out |= set(range(n)) - {a for a, _ in seen}
    assert len(left_out) == (n if n % bs else 0)
    assert torch.cat([batch[1] for batch in valid]).tolist() == list(range(n))


def test_batches_have_fastai_types_and_the_right_values(folders):
    dls = get_dls("cifar10", path=folders, bs=10, device="cpu")
    images, target = dls.one_batch()
    assert type(images) is TensorImage and type(target) is TensorCategory
    assert images.dtype == torch.float32 and target.dtype == torch.int64 and images.is_contiguous()
    source = SOURCES["cifar10"]
    for channel, values in enumerate(images.unbind(1)):  # images of one colour: crops change nothing
        raw = (values[:, 0, 0] * source.std[channel] + source.mean[channel]) * 255
        expected = (10 * target, None, torch.zeros(10))[channel]
        if expected is not None: torch.testing.assert_close(torch.Tensor(raw), torch.Tensor(expected.float()),
                                                            rtol=0, atol=1e-3)
    assert dls.valid.bs == 20 and len(dls.valid) == 2
    order = torch.cat([target for _, target in dls.train])
    assert not torch.equal(order, dls.train_ds.target) and sorted(order.tolist()) == dls.train_ds.target.tolist()


def test_augmentation_reaches_training_batches_and_no_others():
    dls = get_dls("digits", bs=100, seed=1, device="cpu")
    first = [int(label) for label in dls.valid.one_batch()[1][:20]]
    assert first == dls.valid_ds.target[:20].tolist()
    plain = dls.train.new(shuffle=False, drop_last=False)
    plain.dataset = copy.copy(plain.dataset)
    plain.dataset.split_idx = 1
    unmoved, moved = plain.one_batch()[0], dls.train.new(shuffle=False).one_batch()[0]
    differs = (unmoved - moved).abs().amax((1, 2, 3)) > 0
    assert 0.9 < differs.float().mean() < 1.01


def test_num_workers_is_ignored_and_unique_works():
    dls = get_dls("digits", bs=10, limit=40, device="cpu")
    loader = dls.train.new(num_workers=4)
    assert loader.num_workers == 1 and loader.fake_l.num_workers == 0
    assert next(iter(loader))[0].shape[0] == 10
    dls.train.show_batch(unique=True, max_n=3, show=False)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.view == "crop"])
def test_sets_whose_labels_survive_a_mirror(folders, name):
    assert SOURCES[name].flip == (name != "digits")
    if name == "cifar100": return
    path = None if SOURCES[name].url is None else folders
    augment = get_dls(name, path=path, bs=10, size=16, device="cpu").train.after_batch[0]
    assert augment.flip == SOURCES[name].flip and augment.pad == SOURCES[name].pad // 2


def test_device_argument_moves_images_and_batches():
    dls = get_dls("digits", limit=100, device=torch.device("cpu"))
    assert dls.device == torch.device("cpu") and dls.train_ds.images.device.type == "cpu"
    dls.to("meta")
    assert dls.train_ds.images.device.type == dls.valid_ds.target.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_sees_the_same_batches():
    on_gpu, on_cpu = (get_dls("digits", bs=64, limit=300, device=device).train for device in ("cuda", "cpu"))
    for (images, target), (images_cpu, target_cpu) in zip(on_gpu, on_cpu, strict=True):
        assert images.device.type == "cuda"
        torch.testing.assert_close(images.cpu(), images_cpu)
        assert torch.equal(target.cpu(), target_cpu)


# --- a real Learner ---------------------------------------------------------------------------------------------------

@pytest.fixture
def learn(folders):
    torch.manual_seed(0)
    dls = get_dls("cifar10", path=folders, bs=20, device="cpu")
    learn = Learner(dls, tiny_model(), metrics=accuracy, path=folders)
    with learn.no_logging(): learn.fit(2, 1e-2)
    return learn


def test_loss_function_is_found_and_training_repeats(learn, folders):
    torch.manual_seed(0)
    again = Learner(get_dls("cifar10", path=folders, bs=20, device="cpu"), tiny_model(), metrics=accuracy, path=folders)
    with again.no_logging(): again.fit(2, 1e-2)
    assert again.recorder.values == learn.recorder.values
    for first, second in zip(learn.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)


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
    assert len(learn.dls.test_dl(files).decode_batch(learn.dls.test_dl(files).one_batch(), max_n=4)) == 4


def test_test_dl_with_labels(learn, folders):
    pairs = [(file, file.parent.name) for file in sorted((folders / "test").rglob("*.png"))]
    preds, target = learn.get_preds(dl=learn.dls.test_dl(pairs, with_labels=True))
    assert [learn.dls.vocab[k] for k in target] == [name for _, name in pairs]
    torch.testing.assert_close(preds, learn.get_preds()[0])
    assert list(learn.validate(dl=learn.dls.test_dl(pairs, with_labels=True))) == pytest.approx(list(learn.validate()))
    with pytest.raises(ValueError, match="not in `vocab`"):
        learn.dls.test_dl([(pairs[0][0], "zebra")], with_labels=True)


@pytest.mark.parametrize("items, error, text", [
    ("one.png", TypeError, "must be a list"),
    ([3.5], TypeError, "path or a Pillow image, got float"),
    (["nowhere.png"], FileNotFoundError, "nowhere.png"),
    (torch.zeros(2, 3, 32, 32), ValueError, "uint8"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ValueError, "(N, 3, 32, 32)"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), ValueError, "(N, 3, 32, 32)"),
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
        assert label == learn.dls.vocab[int(index)] and probs.argmax() == index and abs(probs.sum() - 1) < 1e-5
    learn.dls.show_batch()
    learn.dls.valid.show_batch(max_n=4)
    learn.dls.test_dl([tmp_path / "photo.jpg"]).show_batch()
    learn.show_results(max_n=4)
    plt.close("all")


def test_decode_batch_gives_back_the_bytes(learn):
    batch = learn.dls.valid.one_batch()
    decoded, part = learn.dls.valid.decode_batch(batch, max_n=12), learn.dls.valid_ds
    for (image, label), original, index in zip(decoded, part.images[:12], part.target[:12], strict=True):
        assert label == NAMES[index]
        assert (image.long() - original.long()).abs().max() <= 1  # fastai truncates


def test_export_holds_no_images(folders, tmp_path):
    dls = get_dls("digits", limit=500, device="cpu")
    learn = Learner(dls, tiny_model(), metrics=accuracy, path=tmp_path)
    with learn.no_logging(): learn.fit(1, 1e-2)
    learn.export("model.pkl")
    assert (tmp_path / "model.pkl").stat().st_size < 100_000
    assert len(learn.dls.train_ds) == 500
    loaded = load_learner(tmp_path / "model.pkl")
    assert len(loaded.dls.train_ds) == len(loaded.dls.valid_ds) == 0 and list(loaded.dls.vocab) == list(dls.vocab)
    images = dls.valid_ds.images[:30]
    torch.testing.assert_close(loaded.get_preds(dl=loaded.dls.test_dl(images))[0],
                               learn.get_preds(dl=dls.test_dl(images))[0])
    assert loaded.predict(folders / "test" / "class1" / "0.png")[0] in dls.vocab
    with learn.no_logging(): learn.fit(1, 1e-2)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_repeat_the_next_epoch(clone):
    dls = get_dls("digits", bs=32, limit=100, device="cpu")
    batches(dls.train)
    twin = clone(dls)
    assert twin.train.generator is twin.train.after_batch[0].generator
    assert same(batches(dls.train), batches(twin.train))


# --- downloads --------------------------------------------------------------------------------------------------------

def packed(root, file, top="cifar10"):
    with tarfile.open(file, "w:gz") as tar: tar.add(root, top)
    return source_of(file)


def source_of(file, url=None, **changes):
    content = file.read_bytes()
    facts = dict(n_bytes=len(content), md5=hashlib.md5(content[:2**20]).hexdigest()) | changes
    row = SOURCES["cifar10"]
    return DataSource("cifar10", 32, 10, row.mean, row.std, url=url or file.as_uri(), **facts)


def test_download_from_a_server_once(folders, tmp_path, monkeypatch):
    archive = tmp_path / "web" / "cifar10.tgz"
    archive.parent.mkdir()
    packed(folders, archive)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(archive.parent))
        def log_message(self, *args): requests.append(args)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setitem(SOURCES, "cifar10", source_of(archive, address + "cifar10.tgz"))
        monkeypatch.setattr(data, "fastai_path", lambda kind: tmp_path / "home" / kind)
        for _ in range(2): assert len(get_dls("cifar10", bs=10, device="cpu").train_ds) == 60
        assert len(requests) == 1 and os.listdir(tmp_path / "home" / "data") == ["cifar10"]
        with pytest.raises(ConnectionError, match="SUMIX_DATA"):
            download(source_of(archive, address + "gone.tgz"), tmp_path / "other")
        server.shutdown()
    with pytest.raises(ConnectionError, match="path="):
        download(source_of(archive, address + "cifar10.tgz"), tmp_path / "other")
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.parametrize("filtered", [True, False], ids=["filter", "no filter in this Python"])
@pytest.mark.parametrize("top", ["cifar10", "another_name", "."])
def test_archive_with_any_top_folder(folders, tmp_path, top, filtered, monkeypatch):
    if not filtered: monkeypatch.delattr(tarfile, "data_filter", raising=False)
    root = download(packed(folders, tmp_path / "a.tgz", top), tmp_path / "store")
    assert root == tmp_path / "store" / "cifar10" and list(list_images(root / "train")) == NAMES
    assert os.listdir(tmp_path / "store") == ["cifar10"]


@pytest.mark.parametrize("changes", [dict(md5="0" * 32), dict(n_bytes=5)])
def test_wrong_checksum(folders, tmp_path, changes):
    packed(folders, tmp_path / "a.tgz")
    with pytest.raises(ValueError, match="not the expected archive"):
        download(source_of(tmp_path / "a.tgz", **changes), tmp_path / "store")
    assert os.listdir(tmp_path / "store") == []


@pytest.mark.parametrize("filtered", [True, False], ids=["filter", "no filter in this Python"])
@pytest.mark.parametrize("member", ["../evil", "/evil", "cifar10/../../evil", "link"])
def test_archive_cannot_write_outside(tmp_path, member, filtered, monkeypatch):
    if not filtered: monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        info = tarfile.TarInfo(member)
        if member == "link": info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        else: info.size = 4
        tar.addfile(info, None if member == "link" else io.BytesIO(b"evil"))
    refusals = getattr(tarfile, "FilterError", ValueError), ValueError
    with pytest.raises(refusals): download(source_of(tmp_path / "a.tgz"), tmp_path / "store")
    assert os.listdir(tmp_path / "store") == [] and sorted(os.listdir(tmp_path)) == ["a.tgz", "store"]
    assert not Path("/evil").exists()


def test_damaged_archive_leaves_nothing(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"no archive at all")
    with pytest.raises(tarfile.ReadError): download(source_of(tmp_path / "a.tgz"), tmp_path / "store")
    assert os.listdir(tmp_path / "store") == []


def test_two_downloads_at_once(folders, tmp_path, monkeypatch):
    source, target = packed(folders, tmp_path / "a.tgz"), tmp_path / "store" / "cifar10"
    def other_process_wins(self, goal):
        (goal / "train").mkdir(parents=True)
        raise OSError("Directory not empty")
    monkeypatch.setattr(Path, "rename", other_process_wins)
    assert download(source, tmp_path / "store") == target and os.listdir(target.parent) == ["cifar10"]


def test_checksums_are_those_of_fastai():
    import fastai.data.download_checks as checks

    table = eval(Path(checks.__file__).read_text())
    for source in SOURCES.values():
        if source.url: assert table[source.url] == (source.n_bytes, source.md5)


# --- real images ------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not Path(os.environ.get("SUMIX_DATA", "/nowhere"), "cifar100").is_dir(),
                    reason="needs $SUMIX_DATA/cifar100")
def test_real_cifar100():
    dls = get_dls("cifar100", device="cpu")
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (50_000, 10_000, 100)
    assert torch.bincount(dls.train_ds.target).tolist() == [500] * 100
    assert torch.bincount(dls.valid_ds.target).tolist() == [100] * 100
    pixels = dls.train_ds.images.float() / 255
    source = SOURCES["cifar100"]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(source.mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(source.std), rtol=0, atol=1e-4)
    assert len(dls.train) == 500 and dls.one_batch()[0].shape == (100, 3, 32, 32)


def test_digits_statistics():
    pixels = get_dls("digits", device="cpu").train_ds.images.double() / 255
    source = SOURCES["digits"]
    torch.testing.assert_close(pixels.mean((0, 2, 3)).float(), torch.tensor(source.mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels.std((0, 2, 3)).float(), torch.tensor(source.std), rtol=0, atol=1e-4)


def test_scenes_are_drawn_at_the_wanted_size_and_have_the_statistics_of_the_table():
    dls, source = get_dls("scenes", device="cpu"), SOURCES["scenes"]
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c) == (20000, 4000, 24) == (20000, 4000, source.n_classes)
    drawn = scenes(4000, seed=1)
    assert torch.equal(dls.valid_ds.images, drawn.images) and torch.equal(dls.valid_ds.target, drawn.target)
    pixels = dls.train_ds.images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)).float(), torch.tensor(source.mean), rtol=0, atol=3e-3)
    torch.testing.assert_close(pixels.std((0, 2, 3)).float(), torch.tensor(source.std), rtol=0, atol=3e-3)
    with pytest.raises(ValueError, match="`size`"): get_dls("scenes", size=8, device="cpu")


def test_read_image_returns_rgb():
    assert read_image(Image.new("L", (5, 4), 9), 3).getpixel((1, 1)) == (9, 9, 9)
    with pytest.raises(ValueError, match="5 x 4"): read_image(Image.new("L", (5, 4)), 5, resize=False)
