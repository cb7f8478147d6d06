"AdAutoMix in training: recorded iterations, faults of the references that we do not share, and SUMix for many images"
import math

import pytest
import torch
from fastai.torch_core import no_random
from torch.nn import functional as F

from sumix_nb.mixers.adautomix import ManyMixed
from sumix_nb.mixers.mixed import Mixed, unmixed
from sumix_nb.models.networks import get_model
from sumix_nb.sumix.adautomix import AdAutoMix, AdAutoMixPasses, many_ratio, many_sumix_loss
from sumix_nb.sumix.learned import PARTS_NAME
from sumix_nb.sumix.loss import sumix_loss
from sumix_nb.sumix.mix import MixedAccuracy
from sumix_nb.training.resume import Checkpoint, read_checkpoint
from sumix_nb.training.steps import Autocast
from tests.oracles import PRECISIONS
from tests.sumix.learners import At, digits, fit, learner, make_dls, weights
from tests.sumix.recorded import run_iterations
from tests.training import oracles
from tests.training.oracles import Interrupt


def adautomix(*cbs, dls=None, k=4, size=8, **options):
    "A quiet Learner with AdAutoMix on random images"
    torch.manual_seed(0)
    options = {"base": 0.5, "end": 0.9, "seed": 0} | options
    return learner(AdAutoMix(**options), *cbs, model=get_model("resnet18", k, width=4),
                   dls=make_dls(size=size, k=k) if dls is None else dls)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", ["i0", "i1", "i2"])
def test_an_adversarial_and_a_cooperative_iteration_equal_the_recorded_ones(golden, case, precision):
    cases, dtype = golden("adautomix_official.npz"), PRECISIONS[precision]
    count = cases[case, "n_images"]
    passes = AdAutoMixPasses(count, stage="0", lam_channel=bool(cases[case, "lam_concat"]), beta=cases[case, "beta"],
                             mode=str(cases.arrays[f"{case}__mode"]), lam_margin=cases[case, "lam_margin"])

    def draws(step):
        passes.when = step, 2
        lam, rows = cases[case, f"s{step}_lam"], [cases[case, f"s{step}_index_{name}"] for name in ("mb", "bb")]
        shares = [lam, lam] if count > 2 else [torch.stack([one, 1 - one]) for one in lam]
        if count == 2: rows = [torch.cat([torch.arange(row.shape[1])[None], row]) for row in rows]
        passes.draw = lambda n: (shares, rows)

    def terms_of(passes, evidence, step):
        judged, mixed, terms = passes.judged[0], evidence.mixed, passes.terms(evidence)
        assert cases[case, f"s{step}_adversarial"] == (step % 2 == 0)
        re = (terms.clean_ce + terms.plain_ce) / 2
        found = {"mask_mb": judged.mask, "img_mix_mb": judged.images, "img_mix_bb": mixed.images, "cos": terms.cosine,
                 "mask_bb_raw": mixed.mask, "loss": terms.loss, "loss_one_q": terms.clean_ce, "loss_re_q": re,
                 "loss_plain_q": terms.plain_ce, "loss_mix_q": terms.mixed_ce, "ce_k": terms.teacher_ce}
        # the shares of the classifier are extreme in one step of i2, whose masks are not recorded as used
        if count == 2 and not 0.03 < mixed.shares[0, 0] < 0.97: del found["mask_bb_raw"]
        return found

    assert run_iterations(cases, case, passes, precision, dtype, draws, terms_of) > 50


def one_step(passes, model, images, target, iteration=0, seed=0):
    passes.generator, passes.when = torch.Generator().manual_seed(seed), (iteration, 4)
    output = model(passes.inputs(unmixed(images, target), images))
    return passes.terms(passes.collect(model, output))


def attached(count=3, **options):
    torch.manual_seed(0)
    model, passes = get_model("resnet18", 4, width=4), AdAutoMixPasses(count, **options)
    passes.attach(model)
    return model, passes, torch.randn(6, 3, 8, 12), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_loss_is_the_sum_of_its_formula_and_the_cosine_sign_is_a_choice(count):
    "Images, and so feature maps, are not square, which the released generator cannot take"
    for sign in (1, -1):
        for iteration in (0, 1, 2, 3):
            model, passes, images, target = attached(count, beta=0.4, cos_sign=sign)
            terms = one_step(passes, model, images, target, iteration)
            contest = terms.teacher_ce if iteration % 2 else -0.4 * terms.teacher_ce + 0.6 * sign * terms.cosine
            wanted = terms.mixed_ce + 0.5 * terms.clean_ce + 0.5 * terms.plain_ce + contest
            torch.testing.assert_close(terms.loss, wanted)
            assert torch.equal(terms.plain_ce, terms.clean_ce) == (count == 2) and terms.shares.shape == (6, count)


@pytest.mark.parametrize("iteration", [0, 1])
def test_generator_learns_and_the_teacher_does_not(iteration):
    model, passes, images, target = attached()
    terms = one_step(passes, model, images, target, iteration)
    names = dict(model.named_parameters())
    contest = -0.3 * terms.teacher_ce + 0.7 * terms.cosine if iteration == 0 else terms.teacher_ce
    contest.backward(retain_graph=True)
    reached = {name for name, p in names.items() if p.grad is not None and p.grad.any()}
    assert reached and all(".generator." in name for name in reached)
    terms.loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and not any(b.requires_grad for b in model.buffers())


def test_skipping_nothing_every_second_step_is_adversarial_in_a_learner():
    "The released `switch_off` fails in adversarial steps; here nothing is skipped"
    learn, seen = adautomix(beta=0.2), []
    def look():
        terms, odd = learn.adautomix.terms, learn.train_iter % 2
        contest = terms.teacher_ce if odd else -0.2 * terms.teacher_ce + 0.8 * terms.cosine
        wanted = terms.mixed_ce + (terms.clean_ce + terms.plain_ce) / 2 + contest
        torch.testing.assert_close(terms.loss, wanted)
        seen.append(odd)
    for batch in (0, 1, 2): fit(learn, 2, cbs=At("after_loss", look, batch=batch))
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


def test_a_classifier_mask_gives_way_at_the_ends_only():
    "OpenMixup's copy compares the other way round, and replaces nearly every mask"
    replaced = []
    for first in (0.02, 0.03, 0.2, 0.5, 0.8, 0.96, 0.98):
        model, passes, images, target = attached()
        with torch.no_grad():
            for p in passes.parts.generator.parameters(): p.add_(torch.randn_like(p))
        shares = torch.tensor([first, (1 - first) / 2, (1 - first) / 2], dtype=torch.float64)
        rows = torch.stack([torch.arange(6).roll(i) for i in range(3)])
        passes.draw = lambda n, shares=shares, rows=rows: ([shares, shares], [rows, rows])
        mask = passes.collect(model, model(passes.inputs(unmixed(images, target), images))).mixed.mask
        replaced.append(bool((mask.std((0, 2, 3)) == 0).all()))
    assert replaced == [True, True, False, False, False, False, True]


def test_three_images_share_their_draw_and_two_do_not():
    for count in (2, 3):
        _, passes, _, _ = attached(count)
        passes.generator = torch.Generator().manual_seed(0)
        (one, other), rows = passes.draw(7)
        assert torch.equal(one, other) == (count == 3) and one.sum() == pytest.approx(1)
        assert all(row.sort(1).values.eq(torch.arange(7)).all() and row.shape == (count, 7) for row in rows)
        assert (rows[0] != rows[1]).any() and (count == 3 or rows[0][0].eq(torch.arange(7)).all())


def test_several_numbers_of_images_are_drawn_by_batch():
    learn, found = adautomix(images=(2, 3), dls=make_dls(n=64, size=8)), []
    def look(): found.append(learn.adautomix.terms.shares.shape[1])
    for batch in range(8): fit(learn, cbs=At("after_loss", look, batch=batch))
    assert set(found) == {2, 3}
    _, passes, _, _ = attached((2, 3, 4))
    for seed in (0, 1):
        drawn = []
        for rank in (0, 1):  # whatever else is drawn by the generator of a process
            passes.seed, passes.generator, counts = seed, torch.Generator().manual_seed(seed + rank), []
            for step in range(20):
                passes.when = step, 20
                counts.append(len(passes.draw(5)[1][0]))
            drawn.append(counts)
        assert drawn[0] == drawn[1] and set(drawn[0]) == {2, 3, 4}


# ---- SUMix for many ------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["poster", "corrected"])
def test_for_two_images_loss_ratio_and_gradients_are_those_of_sumix(variant):
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    target, partner = torch.tensor([0, 1, 2, 3, 1, 0]), torch.tensor([3, 0, 1, 2, 5, 4])
    lam, images = torch.rand(6, generator=generator, dtype=torch.float64), torch.zeros(6, 1, 1, 1)
    rows = torch.stack([torch.arange(6), partner])
    many = ManyMixed(images, target[rows], torch.stack([lam, 1 - lam], 1), rows, images)
    loss, ratio = many_sumix_loss(*outputs, many, xi=0.7, variant=variant)
    terms = sumix_loss(*outputs, Mixed(images, target, target[partner], lam, partner), xi=0.7, variant=variant)
    torch.testing.assert_close(loss, terms.loss)
    torch.testing.assert_close(ratio[:, 0], terms.ratio)
    found, wanted = (torch.autograd.grad(one, outputs, allow_unused=True) for one in (loss, terms.loss))
    for one, other in zip(found, wanted):
        if other is None: assert one is None or not one.any()
        else: torch.testing.assert_close(one, other)


def test_the_ratio_of_three_is_what_plain_numbers_give():
    generator = torch.Generator().manual_seed(1)
    shares, distances = torch.rand(5, 3, generator=generator), 3 * torch.rand(5, 3, generator=generator)
    shares = shares / shares.sum(1, keepdim=True)
    found = many_ratio(shares, distances).tolist()
    for row, prior, distance in zip(found, shares.tolist(), distances.tolist()):
        parts = [p * math.exp(-d) for p, d in zip(prior, distance)]
        assert row == pytest.approx([part / sum(parts) for part in parts], rel=1e-5)
    assert many_ratio(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 900.0, 0.0]])).tolist() == [[1, 0, 0]]


def test_sumix_labels_are_used_in_training():
    model, passes, images, target = attached(method="sumix", xi=0.7, variant="corrected")
    passes.generator = torch.Generator().manual_seed(0)
    evidence = passes.collect(model, model(passes.inputs(unmixed(images, target), images)))
    parts, terms = passes.parts, passes.terms(evidence)
    heads = [parts.uncertainty(part) for part in (evidence.features, evidence.clean_features)]
    wanted, ratio = many_sumix_loss(evidence.logits, parts.head(evidence.clean_features), *heads, evidence.mixed,
                                    xi=0.7, variant="corrected")
    torch.testing.assert_close(terms.mixed_ce, wanted)
    assert torch.equal(terms.shares, ratio) and (ratio - evidence.mixed.shares).abs().max() > 1e-3
    ce = F.cross_entropy(evidence.logits, evidence.mixed.targets[0], reduction="none")
    assert ce.isfinite().all() and terms.loss.isfinite()


# ---- in a Learner --------------------------------------------------------------------------------------

def run(folder, *cbs, epochs=3):
    "Last checkpoint and weights of a training that may have begun before; None if it was stopped"
    learn, keeper = adautomix(images=(2, 3), method="sumix", dls=digits(), k=10), Checkpoint(folder, "run")
    try:
        with learn.no_bar(), no_random(0): fit(learn, epochs, cbs=[keeper, *cbs])
    except RuntimeError: return None
    return read_checkpoint(keeper.file), weights(learn.model)


def test_a_training_that_was_stopped_ends_as_if_nothing_had_happened(tmp_path):
    whole = run(tmp_path / "whole")
    assert run(tmp_path, Interrupt(5, "after_loss")) is None
    assert oracles.same(list(run(tmp_path)), list(whole))


def test_in_half_precision_with_metrics_and_a_plain_export():
    learn = adautomix(Autocast(), dls=digits(), k=10)
    learn.metrics = [MixedAccuracy()]
    learn.recorder.train_metrics = True
    fit(learn)
    assert 0 <= learn.recorder.values[-1][1] <= 1 and learn.adautomix.terms.loss.isfinite()
    lam, ratio = learn.adautomix.shares()
    assert torch.equal(lam, ratio) and len(learn.adautomix.show_mixed(2)) == 2
    with learn.without_mixing(): assert PARTS_NAME not in dict(learn.model.named_modules())
    fit(learn)


def test_mixed_accuracy_counts_every_source():
    learn = adautomix()
    fit(learn)
    mixed, shares = learn.adautomix.last[0], learn.adautomix.terms.shares
    prediction = mixed.targets[1].clone()
    wanted = [sum(shares[n, i].item() for i in range(3) if mixed.targets[i, n] == prediction[n]) for n in range(8)]
    assert learn.adautomix.right(prediction).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("options", "words"), [
    ({"images": 1}, "`images`"), ({"images": ()}, "`images`"), ({"images": (2, 1)}, "`images`"),
    ({"beta": 1.5}, "`beta`"), ({"cos_sign": 0}, "`cos_sign`"),
    ({"method": "sumix", "variant": "released"}, "`variant`"),
    ({"stage": "layer9"}, "`stage`"), ({"lam_margin": -0.1}, "`lam_margin`")])
def test_bad_input_ends_in_a_clear_error(options, words):
    with pytest.raises(ValueError, match=words): adautomix(**options)
