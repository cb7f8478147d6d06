"Labels that are made wrong on purpose, from the loaders to the record"
import pytest
import torch
from fastai.learner import Learner

from sumix_nb.data.choosing import mislabel
from sumix_nb.data.loaders import get_dls
from sumix_nb.evaluation.label_noise import wrong_answers
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.train import make_learner, train

NOISY = {"data": "digits", "limit": 200, "bs": 50, "size": 16, "width": 4, "label_noise": 0.3}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_as_many_labels_as_asked_for_are_wrong_and_all_are_classes(share, classes):
    target = torch.randint(classes, (101,), generator=torch.Generator().manual_seed(1))
    kept = target.clone()
    found = [mislabel(target, share, classes, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*found) and torch.equal(target, kept) and found[0].dtype == torch.int64
    assert (found[0] != target).sum() == round(share * 101) and 0 <= found[0].min() <= found[0].max() < classes


@pytest.mark.parametrize("view", [None, "fine_grained"])
def test_only_training_labels_are_wrong_and_the_truth_is_kept(view):
    options = {"limit": 100, "bs": 20, "size": 16, "view": view, "workers": 0, "device": "cpu"}
    clean, noisy = get_dls("digits", **options), get_dls("digits", label_noise=0.3, **options)
    for right in (clean.train_ds.target, clean.train_ds.truth): assert torch.equal(right, noisy.train_ds.truth)
    assert (noisy.train_ds.target != noisy.train_ds.truth).sum() == 30
    assert torch.equal(noisy.valid_ds.target, clean.valid_ds.target)
    other = get_dls("digits", label_noise=0.3, seed=1, **options)
    assert not torch.equal(other.train_ds.target == other.train_ds.truth, noisy.train_ds.target == noisy.train_ds.truth)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, "much", None])
def test_a_share_that_is_none_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="`label_noise`"): get_dls("digits", label_noise=wrong)
    with pytest.raises((TypeError, ValueError), match="`label_noise`"): Recipe(label_noise=wrong)


@pytest.mark.parametrize("options", [{}, {"mixer": "cutmix", "method": "sumix"}, {"mixer": "cutmix", "clean": "bank",
                                                                                 "method": "sumix", "p": 0.5}])
def test_a_record_says_what_was_memorised_where_it_was_validated(options):
    recipe = Recipe(epochs=3, validate_every=2, **NOISY, **options)
    learn = make_learner(recipe, device="cpu")
    epochs = train(recipe, learn=learn, progress=False)["label_noise"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    dls, said = learn.dls, []
    with torch.no_grad():
        for batch in dls.valid.new(dls.train_ds): said.append(learn.model.eval()(batch[0]).argmax(1))
    said, wrong = torch.cat(said), dls.train_ds.target != dls.train_ds.truth
    counted = [sum(bool(said[i] == label[i]) for i in range(200) if wrong[i]) / 60
               for label in (dls.train_ds.target, dls.train_ds.truth)]
    assert [epochs[-1]["memorised"], epochs[-1]["recovered"]] == pytest.approx(counted)
    assert "label_noise" not in train(Recipe(**NOISY | {"label_noise": 0.0, "epochs": 1}), progress=False)


def test_a_share_that_makes_no_label_wrong_trains_and_says_nothing():
    assert "label_noise" not in train(Recipe(**NOISY | {"label_noise": 0.002, "epochs": 1}), progress=False)


def test_training_images_are_shown_as_validation_images_are():
    dls = get_dls("digits", view="fine_grained", label_noise=0.5, limit=20, bs=10, size=16, workers=0, device="cpu")
    seen = []
    class Spy(torch.nn.Module):
        def forward(self, images):
            seen.append(images.as_subclass(torch.Tensor))
            return torch.zeros(len(images), dls.c)
    learn = Learner(dls, Spy(), loss_func=torch.nn.CrossEntropyLoss())
    wrong_answers(learn)
    wrong_answers(learn)
    once, again = torch.cat(seen).split(20)
    assert torch.equal(once, again) and dls.train_ds.split_idx == 0


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"mixer": "automix", "mixer_options": {"base": 0.5}}])
def test_the_network_that_is_validated_is_asked(options):
    recipe = Recipe(**NOISY | {"epochs": 2, "bs": 20} | options)
    learn = make_learner(recipe, device="cpu")
    record = train(recipe, learn=learn, progress=False)
    with learn.without_mixing(): found = wrong_answers(learn)
    assert {name: record["label_noise"][-1][name] for name in found} == pytest.approx(found)
