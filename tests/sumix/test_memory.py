"What is remembered: growth, fading, and one table for all processes"
import sys

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from sumix_nb.sumix.memory import Memory


def batches(seed, n=6, rows=6, steps=8):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(rows, (n,), generator=generator), torch.randn(n, 4, generator=generator),
             torch.randint(2, (n,), generator=generator).float()) for _ in range(steps)]


def remember(rank, folder, span):
    "What one of two processes remembers of its half, and whether it knew it before"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    memory, knew = Memory(span), []
    for rows, values, weight in batches(0):
        half = slice(3 * rank, 3 * rank + 3)
        knew.append(memory.knows(rows[half]))
        memory.update(rows[half], [values[half], values[half, :2]], weight[half])
    torch.save((memory.state_dict(), knew), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_changes_nothing(bad, weight):
    memory = Memory()
    memory.update(torch.tensor([0, 1]), [torch.tensor([[1.0, 2], [3, 4]])], torch.ones(2))
    before = [table.clone() for table in memory.tables]
    memory.update(torch.tensor([0, 2]), [torch.tensor([[bad, 0], [bad, 1]])], torch.tensor([weight, weight]))
    torch.testing.assert_close(memory.tables[0][:2], before[0])
    assert memory.tables[0].isfinite().all() and not memory.knows(torch.tensor([2])) and memory.counts[0] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo over a file")
@pytest.mark.parametrize("span", [50])
def test_two_processes_keep_the_table_of_one_and_decide_alike(span, tmp_path):
    multiprocessing.spawn(remember, (str(tmp_path), span), nprocs=2)
    memory, knew = Memory(span), []
    for rows, values, weight in batches(0):
        knew.append(memory.knows(rows))
        memory.update(rows, [values, values[:, :2]], weight)
    assert {*knew} == {True, False}
    for rank in (0, 1):
        found, decided = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, memory.state_dict())
        assert decided == knew


def test_a_long_span_is_the_plain_mean_and_a_span_of_one_the_last_value():
    mean, last, seen = Memory(10**6), Memory(1), {}
    for rows, values, _ in batches(1, n=3, rows=40):
        rows = torch.arange(3) + 3 * (rows[0] % 3)  # each row once in a batch
        for memory in (mean, last): memory.update(rows, [values], torch.ones(3))
        for row, value in zip(rows.tolist(), values): seen.setdefault(row, []).append(value)
    for row, values in seen.items():
        torch.testing.assert_close(mean.tables[0][row], torch.stack(values).mean(0))
        torch.testing.assert_close(last.tables[0][row], values[-1])


def test_a_memory_that_was_loaded_is_a_memory_of_its_own():
    one, two = Memory(5), Memory(5)
    one.update(torch.tensor([0, 1]), [torch.ones(2, 4)], torch.ones(2))
    two.load_state_dict(one.state_dict())
    two.update(torch.tensor([0, 1]), [torch.zeros(2, 4)], torch.ones(2))
    assert one.tables[0].eq(1).all() and one.counts.tolist() == [1, 1] and two.counts.tolist() == [2, 2]


def test_what_does_not_count_changes_nothing_and_half_precision_is_kept_in_full():
    memory = Memory(5, size=3)
    memory.update(torch.tensor([0, 1]), [torch.ones(2, 4).bfloat16()], torch.tensor([1.0, 0.0]))
    assert memory.tables[0].dtype == torch.float32 and memory.counts.tolist() == [1, 0, 0]
    assert memory.knows(torch.tensor([0])) and not memory.knows(torch.tensor([1]))
    before = memory.tables[0].clone()
    memory.update(torch.tensor([0, 2]), [torch.full((2, 4), 7.0)], torch.zeros(2))
    assert torch.equal(memory.tables[0], before)
