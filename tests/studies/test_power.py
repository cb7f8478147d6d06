"Power, seeds and the pooled spread, against other computations"
import math
import random
import statistics

import pandas as pd
import pytest
from scipy import stats

from sumix_nb.studies.power import paired_power, pooled_spread, seeds_needed


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


@pytest.mark.parametrize("effect, spread, power, level", [
    (0.3, 1, 0.8, 0.95), (1, 0.9, 0.95, 0.95), (1, 1, 0.5, 0.99), (0.01, 1, 0.8, 0.95), (0.001, 1, 0.9, 0.999)])
def test_one_seed_less_is_too_few(effect, spread, power, level):
    n = seeds_needed(effect, spread, power, level)
    assert paired_power(effect, spread, n, level) >= power > paired_power(effect, spread, n - 1, level)


def test_two_seeds_are_the_least():
    assert seeds_needed(100, 1) == seeds_needed(1e300, 1e-3) == seeds_needed(1, 1, power=0.05) == 2
    assert type(seeds_needed(1, 1)) is int


def test_the_pooled_spread_weighs_groups_by_their_degrees_of_freedom():
    dice = random.Random(0)
    groups = [[dice.gauss(mean, 0.7) for _ in range(n)] for n, mean in ((2, 0), (5, 90), (1, 3), (3, 4))]
    expected = sum((len(group) - 1) * statistics.variance(group) for group in groups if len(group) > 1) / 7
    spread, freedom = pooled_spread(pd.DataFrame(groups).T)
    assert freedom == 7 and math.isclose(spread, math.sqrt(expected))
    spread, freedom = pooled_spread(pd.DataFrame({"one": groups[1]}))
    assert freedom == 4 and math.isclose(spread, statistics.stdev(groups[1]))
    assert pooled_spread(pd.DataFrame({"equal": [2.0, 2.0]})) == (0, 1)
