"The code of the page about other trainers, as it stands there, with the real packages where they are installed"
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from sumix_nb import CutMix, SUMixStep, get_model
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("try_trainers", ROOT / "tools/try_trainers.py")
trainers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainers)


class Counted(CutMix):
    "Counts the batches"
    calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return super().__call__(*args, **options)


def mixed_batch(samples):
    images, target = default_collate(samples)
    return images, CutMix()(images, target)


def test_workers_mix_in_their_own_way_and_repeat_it():
    def shares():
        loader = DataLoader(trainers.digits()[0], 32, collate_fn=mixed_batch, num_workers=2,
                            generator=torch.Generator().manual_seed(1))
        return [mixed.drawn[0].item() for _, (_, mixed) in zip(range(6), loader)]
    first = shares()
    assert first == shares() and len(set(first)) == 6


def test_timms_task_mixes_and_keeps_the_smoothing(batch):
    task = pytest.importorskip("timm.task")
    loss = pytest.importorskip("timm.loss")
    known = {"ClassificationTask": task.ClassificationTask, "SUMixStep": SUMixStep, "nn": nn}
    make = trainers.defined("class SUMixTask", "SUMixTask", **known)
    smoothed, model = loss.LabelSmoothingCrossEntropy(0.3), get_model("resnet18", 5, width=8)
    made, (images, target) = make(model, criterion=smoothed, verbose=False), batch
    assert (made(images, target)["loss"] - smoothed(model(images), target)).abs() > 1e-3
    made.sumix.mixer = CutMix(p=0)
    torch.testing.assert_close(made(images, target)["loss"], smoothed(model(images), target))


def test_lightning():
    pytest.importorskip("lightning")
    mixer = Counted()
    module, trainer = trainers.lightning_run(3, mixer)
    assert trainer.callback_metrics["accuracy"] > 0.6 and mixer.calls == 3 * 20  # none in validation
    [group] = trainer.optimizers[0].param_groups
    assert any(parameter is module.sumix.head.layers[0].weight for parameter in group["params"])


def test_transformers_evaluates_unmixed_images(tmp_path):
    pytest.importorskip("transformers")
    trainer = trainers.hugging_face_trainer(tmp_path, max_steps=4, logging_strategy="no")
    trainer.sumix.mixer = Counted()
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    assert trainer.sumix.mixer.calls == 4
    images, target = trainers.digits()[1][:]
    with torch.no_grad(): wanted = F.cross_entropy(trainer.model.eval()(images).logits, target).item()
    assert found == pytest.approx(wanted, rel=1e-4)


def test_transformers_accumulates_to_the_gradient_of_the_whole_batch(tmp_path):
    transformers = pytest.importorskip("transformers")

    def gradient(bs, batches):
        trainer, found = trainers.hugging_face_trainer(
            tmp_path, max_steps=1, logging_strategy="no", per_device_train_batch_size=bs, max_grad_norm=0.0,
            gradient_accumulation_steps=batches, learning_rate=0.0), []
        trainer.sumix.mixer = CutMix(p=0)
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout): module.p = 0.0

        class Keep(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, *args, **options):
                found.extend(parameter.grad.clone() for parameter in trainer.model.parameters())
        trainer.add_callback(Keep())
        trainer.train()
        return found

    for one, other in zip(gradient(64, 1), gradient(32, 2), strict=True): torch.testing.assert_close(one, other)
