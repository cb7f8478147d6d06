"Precision, averages, schedules and decay in a real Learner, against PyTorch and by hand"
from dataclasses import replace
from shutil import which

import pytest
import torch
from fastai.callback.core import CancelFitException, Callback
from fastai.learner import Learner
from fastai.optimizer import SGD

from sumix_nb.data.loaders import get_dls
from sumix_nb.training.steps import LossNumbers, WeightAverage
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
        def after_step(self): self.weights = next(self.learn.model.parameters()).detach().clone()
        def before_batch(self):
            if not self.training: raise RuntimeError("broken on purpose")
    average, broken = WeightAverage(0.9), Break()
    learn = fit(average, broken, epochs=0)
    weights = next(learn.model.parameters())
    with pytest.raises(RuntimeError, match="broken on purpose"), learn.no_bar(), learn.no_logging(): learn.fit(1, 0.05)
    assert not torch.equal(weights, broken.weights)  # the average is still in the network
    average.before_fit()
    assert torch.equal(weights, broken.weights)


def test_weights_that_are_loaded_after_a_fit_are_not_averaged_away():
    learn = fit(WeightAverage(0.9))
    with torch.no_grad():
        for parameter in learn.model.parameters(): parameter.fill_(0.01)
    with learn.no_bar(): learn.validate()
    assert all((parameter == 0.01).all() for parameter in learn.model.parameters())


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
    class Stop(Callback):
        def after_pred(self): raise KeyboardInterrupt
    learn, dtypes = make_learner(replace(TINY, precision="bf16")), []
    learn.model.layer1.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
        assert not torch.is_autocast_enabled("cpu")
        learn.remove_cbs(Stop)
        learn.fit(1)
    assert set(dtypes) == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")
    learn.model(learn.dls.one_batch()[0])
    assert dtypes[-1] == torch.float32 and not learn.model._forward_pre_hooks and not learn.model._forward_hooks


def test_losses_become_numbers_once_an_epoch_on_a_device_that_must_be_waited_for():
    class Elsewhere(LossNumbers):
        def after_batch(self): self.kinds.append(type(self.learn.recorder.losses[-1]))
        def __init__(self): self.kinds = []
    ours, theirs = fit(Elsewhere(), epochs=2), fit(epochs=2)
    assert ours.elsewhere.kinds.count(float) == 0 and len(ours.elsewhere.kinds) == 8
    assert ours.recorder.losses == [float(loss) for loss in theirs.recorder.losses]
    assert all(isinstance(loss, float) for loss in ours.recorder.losses)
