"Small image sets on disk, in the layouts of the published ones, random images and a tiny network"
import random
from functools import partial

import numpy as np
from PIL import Image
from torch import nn

from sumix_nb.data.layouts import read_aircraft, read_class_folders, read_cub200, read_tiny_imagenet

NAMES = [f"class{k}" for k in range(10)]


def write_image(file, value, size=(32, 32), mode="RGB"):
    "An image of one colour in a new folder"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(file, quality=95)


def write_rows(file, rows):
    "Lines of text in a new folder"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows))


def white_noise(seed=0, height=40, width=56):
    "An image of random bytes"
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_model(n_classes=10):
    "A linear network for images of any size"
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, n_classes))


def grey(file, k): write_image(file, (50 * k,) * 3, (8, 6))


def make_tiny(root):
    "Tiny-ImageNet with three classes; shades tell the class"
    wnids = "n02", "n10", "n03"
    for k, wnid in enumerate(wnids):
        for i in range(k + 1): grey(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", k)
        write_rows(root / "train" / wnid / f"{wnid}_boxes.txt", ["x 0 0 1 1"])
    rows = [(f"val_{i}.JPEG", wnid) for i, wnid in enumerate(("n03", "n02", "n10", "n02"))]
    for name, wnid in rows: grey(root / "val" / "images" / name, wnids.index(wnid))
    lines = ["\t".join((*row, "0", "0", "5", "5")) for row in rows]
    write_rows(root / "val" / "val_annotations.txt", lines)
    return root


def make_imagenet(root):
    "ImageNet with three classes"
    for k, wnid in enumerate(("n02", "n10", "n03")):
        for split in ("train", "val"): grey(root / split / wnid / f"{split}_{wnid}.JPEG", k)
    return root


def make_cub(root):
    "CUB-200 with three classes, its tables in random order"
    names = "001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"
    files = [f"{name}/{name[4:]}_{i}.jpg" for name in names for i in range(2)]
    for i, file in enumerate(files): grey(root / "images" / file, i // 2)
    tables = {"images": files, "image_class_labels": [i // 2 + 1 for i in range(6)],
              "train_test_split": [i % 2 for i in range(6)]}
    for seed, (table, values) in enumerate(tables.items()):
        rows = [f"{i + 1} {value}" for i, value in enumerate(values)]
        random.Random(seed).shuffle(rows)
        write_rows(root / f"{table}.txt", rows)
    write_rows(root / "classes.txt", [f"{i + 1} {name}" for i, name in enumerate(names)])
    return root


def make_aircraft(root):
    "FGVC-Aircraft with three classes, whose names hold blanks and slashes"
    names = "Boeing 707/320", "A330 Mk II", "Yak-42"
    write_rows(root / "data" / "variants.txt", names)
    for split, start in (("trainval", 0), ("test", 3)):
        rows = [f"{start + k:07d} {name}" for k, name in enumerate(names)]
        write_rows(root / "data" / f"images_variant_{split}.txt", rows)
    for i in range(6): grey(root / "data" / "images" / f"{i:07d}.jpg", i % 3)
    return root


MAKERS = {"tiny_imagenet": (make_tiny, read_tiny_imagenet),
          "imagenet": (make_imagenet, partial(read_class_folders, test="val")),
          "cub200": (make_cub, read_cub200), "aircraft": (make_aircraft, read_aircraft)}
