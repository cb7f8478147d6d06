"The head of `SUMix` in optimisers, checkpoints, exports and copies"
import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import params
from fastcore.foundation import L

from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.mix import Mix
from sumix_nb.sumix.step import HEAD_NAME
from tests.sumix.learners import K, KINDS, Named, At, digits, fit, head_of, learner, mix_of
from tests.sumix.learners import same, throw, times_in_optimizer, weights, with_bn


@pytest.mark.parametrize("how", ["cbs=", "add_cb before create_opt", "add_cb after create_opt", "add_cb after fit",
                                 "fit(cbs=)", "second fit(cbs=)"])
@pytest.mark.parametrize("opt_func", [partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW)],
                         ids=["fastai SGD", "torch AdamW"])
def test_the_head_is_in_the_optimiser_exactly_once_and_is_trained(how, opt_func):
    cb = SUMix(CutMix(), seed=0, xi=5.0)
    learn = learner(*([cb] if how == "cbs=" else []), opt_func=opt_func)
    if how == "add_cb after create_opt": learn.create_opt()
    if how == "add_cb after fit": fit(learn)
    if how.startswith("add_cb"): learn.add_cb(cb)
    seen = []
    class Count(Callback):
        run_valid = False
        def after_step(self):
            seen.append((times_in_optimizer(learn, cb.uncertainty_head), weights(cb.uncertainty_head)))
    cbs = [Count(), *([cb] if "fit(cbs=)" in how else [])]
    fit(learn, cbs=cbs)
    if how.startswith("second"): fit(learn, cbs=[Count(), cb])
    assert len(seen) == (6 if how.startswith("second") else 3) and {count for count, _ in seen} == {1}
    assert all(not torch.equal(seen[0][1][name], seen[-1][1][name]) for name in seen[0][1])
    total = sum(len(group) for group in learn.opt.param_lists)
    assert total == len(list(learn.model.parameters()))
    if "fit(cbs=)" in how:
        assert HEAD_NAME not in learn.model[-1]._modules and times_in_optimizer(learn, cb.uncertainty_head) == 0
        assert set(learn.model.state_dict()) == set(with_bn().state_dict())
        fit(learn)


@pytest.mark.parametrize("opt_func", [partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.AdamW)],
                         ids=["fastai SGD", "torch AdamW"])
def test_the_head_can_join_an_optimiser_whose_state_was_loaded(opt_func, tmp_path):
    learn = fit(learner(opt_func=opt_func, tmp=tmp_path))
    learn.save("plain")
    learn.load("plain")
    fit(learn, cbs=SUMix(CutMix(), seed=0))
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_the_state_of_the_other_parameters_survives_attaching_and_detaching():
    learn = fit(learner())
    model_parameters = list(learn.model.parameters())
    state = [copy.deepcopy(learn.opt.state[p]) for p in model_parameters]
    hypers = [dict(group) for group in learn.opt.hypers]
    assert all("grad_avg" in s for s in state)
    cb = SUMix(CutMix())
    for _ in range(2):
        learn.add_cb(cb)
        assert times_in_optimizer(learn, cb.uncertainty_head) == 1
        for p, kept in zip(model_parameters, state, strict=True):
            assert learn.opt.state[p].keys() == kept.keys()
            torch.testing.assert_close(learn.opt.state[p]["grad_avg"], kept["grad_avg"], rtol=0, atol=0)
        assert [dict(group) for group in learn.opt.hypers] == hypers
        learn.remove_cb(cb)
        assert times_in_optimizer(learn, cb.uncertainty_head) == 0
        assert [id(p) for group in learn.opt.param_lists for p in group] == [id(p) for p in model_parameters]


def test_the_bias_of_a_head_that_joins_late_is_treated_as_that_of_one_that_was_there():
    early, late = learner(SUMix(CutMix()), wd_bn_bias=False), learner(wd_bn_bias=False)
    early.create_opt(), late.create_opt()
    late.add_cb(SUMix(CutMix()))
    one, other = (learn.opt.state[head_of(learn).layers[0].bias] for learn in (early, late))
    assert one["do_wd"] is False and one == other


def two_groups(model): return L(model.body, model.fc).map(params)


def test_one_cycle_with_discriminative_rates_moves_the_head_at_the_last_groups_rate():
    learn, rates = learner(SUMix(CutMix(), seed=0), model=Named(), splitter=two_groups), []
    class Rates(Callback):
        run_valid = False
        def after_step(self): rates.append([hyper["lr"] for hyper in learn.opt.hypers])
    head = weights(head_of(learn))
    with learn.no_logging(): learn.fit_one_cycle(1, slice(1e-4, 1e-2), cbs=Rates())
    assert [len(group) for group in learn.opt.param_lists] == [2, 4]
    assert all(any(p is q for q in learn.opt.param_lists[-1]) for p in head_of(learn).parameters())
    assert all(last == pytest.approx(100 * first) for first, last in rates)
    assert all(not torch.equal(head[name], value) for name, value in head_of(learn).state_dict().items())


def test_freeze_keeps_the_body_and_trains_the_head():
    for late in (False, True):
        cb = SUMix(CutMix(), seed=0, xi=5.0)
        learn = learner(*([] if late else [cb]), model=Named(), splitter=two_groups)
        learn.freeze()
        if late: learn.add_cb(cb)
        before = weights(learn.model)
        fit(learn)
        changed = {name for name, value in learn.model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"fc.weight", "fc.bias", "fc.uncertainty.layers.0.weight", "fc.uncertainty.layers.0.bias"}
        learn.unfreeze()
        fit(learn)
        assert all(not torch.equal(p, before[name]) for name, p in learn.model.named_parameters())


def test_lr_find_gives_back_network_head_and_optimiser(tmp_path):
    for kind in ("SUMix no_grad", "SUMix concat"):
        learn = fit(learner(KINDS[kind](CutMix(), seed=0, xi=5.0), tmp=tmp_path))
        before, state = weights(learn.model), [learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()]
        assert any("uncertainty" in name for name in before)
        with learn.no_logging(), learn.no_bar(): learn.lr_find(start_lr=0.1, end_lr=5, num_it=5, show_plot=False)
        same(weights(learn.model), before)
        assert times_in_optimizer(learn, head_of(learn)) == 1 and len(state) == len(list(learn.model.parameters()))
        fit(learn)


@pytest.mark.parametrize("with_opt", [True, False])
def test_save_and_load_bring_back_network_head_and_optimiser(with_opt, tmp_path):
    learn = fit(learner(SUMix(CutMix(), seed=0), tmp=tmp_path))
    learn.save("mixed", with_opt=with_opt)
    before, state = weights(learn.model), [learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()]
    fit(learn)
    with warnings.catch_warnings():
        if with_opt: warnings.filterwarnings("error", category=UserWarning)
        learn.load("mixed", with_opt=with_opt)
        other = learner(SUMix(CutMix(), seed=0), tmp=tmp_path)
        other.create_opt()
        other.load("mixed", with_opt=with_opt)
    for loaded in (learn, other):
        same(weights(loaded.model), before)
        if with_opt:
            for p, kept in zip(loaded.model.parameters(), state, strict=True):
                torch.testing.assert_close(loaded.opt.state[p]["grad_avg"], kept)
        fit(loaded)


def test_a_plain_checkpoint_loads_into_a_sumix_learner_and_keeps_the_head(tmp_path):
    plain, learn = fit(learner(tmp=tmp_path)), learner(SUMix(CutMix(), seed=0), tmp=tmp_path)
    plain.save("plain")
    head = weights(head_of(learn))
    learn.load("plain", with_opt=False)
    same(weights(head_of(learn)), head)
    same({name: value for name, value in weights(learn.model).items() if HEAD_NAME not in name}, weights(plain.model))
    fit(learn)
    learn.create_opt()
    with pytest.warns(UserWarning, match="Could not load the optimizer state"): learn.load("plain", with_opt=True)
    fit(learn)


def test_a_sumix_checkpoint_loads_into_a_plain_learner_when_asked_not_strictly(tmp_path):
    learn, plain = fit(learner(SUMix(CutMix(), seed=0), tmp=tmp_path)), learner(tmp=tmp_path)
    learn.save("mixed")
    plain.load("mixed", strict=False, with_opt=False)
    assert torch.equal(plain.get_preds()[0], learn.get_preds()[0])
    with learn.without_mixing(): learn.save("network", with_opt=False)
    fresh = learner(tmp=tmp_path)
    fresh.load("network", with_opt=False)
    assert torch.equal(fresh.get_preds()[0], learn.get_preds()[0])


def exported(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_learner(path)


@pytest.mark.parametrize("kind", ["Mix", "SUMix no_grad"])
def test_export_plain_leaves_no_trace_in_the_file_and_the_learner_as_it_was(kind, tmp_path):
    learn = fit(learner(KINDS[kind](CutMix(), seed=0), dls=digits(), model=with_bn(10), tmp=tmp_path))
    cb = mix_of(learn)
    predictions, before, opt = learn.get_preds(), weights(learn.model), learn.opt
    learn.export_plain("plain.pkl")
    content = (tmp_path / "plain.pkl").read_bytes()
    for word in (b"sumix_nb.sumix", b"sumix_nb.mixers", b"uncertainty"): assert word not in content
    assert b"FeatureTap" not in content and b"keep_own_values" not in content
    loaded = exported(tmp_path / "plain.pkl")
    assert not [c for c in loaded.cbs if isinstance(c, Mix)]
    assert set(loaded.model.state_dict()) == set(with_bn().state_dict())
    assert torch.equal(loaded.get_preds(dl=learn.dls.valid)[0], predictions[0])
    same(weights(learn.model), before)
    assert learn.opt is opt and cb in learn.cbs and len(learn.dls.train_ds) == 48
    if kind != "Mix": assert times_in_optimizer(learn, head_of(learn)) == 1
    fit(learn)


def test_without_mixing_keeps_the_optimisers_state_also_after_an_error():
    learn = fit(learner(SUMix(CutMix(), seed=0)))
    state, cbs = {p: learn.opt.state[p]["grad_avg"].clone() for p in learn.model.parameters()}, list(learn.cbs)
    with pytest.raises(KeyError), learn.without_mixing():
        assert not [cb for cb in learn.cbs if isinstance(cb, Mix)] and HEAD_NAME not in learn.model[-1]._modules
        assert not hasattr(learn, "sumix")
        raise KeyError
    assert set(learn.cbs) == set(cbs) and learn.sumix is not None
    for p in learn.model.parameters(): torch.testing.assert_close(learn.opt.state[p]["grad_avg"], state[p])
    fit(learn)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_export_of_fastai_works_too_and_predicts_the_same(kind, tmp_path):
    learn = fit(learner(KINDS[kind](CutMix(), seed=0), dls=digits(), model=with_bn(10), tmp=tmp_path))
    predictions = learn.get_preds()[0]
    learn.export("whole.pkl")
    loaded = exported(tmp_path / "whole.pkl")
    assert torch.equal(loaded.get_preds(dl=learn.dls.valid)[0], predictions)
    fit(learn)
    loaded.dls = learn.dls
    fit(loaded)
    assert torch.isfinite(loaded.model[0].weight).all()


def test_a_learner_exported_after_an_interrupt_holds_no_images_either(tmp_path):
    learn = learner(SUMix(CutMix(), seed=0), dls=digits(), model=with_bn(10), tmp=tmp_path)
    for event, order in (("after_pred", 4), ("after_loss", 4)):
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At(event, throw(KeyboardInterrupt()), order=order))
        learn.export("whole.pkl")
        cb = exported(tmp_path / "whole.pkl").sumix
        assert cb.mixed is cb.evidence is cb.passes.batch is None
        assert cb.passes.taps["features"].features is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_step", "after_batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_can_be_copied_within_a_batch(kind, event, clone):
    copies, x = [], torch.randn(2, 3, 6, 6)
    learn = learner(KINDS[kind](CutMix(), seed=0))
    fit(learn, cbs=At(event, lambda: copies.append((clone(learn.model).train(), weights(learn.model)))))
    same(weights(copies[0][0]), copies[0][1])
    assert copies[0][0](x).shape == (2, K)
    if kind != "Mix": assert learn.sumix.passes.taps["features"].features is None is not copies[0][0][-1].uncertainty
