"`Relabel` in real Learners: the label, the passes it makes, and its likeness to `Mix` and `SUMix`"
from functools import partial

import pytest
import torch
from torch import nn

from sumix_nb.labels import Relabel
from sumix_nb.labels.rules import Ratio
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.callback import CLEAN, SUMix
from sumix_nb.sumix.mix import Mix
from tests.sumix.learners import EIGHTHS, K, Fixed, Spy, fit, learner, make_dls, same, weights, without_bn
from tests.sumix.oracles import repeated_loss


class Convolution(nn.Sequential):
    "A network without a linear layer"
    def __init__(self): super().__init__(nn.Conv2d(3, K, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def passes_of(callback, **options):
    learn, passes = learner(callback, **options), []
    learn.model.register_forward_pre_hook(lambda model, inputs: passes.append(len(inputs[0]) * model.training))
    fit(learn)
    return learn, sum(passes)


def test_the_area_trains_as_mix_does_and_the_draw_by_what_was_drawn_without_a_clean_pass():
    runs = [passes_of(callback(CutMix(), seed=0)) for callback in (Mix, Relabel, partial(Relabel, rule="drawn"))]
    (mix, _), (area, _), (drawn, _) = runs
    same(weights(area.model), weights(mix.model))
    assert torch.equal(drawn.relabel.last[1], drawn.relabel.mixed.drawn)
    assert not torch.equal(*drawn.relabel.shares()), "no box was cut by the border"
    assert all(passes == 24 and not learn.model[-1]._forward_pre_hooks for learn, passes in runs)


@pytest.mark.parametrize("clean", CLEAN)
@pytest.mark.parametrize("variant", ["poster", "corrected", "released"])
def test_sumix_without_its_regulariser_is_relabel_with_its_ratio(variant, clean):
    torch.manual_seed(1)
    sumix = fit(learner(SUMix(CutMix(), xi=0, variant=variant, clean=clean, seed=0)))
    relabel, passes = passes_of(Relabel(CutMix(), variant, clean=clean, seed=0))
    plain = {name: value for name, value in weights(sumix.model).items() if "uncertainty" not in name}
    assert plain.keys() == relabel.model.state_dict().keys() and passes == 48
    for name, value in weights(relabel.model).items(): torch.testing.assert_close(value, plain[name])


def test_a_rule_of_your_own_gets_what_it_needs_and_labels():
    seen = []
    class Turned:
        needs = ("features", "clean_features")
        def __call__(self, evidence):
            seen.append(evidence)
            return torch.tensor(EIGHTHS[::-1]) / 8
    spy, learn = Spy(), learner(Relabel(Fixed(), Turned()), model=without_bn())
    fit(learn, cbs=spy)
    for batch, evidence in zip(spy.batches, seen, strict=True):
        target_b = batch.y[torch.arange(8) ^ 1]
        expected = repeated_loss(nn.CrossEntropyLoss(), batch.pred, batch.y, target_b, EIGHTHS[::-1])
        torch.testing.assert_close(batch.loss, expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
        assert evidence.features.shape == evidence.clean_features.shape == (8, 32)
    assert learn.relabel.shares()[1].tolist() == [share / 8 for share in EIGHTHS[::-1]] * 3


def test_a_network_without_a_linear_layer_will_do_where_no_features_are_needed():
    fit(learner(Relabel(CutMix(), "poster"), model=Convolution()))
    class Features:
        needs = ("features",)
        def __call__(self, evidence): return evidence.mixed.lam
    with pytest.raises(ValueError, match="`model` must have a linear layer"):
        learner(Relabel(CutMix(), Features()), model=Convolution())


def test_multi_label_targets_may_be_labelled_by_what_the_network_sees():
    fit(learner(Relabel(CutMix(), "poster"), loss=nn.BCEWithLogitsLoss(), dls=make_dls(soft=True)))


def test_a_share_outside_0_and_1_or_for_another_batch_is_refused():
    for share in (torch.full((8,), 1.5), torch.zeros(7)):
        with pytest.raises(ValueError, match="`lam` must"): fit(learner(Relabel(CutMix(), lambda evidence: share)))  # noqa: B023


@pytest.mark.parametrize(("rule", "error"), [("areas", ValueError), (0.5, TypeError), (Ratio, TypeError)])
def test_what_is_no_rule_is_refused(rule, error):
    with pytest.raises(error, match="`rule` must be"): Relabel(CutMix(), rule)


def test_needs_that_cannot_be_collected_are_named():
    class Maps:
        needs = ("maps",)
        def __call__(self, evidence): return evidence.mixed.lam
    with pytest.raises(ValueError, match="`needs` must be one of .*got 'maps'"): Relabel(CutMix(), Maps())
