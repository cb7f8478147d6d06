"Every page runs from its first cell to its last, each in a process of its own"
import multiprocessing
import sys

import pytest
import torch
from nbdev.config import get_config
from nbdev.test import test_nb as run_page

from tests.conftest import CONTEXT, ROOT, finish

PAGES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("nbs/**/[!.]*.ipynb")
               if ".ipynb_checkpoints" not in path.parts)[::-1]  # tutorials first: the longest should not be the last


def run(page, report):
    torch.set_num_threads(1)  # two pages run on two cores
    multiprocessing.set_start_method(None, force=True)  # what it is where a page is read
    flags = get_config(ROOT).tst_flags.split()
    with open(report, "w") as sys.__stderr__: good, _ = run_page(ROOT / page, flags)
    sys.exit(not good)


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path):
    child = CONTEXT.Process(target=run, args=(page, tmp_path / "report"))
    child.start()
    try: assert finish(child) == 0, (tmp_path / "report").read_text()
    finally: child.kill()
