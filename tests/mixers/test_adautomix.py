"AdAutoMix's generator and masks against recorded numbers of the released code"
import pytest
import torch
from torch import nn

from sumix_nb.mixers.adautomix import ManyMaskGenerator, mix_many, sample_shares
from sumix_nb.mixers.automix import is_extreme
from tests.oracles import PRECISIONS, near


def recorded_generator(cases, case, dtype):
    channels = cases[case, "feats" if case[0] == "g" else "feat"].shape[-3]
    mode = str(cases.arrays[f"{case}__mode"])
    generator = ManyMaskGenerator(channels, bool(cases[case, "lam_concat"]), mode).to(dtype)
    with torch.no_grad():
        for label, layer in zip("qkv", (generator.query, generator.key, generator.value)):
            layer.weight.copy_(cases[case, f"w_{label}"].to(dtype).reshape(layer.weight.shape))
            layer.bias.copy_(torch.as_tensor(cases[case, f"b_{label}"], dtype=dtype).reshape(-1))
    return generator


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [f"g{i}" for i in range(8)])
def test_masks_and_gradients_equal_recorded_ones(golden, case, precision):
    cases, dtype = golden("adautomix_official.npz"), PRECISIONS[precision]
    generator, features = recorded_generator(cases, case, dtype), cases[case, "feats"].to(dtype)
    size = tuple(side * cases[case, "scale"] for side in features.shape[3:])
    mask = generator(features, cases[case, "lam"], size)
    assert mask.shape == (features.shape[1], features.shape[0], *size)
    torch.testing.assert_close(mask.sum(1), torch.ones_like(mask[:, 0]))
    gradients = torch.autograd.grad((mask * cases[case, "probe"].to(dtype)).sum(), list(generator.parameters()))
    found = {"mask": mask, **dict(zip((f"grad_{kind}_{label}" for label in "qkv" for kind in "wb"), gradients))}
    compared = 0
    for name, value in found.items():
        if (case, precision, name) not in cases: continue
        wanted = torch.as_tensor(cases[case, precision, name], dtype=torch.float64)
        near(value.detach().reshape(wanted.shape), wanted, precision)
        compared += 1
    assert compared >= (7 if precision == "f64" else 1)


@pytest.mark.parametrize("case", [f"b{i}" for i in range(7)])
def test_both_mixtures_equal_recorded_ones(golden, case):
    cases = golden("adautomix_official.npz")
    generator, images = recorded_generator(cases, case, torch.float64), cases[case, "x"].double()
    features, lam, rows = cases[case, "feat"].double(), cases[case, "lam"], torch.arange(len(images))[None]
    for who, which in (("mb", 0), ("bb", 1)):
        index, shares = cases[case, f"index_{who}"], lam
        if cases[case, "n_images"] == 2:
            index, shares = torch.cat([rows, index]), torch.stack([lam[which], 1 - lam[which]])
        mask = generator(features[index], shares, images.shape[2:])
        near(mask.detach(), cases[case, "f64", "mask_mb" if who == "mb" else "mask_bb_raw"], "f64")
        if who == "bb":
            extreme = is_extreme(shares.tolist(), cases[case, "lam_margin"])
            assert extreme == (case in ("b0", "b1", "b3", "b4", "b6"))
            if extreme: mask = shares.view(1, -1, 1, 1).expand_as(mask)
        near(mix_many(mask, images[index]).detach(), cases[case, "f64", f"img_mix_{who}"], "f64")


def test_maps_that_are_not_square_keep_their_height_and_width():
    "The released generator exchanges them; turning the images must turn the masks"
    torch.manual_seed(0)
    for lam_channel in (False, True):
        generator, lam = ManyMaskGenerator(4, lam_channel, "nearest"), torch.tensor([0.5, 0.3, 0.2])
        for p in generator.parameters(): nn.init.normal_(p)
        features = torch.randn(3, 2, 4, 3, 5)
        mask = generator(features, lam, (6, 10))
        assert mask.shape == (2, 3, 6, 10)
        torch.testing.assert_close(generator(features.mT, lam, (10, 6)).mT, mask)


def test_the_order_of_the_images_does_not_matter():
    torch.manual_seed(0)
    generator, lam, order = ManyMaskGenerator(4, True), torch.tensor([0.5, 0.3, 0.2]), [2, 0, 1]
    for p in generator.parameters(): nn.init.normal_(p)
    features = torch.randn(3, 2, 4, 3, 3)
    wanted = generator(features, lam, (6, 6))[:, order]
    torch.testing.assert_close(generator(features[order], lam[order], (6, 6)), wanted)


def test_shares_are_drawn_in_proportion():
    generator = torch.Generator().manual_seed(0)
    shares = torch.stack([sample_shares(1.0, 3, generator) for _ in range(2000)])
    torch.testing.assert_close(shares.sum(1), torch.ones(2000, dtype=torch.float64))
    torch.testing.assert_close(shares.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize(("shares", "extreme"), [([0.25, 0.75], True), ([0.75, 0.25], True), ([0.5, 0.25, 0.25], False),
                                                 ([0.25, 0.5, 0.25], True), ([0.75, 0.125, 0.125], False),
                                                 ([0.8, 0.1, 0.1], True), ([0.4, 0.6], False)])
def test_only_the_first_share_decides(shares, extreme): assert is_extreme(shares, 0.25) == extreme


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ManyMaskGenerator(0), "`channels`"), (lambda: ManyMaskGenerator(4, mode="cubic"), "`mode`"),
    (lambda: ManyMaskGenerator(4)(torch.zeros(2, 4, 3, 3), torch.ones(2), (6, 6)), "`features`"),
    (lambda: ManyMaskGenerator(4)(torch.zeros(1, 2, 4, 3, 3), torch.ones(1), (6, 6)), "`features`"),
    (lambda: ManyMaskGenerator(4)(torch.zeros(3, 2, 5, 3, 3), torch.ones(3) / 3, (6, 6)), "`features`"),
    (lambda: ManyMaskGenerator(4)(torch.zeros(3, 2, 4, 3, 3), torch.ones(2) / 2, (6, 6)), "`lam`")])
def test_bad_input_names_the_argument(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_the_callback_is_found_where_one_looks_for_it():
    import sumix_nb.mixers.adautomix as module
    from sumix_nb.mixers.adautomix import AdAutoMix
    assert AdAutoMix.__name__ == "AdAutoMix"
    with pytest.raises(AttributeError, match="AdAutoMax"): module.AdAutoMax  # noqa: B018
