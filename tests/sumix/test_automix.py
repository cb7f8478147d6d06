"AutoMix in training: recorded iterations, the course of gradients, and a callback that works as SUMix does"
import copy
import math
from functools import partial

import pytest
import torch
from fastai.callback.training import GradientAccumulation
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler  # noqa: F401 (teaches `Learner` `lr_find`)
from fastai.learner import load_learner
from fastai.torch_core import no_random
from torch import nn
from torch.nn import functional as F

from sumix_nb.mixers.automix import teacher_momentum
from sumix_nb.mixers.checking import check_pixels, check_record, numbered_images
from sumix_nb.mixers.mixed import unmixed
from sumix_nb.models.networks import get_model
from sumix_nb.sumix.automix import AutoMix, AutoMixPasses
from sumix_nb.sumix.callback import SUMix
from sumix_nb.sumix.learned import PARTS_NAME
from sumix_nb.sumix.loss import sumix_loss
from sumix_nb.sumix.mix import Mix, MixedAccuracy
from sumix_nb.training.resume import Checkpoint, Preempted, read_checkpoint
from sumix_nb.training.steps import Autocast, WeightAverage
from tests.conftest import LIMIT, commands
from tests.oracles import PRECISIONS
from tests.sumix.learners import LOSSES, WEIGHT, At, Named, digits, fit, learner, make_dls, same, throw, weights
from tests.sumix.learners import times_in_optimizer
from tests.sumix import two_processes
from tests.sumix.recorded import run_iterations
from tests.training import oracles
from tests.training.oracles import Interrupt, Signal


def automix(*cbs, model=None, loss=None, dls=None, tmp=None, k=4, size=8, **options):
    "A quiet Learner with AutoMix on random images"
    torch.manual_seed(0)
    model = get_model("resnet18", k, width=4) if model is None else model
    dls = make_dls(size=size, k=k) if dls is None else dls
    options = {"base": 0.5, "end": 0.9, "seed": 0} | options
    return learner(AutoMix(**options), *cbs, model=model, dls=dls, loss=loss, tmp=tmp)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", ["i0", "i1"])
def test_two_iterations_equal_the_recorded_ones(golden, case, precision):
    cases, dtype = golden("automix_official.npz"), PRECISIONS[precision]
    passes = AutoMixPasses(stage="0", lam_channel=bool(cases[case, "lam_concat"]), lam_margin=cases[case, "lam_margin"],
                           mask_weight=cases[case, "mask_loss_weight"], mask_margin=cases[case, "mask_loss_margin"])

    def draws(step):
        lams = cases[case, f"s{step}_lam"].tolist()
        partners = [cases[case, f"s{step}_index_{name}"] for name in ("mb", "bb")]
        passes.draw = lambda n: (lams, partners)

    def terms_of(passes, evidence, step):
        judged, mixed, terms = passes.judged[0], evidence.mixed, passes.terms(evidence)
        found = {"mask_mb": judged.mask, "img_mix_mb": judged.images, "img_mix_bb": mixed.images,
                 "loss": terms.loss, "loss_one_q": terms.clean_ce, "loss_mix_q": terms.mixed_ce,
                 "loss_mix_k": terms.teacher_ce, "loss_mask": terms.mask_loss}
        return found if (case, step) == ("i1", 1) else found | {"mask_bb_raw": mixed.mask} # there it is a cross-fade

    assert run_iterations(cases, case, passes, precision, dtype, draws, terms_of) > 50


# ---- one step in a Learner -------------------------------------------------------------------------

def naive_step(learn, batch):
    "The loss of one step from real copies of all networks, as four forward passes"
    passes, (images, target) = learn.automix.passes, batch
    network, parts = passes.network, passes.parts
    student, teacher = copy.deepcopy(network), copy.deepcopy(network)
    for twin in (student, teacher): twin.fc._forward_pre_hooks.clear()
    teacher.load_state_dict(teacher.state_dict() | {
        name: getattr(parts.teacher, parts.teacher.own(name)) for name in parts.teacher.names})
    features, maps = {}, {}
    for name, twin in (("q", student), ("k", teacher)):
        twin.fc.register_forward_pre_hook(lambda layer, inputs, name=name: features.__setitem__(name, inputs[0]))
        twin.layer3.register_forward_hook(lambda layer, inputs, output, name=name: maps.__setitem__(name, output))
    (lam_k, lam_q), (partner_k, partner_q) = passes.draw(len(images))
    generator, size = copy.deepcopy(parts.generator), images.shape[2:]
    teacher(images)
    seen = maps["k"].detach()
    mask_k, mask_q = (generator(seen, seen[partner], lam, size)
                      for lam, partner in ((lam_k, partner_k), (lam_q, partner_q)))
    if min(lam_q, 1 - lam_q) <= passes.lam_margin: mask_q = torch.full_like(mask_q, lam_q)
    mixed_k, mixed_q = (mask * images + (1 - mask) * images[partner]
                        for mask, partner in ((mask_k, partner_k), (mask_q.detach(), partner_q)))
    def mce(logits, partner, lam):
        return lam * F.cross_entropy(logits, target) + (1 - lam) * F.cross_entropy(logits, target[partner])
    head_k = copy.deepcopy(parts.head)
    head_k.load_state_dict({name: getattr(parts.teacher_head, f"ema/{name}") for name in ("weight", "bias")})
    teacher(mixed_k)
    loss = mce(head_k(features["k"]), partner_k, lam_k) + F.cross_entropy(student(images), target)
    student(mixed_q)
    loss = loss + mce(parts.head(features["q"]), partner_q, lam_q)
    return loss + 0.1 * max(abs(mask_k.mean() - lam_k) - 0.1, torch.tensor(0.0)), (student, teacher)


def test_a_step_in_a_learner_equals_four_passes_of_real_copies():
    learn, found = automix(lam_channel=True), []
    passes = learn.automix.passes
    with torch.no_grad():
        for p in passes.parts.generator.parameters(): p.mul_(100)
        passes.parts.follow(passes.network, 1.0)
        for b in passes.parts.teacher.buffers():
            if b.is_floating_point(): b.add_(0.01)

    def before():
        state = passes.generator.get_state()
        found.append(naive_step(learn, (learn.xb[0].as_subclass(torch.Tensor), learn.yb[0].as_subclass(torch.Tensor))))
        passes.generator.set_state(state)

    def after():
        loss, (student, teacher) = found[-1]
        torch.testing.assert_close(learn.loss, loss.detach(), rtol=1e-5, atol=1e-6)
        own = passes.parts.teacher
        for name, value in teacher.named_buffers():
            if PARTS_NAME in name: continue
            torch.testing.assert_close(getattr(own, own.own(name)), value, msg=name)
            torch.testing.assert_close(dict(passes.network.named_buffers())[name], dict(student.named_buffers())[name])

    fit(learn, cbs=[At("before_batch", before, batch=0, order=-10), At("after_loss", after, batch=0)])
    assert len(found) == 1


def test_each_part_of_the_loss_trains_whom_it_should():
    torch.manual_seed(0)
    model, passes = get_model("resnet18", 4, width=4), AutoMixPasses()
    passes.attach(model)
    images, target = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])

    def reached(part):
        model.zero_grad()
        passes.draw = lambda n: ([0.9, 0.4], [torch.arange(n).roll(1), torch.arange(n).roll(2)])
        terms = passes.terms(passes.collect(model, model(passes.inputs(unmixed(images, target), images))))
        getattr(terms, part).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    generator = {name for name, _ in model.named_parameters() if ".generator." in name}
    head = {f"fc.{PARTS_NAME}.head.weight", f"fc.{PARTS_NAME}.head.bias"}
    everything = {name for name, _ in model.named_parameters()}
    assert reached("loss") == everything and len(generator) == 4
    assert reached("teacher_ce") <= generator and reached("teacher_ce")
    assert reached("mask_loss") <= generator and reached("mask_loss")
    assert reached("mixed_ce") == everything - generator - {"fc.weight", "fc.bias"}
    assert reached("clean_ce") == everything - generator - head
    assert not any(b.requires_grad for b in model.buffers())


def test_the_teacher_follows_the_updated_student_on_schedule():
    learn, seen = automix(base=0.3, end=0.8, scope=(0.0, 1.0)), []
    own = learn.automix.parts.teacher
    name = "layer1.0.conv1.weight"
    def before(): seen.append(getattr(own, own.own(name)).clone())
    def after():
        i = learn.train_iter
        momentum, student = teacher_momentum(i, 6, 0.3, 0.8, (0.0, 1.0)), learn.model.get_parameter(name)
        torch.testing.assert_close(getattr(own, own.own(name)), momentum * seen[-1] + (1 - momentum) * student)
        seen.append(momentum)
    fit(learn, 2, cbs=[At("before_batch", before, batch=1), At("after_step", after, batch=1)])
    assert seen[1::2] == [teacher_momentum(i, 6, 0.3, 0.8, (0, 1)) for i in (1, 4)]
    assert learn.automix.parts.updates == 6


@pytest.mark.parametrize("variant", ["poster", "corrected", "released"])
def test_with_sumix_the_mixed_term_is_that_of_sumix_at_no_pass_more(variant):
    passed = []
    for method in ("mce", "sumix"):
        learn, count = automix(method=method, variant=variant, xi=0.7), []
        hook = learn.model.register_forward_pre_hook(lambda model, inputs, count=count: count.append(model.training))
        found = []
        def check(learn=learn, found=found):
            passes, terms = learn.automix.passes, learn.automix.terms
            evidence, parts = found[0], passes.parts
            wanted = sumix_loss(parts.head(evidence.features), parts.head(evidence.clean_features),
                                parts.uncertainty(evidence.features), parts.uncertainty(evidence.clean_features),
                                evidence.mixed, xi=0.7, variant=variant)
            torch.testing.assert_close(terms.mixed_ce, wanted.loss.detach())
            torch.testing.assert_close(terms.ratio, wanted.ratio)
        def keep(learn=learn, found=found): found.append(learn.automix.evidence)
        cbs = [At("after_pred", keep, batch=0), At("after_loss", check, batch=0)] if method == "sumix" else []
        fit(learn, cbs=cbs)
        hook.remove()
        passed.append(sum(count))
        if method == "sumix":
            lam, ratio = learn.automix.shares()
            assert (lam - ratio).abs().max() > 1e-4
    assert passed[0] == passed[1]


@pytest.mark.parametrize("name", ["class weights", "smoothing", "sum", "fastai", "focal"])
def test_the_loss_of_the_learner_is_kept(name):
    learn = automix(loss=LOSSES[name], mask_weight=0.0)
    kept, loss_func, close = [], LOSSES[name], {"rtol": 1e-4, "atol": 1e-5}
    def take(): kept.append(learn.automix.evidence)
    def check():
        terms, evidence, target = learn.automix.terms, kept[0], learn.yb[0]
        torch.testing.assert_close(terms.clean_ce, loss_func(evidence.clean_logits, target).detach(), **close)
        mixed, above, below = evidence.mixed, 0.0, 0.0
        for i in range(len(target)):
            for label, share in ((mixed.target_a[i], mixed.lam[i]), (mixed.target_b[i], 1 - mixed.lam[i])):
                weight = WEIGHT[label] if name == "class weights" else 1.0
                above = above + share * weight * loss_func(learn.pred[i:i + 1], label[None])
                below = below + share * weight
        torch.testing.assert_close(terms.mixed_ce, (above if name == "sum" else above / below).detach(), **close)
    fit(learn, cbs=[At("after_pred", take, batch=0), At("after_loss", check, batch=0)])
    assert kept and learn.loss_func is loss_func


# ---- what is validated, saved and exported -----------------------------------------------------------

def logits_of(learn):
    "Logits of the validation images by the teacher and by the student, computed from real copies"
    images, own = torch.cat([x for x, _ in learn.dls.valid]).as_subclass(torch.Tensor), learn.automix.parts.teacher
    student = copy.deepcopy(learn.model).eval()
    teacher = copy.deepcopy(student)
    teacher.load_state_dict(teacher.state_dict() | {name: getattr(own, own.own(name)) for name in own.names})
    with torch.no_grad(): return {"teacher": teacher(images), "student": student(images)}, images


@pytest.mark.parametrize("report", ["teacher", "student"])
def test_validation_predictions_and_exports_are_those_of_what_is_reported(report, tmp_path):
    learn = fit(automix(report=report, tmp=tmp_path, dls=digits(), k=10), 2)
    wanted, images = logits_of(learn)
    assert (wanted["teacher"] - wanted["student"]).abs().max() > 1e-3
    before = weights(learn.model)
    with learn.no_bar(): found = learn.get_preds(act=nn.Identity())[0]
    torch.testing.assert_close(found, wanted[report])
    same(weights(learn.model), before)
    learn.export("whole.pkl")
    whole = load_learner(tmp_path / "whole.pkl")
    with whole.no_bar(): torch.testing.assert_close(whole.get_preds(dl=learn.dls.valid, act=nn.Identity())[0], found)
    learn.export_plain()
    same(weights(learn.model), before)
    plain = load_learner(tmp_path / "export.pkl")
    assert not any(isinstance(cb, Mix) for cb in plain.cbs) and PARTS_NAME not in dict(plain.model.named_modules())
    with torch.no_grad(): torch.testing.assert_close(plain.model.eval()(images), wanted[report])
    with learn.without_mixing(): learn.save("network", with_opt=False)
    same(weights(learn.model), before)
    fresh = get_model("resnet18", 10, width=4)
    fresh.load_state_dict(torch.load(tmp_path / "models" / "network.pth"))
    with torch.no_grad(): torch.testing.assert_close(fresh.eval()(images), wanted[report])
    fit(learn)


def test_a_callback_that_leaves_takes_the_student_along_and_brings_it_back():
    learn = fit(automix(), 2)
    before, cb = weights(learn.model), learn.automix
    wanted, images = logits_of(learn)
    learn.remove_cb(cb)
    with torch.no_grad(): torch.testing.assert_close(learn.model.eval()(images), wanted["teacher"])
    learn.add_cb(cb)
    same(weights(learn.model), before)
    fit(learn)


def test_a_network_trained_in_between_is_a_new_student():
    learn = fit(automix(), 2)
    cb = learn.automix
    learn.remove_cb(cb)
    fit(learn)
    trained = weights(learn.model)
    learn.add_cb(cb)
    same({name: learn.model.state_dict()[name] for name in trained}, trained)
    def begun(): same({n: getattr(cb.parts.teacher, cb.parts.teacher.own(n)) for n in trained}, trained)
    fit(learn, cbs=At("before_batch", begun, batch=0, order=-10))


def test_an_interrupted_validation_leaves_a_learner_that_trains_on():
    learn = fit(automix())
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At("before_validate", throw(KeyboardInterrupt()), batch=2))
    student = weights(learn.model)
    assert learn.automix.shown
    def back():
        assert not learn.automix.shown
        assert not torch.equal(learn.model.conv1.weight, student["conv1.weight"])
    fit(learn, cbs=At("before_batch", back, batch=0))


@pytest.mark.parametrize("plain", [False, True])
def test_weights_loaded_after_an_interrupted_validation_are_the_ones_that_train_on(plain, tmp_path):
    learn = fit(automix(tmp=tmp_path))
    if plain:
        with learn.without_mixing(): torch.save(learn.model.state_dict(), tmp_path / "kept.pth")
    else: learn.save("both")
    before = torch.load(tmp_path / "kept.pth") if plain else weights(learn.model)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=At("before_validate", throw(KeyboardInterrupt()), batch=2))
    if plain: learn.model.load_state_dict(torch.load(tmp_path / "kept.pth"))
    else: learn.load("both", with_opt=False)
    def kept(): same({name: learn.model.state_dict()[name] for name in before if name != "fc.learned_mixer.shown"},
                     {name: value for name, value in before.items() if name != "fc.learned_mixer.shown"})
    assert not learn.automix.shown
    fit(learn, cbs=At("before_batch", kept, batch=0, order=-10))


def test_another_number_of_classes_begins_anew():
    learn = fit(automix(), 2)
    parts = learn.automix.parts
    body = learn.model.conv1.weight.clone()
    learn.model.fc = nn.Linear(learn.model.fc.in_features, learn.model.fc.out_features + 3)
    seen = []
    fit(learn, cbs=At("before_batch", lambda: seen.append(learn.model.conv1.weight.clone()), batch=0, order=-10))
    assert learn.automix.parts is not parts and torch.equal(seen[0], body)


def test_an_average_of_weights_beside_the_teacher_is_refused():
    with pytest.raises(ValueError, match="cannot stand beside"): fit(automix(), cbs=WeightAverage(0.9))


def test_save_load_and_lr_find_bring_everything_back(tmp_path):
    learn = fit(automix(tmp=tmp_path))
    before = weights(learn.model)
    learn.save("both")
    with learn.no_logging(), learn.no_bar(): learn.lr_find(start_lr=0.01, end_lr=1, num_it=5, show_plot=False)
    same(weights(learn.model), before)
    fit(learn)
    other = automix(tmp=tmp_path)
    other.create_opt()
    for loaded in (learn, other):
        loaded.load("both")
        same(weights(loaded.model), before)
        fit(loaded)


def test_a_plain_checkpoint_gives_student_and_teacher_its_weights(tmp_path):
    torch.manual_seed(1)
    plain = learner(model=get_model("resnet18", 4, width=4), dls=make_dls(size=8), tmp=tmp_path)
    plain.save("plain", with_opt=False)
    wanted = weights(plain.model)
    learn = fit(automix(tmp=tmp_path))
    learn.load("plain", with_opt=False)
    own = learn.automix.parts.teacher
    def check():
        for name, value in wanted.items():
            assert torch.equal(learn.model.state_dict()[name], value)
            assert torch.equal(getattr(own, own.own(name)), value)
    fit(learn, cbs=At("before_batch", check, batch=0, order=-10))


@pytest.mark.parametrize("method", ["mce", "sumix"])
def test_generator_and_heads_are_in_the_optimiser_once_and_the_teacher_never(method):
    early, late = automix(method=method), learner(model=get_model("resnet18", 4, width=4), dls=make_dls(size=8))
    fit(late)
    late.add_cb(AutoMix(method=method, seed=0))
    for learn in (early, late):
        before = weights(learn.automix.parts)
        fit(learn, 2)
        assert times_in_optimizer(learn, learn.automix.parts) == 1
        assert sum(len(group) for group in learn.opt.param_lists) == len(list(learn.model.parameters()))
        after = learn.automix.parts.state_dict()
        trained = [name for name in before if name.startswith(("head", "generator.query.w", "uncertainty"))]
        assert len(trained) >= 3 and all(not torch.equal(before[name], after[name]) for name in trained)
        learn.unfreeze()
        assert not any(b.requires_grad for b in learn.model.buffers())


# ---- resuming --------------------------------------------------------------------------------------

def run(folder, *cbs, epochs=3, **options):
    "Learner and last checkpoint of a training that may have begun before; None if it was stopped"
    learn = automix(dls=digits(), k=10, **options)
    keeper = Checkpoint(folder, "run")
    try:
        with learn.no_bar(), no_random(0): fit(learn, epochs, cbs=[keeper, *cbs])
    except (RuntimeError, Preempted): return None
    return read_checkpoint(keeper.file), weights(learn.model), learn


@pytest.mark.parametrize("method", ["mce", "sumix"])
def test_a_training_that_was_stopped_ends_as_if_nothing_had_happened(method, tmp_path):
    whole = run(tmp_path / "whole", method=method)
    stops = [Interrupt(4, "after_step"), Interrupt(5, "after_validate"), Signal(4), Signal(3, training=False)]
    for i, stop in enumerate(stops):
        folder = tmp_path / str(i)
        assert run(folder, stop, method=method) is None
        resumed = run(folder, method=method)
        assert oracles.same(resumed[0], whole[0]) and oracles.same(resumed[1], whole[1])
    assert any("ema/" in name for name in whole[1])


def test_another_setting_is_another_training(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="AutoMix's lam_margin"): run(tmp_path, epochs=1, lam_margin=0.2)


def test_the_same_seed_gives_the_same_training():
    one, other = (weights(fit(automix(), 2).model) for _ in range(2))
    same(one, other)
    different = weights(fit(automix(seed=1), 2).model)
    assert any(not torch.equal(one[name], value) for name, value in different.items())


# ---- beside other callbacks --------------------------------------------------------------------------

class CPUPrecision(MixedPrecision):
    "fastai's mixed precision, which is for GPUs, on the CPU"
    def before_fit(self):
        self.autocast, self.scales = torch.autocast("cpu", torch.bfloat16), []
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize("callback", [CPUPrecision, Autocast])
def test_all_passes_run_in_half_precision_and_the_loss_in_full(callback):
    learn, kinds = automix(callback(), method="sumix"), []
    learn.model.layer1.register_forward_hook(lambda layer, inputs, output: kinds.append(output.dtype))
    fit(learn)
    assert set(kinds[:4]) == {torch.bfloat16} and len(kinds) >= 12
    assert learn.automix.terms.loss.dtype == torch.float32 and learn.automix.terms.loss.isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learn.model.parameters())


def test_with_accumulation_the_teacher_follows_once_per_step_and_gradients_are_those_of_a_mean():
    learn = automix(GradientAccumulation(16), dls=make_dls(n=32, size=8))
    fit(learn)
    assert learn.automix.parts.updates == 2


def test_metrics_of_mixtures_and_pictures_work():
    learn = automix(dls=digits(), k=10)
    learn.metrics = [MixedAccuracy()]
    learn.recorder.train_metrics = True
    fit(learn)
    assert 0 <= learn.recorder.values[-1][1] <= 1
    mixed = learn.automix.last[0]
    assert len(learn.automix.show_mixed(2)) == 2 and mixed.mask.shape == (len(mixed.images), 1, 16, 16)
    lam, ratio = learn.automix.shares()
    assert torch.equal(lam, ratio) and mixed.images.shape == (16, 3, 16, 16) and not mixed.images.requires_grad


def test_a_compiled_network_trains_as_one_that_is_not():
    found = []
    def note(learn, losses): losses.append(learn.loss.item())
    for compiled in (False, True):
        torch.manual_seed(0)
        model, losses = get_model("resnet18", 4, width=4), []
        if compiled: model.compile(backend="eager")
        learn = automix(model=model)
        fit(learn, 2, cbs=[At("after_loss", partial(note, learn, losses), batch=i) for i in range(3)])
        found.append(losses)
    assert len(found[0]) == 6 and found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_network_taken_in_exchange_gets_parts_of_its_own():
    learn = fit(automix())
    old, parts = learn.model, learn.automix.parts
    learn.model = get_model("resnet18", 4, width=4)
    learn.opt = None
    fit(learn)
    assert learn.automix.parts is not parts and not list(old.fc.children()) and learn.automix.parts.updates == 3


# ---- what is refused ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: automix(stage="layer9"), ValueError, "`stage`"), (lambda: automix(stage="relu"), ValueError, "`stage`"),
    (lambda: fit(automix(stage="fc")), ValueError, "`stage`|dimensions"),
    (lambda: automix(model=nn.Conv2d(3, 4, 8)), ValueError, "`stage`|linear layer"),
    (lambda: automix(model=Named()), ValueError, "`stage`"),
    (lambda: fit(automix(dls=make_dls(size=8, soft=True), loss=nn.BCEWithLogitsLoss())), ValueError, "class indices"),
    (lambda: automix(report="both"), ValueError, "`report`"), (lambda: automix(method="mix"), ValueError, "`method`"),
    (lambda: automix(alpha=0), ValueError, "`alpha`"), (lambda: automix(lam_margin=0.6), ValueError, "`lam_margin`"),
    (lambda: automix(mask_weight=-1), ValueError, "`mask_weight`"),
    (lambda: automix(variant="paper"), ValueError, "`variant`"), (lambda: automix(anneal=1), TypeError, "`anneal`"),
    (lambda: automix(lam_channel="yes"), TypeError, "`lam_channel`"), (lambda: automix(scope=1), TypeError, "`scope`"),
    (lambda: automix(seed=-1), ValueError, "`seed`"), (lambda: fit(automix(SUMix("cutmix"))), ValueError, "keep one"),
    (lambda: fit(automix(Mix("cutmix"))), ValueError, "keep one"), (lambda: automix(AutoMix()), ValueError, "already")])
def test_bad_input_ends_in_a_clear_error(make, error, words):
    with pytest.raises(error, match=words): make()


def test_every_pixel_of_a_mixture_comes_from_where_it_says():
    "The checks of `check_mixer`, but for that of the share: the label of AutoMix is drawn, not the mean of its mask"
    for lam_channel in (False, True):
        passes, model = AutoMixPasses(lam_channel=lam_channel), get_model("resnet18", 4, width=4)
        passes.attach(model)
        with torch.no_grad():
            for p in passes.parts.generator.parameters(): p.normal_()
        images, target = numbered_images((6, 3, 8, 12), dtype=torch.float32), torch.tensor([0, 1, 2, 3, 0, 1])
        for margin in (None, 0.4):
            mixed = passes.mix(images, target, torch.randn(6, 16, 2, 3), 0.3, torch.randperm(6), margin)
            check_record(images, target, mixed)
            check_pixels(images, mixed)
            assert mixed.mask.eq(mixed.mask[0, 0, 0, 0]).all() == (margin is not None)


def test_the_mask_weight_falls_if_asked():
    torch.manual_seed(0)
    passes = AutoMixPasses(anneal=True, mask_weight=0.4, mask_margin=0.0)
    model = get_model("resnet18", 4, width=4)
    passes.attach(model)
    images, target, found = torch.randn(4, 3, 8, 8), torch.arange(4), []
    for iteration in (0, 5, 10):
        passes.draw = lambda n: ([0.9, 0.4], [torch.arange(n).roll(1)] * 2)
        passes.when = iteration, 10
        evidence = passes.collect(model, model(passes.inputs(unmixed(images, target), images)))
        found.append(passes.terms(evidence).mask_loss.item())
    assert found == pytest.approx([0.16, 0.08, 0.0], abs=2e-3) and math.isclose(found[2], 0, abs_tol=1e-9)


# ---- two processes -------------------------------------------------------------------------------------

def test_two_processes_end_with_one_student_one_teacher_and_one_generator(tmp_path):
    pytest.importorskip("accelerate")
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    with commands() as command:
        process = command(*launch, two_processes.__file__, tmp_path, ACCELERATE_USE_CPU="true")
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("automix", "adautomix"):
        own, theirs = ({name: value for name, value in rank[kind]["weights"].items()
                        if "running" not in name and "num_batches" not in name} for rank in (one, other))
        assert any("ema/" in name for name in own) and any("generator" in name for name in own)
        same(own, theirs)
        assert one[kind]["metrics"] == other[kind]["metrics"]
        counts, shares = ([list(zip(*rank[kind]["draws"]))[i] for rank in (one, other)] for i in (0, 1))
        assert counts[0] == counts[1] and not set(shares[0]) & set(shares[1])
    assert set(counts[0]) == {2, 3}  # of AdAutoMix, whose passes BatchNorm over all processes would wait for
