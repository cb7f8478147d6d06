"The house: paths of notebooks, modules and pages agree, imports point downwards, and nothing outgrows its room"
import ast
import json
import re

import pytest

from tests.conftest import ROOT

# From the ground up: a module imports from its own layer or from those before it
LAYERS = ("checks pictures stopping", "models", "mixers", "sumix labels", "data", "evaluation", "training", "running",
          "studies")
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
           for path in sorted((ROOT / "sumix_nb").rglob("*.py")) if path.name != "_modidx.py"}
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def cells_of(path):
    "Pairs of kind and source of a notebook's cells"
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text("utf-8"))["cells"]]


def exported_as(path):
    "The module that a notebook exports, below `sumix_nb`, or None"
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(source for _, source in cells_of(path)), re.MULTILINE)
    return found and found[1]


EXPORTING = [path for path in NOTEBOOKS if exported_as(path)]


def without_numbers(path):
    "The path of a notebook below `nbs/` as nbdev names its page"
    parts = path.relative_to(ROOT / "nbs").with_suffix("").parts
    return "/".join(re.sub(r"^\d+_", "", part) for part in parts)


def is_export(kind, source): return kind == "code" and re.match(r"#\|\s*exports?\s*$", source.partition("\n")[0])


def code_lines(source): return [line for line in source.split("\n") if line.strip() and not line.startswith("#|")]


def is_import(source):
    body = ast.parse("\n".join(code_lines(source))).body
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def imported(name):
    "The modules of the package that module `name` imports, anywhere in its code"
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    package = package.removesuffix(".__init__")
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import): targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[:len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else: continue
        found |= {target for target in targets if target.startswith("sumix_nb.")}
    return {target for target in found if target in MODULES} - {name}


def layer(name):
    "The layer of a module"
    return LAYER_OF[name.split(".")[1]]


GRAPH = {name: imported(name) for name in MODULES if name != "sumix_nb.__init__"}


@pytest.mark.parametrize("path", EXPORTING, ids=without_numbers)
def test_notebook_module_and_page_have_one_path(path):
    module = exported_as(path).replace(".", "/")
    page = without_numbers(path)
    if module.endswith("__init__"): assert path.name.startswith("00_")
    elif path.parent.name == "support": assert module == page.removeprefix("support/")
    else: assert module == page
    assert (ROOT / "sumix_nb" / f"{module}.py").is_file() and (ROOT / "docs" / f"{page}.html").is_file()


def test_every_module_has_its_notebook():
    exported = {f"sumix_nb.{exported_as(path)}" for path in EXPORTING}
    empty = {name for name, path in MODULES.items() if not path.read_text("utf-8").strip()}
    assert set(MODULES) - empty == exported


@pytest.mark.parametrize("name", GRAPH)
def test_imports_point_downwards(name):
    upwards = [target for target in GRAPH[name] if layer(target) > layer(name)]
    assert not upwards, f"{name} imports {upwards}, which stand above it"


def test_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name in done: return
        path.append(name)
        for target in sorted(GRAPH[name]): visit(target)
        done.add(path.pop())

    for name in GRAPH: visit(name)


def test_the_graph_sees_imports():
    assert "sumix_nb.mixers.mixed" in GRAPH["sumix_nb.mixers.cutmix"]
    assert "sumix_nb.training.train" in GRAPH["sumix_nb.running.shell"]


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_lines_are_short(name):
    text = MODULES[name].read_text("utf-8")
    assert len(text.splitlines()) <= 350
    ours = text.partition("# %% auto")[2].partition("# %% ")[2]  # without docstring and `__all__`, laid out by nbdev
    long = [line for line in ours.splitlines() if len(line) > 100 and not line.startswith("# %%")]
    assert not long, long[:3]


# Most lines of the library and of its tests: what each part may add to them
LINES = {"the house": (6500, 8500), "PuzzleMix": (545, 525), "AutoMix and AdAutoMix": (985, 1230),
         "a demo of scenes, pictures that can be seen": (0, 100), "the pages run as tests": (0, 28),
         "robustness": (1640, 1150),
         "label rules": (630, 375), "their studies": (0, 280), "photographs with masks": (50, 25),
         "wrong labels": (75, 60), "what three reviews of the code found": (85, 170),
         "the map of mixing, labels on photographs, a bench of labels": (0, 90),
         "SUMix where mixing helps": (-3, 190), "its doses and parts, wrong labels, the whole map": (1, 150),
         "a dose in brief trainings, links of the copies for machines": (0, 40)}
MOST_LINES, MOST_TEST_LINES = map(sum, zip(*LINES.values()))


def test_the_library_stays_small():
    assert sum(len(path.read_text("utf-8").splitlines()) for path in MODULES.values()) <= MOST_LINES


def page_lines(path): return sum(len(code_lines(source)) for kind, source in cells_of(path) if kind == "code")


def test_pages_are_short():
    lines = {without_numbers(path): page_lines(path) for path in NOTEBOOKS}
    assert {name: n for name, n in lines.items() if n > 300} == {}
    assert sorted(lines.values())[len(lines) // 2] <= 150


@pytest.mark.parametrize("path", EXPORTING, ids=without_numbers)
def test_definitions_come_in_small_steps(path):
    run = 0
    for kind, source in cells_of(path):
        if kind != "code": run = 0
        elif is_export(kind, source) and not is_import(source):
            run += 1
            assert len(code_lines(source)) <= 60, source.split("\n")[1]
            assert run <= 3, f"{run} definitions in a row without prose or a demo, at: {source.split(chr(10))[1]}"
        elif "default_exp" not in source and not is_export(kind, source): run = 0


def test_most_definitions_are_shown_at_work():
    "At least four in five of the exported definitions are used within the next two code cells"
    used, total = 0, 0
    for path in EXPORTING:
        code = [source for kind, source in cells_of(path) if kind == "code"]
        for i, source in enumerate(code):
            if not is_export("code", source): continue
            for node in ast.parse("\n".join(code_lines(source))).body:
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
                total += 1
                used += any(re.search(rf"\b{node.name}\b", later) for later in code[i + 1:i + 3])
    assert used / total >= 0.8, f"{used} of {total}"


def test_no_test_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert not re.search(r"^\s*(from|import) tests\.(\w+\.)*test_", path.read_text("utf-8"), re.MULTILINE), path


def test_tests_stand_where_their_modules_do():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    houses = {path.name for path in (ROOT / "sumix_nb").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert houses <= folders
    files = (ROOT / "tests").rglob("*.py")
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files) <= MOST_TEST_LINES
