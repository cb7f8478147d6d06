"Every rule judged on made-up answers, and accuracy by object size in a real Learner"
import math

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import IntToFloatTensor
from fastai.learner import Learner
from fastai.metrics import accuracy
from torch import nn

from sumix_nb.data.loaders import ImageSet, TensorDL
from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.label_rules import Judged, RuleErrorLog, SizeLog, judge, rule_errors
from sumix_nb.labels import RULES
from sumix_nb.mixers.resizemix import ResizeMix
from sumix_nb.models.networks import get_model

FACTS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def made_up(n=40):
    generator = torch.Generator().manual_seed(0)
    truths, visible, sizes = torch.rand(3, 2, n, generator=generator)
    truths[:, :5] = math.nan
    shares = {"area": torch.rand(n, generator=generator), "oracle": truths[0].nan_to_num(0.5)}
    return Judged(shares, truths, visible, sizes, torch.randint(20, (2, n), generator=generator))


def test_values_are_plain_means_and_intervals_hold_them():
    judged, found = made_up(), rule_errors(made_up(), 300)
    known = slice(5, None)
    error = (judged.shares["area"] - judged.truths[0])[known].abs().mean().item()
    assert found["oracle"]["error"] == [0, 0, 0] and abs(found["oracle"]["gain"][0] - error) < 1e-4
    assert abs(found["area"]["error"][0] - error) < 1e-4
    for measure in ("error", "relative", "ghosts"):
        value, low, high = found["area"][measure]
        assert low <= value <= high
    assert len(found["area"]["sizes"]) == 5


def test_a_ghost_is_a_label_for_what_is_hidden():
    judged = made_up()
    seen = judged._replace(visible=torch.ones_like(judged.visible))
    hidden = judged._replace(visible=torch.zeros_like(judged.visible))
    assert rule_errors(seen, 1)["area"]["ghosts"][0] == 0 and rule_errors(hidden, 1)["area"]["ghosts"][0] == 1
    sure = hidden._replace(shares={"area": torch.ones(40)}, visible=torch.stack([torch.ones(40), torch.zeros(40)]))
    assert rule_errors(sure, 1)["area"]["ghosts"][0] == 0


def test_every_rule_is_judged_and_the_network_is_left_as_it_was():
    torch.manual_seed(0)
    model, data = get_model("resnet18", 24, width=4), scenes(40, 16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    judged = judge(model, data, ResizeMix(per_sample=True), **FACTS, bs=20)
    assert set(judged.shares) == set(RULES) - {"snapmix_raw"} and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = judge(model, data, ResizeMix(per_sample=True), **FACTS, bs=20)
    for rule, share in judged.shares.items(): assert torch.equal(share, again.shares[rule]), rule
    with pytest.raises(ValueError, match="`bs`"): judge(model, data, ResizeMix(), **FACTS, bs=1)


def test_accuracy_by_size_adds_up_and_rules_are_logged_after_each_epoch():
    sets = [ImageSet(part.images, part.target, part.vocab, i, part.masks)
            for i, part in enumerate([scenes(20, 16), scenes(50, 16, 1)])]
    dls = DataLoaders(*(TensorDL(part, bs=20, after_batch=[IntToFloatTensor()]) for part in sets),
                      device=torch.device("cpu"))
    torch.manual_seed(0)
    log = RuleErrorLog(scenes(20, 16, 2), {"ResizeMix": ResizeMix()}, **FACTS, bs=20)
    learn = Learner(dls, get_model("resnet18", 24, width=4), nn.CrossEntropyLoss(), metrics=accuracy,
                    cbs=[SizeLog(), log])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    assert abs(sum(learn.size_log.by_size) / 5 - learn.recorder.values[-1][2]) < 1e-6  # ten images in each fifth
    assert len(log.epochs) == 2 and set(log.epochs[1]["ResizeMix"]) == set(RULES) - {"snapmix_raw"}
