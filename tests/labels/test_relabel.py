"`Relabel` in real Learners: the label, the passes it makes, and its likeness to `Mix` and `SUMix`"
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.transforms import IntToFloatTensor
from torch import nn
from torch.nn import functional as F

from sumix_nb.data.augment import RandomCropFlip
from sumix_nb.data.loaders import ImageSet, TensorDL
from sumix_nb.data.scenes import scenes
from sumix_nb.labels import RULES, Relabel
from sumix_nb.labels.rules import Ratio
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.callback import TRAINING, SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.models.networks import get_model
from sumix_nb.training.resume import Checkpoint
from tests.sumix.learners import EIGHTHS, K, Fixed, Spy, fit, learner, make_dls, released_label, same, weights
from tests.sumix.learners import without_bn
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


@pytest.mark.parametrize("clean", TRAINING)
@pytest.mark.parametrize("variant", ["poster", "corrected", "released"])
def test_sumix_without_its_regulariser_is_relabel_with_its_ratio(variant, clean):
    torch.manual_seed(1)
    sumix = fit(learner(SUMix(CutMix(), xi=0, variant=variant, clean=clean, seed=0)))
    relabel, passes = passes_of(Relabel(CutMix(), variant, clean=clean, seed=0))
    plain = {name: value for name, value in weights(sumix.model).items() if "uncertainty" not in name}
    assert plain.keys() == relabel.model.state_dict().keys() and passes == 48
    for name, value in weights(relabel.model).items(): torch.testing.assert_close(value, plain[name])


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.startswith("oracle")])
def test_an_image_that_is_left_alone_keeps_its_label_whole(rule):
    callback = Relabel(CutMix(per_sample=True, p=0.5), rule, seed=0)
    learn, weighed, given = learner(callback, model=narrow()), [], callback.weights
    callback.weights = lambda: weighed.append((callback.mixed, given())) or weighed[-1][1]
    fit(learn)
    alone = torch.cat([mixed.lam == 1 for mixed, _ in weighed])
    first = torch.cat([pair[0] for _, pair in weighed])
    second = torch.cat([1 - pair[0] if pair[1] is None else pair[1] for _, pair in weighed])
    assert 0 < alone.sum() < len(alone) and first[alone].eq(1).all() and second[alone].eq(0).all()
    assert (first[~alone] < 1).any()


def test_a_rule_of_your_own_gets_what_it_needs_and_labels():
    seen = []
    class Turned:
        needs = ("features", "clean_features")
        def __call__(self, evidence):
            seen.append(evidence)
            return torch.tensor(EIGHTHS[::-1]) / 8
    spy, learn = Spy(), learner(Relabel(Fixed(), Turned()), model=without_bn())
    fit(learn, cbs=spy)
    turned = [8 if drawn == 8 else share for drawn, share in zip(EIGHTHS, EIGHTHS[::-1])]  # one image is left alone
    for batch, evidence in zip(spy.batches, seen, strict=True):
        target_b = batch.y[torch.arange(8) ^ 1]
        expected = repeated_loss(nn.CrossEntropyLoss(), batch.pred, batch.y, target_b, turned)
        torch.testing.assert_close(batch.loss, expected.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)
        assert evidence.features.shape == evidence.clean_features.shape == (8, 32)
    assert learn.relabel.shares()[1].tolist() == [share / 8 for share in turned] * 3


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
    class Odd:
        needs = ("odour",)
        def __call__(self, evidence): return evidence.mixed.lam
    with pytest.raises(ValueError, match="`needs` must be one of .*got 'odour'"): Relabel(CutMix(), Odd())
    with pytest.raises(ValueError, match="`rule` needs object masks"): fit(learner(Relabel(CutMix(), "oracle")))
    with pytest.raises(ValueError, match="must average its last feature maps"):
        learner(Relabel(CutMix(), "cam"), model=nn.Sequential(nn.Flatten(), nn.Linear(108, K)))


@pytest.fixture(scope="module")
def drawn():
    "Loaders of scenes with their masks"
    sets = [ImageSet(part.images, part.target, part.vocab, i, part.masks)
            for i, part in enumerate([scenes(48, 16), scenes(24, 16, 1)])]
    generator = torch.Generator()
    augment = [RandomCropFlip(2, True, generator), IntToFloatTensor()]
    return DataLoaders(TensorDL(sets[0], bs=16, shuffle=True, generator=generator, after_batch=augment),
                       TensorDL(sets[1], bs=24, after_batch=[IntToFloatTensor()]), device=torch.device("cpu"))


def narrow():
    torch.manual_seed(0)
    return get_model("resnet18", 24, width=4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_labels_the_same_mixtures(drawn, rule):
    drawn.train.epoch = 0
    learn = fit(learner(Relabel(CutMix(per_sample=True), rule, seed=0), model=narrow(), dls=drawn))
    lam, share = learn.relabel.shares()
    drawn.train.epoch = 0
    area = fit(learner(Relabel(CutMix(per_sample=True), seed=0), model=narrow(), dls=drawn)).relabel.shares()[0]
    assert torch.equal(lam, area) and share.isfinite().all() and ((share >= 0) & (share <= 1)).all()
    assert torch.equal(lam, share) == (rule == "area")


def test_the_oracle_counts_the_pixels_that_the_network_is_shown(drawn):
    class Both:
        needs = ("masks", "images")
        def __call__(self, evidence):
            self.seen = evidence
            return RULES["oracle"](evidence)
    fit(learner(Relabel(CutMix(per_sample=True), rule := Both(), seed=0), model=narrow(), dls=drawn))
    mixed, masks = rule.seen.mixed, rule.seen.masks
    assert masks.dtype == torch.bool and masks.shape == (16, 1, 16, 16)
    for i, j in enumerate(mixed.partner.tolist()):
        own = mixed.mask[i, 0] == 1
        m_a, m_b = int((masks[i, 0] & own).sum()), int((masks[j, 0] & ~own).sum())
        expected = m_a / (m_a + m_b) if m_a + m_b else mixed.lam[i].item()
        assert abs(RULES["oracle"](rule.seen)[i].item() - expected) < 1e-6


def test_a_pair_of_weights_makes_the_loss_smaller():
    class Pair:
        def __call__(self, evidence): return torch.full((8,), 0.5), torch.full((8,), 0.25)
    spy, learn = Spy(), learner(Relabel(Fixed(), Pair()), model=without_bn())
    fit(learn, cbs=spy)
    alone = torch.tensor(EIGHTHS) == 8
    for batch in spy.batches:
        pred, target_b = batch.pred.as_subclass(torch.Tensor), batch.y[torch.arange(8) ^ 1]
        one, two = (F.cross_entropy(pred, target.as_subclass(torch.Tensor), reduction="none")
                    for target in (batch.y, target_b))
        expected = torch.where(alone, one, 0.5 * one + 0.25 * two).mean()
        torch.testing.assert_close(batch.loss.as_subclass(torch.Tensor), expected)
    torch.testing.assert_close(learn.relabel.shares()[1], torch.where(alone, 1, 2 / 3).repeat(3))


def test_a_rule_by_maps_follows_another_network():
    learn = fit(learner(Relabel(CutMix(), "cam", seed=0), model=narrow()))
    learn.model = other = narrow()
    fit(learn)
    assert learn.relabel.passes.tapped[0] in list(other.modules())
    learn.model = nn.DataParallel(other)
    with pytest.raises(ValueError, match="cannot work under nn.DataParallel"): fit(learn)


@pytest.mark.parametrize("clean", ["means", "bank"])
def test_each_fit_remembers_anew(clean, drawn):
    learn = fit(learner(SUMix(CutMix(per_sample=True), clean=clean, seed=0), model=narrow(), dls=drawn))
    memory, seen = learn.sumix.passes.memories[clean], []
    class Watch(Callback):
        def before_batch(self): seen.append(memory.counts)
    learn.model = get_model("resnet18", learn.dls.c, width=8)
    fit(learn, cbs=Watch())
    assert seen[0] is None and seen[1] is not None


@pytest.mark.parametrize(("options", "share"), [({"relabel": False}, "lam"), ({"variant": "released"}, "mean")])
def test_the_shares_are_those_of_the_label(options, share):
    learn, spy = learner(SUMix(CutMix(per_sample=True), seed=0, **options)), Spy()
    fit(learn, cbs=spy)
    for found, batch in zip(learn.sumix.shares()[1].split(8), spy.batches, strict=True):
        wanted = batch.mixed.lam if share == "lam" else released_label(batch.terms.ratio, batch.mixed.lam)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rule", ["means", "snapmix", "probability", "half", "lumix"])
def test_images_without_a_label_teach_the_memory_nothing(rule):
    data, seen = scenes(24, 16), []
    target = data.target.clone()
    target[::3] = -100
    train = TensorDL(ImageSet(data.images, data.target, data.vocab, 0), 8, after_batch=[IntToFloatTensor()])
    class Unlabel(Callback):
        order = Relabel.order - 1
        def before_batch(self): self.learn.yb = (target[train.index],)
    model, callback = narrow(), Relabel(CutMix(per_sample=True, p=0.5), rule, seed=0)
    learn = learner(callback, model=model, dls=DataLoaders(train, train))
    callback.rule, given = lambda evidence: seen.append(given(evidence)) or seen[-1], callback.rule
    fit(learn, cbs=Unlabel())
    assert all(part.isfinite().all() for label in seen for part in (label if isinstance(label, tuple) else (label,)))
    if rule == "means":
        known = callback.passes.memories["means"].counts > 0
        assert known.nonzero()[:, 0].tolist() == sorted(set(target[target >= 0].tolist()))


@pytest.mark.parametrize("clean", ["eval", "means", "bank"])
def test_what_is_remembered_costs_few_passes_and_survives_a_checkpoint(clean, tmp_path, drawn):
    def made():
        drawn.train.epoch = 0
        return learner(SUMix(CutMix(per_sample=True), clean=clean, seed=0), model=narrow(), dls=drawn)
    def count(learn):
        passes = []
        learn.model.register_forward_pre_hook(lambda model, inputs: passes.append(len(inputs[0]) * learn.training))
        return passes
    learn = made()
    passes = count(learn)
    with learn.no_bar(): learn.fit(3, 0.02, cbs=Checkpoint(tmp_path, "whole"))
    wanted = 3 * 48 + {"eval": 3 * 48, "bank": 48 + 2 * 4, "means": sum(passes) - 3 * 48}[clean]
    assert sum(passes) == wanted <= 3 * 96

    stopped = made()
    class Stop(Callback):
        only_watches = True
        def after_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), stopped.no_bar():
        stopped.fit(3, 0.02, cbs=[Stop(), Checkpoint(tmp_path, "part")])
    again = made()
    with again.no_bar(): again.fit(3, 0.02, cbs=Checkpoint(tmp_path, "part"))
    same(weights(again.model), weights(learn.model))


def test_a_bank_holds_what_each_image_gave_when_it_was_last_seen_clean(drawn):
    drawn.train.epoch, given = 0, {}
    class Watch(Callback):
        order, run_valid = 20, False
        def after_loss(self):
            if self.learn.epoch: return
            for row, logits in zip(self.dl.index.tolist(), self.learn.pred.detach()): given[row] = logits
    learn = learner(SUMix(CutMix(p=0.0), clean="bank", seed=0), model=narrow(), dls=drawn)
    fit(learn, cbs=Watch())
    memory = learn.sumix.passes.memories["bank"]
    assert len(memory.counts) == len(given) == 48
    for row, logits in given.items():
        torch.testing.assert_close(memory.tables[0][row], logits.as_subclass(torch.Tensor))


def test_a_bank_needs_a_loader_that_counts():
    with pytest.raises(ValueError, match='`clean` must not be "bank"'): fit(learner(SUMix(CutMix(), clean="bank")))
    with pytest.raises(ValueError, match="`clean` must pass the images"): Relabel(CutMix(), "snapmix", clean="means")
