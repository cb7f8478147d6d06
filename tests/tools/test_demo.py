"The demo: its table and figure on digits, and on scenes with the labels that it measures"
import importlib.util
import subprocess
import sys

import torch

from sumix_nb import CutMix, Recipe, get_model, load_records
from sumix_nb.data import sources
from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.label_errors import measure_mixtures
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("demo", ROOT / "tools/demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def test_table_records_and_figure_of_digits(tmp_path):
    command = [sys.executable, str(ROOT / "tools/demo.py"), "--data", "digits", "--epochs", "1", "--out", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "digits.png").stat().st_size > 10_000 and len(load_records(tmp_path)) == 3
    assert output.rstrip().endswith("digits.png") and "x CutMix" in output and "CutMix + SUMix" in output
    assert "calibration error" in output and "SUMix adds" in output


def test_the_figure_shows_the_mixtures_that_were_measured():
    seen, mixer = scenes(300, seed=3), CutMix(per_sample=True)
    measured = measure_mixtures(get_model("resnet18", 24, width=2), seen, mixer, mean=(0.5,) * 3, std=(0.2,) * 3)
    images, objects, lam, truth = demo.mix_again(seen, mixer)
    assert torch.equal(lam, measured.lam)
    known = ~measured.truth.isnan()  # it also leaves out pairs of one class
    assert known.sum() > 250
    torch.testing.assert_close(truth[known], measured.truth[known])
    first, second = ((objects - color.view(3, 1, 1)).abs().amax(1) < 1e-6 for color in demo.COLORS[:2])
    count = [part.sum((1, 2)).float() for part in (first, second)]
    torch.testing.assert_close((count[0] / (count[0] + count[1]))[known], truth[known])
    assert images.shape == objects.shape == (300, 3, 32, 32)


def test_table_and_figure_of_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "scenes", lambda n, size, seed: scenes(n // 50, size, seed))
    monkeypatch.setattr(demo, "scenes", lambda n, seed: scenes(n // 10, seed=seed))
    recipe = Recipe(data="scenes", per_sample=True, **demo.SCENES | {"epochs": 1, "width": 2})
    table, figure, remarks = demo.demo_scenes(recipe, None, tmp_path)
    assert list(table.index) == ["CutMix", "CutMix + SUMix"] and len(load_records(tmp_path)) == 2
    assert list(table)[:3] == ["accuracy (%)", "calibration error (%)", "label error"] and "x CutMix" in table
    lam, truth = demo.mix_again(scenes(400, seed=2), CutMix(per_sample=True))[2:]
    assert abs(table["label error"].iloc[0] - (lam - truth).abs().nanmean().item()) < 0.01
    assert len(figure.axes) == 12 and "over 400 mixtures" in remarks


def test_the_line_of_recorded_evidence_is_that_of_the_home_page():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    gain = demo.recorded().partition("SUMix adds ")[2].partition(" points")[0]
    assert f"SUMix adds {gain} points" in readme
