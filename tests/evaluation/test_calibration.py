"Counts of confidence and accuracy, and what must not be counted"
import pytest
import torch

from sumix_nb.evaluation.calibration import calibration_error, calibration_summary, fit_temperature
from sumix_nb.evaluation.calibration import plot_reliability, reliability_curve, reliability_sums


@pytest.mark.parametrize("target", [[0, 3], [-1, 0], [0, -100], [2, 99]])
def test_labels_that_are_no_class_are_refused(target):
    with pytest.raises(ValueError, match=r"`target` must be 2 class indices in \[0, 2\]"):
        reliability_sums(torch.zeros(2, 3), torch.tensor(target))


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_every_answer_is_in_one_bin(bins):
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(bins))
    target = torch.arange(500) % 4
    sums = reliability_sums(logits, target, bins)
    assert sums.shape == (bins, 3) and sums[:, 0].sum() == 500
    assert sums[:, 1].sum() == (logits.argmax(1) == target).sum()
    torch.testing.assert_close(sums[:, 2].sum(), logits.softmax(1).amax(1).sum())
    for m, (n, right, confidence) in enumerate(sums.tolist()):
        assert 0 <= right <= n and m * n / bins - 1e-3 <= confidence <= (m + 1) * n / bins + 1e-3


def test_the_picture_names_the_error():
    curve = reliability_curve(reliability_sums(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 1])))
    assert curve == [{"confidence": 0.5, "accuracy": 0.0, "n": 2}] and calibration_error(curve) == 0.5
    label, = [text.get_text() for text in plot_reliability({"mine": curve}).get_legend().get_texts()]
    assert label == "mine (ECE 0.500)"


@pytest.mark.parametrize("case", ["e0", "e1", "e2"])
def test_errors_equal_the_recorded_ones_and_not_the_sorted_ones(golden, case):
    cases = golden("evaluation_official.npz")
    sums = reliability_sums(cases[case, "logits"], cases[case, "y"])
    found, counts = calibration_error(reliability_curve(sums)), cases[case, "bin_count"]
    assert found == pytest.approx(cases[case, "ece_unsorted"], abs=1e-6)
    assert found == pytest.approx(cases[case, "ece_torchmetrics_l1"], abs=1e-6)
    assert abs(found - cases[case, "ece_released_sorted"]) > 1e-4
    assert sums[:, 0].tolist() == counts.tolist()
    for name, column in (("bin_acc", 1), ("bin_conf", 2)):
        torch.testing.assert_close(sums[:, column].double(), cases[case, name] * counts, rtol=1e-5, atol=1e-5)
    fine = calibration_error(reliability_curve(reliability_sums(cases[case, "logits"], cases[case, "y"], 15)))
    if case == "e2": return  # it has values on edges, which belong to the other bin there
    assert fine == pytest.approx(cases[case, "ece_torchmetrics_15"], abs=1e-6)


@pytest.mark.parametrize("bins", [5, 15])
def test_the_error_is_that_of_torchmetrics(bins):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    draws = torch.Generator().manual_seed(bins)
    logits, target = 3 * torch.randn(400, 6, generator=draws), torch.randint(6, (400,), generator=draws)
    wanted = metrics.multiclass_calibration_error(logits.softmax(1), target, 6, n_bins=bins).item()
    found = calibration_error(reliability_curve(reliability_sums(logits, target, bins)))
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("factor", [0.3, 1, 4])
def test_the_temperature_is_that_of_a_grid(factor):
    draws = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2000, 5, generator=draws)
    target = logits.softmax(1).multinomial(1, generator=draws)[:, 0]
    losses = {t / 100: torch.nn.functional.cross_entropy(factor * logits / (t / 100), target).item()
              for t in range(10, 800, 2)}
    assert fit_temperature(factor * logits, target) == pytest.approx(min(losses, key=losses.get), abs=0.02)


def test_each_half_is_judged_by_the_temperature_of_the_other():
    draws = torch.Generator().manual_seed(4)
    logits, target = 3 * torch.randn(301, 5, generator=draws), torch.randint(5, (301,), generator=draws)
    found = calibration_summary(logits, target, bins=7)
    one, other = torch.randperm(301, generator=torch.Generator().manual_seed(0)).chunk(2)
    temperatures = [fit_temperature(logits[rows], target[rows]) for rows in (one, other)]
    scaled = logits.clone()
    scaled[other], scaled[one] = logits[other] / temperatures[0], logits[one] / temperatures[1]
    assert found["temperatures"] == temperatures and found["n"] == 301
    curve = reliability_curve(reliability_sums(scaled, target, 7))
    assert found["ece_scaled"] == pytest.approx(calibration_error(curve), abs=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: fit_temperature(torch.zeros(0, 3), torch.zeros(0).long()), "`logits` must have an answer"),
    (lambda: fit_temperature(torch.zeros(3), torch.zeros(3).long()), "`logits` must be float"),
    (lambda: fit_temperature(torch.zeros(2, 3), torch.tensor([0, 3])), "`target` must be 2 class indices"),
    (lambda: calibration_summary(torch.zeros(1, 3), torch.tensor([0])), "`logits` must have 2 answers")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()
