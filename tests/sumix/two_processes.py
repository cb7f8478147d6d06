"What `test_automix.py` lets two processes do: train with a learned mixer, and write down the weights"
import sys
from pathlib import Path

import torch
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import no_random, rank_distrib

from sumix_nb.data.loaders import get_dls
from sumix_nb.models.networks import get_model
from sumix_nb.sumix.adautomix import AdAutoMix
from sumix_nb.sumix.automix import AutoMix
from sumix_nb.training.processes import distribute, leave_group, local_device


def trained(callback):
    "Weights of network, generator and teacher, the metrics, and of each step how many images were mixed and by what"
    local_device()
    draws, draw = [], callback.passes.draw

    def noted(n):
        shares, rows = draw(n)
        draws.append((len(rows[0]), float(torch.as_tensor(shares[0]).flatten()[0])))
        return shares, rows

    callback.passes.draw = noted
    with no_random(0):
        dls = get_dls("digits", size=16, bs=16, limit=48, device="cpu")
        learn = Learner(dls, get_model("resnet18", 10, width=4), cbs=callback, opt_func=SGD, metrics=accuracy)
        with learn.no_bar(), learn.no_logging(), distribute(learn): learn.fit(2, 0.02)
    return {"weights": learn.model.state_dict(), "draws": draws,
            "metrics": [float(value) for value in learn.recorder.values[-1][1:]]}


if __name__ == "__main__":
    found = {"automix": trained(AutoMix(method="sumix", base=0.5, end=0.9, seed=0)),
             "adautomix": trained(AdAutoMix((2, 3), base=0.5, end=0.9, seed=0))}
    torch.save(found, Path(sys.argv[1], f"{rank_distrib()}.pt"))
    leave_group()
