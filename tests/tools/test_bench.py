"The benchmark: every method runs and leaves its batch alone, ratios are those of a round, goals name what is measured"
import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from sumix_nb.labels import RULES
from sumix_nb.sumix.evidence import CLEAN

pytest.importorskip("timm")
ROOT = Path(__file__).parents[2]


def load(name):
    "A tool as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = load("bench")
bench_sumix = load("bench_sumix")
bench_labels = load("bench_labels")


def test_every_method_and_step_runs_and_none_changes_the_batch_of_the_others():
    images, target = bench.batch((4, 3, 32, 16))
    kept, kept_target = images.clone(), target.clone()
    for functions in (bench.methods(images, target), bench.parts(images, target)):
        for name, function in functions.items():
            function()
            assert torch.equal(images, kept) and torch.equal(target, kept_target), name


def test_goals_name_methods_that_are_measured():
    names = set(bench.methods(*bench.batch((4, 3, 32, 16))))
    assert {name for goal in bench.GOALS for name in goal[:2]} <= names
    assert {kind.__name__ for kind in bench.OURS} | {kind.__name__ + " per sample" for kind in bench.OURS} <= names


def test_a_ratio_is_the_median_of_ratios_within_rounds_and_methods_take_turns():
    seconds = {"one": [1.0, 10.0, 3.0], "two": [2.0, 5.0, 3.0]}
    assert bench.median_ratio(seconds, "one", "two") == 1.0 and bench.median_ratio(seconds, "two", "one") == 1.0
    order = []
    seconds = bench.measure({name: lambda name=name: order.append(name) for name in "abc"}, 6, turn=1e-9)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = {"".join(order[len(order) - 18 + 3 * i:][:3]) for i in range(6)}
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds) and len(rounds) > 2


def test_a_turn_calls_short_methods_more_often(monkeypatch):
    clock, calls = [0.0], {"short": 0, "long": 0}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    def run(name, seconds):
        calls[name] += 1
        clock[0] += seconds
    functions = {name: partial(run, name, wait) for name, wait in (("short", 2**-10), ("long", 2**-8))}
    seconds = bench.measure(functions, 2, 2**-8)
    assert calls == {"long": 3 + 3 + 2 * 1, "short": 3 + 3 + 2 * 4}
    assert seconds == {"short": [2**-10] * 2, "long": [2**-8] * 2}


def test_the_table_of_scaling_has_every_mixer_for_every_shape():
    rows = bench.scaling([(2, 3, 8, 8), (3, 3, 8, 8)], 1)
    assert [row["shape"][0] for row in rows] == [2, 3]
    assert all(len(row["ms"]) == len(bench.OURS) + 1 and min(row["ms"].values()) > 0 for row in rows)


def test_the_losses_are_measured_on_the_same_numbers_and_the_loops_are_the_released_arithmetic():
    functions = bench_sumix.losses()  # compares the loops with our "released" variant
    for function in functions.values(): function()
    assert {name for goal in bench_sumix.LOSS_GOALS for name in goal[:2]} == set(functions)


def test_steps_are_those_of_learners_and_goals_name_them():
    found = bench_sumix.learners("fp32", 4)
    assert {name for goal in bench_sumix.STEP_GOALS for name in goal[:2]} <= set(found)
    seconds = bench_sumix.measure_steps(found, 2)
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    assert bench_sumix.median_ratio(seconds, "CutMix", "CutMix") == 1


def test_every_rule_and_every_origin_of_clean_logits_is_timed():
    found = bench_labels.learners(4, 4, "fp32")
    assert {name for goal in bench_labels.GOALS for name in goal[:2]} <= set(found)
    assert {f"CutMix, {rule}" for rule in RULES} - set(found) == {"CutMix, area"}
    assert {f"CutMix + SUMix, {clean}" for clean in CLEAN} < set(found)
    assert all(bench_sumix.step_seconds(found[name]) > 0 for name in ("CutMix, oracle", "CutMix + SUMix, bank"))
