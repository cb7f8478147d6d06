"Shared by all tests: where recorded numbers and data sets are, and small batches"
import os
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests run in two processes on two cores

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("SUMIX_GOLDEN", ROOT.parent / "shared" / "golden"))


class Cases:
    "The cases of one recorded file: `cases[case, name]` is a tensor, or a Python number for a scalar"
    def __init__(self, path):
        with np.load(path, allow_pickle=False) as arrays: self.arrays = dict(arrays)
        self.names = sorted({key.split("__")[0] for key in self.arrays if "__" in key})

    def __getitem__(self, key):
        value = self.arrays["__".join(key)]
        return value.item() if value.ndim == 0 else torch.from_numpy(value)

    def __contains__(self, key): return "__".join(key) in self.arrays


@pytest.fixture(scope="session")
def golden():
    "`golden(name)` loads a recorded file, or skips the test where there is none"
    def load(name):
        path = GOLDEN / name
        if not path.exists(): pytest.skip(f"{name} is not there: set SUMIX_GOLDEN to the folder of recorded numbers")
        return Cases(path)
    return load


@pytest.fixture
def batch():
    "A small batch on odd shapes: images (7, 3, 10, 6) and class indices of 5 classes"
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 3, 10, 6, generator=generator), torch.tensor([0, 4, 2, 2, 1, 3, 0])


def pytest_addoption(parser):
    "`--slow` runs what takes minutes, too"
    parser.addoption("--slow", action="store_true", help="run tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    "Without `--slow`, slow tests are skipped"
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="takes minutes: pytest --slow"))
