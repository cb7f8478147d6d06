"Layouts of published sets: what readers find in miniature copies, and what they say of damaged ones"
import numpy as np
import pytest

from sumix_nb.data.layouts import CORRUPTIONS, EXTRA_CORRUPTIONS, read_cifar100_c
from sumix_nb.data.layouts import read_cub200
from sumix_nb.data.sources import decode_images
from tests.data.oracles import MAKERS, make_cub


@pytest.mark.parametrize("name", MAKERS)
def test_files_and_classes_belong_together(name, tmp_path):
    make, read = MAKERS[name]
    splits, names = read(make(tmp_path / "set"))
    assert set(splits) == {"train", "test"} and len(names) == 3
    shades = {}
    for files, labels in splits.values():
        assert len(files) == len(labels) >= 3
        for image, label in zip(decode_images(files, 8), labels, strict=True):
            shades.setdefault(label, set()).add(round(image.float().mean().item() / 50))
    assert sorted(min(shade) for shade in shades.values()) == [0, 1, 2]
    assert set(shades) == set(names) and all(len(shade) == 1 for shade in shades.values())


@pytest.mark.parametrize(("name", "table"), [
    ("tiny_imagenet", "val/val_annotations.txt"), ("cub200", "images.txt"), ("cub200", "classes.txt"),
    ("cub200", "train_test_split.txt"), ("aircraft", "data/variants.txt"),
    ("aircraft", "data/images_variant_trainval.txt")])
def test_a_missing_or_cut_table_is_named(name, table, tmp_path):
    make, read = MAKERS[name]
    file = make(tmp_path / "set") / table
    text = file.read_text()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=file.name): read(tmp_path / "set")
    if "variants" not in table:
        file.write_text(text + "alone\n")
        with pytest.raises(ValueError, match=r"line \d+ of .* must have \d columns, got 'alone'"):
            read(tmp_path / "set")


@pytest.mark.parametrize("table", ["images", "image_class_labels", "train_test_split"])
def test_bird_tables_must_agree(tmp_path, table):
    rows = (make_cub(tmp_path) / f"{table}.txt").read_text().splitlines()
    (tmp_path / f"{table}.txt").write_text("\n".join(rows[:-1]))
    with pytest.raises(ValueError, match=f"do not all have image {rows[-1].split()[0]}"):
        read_cub200(tmp_path)


@pytest.mark.parametrize("corruption", [CORRUPTIONS[0], EXTRA_CORRUPTIONS[-1]])
def test_corrupted_images_come_by_severity_without_being_loaded(corruption, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.array([7, 99, 0], np.uint8), 5)
    np.save(tmp_path / f"{corruption}.npy", images), np.save(tmp_path / "labels.npy", labels)
    found, target = read_cifar100_c(tmp_path, corruption)
    assert target.tolist() == [7, 99, 0] and np.array_equal(found[2, 1], images[7])
    assert not found.flags.writeable
    for wrong in (-1, 100, 7.5):
        np.save(tmp_path / "labels.npy", np.tile([7, wrong, 0], 5))
        with pytest.raises(ValueError, match=r"labels.npy of .* must be whole numbers in 0 \.\.\. 99"):
            read_cifar100_c(tmp_path, corruption)
    np.save(tmp_path / f"{corruption}.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"): read_cifar100_c(tmp_path, corruption)  # no pickle
