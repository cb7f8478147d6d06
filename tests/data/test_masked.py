"Photographs with masks, of files written here"
import numpy as np
import pytest
from PIL import Image

from sumix_nb.data.masked import masked_folder, pets


def write_pet(base, name, sides, animal):
    "A photograph and its map; `animal` is (top, bottom, left, right)"
    picture, seam = np.full((*sides, 3), 30, np.uint8), np.full(sides, 2, np.uint8)
    top, bottom, left, right = animal
    picture[top:bottom, left:right], seam[top:bottom, left:right] = 220, 1
    for folder, image, ending in (("images", picture, "jpg"), ("annotations/trimaps", seam, "png")):
        (base / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(base / folder / f"{name}.{ending}")


def test_pets_keep_mask_and_photograph_together(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    write_pet(base, "great_pyrenees_3", (60, 40), (20, 40, 10, 30))
    write_pet(base, "Bombay_12", (40, 80), (0, 40, 40, 80))
    (base / "annotations" / "trainval.txt").write_text("great_pyrenees_3 2 2 1\nBombay_12 1 1 1\n")
    found = pets(tmp_path, "trainval", size=40)
    assert found.vocab == ("Bombay", "Great Pyrenees") and found.target.tolist() == [1, 0]
    for image, mask in zip(found.images, found.masks, strict=True):
        assert image[:, mask[0]].float().mean() > 200 and image[:, ~mask[0]].float().mean() < 60
    assert found.masks[1, 0, :, 20:].all() and not found.masks[1, 0, :, :20].any()


@pytest.mark.parametrize(("bright", "above"), [(255, 127), (153, 127), (1, 0)])
def test_masks_of_a_folder_stay_with_their_images(tmp_path, bright, above):
    sides = {"wren/b.jpg": (60, 40), "wren/a.png": (40, 80), "finch/a.jpeg": (50, 50)}
    for name, (height, width) in sides.items():
        picture, mask = np.full((height, width, 3), 30, np.uint8), np.zeros((height, width), np.uint8)
        picture[height // 4:height // 2, :width // 2], mask[height // 4:height // 2, :width // 2] = 220, bright
        files = tmp_path / "images" / name, (tmp_path / "masks" / name).with_suffix(".png")
        for file, image in zip(files, (picture, mask), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    found = masked_folder(tmp_path / "images", tmp_path / "masks", size=20, above=above)
    assert found.vocab == ("finch", "wren") and found.target.tolist() == [0, 1, 1]
    assert found.images.shape == (3, 3, 20, 20) and found.masks.flatten(1).any(1).all()
    for image, mask in zip(found.images, found.masks, strict=True):
        inside, outside = image[:, mask[0]].float(), image[:, ~mask[0]].float()
        assert inside.mean() > 190 and outside.mean() < 60


def test_a_folder_without_images_says_so(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"): masked_folder(tmp_path / "images", tmp_path)
