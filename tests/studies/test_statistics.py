"Differences paired by seed: their intervals and tables, against other computations"
import math
import random

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sumix_nb.studies.statistics import paired_interval, paired_table, with_interval

VALUES = pd.DataFrame({"base": {0: 50.0, 1: 51.0, 2: 52.0}, "up": {0: 51.0, 1: 51.5, 2: 53.5},
                       "one": {2: 40.25, 9: 1.0}, "two": {0: 51.0, 1: 51.5}, "none": {9: 2.0}}).sort_index()


def draws(n, seed=0, mean=0.4, spread=0.7):
    dice = random.Random(seed)
    return [dice.gauss(mean, spread) for _ in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_students_interval_against_scipy(n, level):
    values = draws(n, seed=n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    np.testing.assert_allclose(paired_interval(values, level), (expected.low, expected.high))


def test_intervals_move_and_stretch_with_the_differences():
    values = np.array(draws(5))
    low, high = paired_interval(values)
    np.testing.assert_allclose(paired_interval(3 * values + 2), (3 * low + 2, 3 * high + 2))
    narrow = paired_interval(values, 0.5)
    assert low < narrow[0] < narrow[1] < high and all(type(end) is float for end in narrow)


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
