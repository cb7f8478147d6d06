"Shared by the tests of the mixers: seeds, images that tell where a value comes from, and every mixer there is"
import torch

from sumix_nb.mixers import MIXERS, CutMix, FMix, GridMix, MixUp, OneOf, PuzzleMix, ResizeMix, SaliencyMix, SmoothMix
from sumix_nb.mixers.resizemix import RESIZE_MODES

ALL = tuple(kind for kind in MIXERS.values() if kind is not PuzzleMix)  # which wants a map of each batch
BOX = (CutMix, ResizeMix, SaliencyMix)  # those whose box the border may cut
BOOLS = (False, True)


def seeded(seed=0): return torch.Generator(device="cpu").manual_seed(seed)


def numbered(n, channels, height, width, dtype=torch.float32):
    "Images whose every value tells which image, channel, row and column it comes from"
    return torch.arange(n * channels * height * width, dtype=dtype).view(n, channels, height, width)


def variants():
    "Every mixer with every option that changes its pixels, of those that need no map"
    for per_sample in BOOLS:
        for kind in (MixUp, CutMix, SmoothMix, GridMix, FMix, SaliencyMix):
            yield kind(per_sample=per_sample)
            yield kind(alpha=0.2, per_sample=per_sample, p=0.5)
        yield FMix(per_sample=per_sample, quirk=True)
        yield FMix(per_sample=per_sample, max_soft=0.3, decay=2.0)
        yield SaliencyMix(per_sample=per_sample, saliency="spectral")
        yield SaliencyMix(per_sample=per_sample, saliency="random")
        yield SaliencyMix(per_sample=per_sample, mean=(0.5,), std=(0.25,))
        yield GridMix(per_sample=per_sample, columns=(1, 1), area=(1, 1), aspect=(1, 1))
        yield SmoothMix(per_sample=per_sample, deviation=(0.05, 0.1))
        for mode in RESIZE_MODES:
            yield ResizeMix(per_sample=per_sample, mode=mode)
            yield ResizeMix(per_sample=per_sample, mode=mode, scope=(0.0, 1.0), alpha=0.5)
        yield OneOf([CutMix(), FMix(), MixUp()], per_sample=per_sample)
        yield OneOf([CutMix(per_sample=True), GridMix(), SaliencyMix()], [0.4, 0.3, 0.1], per_sample)
        yield OneOf([ResizeMix(), OneOf([CutMix(), SmoothMix()], per_sample=True)], None, per_sample)
