"Layouts of published sets: what readers find in miniature copies, and what they say of damaged ones"
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sumix_nb.data import layouts
from sumix_nb.data.sources import decode_images
from sumix_nb.data.layouts import CORRUPTIONS, EXTRA_CORRUPTIONS, SETS, check_files, class_folders, index_classes
from sumix_nb.data.layouts import list_folder, read_aircraft, read_cifar100_c, read_cub200, read_imagenet, read_table
from sumix_nb.data.layouts import read_tiny_imagenet


@pytest.fixture
def few(monkeypatch):
    "Every set has three classes"
    monkeypatch.setattr(layouts, "SETS", {name: (3, source) for name, (_, source) in SETS.items()})


def draw(file, shade=90):
    "A gray image of 8 x 6 pixels in a new folder"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade,) * 3).save(file, quality=95)


def write(file, lines):
    "Lines of text in a new folder"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def make_tiny(root):
    "Tiny-ImageNet with three classes; shades tell the class"
    for k, wnid in enumerate(("n02", "n10", "n03")):
        for i in range(k + 1): draw(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 50 * k)
        write(root / "train" / wnid / f"{wnid}_boxes.txt", ["x 0 0 1 1"])
    rows = [(f"val_{i}.JPEG", wnid) for i, wnid in enumerate(("n03", "n02", "n10", "n02"))]
    for (name, wnid) in rows: draw(root / "val" / "images" / name, 50 * ("n02", "n10", "n03").index(wnid))
    write(root / "val" / "val_annotations.txt", ["\t".join((*row, "0", "0", "5", "5")) for row in rows])
    return root


def make_imagenet(root):
    "ImageNet with three classes"
    for k, wnid in enumerate(("n02", "n10", "n03")):
        for split in ("train", "val"): draw(root / split / wnid / f"{split}_{wnid}.JPEG", 50 * k)
    return root


def make_cub(root):
    "CUB-200 with three classes, its tables in random order"
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    files = [f"{name}/{name[4:]}_{i}.jpg" for name in names for i in range(2)]
    for i, file in enumerate(files): draw(root / "images" / file, 50 * (i // 2))
    tables = {"images": files, "image_class_labels": [i // 2 + 1 for i in range(6)],
              "train_test_split": [i % 2 for i in range(6)]}
    for seed, (table, values) in enumerate(tables.items()):
        lines = [f"{i + 1} {value}" for i, value in enumerate(values)]
        random.Random(seed).shuffle(lines)
        write(root / f"{table}.txt", lines)
    write(root / "classes.txt", [f"{i + 1} {name}" for i, name in enumerate(names)])
    return root


def make_aircraft(root):
    "FGVC-Aircraft with three classes, whose names hold blanks and slashes"
    names = ("Boeing 707/320", "A330 Mk II", "Yak-42")
    write(root / "data" / "variants.txt", names)
    for split, start in (("trainval", 0), ("test", 3)):
        lines = [f"{start + k:07d} {name}" for k, name in enumerate(names)]
        write(root / "data" / f"images_variant_{split}.txt", lines)
    for i in range(6): draw(root / "data" / "images" / f"{i:07d}.jpg", 50 * (i % 3))
    return root


MAKERS = {"tiny_imagenet": (make_tiny, read_tiny_imagenet), "imagenet": (make_imagenet, read_imagenet),
          "cub200": (make_cub, read_cub200), "aircraft": (make_aircraft, read_aircraft)}


@pytest.mark.parametrize("name", MAKERS)
def test_files_and_classes_belong_together(name, tmp_path, few):
    make, read = MAKERS[name]
    splits, names = read(make(tmp_path / "set"))
    assert set(splits) == {"train", "test"} and len(names) == 3
    shades = {}
    for files, target in splits.values():
        assert target.dtype == torch.int64 and len(files) == len(target) >= 3
        for image, label in zip(decode_images(files, 8), target.tolist(), strict=True):
            shades.setdefault(label, set()).add(round(image.float().mean().item() / 50))
    assert sorted(len(found) for found in shades.values()) == [1, 1, 1] and len(set.union(*shades.values())) == 3


@pytest.mark.parametrize("name", MAKERS)
def test_an_image_that_is_missing_empty_or_damaged_is_named(name, tmp_path, few):
    make, read = MAKERS[name]
    root = make(tmp_path / "set")
    files = read(root)[0]["test"][0]
    files[-1].write_bytes(b"no image")
    again = read(root)[0]["test"][0]
    with pytest.raises(ValueError, match=f"cannot decode.*{files[-1].name}"): decode_images(again, 8)
    files[-1].unlink()
    # ImageNet knows its images by its folders only, and this was the one image of its class
    error, message = (ValueError, "1 classes of imagenet have no image in the test split") if name == "imagenet" else (
        FileNotFoundError, rf"1 of \d images are missing.*{files[-1].name}")
    with pytest.raises(error, match=message): read(root)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_class_is_named(name, split, tmp_path, few):
    make, read = MAKERS[name]
    root = make(tmp_path / "set")
    tables = {"tiny_imagenet": ("val/val_annotations.txt", "n10"), "aircraft": (
        f"data/images_variant_{'trainval' if split == 'train' else 'test'}.txt", "A330 Mk II")}
    if name == "imagenet" or (name, split) == ("tiny_imagenet", "train"):
        label, folder = "n10", root / ("train" if split == "train" else "val") / "n10"
        for file in folder.rglob("*.JPEG"): file.unlink()
    elif name == "cub200":
        label, file = "002.Laysan_Albatross", root / "train_test_split.txt"
        rows = dict(line.split() for line in file.read_text().splitlines())
        write(file, [f"{i} {int(split == 'test') if i in ('3', '4') else flag}" for i, flag in rows.items()])
    else:
        table, label = tables[name]
        write(root / table, [line for line in (root / table).read_text().splitlines() if label not in line])
    with pytest.raises(ValueError, match=f"1 classes of {name} have no image in the {split} split, e.g. {label}"):
        read(root)


@pytest.mark.parametrize("name", MAKERS)
def test_another_number_of_classes_is_refused_with_the_source(name, tmp_path):
    make, read = MAKERS[name]
    expected, source = SETS[name]
    with pytest.raises(ValueError, match=f"{name} has {expected} classes, but 3 were found") as error:
        read(make(tmp_path / "set"))
    assert source in str(error.value)


@pytest.mark.parametrize(("name", "table"), [
    ("tiny_imagenet", "val/val_annotations.txt"), ("cub200", "images.txt"), ("cub200", "classes.txt"),
    ("cub200", "train_test_split.txt"), ("aircraft", "data/variants.txt"),
    ("aircraft", "data/images_variant_trainval.txt")])
def test_a_missing_or_cut_table_is_named(name, table, tmp_path, few):
    make, read = MAKERS[name]
    root = make(tmp_path / "set")
    text = (root / table).read_text()
    (root / table).unlink()
    with pytest.raises(FileNotFoundError, match=table.split("/")[-1]): read(root)
    if "variants" not in table:
        (root / table).write_text(text + "alone\n")
        with pytest.raises(ValueError, match=r"line \d+ of .* must have \d columns, got 'alone'"): read(root)


def test_birds_with_a_one_are_for_training(tmp_path, few):
    splits, _ = read_cub200(make_cub(tmp_path))
    assert {file.stem[-1] for file in splits["train"][0]} == {"1"}  # as `make_cub` has it
    assert {file.stem[-1] for file in splits["test"][0]} == {"0"}


def test_missing_test_images_of_imagenet_are_named(tmp_path, few):
    (make_imagenet(tmp_path) / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder .*val"): read_imagenet(tmp_path)


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet"])
def test_a_missing_training_folder_is_named(name, tmp_path, few):
    with pytest.raises(FileNotFoundError, match="no folder .*train"): MAKERS[name][1](tmp_path)
    assert list_folder(tmp_path / "nowhere") == [] and class_folders(tmp_path) == []
    for hidden in ("._a.JPEG", "a.JPEG", "a.txt"): (tmp_path / hidden).touch()
    assert list_folder(tmp_path) == [tmp_path / "a.JPEG"]


def test_classes_must_be_known(tmp_path, few):
    draw(tmp_path / "one.png")
    check_files([tmp_path / "one.png"])
    found = {"train": ([tmp_path / "one.png"] * 4, ["a", "b", "c", "dodo"])}
    with pytest.raises(ValueError, match="1 classes of the train split.*dodo"):
        index_classes("cub200", found, ["a", "b", "c"])
    assert read_table(make_cub(tmp_path) / "classes.txt", 2)[0] == ["1", "001.Black_footed_Albatross"]


@pytest.mark.parametrize("corruption", [CORRUPTIONS[0], EXTRA_CORRUPTIONS[-1]])
def test_corrupted_images_come_by_severity_without_being_loaded(corruption, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / f"{corruption}.npy", images), np.save(tmp_path / "labels.npy", np.tile([7, 99, 0], 5))
    found, target = read_cifar100_c(tmp_path, corruption)
    assert target.tolist() == [7, 99, 0] and np.array_equal(found[2, 1], images[7]) and not found.flags.writeable
    for wrong in (-1, 100):
        np.save(tmp_path / "labels.npy", np.tile([7, wrong, 0], 5))
        with pytest.raises(ValueError, match=r"labels.npy of .* must be in 0 \.\. 99"):
            read_cifar100_c(tmp_path, corruption)
    np.save(tmp_path / f"{corruption}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"): read_cifar100_c(tmp_path, corruption)  # no pickle is opened
