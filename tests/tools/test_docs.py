"""Checks on the site as it is committed: links, no network, formulas, leftover markup, freshness, and the notebooks.

Each check is a function from a folder to a list of problems, so that it can be shown to find them: see the second half.
"""
import base64
import importlib.util
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MAX_NOTEBOOK_BYTES = 500_000  # a gallery; other pages stay below 300 kB

spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools/build_docs.py")
build_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_docs)


# ---------------------------------------------------------------- reading a page

def is_external(address):
    "Whether `address` names another host; a `data:` address asks nobody"
    parts = urlsplit(address)
    return bool(parts.scheme and parts.scheme != "data") or address.startswith("//")


class Page(HTMLParser):
    "What the checks need of one HTML page"

    LOADING = {"src", "srcset", "poster", "data"}  # attributes whose address the browser fetches by itself
    QUIET_RELS = {"canonical", "license", "next", "prev"}  # `<link>`s that it does not fetch

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.formulas = [], [], [], []
        self.without_alt, self.headings = [], []
        self.styles, self.scripts, self.text, self.code = "", "", "", ""
        self.inside = []  # the open elements that matter here
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.ids += [values["id"]] if "id" in values else []
        if tag == "img" and not values.get("alt"): self.without_alt.append(self.getpos())
        self.loads += [values[name] for name in self.LOADING & values.keys() if not values[name].startswith("data:")]
        self.styles += values.get("style", "") + "\n"
        if tag == "a" and values.get("href"): self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in self.QUIET_RELS: self.loads.append(values.get("href", ""))
        if tag == "span" and "math" in values.get("class", "").split():
            self.inside.append("math")
            self.formulas.append("")
        elif tag in ("pre", "code", "script", "style"): self.inside.append(tag)
        if tag == "pre": self.code += "\n"

    def handle_endtag(self, tag):
        if self.inside and (self.inside[-1] == tag or (self.inside[-1], tag) == ("math", "span")): self.inside.pop()

    def handle_data(self, data):
        where = self.inside[-1] if self.inside else "text"
        if where == "text": self.text += data
        elif where in ("pre", "code"): self.code += data
        elif where == "math": self.formulas[-1] += data
        elif where == "style": self.styles += data
        elif where == "script": self.scripts += data + "\n"


def read_pages(docs):
    "Every page of the site by its path"
    return {path: Page(path) for path in sorted(docs.rglob("*.html"))}


# ---------------------------------------------------------------- the checks

CSS_ADDRESS = re.compile(r"url\(\s*(?:\"([^\"]*)\"|'([^']*)'|([^)\"']*))\s*\)|@import\s*[\"']([^\"']*)[\"']")
JS_REQUEST = re.compile(r"(?:\b(?:fetch|import|importScripts|open)\s*\(|\bfrom\s|\bimport\s|\.src\s*=)\s*"
                        r"(?:[\"'`]GET[\"'`]\s*,\s*)?[\"'`](?:https?:)?//[^\"'`]*")


def css_addresses(css):
    "What a style sheet loads"
    found = ["".join(groups) for groups in CSS_ADDRESS.findall(css)]
    return [address for address in found if not address.startswith(("data:", "#"))]


def broken_links(docs):
    "Links, loads and anchors inside the site that lead nowhere"
    pages = read_pages(docs)
    wanted = [(path, address) for path, page in pages.items()
              for address in page.links + page.loads + css_addresses(page.styles)]
    wanted += [(path, address) for path in sorted(docs.rglob("*.css"))
               for address in css_addresses(path.read_text(encoding="utf-8"))]
    problems = []
    for path, address in wanted:
        if is_external(address): continue
        parts = urlsplit(address)
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir(): target = target / "index.html"
        anchor = unquote(parts.fragment)
        if not target.is_file(): problems.append(f"{path.relative_to(docs)}: {address}: no such file")
        elif parts.path.startswith("/"): problems.append(f"{path.relative_to(docs)}: {address}: not relative")
        elif anchor and target in pages and anchor not in pages[target].ids:
            problems.append(f"{path.relative_to(docs)}: {address}: no such anchor")
    return problems


def broken_copies(docs):
    "Links in the copies for machines, outside code, that lead to no copy"
    problems = []
    for path in sorted(docs.rglob("*.llms.md")):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not is_external(target)]
        problems += [f"{path.relative_to(docs)}: {target}: no such copy" for target in targets
                     if not (target.endswith(".llms.md") and (path.parent / target).is_file()) and target[0] != "#"]
    return problems


def double_ids(docs):
    "Anchors that a page has twice, so that a link cannot say which"
    return [f"{path.relative_to(docs)}: {name}" for path, page in read_pages(docs).items()
            for name in sorted(set(page.ids)) if page.ids.count(name) > 1]


def pictures_without_alt(docs):
    "Pictures that say nothing to those who cannot see them"
    return [f"{path.relative_to(docs)}: a picture at {place} has no alt text"
            for path, page in read_pages(docs).items() for place in page.without_alt]


def double_definitions(docs):
    "Functions and classes whose first line a page prints twice"
    problems = []
    for path, page in read_pages(docs).items():
        starts = re.findall(r"^(?:def|class) \w+\([^)]{10,60}", page.code, re.MULTILINE)
        problems += [f"{path.relative_to(docs)}: {start!r}" for start in sorted(set(starts)) if starts.count(start) > 1]
    return problems


def network_requests(docs):
    "Whatever a browser would ask another host for"
    problems = []
    for path, page in read_pages(docs).items():
        asked = [address for address in page.loads + css_addresses(page.styles) if is_external(address)]
        asked += JS_REQUEST.findall(page.scripts)
        problems += [f"{path.relative_to(docs)}: {address}" for address in asked]
    for path in sorted(docs.rglob("*.css")):
        asked = [address for address in css_addresses(path.read_text(encoding="utf-8")) if is_external(address)]
        problems += [f"{path.relative_to(docs)}: {address}" for address in asked]
    for path in sorted(docs.rglob("*.js")):
        asked = JS_REQUEST.findall(path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(docs)}: {call}" for call in asked]
    return problems


def leftover_markup(docs):
    "Markdown or TeX that reached the reader as it was typed"
    markup = re.compile(
        r":::|\$\$|\]\(|\\(?:begin|end|label|ref|eqref)\{|\{[#.][\w-]+|\{target=|@(?:eq|fig|tbl|sec)-\w+")
    return [f"{path.relative_to(docs)}: {found}" for path, page in read_pages(docs).items()
            for found in markup.findall(page.text)]


PARSE_FORMULAS = """
const katex = require(process.argv[1]);
for (const [page, tex] of JSON.parse(require("fs").readFileSync(0))) {
  try { katex.renderToString(tex.slice(2, -2), {displayMode: tex[1] === "[", strict: "ignore"}); }
  catch (error) { console.log(page + ": " + tex + ": " + error.message); }
}
"""


def bad_formulas(docs, katex=ROOT / "tools/vendor/katex/katex.min.js"):
    "Formulas that KaTeX cannot parse"
    formulas = [(str(path.relative_to(docs)), tex.strip())
                for path, page in read_pages(docs).items() for tex in page.formulas]
    done = subprocess.run(["node", "-e", PARSE_FORMULAS, str(katex)], input=json.dumps(formulas),
                          text=True, capture_output=True, check=True)
    return done.stdout.splitlines()


def machine_text(text):
    "Paths, addresses and warnings in `text` that come from one machine"
    text = build_docs.DATA_URI.sub("", text)
    return sorted(set(build_docs.MACHINE.findall(text)) | set(re.findall(r"\b[A-Z]\w*Warning:", text)))


def machine_traces(docs):
    "Pages, and the search index, that show text from the machine that built them"
    return [f"{path.relative_to(docs)}: {found}" for path in sorted([*docs.rglob("*.html"), *docs.rglob("*.json")])
            for found in machine_text(path.read_text(encoding="utf-8"))]


def notebook_problems(folder):
    "Notebooks that are too large, or hold machine paths, warnings or errors"
    problems = []
    for path in sorted(folder.rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in path.relative_to(folder).parts): continue
        name, size = path.relative_to(folder), path.stat().st_size
        if size > MAX_NOTEBOOK_BYTES: problems.append(f"{name}: {size} bytes, more than {MAX_NOTEBOOK_BYTES}")
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            outputs = cell.get("outputs", [])
            shown = [cell["source"]] + [output.get("text", "") for output in outputs]
            shown += [value for output in outputs for kind, value in output.get("data", {}).items()
                      if not kind.startswith("image/")]
            for text in shown:
                text = "".join(text) if isinstance(text, list) else str(text)
                problems += [f"{name}: {found}" for found in machine_text(text)]
            problems += [f"{name}: output on stderr" for output in outputs if output.get("name") == "stderr"]
            problems += [f"{name}: saved {output['ename']}" for output in outputs if output["output_type"] == "error"]
    return problems


DRAWS_MIXTURES = re.compile(r"(?=.*mix)(?=.*(?:show_images|show_mixed|imshow|gallery)\()", re.DOTALL | re.IGNORECASE)


def panel_widths(picture):
    "Widths of the panels of a figure, connected regions that are larger than letters and marks, pixels"
    ink = np.asarray(picture.convert("L")) < 200
    regions = ndimage.find_objects(ndimage.label(ink, np.ones((3, 3)))[0])
    sizes = [[part.stop - part.start for part in region] for region in regions]
    return [width for height, width in sizes if min(height, width) >= 40]


def small_mixtures(folder):
    "Figures of mixtures in which a picture is less than 96 pixels wide"
    problems = []
    for path in sorted(folder.rglob("[!.]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if not DRAWS_MIXTURES.match("".join(cell["source"])): continue
            for output in cell.get("outputs", []):
                for kind, data in output.get("data", {}).items():
                    if not re.fullmatch("image/(png|jpeg)", kind): continue
                    picture = Image.open(io.BytesIO(base64.b64decode("".join(data))))
                    least = min(panel_widths(picture), default=96)
                    if least < 96: problems.append(f"{path.relative_to(folder)}: a picture {least} pixels wide")
    return problems


def broken_readme_links(root):
    "Links and figures of the README that are no files of the repository"
    text = re.sub(r"```.*?```", "", (root / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    addresses = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=[\"']([^\"']+)", text)
    return [address for address in addresses if not is_external(address) and not address.startswith(("#", "data:"))
            and not (root / unquote(urlsplit(address).path)).is_file()]


def unlisted_notebooks(nbs, docs):
    "Notebooks without a page, or without a link to it in the sidebar of the home page"
    home = Page(docs / "index.html")
    linked = {(docs / unquote(urlsplit(address).path)).resolve() for address in home.links if not is_external(address)}
    pages = {path.relative_to(nbs): docs / path.relative_to(nbs).parent / re.sub(r"^\d+\w*?_", "", f"{path.stem}.html")
             for path in sorted(nbs.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts}
    return [str(source) for source, page in pages.items() if not page.is_file() or page.resolve() not in linked]


# ---------------------------------------------------------------- the site as it is

@pytest.fixture
def docs():
    assert (DOCS / "index.html").is_file(), "docs/ is not built: python tools/build_docs.py"
    return DOCS


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs KaTeX")


def test_docs_are_up_to_date(): assert build_docs.stale() == []


@pytest.mark.parametrize("check", [broken_links, broken_copies, double_ids, pictures_without_alt, double_definitions,
                                   network_requests, leftover_markup, machine_traces,
                                   pytest.param(bad_formulas, marks=needs_node)])
def test_site(docs, check): assert check(docs) == []


def test_every_notebook_is_listed(docs): assert unlisted_notebooks(ROOT / "nbs", docs) == []


def test_readme_links(): assert broken_readme_links(ROOT) == []


def test_readme_shows_nothing_of_this_machine():
    assert machine_text((ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_notebooks(): assert notebook_problems(ROOT / "nbs") == []


def test_mixtures_can_be_seen(): assert small_mixtures(ROOT / "nbs") == []


def test_every_page_can_be_used_without_a_mouse(docs):
    for path in docs.rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        assert page.count('<a class="skip-link" href="#quarto-document-content">') == 1, path
        toggles = re.findall(r'<a class="sidebar-item-toggle[^>]*>', page)
        assert toggles and all('tabindex="0"' in toggle for toggle in toggles), path
        assert 'role="navigation"' not in page, path  # of what opens a section


SEARCHES = {
    "cutmix": "mixers/cutmix.html", "SUMix callback": "sumix/callback.html",
    "how to use with timm": "tutorials/timm.html", "colab": "index.html", "lightning": "tutorials/use_it_with.html",
    "resume training": "training/resume.html", "checkpoint": "training/resume.html", "lambda": "sumix/ratio.html",
    "multi gpu": "tutorials/many_gpus.html", "vit": "models/networks.html", "install": "index.html",
    "turn off mixing last epochs": "sumix/mix.html mixers/choosing.html",
}
FIND = """
require(process.argv[1]);
const search = new globalThis.Fuse(JSON.parse(require("fs").readFileSync(process.argv[2])));
const found = (query) => search.search(query, {limit: 3}).map(({item}) => item.href.split("#")[0]);
console.log(JSON.stringify(JSON.parse(process.argv[3]).map(found)));
"""


@needs_node
def test_search_finds_what_readers_ask_for(docs):
    words = ["node", "-e", FIND, str(ROOT / "tools/site/search.js"), str(docs / "search.json"), json.dumps([*SEARCHES])]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    for (query, wanted), pages in zip(SEARCHES.items(), found): assert set(wanted.split()) & set(pages), (query, pages)


def test_search_shows_no_latex(docs):
    assert not re.search(r"\\(?:lambda|tilde|mathrm|frac)", (docs / "search.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the checks find what they are for

GOOD = r"""<link rel="canonical" href="https://example.org/"><link rel="stylesheet" href="style.css">
<h2 id="top">Top</h2> <a href="#top">here</a> <a href="https://example.org/a">out</a>
<img src="data:image/png;base64,AA==" alt="a dot">
<p>Code <code>a](b) $$ :::</code> and <span class="math inline">\(\tilde\lambda\)</span></p>
<script>fetch("search.json"); const help = "https://example.org";</script>"""


def make_site(folder, page, css="p { background: url(data:image/svg+xml,https://example.org) }"):
    (folder / "index.html").write_text(page, encoding="utf-8")
    (folder / "style.css").write_text(css, encoding="utf-8")
    return folder


# Put together here, so that the repository itself holds no such path
SCRATCH, PACKAGES = "/".join(("", "tmp", "x")), "-".join(("site", "packages"))

FAULTS = [
    (broken_links, '<a href="missing.html">x</a>', "no such file"),
    (broken_links, '<a href="#nowhere">x</a>', "no such anchor"),
    (broken_links, '<a href="index.html#nowhere">x</a>', "no such anchor"),
    (broken_links, '<img src="missing.png">', "no such file"),
    (broken_links, '<p style="background: url(missing.png)">', "no such file"),
    (double_ids, '<h2 id="top">Again</h2>', "top"),
    (pictures_without_alt, '<img src="data:image/png;base64,AA==" alt="">', "no alt text"),
    (double_definitions, 2 * "<pre>def mix(\n    images, # (N, C, H, W)\n)</pre>", "def mix"),
    (network_requests, '<script src="https://cdn.example.org/x.js"></script>', "cdn.example.org"),
    (network_requests, '<img src="//cdn.example.org/x.png">', "cdn.example.org"),
    (network_requests, '<link rel="preconnect" href="https://cdn.example.org">', "cdn.example.org"),
    (network_requests, '<style>@import "https://fonts.example.org/f.css";</style>', "fonts.example.org"),
    (network_requests, '<style>p { background: url(https://fonts.example.org/f) }</style>', "fonts.example.org"),
    (network_requests, '<script>fetch("https://api.example.org")</script>', "api.example.org"),
    (network_requests, '<script>import x from "https://api.example.org/x.mjs"</script>', "api.example.org"),
    (leftover_markup, "<p>::: {.callout-note}</p>", ":::"),
    (leftover_markup, "<p>$$ x</p>", "$$"),
    (leftover_markup, r"<p>\begin{align} x \end{align}</p>", r"\begin{"),
    (leftover_markup, "<h2>Title {#sec-title}</h2>", "{#sec-title"),
    (leftover_markup, "<p>see @eq-ratio</p>", "@eq-ratio"),
    (leftover_markup, "<p>a [link](page.ipynb)</p>", "]("),
    (machine_traces, f"<pre>{SCRATCH}/file.py:3: UserWarning: old</pre>", f"{SCRATCH}/file.py"),
    (machine_traces, "<pre>UserWarning: old</pre>", "UserWarning:"),
    (machine_traces, f"<pre>lib/python3.11/{PACKAGES}/torch</pre>", PACKAGES),
    (machine_traces, "<pre>&lt;object at 0x7f3a5c0b1d90></pre>", "0x7f3a5c0b1d90"),
    pytest.param(bad_formulas, r'<span class="math inline">\(\nosuchmacro\)</span>', "nosuchmacro", marks=needs_node),
    pytest.param(bad_formulas, r'<span class="math display">\[\frac{1}{\]</span>', "frac", marks=needs_node),
]


@pytest.mark.parametrize("check, fault, message", FAULTS)
def test_fault_is_found(tmp_path, check, fault, message):
    assert check(make_site(tmp_path, GOOD)) == []
    problems = check(make_site(tmp_path, GOOD + fault))
    assert len(problems) >= 1 and message in problems[0]


@pytest.mark.parametrize("link", ["[x](10_core.ipynb)", "[x](/core.html#mix)", "[x](missing.llms.md)"])
def test_broken_copy_is_found(tmp_path, link):
    (tmp_path / "core.llms.md").write_text(f"[x](core.llms.md) [out](https://example.org) `a[0](b)` {link}")
    assert broken_copies(tmp_path) == [f"core.llms.md: {link[4:-1]}: no such copy"]


@pytest.mark.parametrize("css", [
    "@import url(https://fonts.example.org/css?a;b);", "a { src: url('//fonts.example.org') }"])
def test_network_request_of_a_style_sheet_is_found(tmp_path, css):
    assert "fonts.example.org" in network_requests(make_site(tmp_path, GOOD, css))[0]


def test_unlisted_notebook_is_found(tmp_path):
    (tmp_path / "nbs").mkdir()
    for name in ("index", "10_listed", "20_hidden"): (tmp_path / f"nbs/{name}.ipynb").write_text("{}", encoding="utf-8")
    make_site(tmp_path, GOOD + '<a href="index.html">Home</a><a href="listed.html">Listed</a>')
    for name in ("listed", "hidden"): (tmp_path / f"{name}.html").write_text("", encoding="utf-8")
    assert unlisted_notebooks(tmp_path / "nbs", tmp_path) == ["20_hidden.ipynb"]


@pytest.mark.parametrize("output, message", [
    ({"output_type": "stream", "name": "stdout", "text": ["/home/me/data"]}, "/home/me/data"),
    ({"output_type": "stream", "name": "stderr", "text": ["progress"]}, "stderr"),
    ({"output_type": "execute_result", "data": {"text/plain": ["<Net at 0x7f3a5c0b1d90>"]}}, "0x7f3a5c0b1d90"),
    ({"output_type": "error", "ename": "NameError", "traceback": []}, "NameError"),
    ({"output_type": "display_data", "data": {"image/png": "A" * MAX_NOTEBOOK_BYTES}}, "more than"),
])
def test_notebook_problem_is_found(tmp_path, output, message):
    cell = {"cell_type": "code", "source": ["print(1)"], "outputs": []}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    assert notebook_problems(tmp_path) == []
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [{**cell, "outputs": [output]}]}), encoding="utf-8")
    assert len(problems := notebook_problems(tmp_path)) == 1 and message in problems[0]


@pytest.mark.parametrize("width", [95, 96])
def test_small_mixture_is_found(tmp_path, width):
    picture, data = Image.new("RGB", (230, 150), "white"), io.BytesIO()
    for left in (5, 115): ImageDraw.Draw(picture).rectangle((left, 30, left + width - 1, 140), outline="black")
    picture.save(data, "PNG")
    output = {"output_type": "display_data", "data": {"image/png": base64.b64encode(data.getvalue()).decode()}}
    cell = {"cell_type": "code", "source": ["show_images(mixed.images)"], "outputs": [output]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    assert len(small_mixtures(tmp_path)) == (width < 96)


def test_broken_readme_link_is_found(tmp_path):
    text = "[good](README.md#part) [out](https://example.org) [gone](nbs/gone.ipynb) ![gone](docs/gone.png)"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert broken_readme_links(tmp_path) == ["nbs/gone.ipynb", "docs/gone.png"]


def test_stale_files_are_named(tmp_path):
    files = ["nbs/a.ipynb", "nbs/deep/b.ipynb", "nbs/_quarto.yml", "nbs/styles.css", "tools/build_docs.py",
             "tools/vendor/katex/katex.min.js", "README.md", "docs/index.html"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as built", encoding="utf-8")
    assert "never built" in build_docs.stale(tmp_path)[0]
    build_docs.write_record(tmp_path, tmp_path)
    assert build_docs.stale(tmp_path) == []
    for name in files:
        (tmp_path / name).write_text("edited", encoding="utf-8")
        assert [line.partition(":")[0] for line in build_docs.stale(tmp_path)] == [name]
        (tmp_path / name).write_text("as built", encoding="utf-8")
    (tmp_path / "nbs/new.ipynb").write_text("", encoding="utf-8")
    (tmp_path / "nbs/deep/b.ipynb").unlink()
    (tmp_path / "nbs/nbdev.yml").write_text("made by nbdev", encoding="utf-8")
    assert build_docs.stale(tmp_path) == ["nbs/deep/b.ipynb: missing", "nbs/new.ipynb: new since the build"]
