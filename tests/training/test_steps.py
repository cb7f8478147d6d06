"Precision, averages, schedules and decay in a real Learner, against PyTorch and by hand"
from dataclasses import replace
from shutil import which

import pytest
import torch
from fastai.callback.core import CancelFitException, Callback
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

from sumix_nb.sumix.callback import SUMix
from sumix_nb.data.loaders import get_dls
from sumix_nb.training.steps import Autocast, LossNumbers, SpareFromDecay, WeightAverage
from sumix_nb.training.steps import no_decay
from sumix_nb.mixers.cutmix import CutMix
from sumix_nb.models.networks import get_model
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner, train

TINY = Recipe(width=4, epochs=1, limit=100, bs=25, mixer="cutmix", method="sumix", lr=0.02)


def fit(*callbacks, epochs=1, lr=0.05):
    "A Learner after training on digits"
    torch.manual_seed(0)
    model = get_model("resnet18", 10, width=4)
    learn = Learner(get_dls("digits", limit=100, bs=25), model, opt_func=SGD, cbs=list(callbacks))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clean", ["no_grad", "concat"])
def test_sumix_learns_in_every_precision(precision, clean):
    record = train(replace(TINY, precision=precision, clean=clean, epochs=3, limit=400), progress=False)
    assert record["accuracy"] > 0.3 and record["epochs"][0]["train_loss"] < 100


def test_the_average_is_validated_and_kept_with_sumix():
    average = WeightAverage(0.5)
    learn = fit(SUMix(CutMix(), seed=0), average, epochs=2)
    assert any("uncertainty" in name for name, _ in learn.model.named_parameters())
    kept = [value.clone() for value in average.average]
    assert all(torch.equal(mean, tensor) for mean, tensor in zip(kept, average.tensors(), strict=True))
    with learn.no_bar(): first = learn.validate()[0]
    with learn.no_bar(): assert learn.validate()[0] == first
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match="`decay` must be"): WeightAverage(value)


def test_a_validation_that_ends_early_gives_the_weights_back():
    class Stop(Callback):
        def before_batch(self):
            if not self.training: raise CancelFitException
    expected = fit(WeightAverage(0.9)).model.state_dict()
    stopped = fit(WeightAverage(0.9), Stop()).model.state_dict()
    torch.testing.assert_close(stopped, expected)


def test_a_fit_after_an_error_in_validation_goes_on_from_the_trained_weights():
    class Break(Callback):
        order = WeightAverage.order - 1
        def before_batch(self):
            self.weights = next(self.learn.model.parameters()).detach().clone() if self.training else self.weights
            if not self.training: raise RuntimeError("broken on purpose")
        def after_step(self): self.weights = next(self.learn.model.parameters()).detach().clone()
    learn = Learner(get_dls("digits", limit=100, bs=25), get_model("resnet18", 10, width=4), opt_func=SGD)
    average, broken = WeightAverage(0.9), Break()
    with pytest.raises(RuntimeError, match="broken on purpose"), learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.05, cbs=[average, broken])
    assert not torch.equal(next(learn.model.parameters()), broken.weights)  # the average is still in the network
    average.learn = learn
    average.before_fit()
    assert torch.equal(next(learn.model.parameters()), broken.weights)


def test_weights_that_are_loaded_after_a_fit_are_not_averaged_away():
    learn = fit(WeightAverage(0.9))
    with torch.no_grad():
        for parameter in learn.model.parameters(): parameter.fill_(0.01)
    with learn.no_bar(): learn.validate()
    assert all((parameter == 0.01).all() for parameter in learn.model.parameters())


@pytest.mark.parametrize("field,value", [("ema", 0.9), ("accumulate", 2), ("clip", 0.1), ("smoothing", 0.2),
                                         ("optimizer", "adamw"), ("schedule", "cosine_step"), ("spare_norms", True)])
def test_every_option_changes_the_result(field, value):
    assert (train(replace(TINY, **{field: value}), progress=False)["epochs"][0]["valid_loss"]
            != train(TINY, progress=False)["epochs"][0]["valid_loss"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{"method": "mce"}, {"clean": "no_grad"}, {"clean": "concat"}])
def test_a_compiled_network_is_one_graph_in_every_precision(precision, changes):
    recipe, graphs, ends = replace(TINY, precision=precision, **changes), [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        learn = make_learner(recipe)
        if compiled: learn.model.compile(backend=lambda graph, inputs: graphs.append(inputs) or graph.forward)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        ends.append(torch.cat([parameter.flatten() for parameter in learn.model.parameters()]))
    torch._dynamo.reset()
    assert torch.equal(*ends)
    # one in training, one in validation, and one for clean images without gradients
    assert len(graphs) == 2 + (changes.get("clean") == "no_grad")


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_network_trains_alike():
    plain, compiled = (train(replace(TINY, compile=value), progress=False)["epochs"][0] for value in (False, True))
    assert abs(plain["train_loss"] - compiled["train_loss"]) < 1e-3
    assert make_learner(replace(TINY, compile=True)).model._compiled_call_impl is not None


def test_autocast_covers_forward_passes_only_and_ends_with_the_fit():
    learn = make_learner(replace(TINY, precision="bf16"))
    dtypes = []
    learn.model.layer1.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert set(dtypes) == {torch.bfloat16}
    learn.model(learn.dls.one_batch()[0])
    assert dtypes[-1] == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_autocast_is_off_after_an_interrupt_and_the_next_fit_hooks_once():
    class Stop(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn = make_learner(replace(TINY, precision="bf16"))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(): learn.fit(1, cbs=Stop())
    assert not torch.is_autocast_enabled("cpu")
    learn.remove_cbs(Stop)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not learn.model._forward_pre_hooks and not learn.model._forward_hooks


def test_autocast_hands_on_errors_of_the_network():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
        def forward(self, x): raise RuntimeError("broken on purpose")
    learn = make_learner(replace(TINY, precision="bf16"))
    learn.model = Broken()
    with pytest.raises(RuntimeError, match="broken on purpose"), learn.no_bar(): learn.fit(1)
    assert not torch.is_autocast_enabled("cpu") and isinstance(learn.autocast, Autocast)


def test_losses_become_numbers_once_an_epoch_on_a_device_that_must_be_waited_for():
    class Elsewhere(LossNumbers):
        def after_batch(self): self.kinds.append(type(self.learn.recorder.losses[-1]))
        def __init__(self): self.kinds = []
    ours, theirs = fit(Elsewhere(), epochs=2), fit(epochs=2)
    assert ours.elsewhere.kinds.count(float) == 0 and len(ours.elsewhere.kinds) == 8
    assert ours.recorder.losses == [float(loss) for loss in theirs.recorder.losses]
    assert all(isinstance(loss, float) for loss in ours.recorder.losses)


def test_vectors_and_what_the_network_names_are_spared():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.matrix = nn.Parameter(torch.ones(2, 3)), nn.Linear(3, 2)
            self.norm, self.scale = nn.LayerNorm(3), nn.Parameter(torch.tensor(1.0))

        def no_weight_decay(self): return {"table"}

    assert set(no_decay(Tokens())) == {"table", "matrix.bias", "norm.weight", "norm.bias", "scale"}
    assert no_decay(nn.Conv2d(1, 1, 3, bias=False)) == [] and SpareFromDecay().name == "spare_from_decay"
