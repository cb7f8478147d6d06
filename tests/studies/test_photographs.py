"Objects cut out of photographs on white, and a box that moves over them"
import torch
from PIL import Image

from sumix_nb.data.scenes import scenes
from sumix_nb.studies.photographs import WHITE, cifar100_objects, measure_photographs, move_box, objects_on_white
from tests.evaluation.oracles import FACTS, Colours


def test_white_is_the_border_and_the_object_the_rest():
    images = torch.full((4, 3, 20, 16), 255, dtype=torch.uint8)
    images[0, 1, 5:12, 4:10] = WHITE - 1  # one channel is enough
    images[1, :, 5:12, 4:10] = WHITE  # still white
    images[2, :, 5:12, 4:10], images[2, :, :3] = 0, 0  # a dark border
    images[3, :, 8, 8] = 0  # too small
    found = objects_on_white(images, torch.arange(4), tuple("abcd"))
    assert found.target.tolist() == [0] and found.masks.sum() == 42 and bool(found.masks[0, 0, 5:12, 4:10].all())


def write_cifar100(root):
    "A miniature in the layout of CIFAR-100: two images of each class and split, objects on white in 13 test classes"
    for split in ("train", "test"):
        for k in range(100):
            folder = root / split / f"class{k:02d}"
            folder.mkdir(parents=True)
            for i in range(2):
                image = torch.full((32, 32, 3), 255 if split == "test" and k < 13 else 90, dtype=torch.uint8)
                image[6 + i:20, 3 + k % 8:18] = torch.tensor([10 + 2 * k, 100, 200 - k], dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return root


def test_photographs_are_found_and_measured(tmp_path):
    data = cifar100_objects(write_cifar100(tmp_path / "cifar100"))
    assert len(data) == 26 and data.target.tolist() == [k for k in range(13) for _ in range(2)]
    assert data.masks[1].sum() == (20 - 7) * (18 - 3) and len(data.vocab) == 100
    model = Colours(100)
    found = measure_photographs(model, data, times=2, bs=20, pairs=2)
    assert found["n"] == 26 and len(found["lattice"]) == 2 and len(found["label_errors"]) == 5
    rows = {pair[name] for pair in found["lattice"] for name in ("first", "second")}
    assert len(rows) == 4 and all(len(pair["truth"]) == len(pair["truth"][0]) == 11 for pair in found["lattice"])
    assert found == measure_photographs(model, data, times=2, bs=20, pairs=2)


def test_the_box_visits_every_place_and_shows_what_it_should():
    data, model = scenes(4, 24, seed=1), Colours()
    found = move_box(model, data, 2, 2, **FACTS, lam=0.6)
    for name in ("poster, logits", "corrected, logits"):  # an image mixed with itself: nothing moves the share
        torch.testing.assert_close(found[name], found["lam"])
    assert move_box(model, data, 0, 1, **FACTS, lam=1.0)["visible"].eq(1).all()
    hidden = move_box(model, data, 0, 1, **FACTS, lam=0.0)
    assert hidden["visible"].shape == (1, 1) and hidden["truth"].item() == 0
