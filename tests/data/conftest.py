"Miniature sets for the tests of data"
import shutil
from dataclasses import replace

import pytest

from sumix_nb.data.sources import SOURCES
from tests.data.oracles import MAKERS, NAMES, write_image


@pytest.fixture(scope="session")
def folder_template(tmp_path_factory):
    "Ten classes with 6 training and 3 test images; the pixel values tell class, number and split"
    root = tmp_path_factory.mktemp("data") / "cifar10"
    for k, name in enumerate(NAMES):
        for i in range(6): write_image(root / "train" / name / f"{i}.png", (10 * k, 20 * i, 0))
        for i in range(3): write_image(root / "test" / name / f"{i}.png", (10 * k, 20 * i, 255))
    return root


@pytest.fixture
def folders(folder_template, tmp_path, monkeypatch):
    "A copy that a test may damage, and no SUMIX_DATA"
    monkeypatch.delenv("SUMIX_DATA", raising=False)
    return shutil.copytree(folder_template, tmp_path / "cifar10")


@pytest.fixture
def few(monkeypatch):
    "Every published set has three classes"
    for name in MAKERS: monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], n_classes=3))
