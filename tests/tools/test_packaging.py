"The package as users get it: metadata, wheel, imports, names"
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.metadata import distribution, entry_points

import pytest
from packaging.version import Version

import sumix_nb
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted(module.name for module in pkgutil.walk_packages(sumix_nb.__path__, "sumix_nb."))


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_settings_pyproject_and_package_agree():
    ini, project, nbdev = settings(), PYPROJECT["project"], PYPROJECT["tool"]["nbdev"]
    assert ini["name"] == project["name"] == nbdev["lib_path"] == sumix_nb.__name__
    assert ini["version"] == sumix_nb.__version__
    assert set(project) == {"name", "dynamic"}, "all other metadata is written in settings.ini"
    assert "nbdev==3.3.26" in ini["dev_requirements"].split()
    assert {"dev", "models", "eval", "dist", "grid", "track"} == {
        key.removesuffix("_requirements") for key in ini if key.endswith("_requirements")}
    assert f"version: {ini['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of what git tracks or would track"
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "sumix_nb", "nbs", "tests", "tools"]
    subprocess.run(["cp", "-r", *[str(ROOT / name) for name in names], str(source)], check=True)
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_the_exports_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive: names = archive.namelist()
    found = {name for name in names if ".dist-info/" not in name}
    files = [file for kind in ("py", "csv") for file in (ROOT / "sumix_nb").rglob(f"*.{kind}")]
    expected = {str(file.relative_to(ROOT)) for file in files}
    assert found == expected


def test_wheel_fills_every_dynamic_field(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    header = metadata.split("\n\n", 1)[0]
    fields = {"version": "Version: ", "description": "Summary: ", "readme": "Description-Content-Type: text/markdown",
              "keywords": "Keywords: ", "license": "License-Expression: Apache-2.0", "authors": "Author: ",
              "requires-python": "Requires-Python: >=3.11", "classifiers": "Classifier: ",
              "dependencies": "Requires-Dist: torch", "optional-dependencies": "Provides-Extra: models"}
    assert set(PYPROJECT["project"]["dynamic"]) == {*fields, "scripts", "entry-points"}
    for name, text in fields.items(): assert text in header, name
    assert "sumix_train = sumix_nb.running.shell:sumix_train" in scripts and "sumix_nb = sumix_nb._modidx:d" in scripts


def test_entry_points_of_the_installed_package_load():
    assert distribution("sumix_nb").version == sumix_nb.__version__
    assert entry_points(group="nbdev")["sumix_nb"].load()["settings"]
    assert callable(entry_points(group="console_scripts")["sumix_train"].load())


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_exists_and_is_documented(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if callable(value): assert value.__doc__, f"{name}.{public} has no docstring"


def test_the_oldest_versions_allowed_have_no_known_hole_in_what_we_rely_on():
    oldest = dict(line.split(">=") for line in settings()["requirements"].split())
    for name, least in {"torch": "2.10", "filelock": "3.20.1", "pillow": "10.0.1"}.items():
        assert Version(oldest[name]) >= Version(least), name


def test_workflows_name_actions_by_their_hash():
    used = re.findall(r"uses: (\S+)", (ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used), used


def test_public_names_come_from_the_package_and_nothing_is_loaded_before_its_use():
    for name in sumix_nb.__all__: assert getattr(sumix_nb, name) is not None
    assert set(sumix_nb.__all__) <= set(dir(sumix_nb))
    with pytest.raises(AttributeError, match="no attribute 'SuMix'"): sumix_nb.SuMix  # noqa: B018
    code = "import sys, sumix_nb; import sumix_nb.sumix.loss; sumix_nb.CutMix; print('fastai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_code_of_the_readme_runs_as_it_stands(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    lines = ["import matplotlib; matplotlib.use('agg')", *blocks]
    code = "\n".join(lines).replace("fit_one_cycle(4", "fit_one_cycle(1")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
