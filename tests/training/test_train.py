"Runs: what is logged, what is skipped, and which batches a method sees"
import gc
from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException

from sumix_nb.sumix.adautomix import LEARNED
from sumix_nb.sumix.mix import Mix
from sumix_nb.training.recipe import CHOICES, Recipe
from sumix_nb.training.records import label_of
from sumix_nb.training.train import make_learner, train

TINY = Recipe(width=4, epochs=1, bs=50, limit=200, lr=0.02)


@pytest.mark.parametrize("options", [{}, {"spare_norms": True, "ema": 0.9, "precision": "bf16", "clip": 1.0}])
def test_a_validation_outside_of_a_fit_is_no_epoch(options):
    learn = make_learner(replace(TINY, **options))
    with learn.no_bar():
        learn.validate()
        record = train(replace(TINY, **options), progress=False, learn=learn)
        assert abs(learn.validate()[1] - record["accuracy"]) < 1e-6
    assert len(learn.epoch_log.epochs) == 1


def test_a_search_is_no_epoch_and_a_used_learner_is_refused():
    recipe = replace(TINY, mixer="cutmix", method="sumix", epochs=2)
    learn = make_learner(recipe)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=9, show_plot=False)
    assert learn.epoch_log.epochs == []
    with pytest.raises(ValueError, match="`learn` must be fresh"): train(recipe, progress=False, learn=learn)
    learn = make_learner(recipe)
    train(recipe, progress=False, learn=learn)
    with pytest.raises(ValueError, match="`learn` must be fresh"): train(recipe, progress=False, learn=learn)
    assert len(learn.epoch_log.epochs) == 2


class Batches(Callback):
    "Keeps every training batch and mixture"
    run_valid, order = False, 40
    def before_fit(self): self.seen = []
    def after_loss(self):
        mix = next(cb for cb in self.learn.cbs if isinstance(cb, Mix))
        self.seen.append((mix.mixed.images.clone(), mix.mixed.lam.clone(), self.learn.y.clone()))


def test_all_methods_see_the_same_batches_and_mixtures_from_the_same_weights():
    seen, weights = {}, {}
    for method in CHOICES["method"]:
        learn = make_learner(replace(TINY, mixer="cutmix", method=method))
        weights[method] = [p.clone() for name, p in learn.model.named_parameters() if "uncertainty" not in name]
        learn.add_cb(Batches())
        train(replace(TINY, mixer="cutmix", method=method), progress=False, learn=learn)
        seen[method] = learn.batches.seen
    assert len(seen["mce"]) == 4
    for method in CHOICES["method"][1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights["mce"], weights[method], strict=True))
        for first, second in zip(seen["mce"], seen[method], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", ["poster", "released", "corrected"])
@pytest.mark.parametrize("clean", ["no_grad", "concat", "separate"])
def test_every_variant_trains_in_bf16(variant, clean):
    recipe = replace(TINY, mixer="cutmix", method="sumix", variant=variant, clean=clean, precision="bf16")
    record = train(recipe, progress=False)
    epoch = record["epochs"][-1]
    assert all(torch.tensor(value).isfinite() for value in epoch.values())
    assert 0 < epoch["lam"] < 1 and 0 < epoch["ratio"] < 1 and epoch["shift"] > 0


def without_clocks(record):
    "What was logged, but for seconds"
    return [{key: value for key, value in epoch.items() if "seconds" not in key} for epoch in record["epochs"]]


@pytest.mark.parametrize("method", ["mce", "sumix"])
@pytest.mark.parametrize("mixer", LEARNED)
def test_a_mixer_that_learns_runs_by_a_recipe_and_the_teacher_is_recorded(mixer, method):
    options = {"alpha": 0.7, "precision": "bf16", "mixer_options": {"base": 0.5, "end": 0.9}}
    recipe = replace(TINY, mixer=mixer, method=method, xi=0.3, seed=3, **options)
    learn = make_learner(recipe)
    record, mix = train(recipe, progress=False, learn=learn), getattr(learn, mixer)
    assert (mix.alpha, mix.method, mix.xi, mix.seed, mix.base, mix.keep) == (0.7, method, 0.3, 3, 0.5, 4)
    epoch, star = record["epochs"][-1], method == "sumix"
    assert all(torch.tensor(value).isfinite() for value in epoch.values())
    assert (record["ratio_curve"] is not None) == star == (epoch["shift"] > 0)
    assert label_of(record["recipe"]) == LEARNED[mixer].__name__ + " + SUMix" * star
    with learn.no_bar():
        assert learn.validate()[1] == pytest.approx(record["accuracy"])
        mix.report = "student"
        assert learn.validate()[0] != epoch["valid_loss"]
    assert without_clocks(train(recipe, progress=False)) == without_clocks(record)


@pytest.mark.parametrize("changes", [{}, {"mixer": "cutmix", "method": "sumix", "ema": 0.9}])
@pytest.mark.parametrize(("epochs", "every"), [(5, 2), (4, 2), (2, 9)])
def test_skipped_validations_change_nothing_else(changes, epochs, every):
    recipe = replace(TINY, epochs=epochs, limit=100, **changes)
    always, seldom = (train(replace(recipe, validate_every=n), progress=False) for n in (1, every))
    for i, (one, other) in enumerate(zip(*map(without_clocks, (always, seldom)), strict=True)):
        if (i + 1) % every and i + 1 < epochs: one |= {"valid_loss": None, "accuracy": None}
        assert one == other
    assert always["accuracy"] == seldom["accuracy"] and always["reliability"] == seldom["reliability"]


def test_a_skipped_validation_reads_no_image_and_leaves_a_gap():
    class Count(Callback):
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append((self.epoch, self.training))
    learn = make_learner(replace(TINY, epochs=3, validate_every=3))
    learn.add_cb(Count())
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert {epoch for epoch, training in learn.count.seen if not training} == {2}


def test_a_validation_that_was_asked_for_is_never_skipped():
    class Stop(Callback):
        order = 70
        def after_train(self): raise KeyboardInterrupt
    learn = make_learner(replace(TINY, epochs=3, validate_every=3))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Stop())
        assert 0 <= learn.validate()[1] <= 1


@pytest.mark.parametrize("data", ["digits", "scenes"])
def test_a_trained_learner_predicts_images_without_labels(data):
    recipe = replace(TINY, data=data, mixer="cutmix", size=16)
    learn = make_learner(recipe)
    train(recipe, learn=learn, progress=False)
    sizes = getattr(learn, "size_log", None)
    known = sizes and sizes.by_size
    with learn.no_bar(): probs, _ = learn.get_preds(dl=learn.dls.test_dl(learn.dls.valid_ds.images[:5]))
    assert len(probs) == 5 and (sizes is None) == (data == "digits") and (sizes and sizes.by_size) == known


@pytest.mark.parametrize("method", CHOICES["method"])
def test_nothing_is_mixed_after_the_share_of_the_recipe(method):
    record = train(replace(TINY, mixer="cutmix", method=method, epochs=4, off_after=0.5), progress=False)
    assert [epoch["lam"] == 1 for epoch in record["epochs"]] == [False, False, True, True]


@pytest.mark.parametrize("method", ["mce", "sumix"])
def test_no_step_leaves_a_tensor_behind(method):
    "200 steps on digits: as many tensors are alive after the last as after the 40th"
    class Count(Callback):
        order, alive = 70, {}
        def after_step(self):
            if self.train_iter + 1 in (40, 200):
                gc.collect()
                self.alive[self.train_iter + 1] = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
            if self.train_iter == 199: raise CancelFitException
    recipe = Recipe(width=2, bs=8, limit=40, epochs=50, lr=0.01, mixer="cutmix", method=method)
    learn = make_learner(recipe, device="cpu")
    learn.add_cb(counter := Count())
    with learn.no_bar(), learn.no_logging(): learn.fit(50, 0.01)
    assert counter.alive[200] <= counter.alive[40] + 5, counter.alive
    assert len(learn.recorder.losses) == 199 and all(isinstance(loss, float) for loss in learn.recorder.losses)
