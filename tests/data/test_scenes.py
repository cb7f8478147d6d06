"Drawn images with masks, and photographs with masks"
import pytest
import torch

from sumix_nb.data.scenes import CHUNK, CLASSES, SHAPES, TEXTURES, MaskedImages, draw_objects, scenes


@pytest.mark.parametrize("n", [1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("size", [16, 33])
def test_any_number_and_size(n, size):
    found = scenes(n, size, seed=5)
    assert found.images.shape == (n, 3, size, size) and found.masks.shape == (n, 1, size, size) and len(found) == n
    covered = found.masks.double().mean((1, 2, 3))
    assert found.images.dtype == torch.uint8 and ((covered > 0) & (covered < 1)).all()
    assert found.target.min() >= 0 and found.target.max() < len(CLASSES)


def test_a_seed_repeats_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    one, two, other = scenes(300, seed=2), scenes(300, seed=2), scenes(300, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    for name in ("images", "target", "masks"):
        assert torch.equal(getattr(one, name), getattr(two, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def centred(turn, frequency, size):
    "An object of each class in the middle"
    n = len(CLASSES)
    return draw_objects(torch.arange(n), torch.full((n, 2), 0.5), torch.full((n,), 0.4), torch.linspace(0, turn, n),
                        torch.full((n,), frequency), torch.zeros(n, 2), size)


def test_a_larger_size_shows_the_same_shape():
    small, large = (centred(6, 1.0, size)[0] for size in (32, 128))
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 4), small, rtol=0, atol=0.51)
    torch.testing.assert_close(large.mean((1, 2, 3)), small.mean((1, 2, 3)), rtol=0.06, atol=0)


def test_texture_changes_colours_and_not_the_outline():
    cover, first = centred(0, 1.5, 48)
    groups = cover.view(len(SHAPES), len(TEXTURES), 48, 48)
    assert (groups == groups[:, :1]).all() and (first <= cover).all()
    colors = first.view(len(SHAPES), len(TEXTURES), -1)
    for a in range(len(TEXTURES)):
        for b in range(a): assert (colors[:, a] != colors[:, b]).any(1).all()


@pytest.mark.parametrize(("part", "value", "pattern"), [
    ("images", torch.zeros(3, 3, 8, 8), "`images`"), ("images", torch.zeros(3, 1, 8, 8, dtype=torch.uint8), "`images`"),
    ("images", torch.zeros(3, 3, 8, dtype=torch.uint8), "`images`"),
    ("target", torch.zeros(2, dtype=torch.long), "`target`"), ("masks", torch.zeros(3, 1, 8, 8), "`masks`"),
    ("masks", torch.zeros(3, 8, 8, dtype=torch.bool), "`masks`")])
def test_parts_that_do_not_fit_are_named(part, value, pattern):
    whole = {"images": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "target": torch.zeros(3, dtype=torch.long),
             "masks": torch.zeros(3, 1, 8, 8, dtype=torch.bool), "vocab": ("a",)}
    MaskedImages(**whole)
    with pytest.raises(ValueError, match=pattern): MaskedImages(**whole | {part: value})
