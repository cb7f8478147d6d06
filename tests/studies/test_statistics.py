"Differences paired by seed: their intervals, signs, power, the table and Holm's correction, against other computations"
import inspect
import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from sumix_nb.studies import power, statistics as comparisons
from sumix_nb.studies.statistics import as_differences, check_share, holm, paired_differences, paired_interval
from sumix_nb.studies.statistics import paired_table, sign_test
from sumix_nb.studies.power import paired_power, pooled_spread, seeds_needed

PUBLIC = (as_differences, check_share, holm, paired_differences, paired_interval, paired_power, paired_table,
          pooled_spread, seeds_needed, sign_test)


def draws(n, seed=0, mean=0.4, spread=0.7):
    dice = random.Random(seed)
    return [dice.gauss(mean, spread) for _ in range(n)]


def test_every_public_name_is_tested_here():
    assert {function.__name__ for function in PUBLIC} == {*comparisons.__all__, *power.__all__}
    assert all(inspect.getdoc(function) for function in PUBLIC)


# ---------------------------------------------------------------- pairs

def test_only_shared_seeds_make_pairs():
    found, base = {8: 2.0, 1: 7.0, 3: 1.5}, {8: 0.5, 2: 9.0, 3: 1.0}
    differences = paired_differences(found, base)
    assert list(differences.items()) == [(3, 0.5), (8, 1.5)]
    assert found == {8: 2.0, 1: 7.0, 3: 1.5} and base == {8: 0.5, 2: 9.0, 3: 1.0}
    assert paired_differences(base, found) == {3: -0.5, 8: -1.5}


@pytest.mark.parametrize("found, base, message", [
    ({0: 1.0}, {1: 1.0}, r"share a seed, got \[0\] and \[1\]"), ({}, {}, "share a seed"),
    ({0: math.nan}, {0: 1.0}, "`found` must be finite, got nan for seed 0"),
    ({0: 1.0}, {0: 1.0, 4: -math.inf}, "`base` must be finite, got -inf for seed 4")])
def test_pairs_that_are_none(found, base, message):
    with pytest.raises(ValueError, match=message): paired_differences(found, base)


@pytest.mark.parametrize("values", [
    [1, 2, -3], (1.0, 2.0, -3.0), {7: 1.0, 0: 2.0, 3: -3.0}, np.array([1, 2, -3], dtype=np.int16),
    np.array([1, 2, -3], dtype=np.float32), torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)])
def test_any_row_of_numbers_is_taken(values):
    taken = as_differences(values)
    assert taken.dtype == np.float64 and taken.tolist() == [1, 2, -3]
    assert paired_interval(values) == paired_interval([1.0, 2.0, -3.0])
    assert sign_test(values) == (2, 3, 1.0)


@pytest.mark.parametrize("values, least", [([], 1), ({}, 1), (3.0, 1), ([[1.0], [2.0]], 1), ([1.0], 2), ([1, 2], 3)])
def test_too_few_or_no_row(values, least):
    with pytest.raises(ValueError, match=f"`differences` must be {least} or more"): as_differences(values, least)


def test_what_is_not_finite():
    for wrong in (math.nan, math.inf, -math.inf):
        for call in (as_differences, paired_interval, sign_test, lambda values: pooled_spread([values])):
            with pytest.raises(ValueError, match="`differences` must be finite"): call([1.0, wrong])


# ---------------------------------------------------------------- intervals

@pytest.mark.parametrize("n", [2, 3, 4, 7, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_students_interval_against_scipy(n, level):
    values = draws(n, seed=n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    np.testing.assert_allclose(paired_interval(values, level), (expected.low, expected.high))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_interval_without_0_is_a_significant_t_test(n):
    seen = [paired_interval(values)[0] > 0 or paired_interval(values)[1] < 0
            for values in (draws(n, seed, spread=0.3) for seed in range(60))]
    expected = [stats.ttest_1samp(draws(n, seed, spread=0.3), 0).pvalue < 0.05 for seed in range(60)]
    assert seen == expected and 0 < sum(seen) < 60


@pytest.mark.parametrize("n, level", [(2, 0.6), (3, 0.8), (3, 0.95), (4, 0.9)])
def test_the_bootstrap_against_all_resamples(n, level):
    values = draws(n, seed=5)
    means = sorted(map(statistics.mean, itertools.product(values, repeat=n)))
    for end, tail in zip(paired_interval(values, level, "bootstrap"), ((1 - level) / 2, (1 + level) / 2)):
        upto = sum(mean < end + 1e-9 for mean in means) / len(means)
        below = sum(mean < end - 1e-9 for mean in means) / len(means)
        assert below - 0.01 < tail < upto + 0.01


def test_the_bootstrap_is_repeatable_and_leaves_global_dice_alone():
    values, state = draws(9), np.random.get_state()[1].copy()
    one = paired_interval(values, method="bootstrap", seed=3)
    assert one == paired_interval(values, method="bootstrap", seed=3)
    assert one != paired_interval(values, method="bootstrap", seed=4)
    assert (np.random.get_state()[1] == state).all()


def test_three_seeds_reach_no_farther_than_their_ends():
    values = draws(3)
    np.testing.assert_allclose(paired_interval(values, method="bootstrap"), (min(values), max(values)))
    low, high = paired_interval(values)
    assert low < min(values) and max(values) < high


@pytest.mark.parametrize("method", ["t", "bootstrap"])
@pytest.mark.parametrize("value", [0.0, -0.25, 0.1, 1e6])
def test_equal_differences_give_a_point(method, value):
    np.testing.assert_allclose(paired_interval([value] * 4, method=method), (value, value))


@pytest.mark.parametrize("method", ["t", "bootstrap"])
def test_intervals_move_and_stretch_with_the_differences(method):
    values = np.array(draws(5))
    low, high = paired_interval(values, method=method)
    np.testing.assert_allclose(paired_interval(3 * values + 2, method=method), (3 * low + 2, 3 * high + 2))
    narrow = paired_interval(values, 0.5, method)
    assert low < narrow[0] < narrow[1] < high and all(type(end) is float for end in narrow)


@pytest.mark.parametrize("options, error, message", [
    *[({"level": level}, ValueError, "`level`") for level in (0, 1.0, 95, -0.5, math.nan)],
    *[({"level": level}, TypeError, "`level`") for level in ("0.95", True, None)],
    *[({"method": method}, ValueError, '`method` must be "t" or "bootstrap"') for method in ("normal", None)],
    ({"seed": -1}, ValueError, "`seed`"), ({"seed": 0.5}, TypeError, "`seed`")])
def test_wrong_options_of_an_interval(options, error, message):
    with pytest.raises(error, match=message): paired_interval([1.0, 2.0], **options)


def test_no_interval_of_a_single_seed():
    for method in ("t", "bootstrap"):
        with pytest.raises(ValueError, match="2 or more"): paired_interval([1.0], method=method)


def test_a_share_is_inside_0_and_1():
    for value in (1e-9, 0.5, np.float32(0.5), 1 - 1e-9): check_share("power", value)
    for value in (0, 1, -0.1, 1.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="`power`"): check_share("power", value)


# ---------------------------------------------------------------- signs

@pytest.mark.parametrize("n", range(1, 12))
def test_the_sign_test_against_binomial_coefficients(n):
    for positive in range(n + 1):
        worse = max(positive, n - positive)
        tail = sum(math.comb(n, k) for k in range(worse, n + 1)) / 2 ** n
        found = sign_test([1.0] * positive + [-0.5] * (n - positive))
        assert found[:2] == (positive, n) and math.isclose(found[2], min(1, 2 * tail))


def test_zeros_have_no_sign():
    assert sign_test([0.0, -0.0, 0.0]) == (0, 0, 1.0)
    assert sign_test([0.0, 1.0, 2.0, 3.0]) == (3, 3, 0.25)


# ---------------------------------------------------------------- power

@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_power_against_the_noncentral_f_distribution(seeds, level):
    "The square of a noncentral t is a noncentral F"
    assert math.isclose(paired_power(0, 1, seeds, level), 1 - level)
    for effect, spread in ((0.1, 1), (0.5, 0.5), (1, 0.4), (2, 3)):
        reach = stats.f.ppf(level, 1, seeds - 1)
        expected = stats.ncf.sf(reach, 1, seeds - 1, seeds * (effect / spread) ** 2)
        assert abs(paired_power(effect, spread, seeds, level) - expected) < 1e-7


@pytest.mark.parametrize("ratio", [0, 1e-6, 0.3, 1, 10, 50, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("seeds", [2, 3, 10, 100, 10**4, 10**7])
def test_power_is_a_probability_for_any_size(ratio, seeds):
    power = paired_power(ratio, 1, seeds)
    assert type(power) is float and 0.05 - 1e-9 <= power <= 1 + 1e-9


def test_power_grows_with_effect_and_seeds_and_falls_with_spread_and_level():
    for vary in (lambda x: paired_power(x, 1, 3), lambda x: paired_power(1, 1, int(4 * x)),
                 lambda x: paired_power(1, 1 / x, 3), lambda x: paired_power(1, 1, 3, 1 - x / 10)):
        powers = [vary(x) for x in (0.5, 1, 2, 4)]
        assert powers == sorted(powers) and len(set(powers)) == 4


@pytest.mark.parametrize("arguments, error, message", [
    *[((effect, 1, 3), ValueError, "`effect`") for effect in (-0.1, math.nan, math.inf)],
    *[((1, spread, 3), ValueError, "`spread`") for spread in (0, -1, math.nan, math.inf)],
    ((1, 1, 1), ValueError, "`seeds`"), ((1, 1, 3.0), TypeError, "`seeds`"), ((1, 1, 3, 1), ValueError, "`level`"),
    (("1", 1, 3), TypeError, "`effect`")])
def test_wrong_arguments_of_power(arguments, error, message):
    with pytest.raises(error, match=message): paired_power(*arguments)


@pytest.mark.parametrize("effect, pairs", [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_seeds_for_cohens_effects(effect, pairs):
    assert seeds_needed(effect, 1) == seeds_needed(10 * effect, 10) == pairs


@pytest.mark.parametrize("effect, spread, power, level", [
    (0.3, 1, 0.8, 0.95), (1, 0.9, 0.95, 0.95), (1, 1, 0.5, 0.99), (0.01, 1, 0.8, 0.95), (0.001, 1, 0.9, 0.999)])
def test_one_seed_less_is_too_few(effect, spread, power, level):
    n = seeds_needed(effect, spread, power, level)
    assert paired_power(effect, spread, n, level) >= power > paired_power(effect, spread, n - 1, level)


def test_two_seeds_are_the_least():
    assert seeds_needed(100, 1) == seeds_needed(1e300, 1e-3) == seeds_needed(1, 1, power=0.05) == 2
    assert type(seeds_needed(1, 1)) is int


@pytest.mark.parametrize("arguments, message", [
    *[((effect, 1), "`effect`") for effect in (0, 0.0009, -1, math.nan)],
    *[((1, spread), "`spread`") for spread in (0, math.nan)], *[((1, 1, power), "`power`") for power in (0, 1.0)],
    ((1, 1, 0.8, 0), "`level`")])
def test_wrong_arguments_of_a_plan(arguments, message):
    with pytest.raises(ValueError, match=message): seeds_needed(*arguments)


# ---------------------------------------------------------------- pooled spread

def test_one_group_has_its_own_spread():
    values = draws(6)
    spread, freedom = pooled_spread([values])
    assert freedom == 5 and math.isclose(spread, statistics.stdev(values))


def test_the_pooled_spread_weighs_groups_by_their_degrees_of_freedom():
    groups = [draws(2, 1), dict(enumerate(draws(5, 2, mean=90))), draws(1, 3), draws(3, 4)]
    parts = [list(group.values()) if isinstance(group, dict) else group for group in groups if len(group) > 1]
    expected = sum((len(part) - 1) * statistics.variance(part) for part in parts) / 7
    spread, freedom = pooled_spread(groups)
    assert freedom == 7 and math.isclose(spread, math.sqrt(expected))
    assert pooled_spread([[2.0, 2.0]]) == (0, 1)


@pytest.mark.parametrize("groups", [[], [[1.0]], [[1.0], {3: 2.0}]])
def test_no_group_with_a_spread(groups):
    with pytest.raises(ValueError, match="`groups` must have one with two differences"): pooled_spread(groups)


# ---------------------------------------------------------------- table

def test_the_table_has_a_row_for_each_pair():
    values = {"base": {0: 50.0, 1: 51.0, 2: 52.0}, "up": {0: 51.0, 1: 51.5, 2: 53.5}, "one": {2: 40.25, 9: 1.0}}
    title, line, *rows = paired_table(values, [("up", "base"), ("one", "up"), ("base", "base")]).splitlines()
    assert [len(row.split("|")) for row in (title, line, *rows)] == [8] * 5
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    reach = 4.302653 * 0.5 / math.sqrt(3)  # the differences are 1, 0.5 and 1.5
    assert cells[0] == ["up", "base", "3", "52.0 ± 1.3", f"+1.00 [{1 - reach:+.2f}, {1 + reach:+.2f}]", "3 of 3"]
    assert cells[1] == ["one", "up", "1", "40.2", "-13.25", "0 of 1"]
    two, far = values | {"two": {0: 51.0, 1: 51.5}}, 12.706205 * 0.25  # 1 and 0.5, of two seeds
    assert f"+0.75 [{0.75 - far:+.2f}, {0.75 + far:+.2f}]" in paired_table(two, [("two", "base")])
    assert cells[2] == ["base", "base", "3", "51.0 ± 1.0", "+0.00 [+0.00, +0.00]", "0 of 3"]
    assert len(paired_table(values, []).splitlines()) == 2


def test_the_table_names_what_is_wrong():
    values = {"a": {0: 1.0}, "b": {1: 1.0}, "c": {0: math.nan}}
    for pair in (("a", "d"), ("d", "a")):
        with pytest.raises(ValueError, match="`pairs` must be of the arms .* got 'd'"): paired_table(values, [pair])
    with pytest.raises(ValueError, match="share a seed"): paired_table(values, [("a", "b")])
    with pytest.raises(ValueError, match="finite"): paired_table(values, [("a", "c")])


# ---------------------------------------------------------------- many comparisons

def test_holm_on_an_example_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_holm_is_the_largest_of_all_steps_up_to_its_own(n):
    dice = random.Random(n)
    for _ in range(50):
        p_values = [round(dice.random() ** 2, 2) for _ in range(n)]  # with ties
        expected = [max(min(1, sum(other >= value for other in p_values) * value) for value in p_values if value <= own)
                    for own in p_values]
        corrected = holm(p_values)
        np.testing.assert_allclose(corrected, expected)
        assert all(own <= new <= 1 for own, new in zip(p_values, corrected))


def test_holm_takes_probabilities_only():
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0, 1, 0.5]) == [0, 1, 1]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="`p_values`"): holm([0.5, wrong])
