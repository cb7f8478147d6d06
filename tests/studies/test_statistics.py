"Differences paired by seed: their intervals and tables, against other computations"
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from sumix_nb.studies.statistics import paired_differences, paired_interval, paired_table, with_interval

VALUES = pd.DataFrame({"base": {0: 50.0, 1: 51.0, 2: 52.0}, "up": {0: 51.0, 1: 51.5, 2: 53.5},
                       "one": {2: 40.25, 9: 1.0}, "two": {0: 51.0, 1: 51.5}, "none": {9: 2.0}}).sort_index()


def draws(n, seed=0, mean=0.4, spread=0.7):
    dice = random.Random(seed)
    return [dice.gauss(mean, spread) for _ in range(n)]


def test_only_shared_seeds_make_pairs():
    before = VALUES.copy()
    assert paired_differences(VALUES, "up", "base").to_dict() == {0: 1.0, 1: 0.5, 2: 1.5}
    assert paired_differences(VALUES, "up", "one").to_dict() == {2: 13.25}
    assert paired_differences(VALUES, "one", "up").to_dict() == {2: -13.25}
    pd.testing.assert_frame_equal(VALUES, before)


@pytest.mark.parametrize("arm, base, message", [
    ("up", "none", "share a seed"), ("puzzle", "up", "`arm` must be one of"), ("up", "puzzle", "`base` must be")])
def test_unknown_arms_and_pairs_without_a_seed_are_named(arm, base, message):
    for call in (paired_differences, lambda values, *pair: paired_table(values, [pair])):
        with pytest.raises(ValueError, match=message): call(VALUES, arm, base)


@pytest.mark.parametrize("values", [
    [1, 2, -3], (1.0, 2.0, -3.0), pd.Series({7: 1.0, 0: 2.0, 3: -3.0}), np.array([1, 2, -3], dtype=np.int16),
    torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)])
def test_any_row_of_numbers_is_taken(values): assert paired_interval(values) == paired_interval([1.0, 2.0, -3.0])


@pytest.mark.parametrize("n", [2, 3, 4, 7, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_students_interval_against_scipy(n, level):
    values = draws(n, seed=n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    np.testing.assert_allclose(paired_interval(values, level), (expected.low, expected.high))


@pytest.mark.parametrize("value", [0.0, -0.25, 0.1, 1e6])
def test_equal_differences_give_a_point(value):
    np.testing.assert_allclose(paired_interval([value] * 4), (value, value))


def test_intervals_move_and_stretch_with_the_differences():
    values = np.array(draws(5))
    low, high = paired_interval(values)
    np.testing.assert_allclose(paired_interval(3 * values + 2), (3 * low + 2, 3 * high + 2))
    narrow = paired_interval(values, 0.5)
    assert low < narrow[0] < narrow[1] < high and all(type(end) is float for end in narrow)


@pytest.mark.parametrize("values", [[1.0], [], 3.0, [[1.0], [2.0]], [1.0, math.nan], [1.0, -math.inf]])
def test_too_few_numbers_or_none(values):
    with pytest.raises(ValueError, match="`differences` must be 2 or more finite"): paired_interval(values)


@pytest.mark.parametrize("level, error", [*[(level, ValueError) for level in (0, 1.0, 95, -0.5, math.nan)],
                                          *[(level, TypeError) for level in ("0.95", True, None)]])
def test_wrong_levels(level, error):
    with pytest.raises(error, match="`level`"): paired_interval([1.0, 2.0], level=level)


def test_the_table_has_a_row_for_each_pair():
    table = paired_table(VALUES, [("up", "base"), ("one", "up"), ("two", "base"), ("base", "base")])
    reach, far = 4.302653 * 0.5 / math.sqrt(3), 12.706205 * 0.25  # of 1, 0.5 and 1.5, and of the first two
    assert table.reset_index().to_numpy().tolist() == [
        ["up", "base", 3, "52.0 ± 1.3", f"+1.00 [{1 - reach:+.2f}, {1 + reach:+.2f}]", "3 of 3"],
        ["one", "up", 1, "40.2", "-13.25", "0 of 1"],
        ["two", "base", 2, "51.2 ± 0.4", f"+0.75 [{0.75 - far:+.2f}, {0.75 + far:+.2f}]", "2 of 2"],
        ["base", "base", 3, "51.0 ± 1.0", "+0.00 [+0.00, +0.00]", "0 of 3"]]
    assert paired_table(VALUES, []).empty and with_interval(pd.Series([2.0])) == "+2.00"


def test_names_reach_a_page_escaped():
    name = "<img onerror=alert(1)>"
    shown = paired_table(VALUES.rename(columns={"up": name}), [(name, "base")])._repr_html_()
    assert "&lt;img" in shown and "<img" not in shown
