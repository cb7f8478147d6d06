"Crops and mirrors: every pixel where it belongs, every draw possible, training images only"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sumix_nb.data.augment import crop_flip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crop_flip_pixel_by_pixel(drawn):
    height, width = drawn.draw(st.integers(1, 9)), drawn.draw(st.integers(1, 9))
    pad = drawn.draw(st.integers(0, min(height, width) - 1))
    n, channels = drawn.draw(st.integers(0, 3)), drawn.draw(st.integers(1, 4))
    images = torch.arange(n * channels * height * width).view(n, channels, height, width)
    pairs = st.lists(st.tuples(*[st.integers(0, 2 * pad)] * 2), min_size=n, max_size=n)
    offset = torch.tensor(drawn.draw(pairs)).view(n, 2).long()
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_crop_flip_dtype_and_no_writing(dtype):
    images = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7).to(dtype)
    kept = images.clone()
    out = crop_flip(images, torch.tensor([[0, 4], [2, 2]]), torch.tensor([True, False]), 2)
    assert out.dtype == dtype and torch.equal(images, kept)
    assert torch.equal(out[1], images[1])
    assert out.data_ptr() != images.data_ptr()
