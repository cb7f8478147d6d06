"""Build `docs/` and `README.md` from the notebooks in `nbs/`, without Quarto and without a network.

    python tools/build_docs.py            # build; exit 1, and leave the old site alone, if anything looks wrong
    python tools/build_docs.py --check    # only say which files changed since the last build; exit 1 if any did

nbdev processes the notebooks as it does for Quarto (hidden cells, `show_doc`, links from backticks), then smalldocs
makes the pages from the same `nbs/_quarto.yml` that `nbdev-docs` would read. KaTeX is copied from `tools/vendor/katex`.
Everything is built in a temporary folder: a build that fails changes nothing in the checkout.
"""
import argparse
import ast
import base64
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from PIL import Image
from smalldocs.config import as_list, glob_match, load
from smalldocs.layout import SiteNav
from smalldocs.site import SCHEME, Site

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sumix_nb"
RECORD = "docs/sources.json"  # What the site was made of: read by `stale`

# Files under `nbs/` that can change a page. `nbdev.yml` is none: each build (and whoever uses Quarto) writes it anew
PAGE_SOURCES = {".ipynb", ".yml", ".css", ".png", ".svg"}
NOT_SOURCES = {"nbdev.yml"}

# smalldocs says this of keys that nbdev writes for Quarto alone
EXPECTED = re.compile(r"unknown key format-links$|\S+: output-file is not read")
# Text that differs from one machine or run to the next, so that it must not be on a page
MACHINE = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|Users)/[^\s<\"']*|site-packages|\bat 0x[0-9a-f]{6,}")
DATA_URI = re.compile(r"data:[\w/+.-]+;base64,[\w+/=]+")

# nbdev's own steps, run by a fresh interpreter inside the staged copy. Not `nbdev_sidebar`: it sorts by the alphabet,
# `nbs/sidebar.yml` by reading order
NBDEV_STEPS = """
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml()
proc_nbs(force=True)
"""


# ---------------------------------------------------------------- what the site is made of

def page_sources(root):
    "Files under `nbs/` that can change a page, in a fixed order"
    hidden = (".", "_proc", "_docs")
    return [path for path in sorted((root / "nbs").rglob("*"))
            if path.is_file() and path.suffix in PAGE_SOURCES and path.name not in NOT_SOURCES
            and not any(part.startswith(hidden) for part in path.relative_to(root).parts)]


def source_files(root):
    "Every file that the site and the README are made of"
    ours = [path for folder in ("site", "vendor") for path in sorted((root / "tools" / folder).rglob("*"))]
    return [*page_sources(root), root / "tools/build_docs.py", *filter(Path.is_file, ours)]


def built_files(root):
    "Every file that a build writes, but for the record itself"
    site = [path for path in sorted((root / "docs").rglob("*")) if path.is_file() and path != root / RECORD]
    return [root / "README.md", *site]


def digests(root, files):
    "SHA-256 of each file by its path from `root`; files that are not there are left out"
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files if path.is_file()}


def write_record(root, built):
    "Note in `docs/sources.json` of `built` what the build read under `root`, and what it wrote under `built`"
    record = {"sources": digests(root, source_files(root)), "built": digests(built, built_files(built))}
    (built / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def stale(root=ROOT):
    "One line for each file that is not as the last build read or wrote it; an empty list if `docs/` is up to date"
    record = root / RECORD
    if not record.is_file(): return [f"{RECORD}: missing, so `docs/` was never built"]
    then = json.loads(record.read_text(encoding="utf-8"))
    now = {"sources": digests(root, source_files(root)), "built": digests(root, built_files(root))}
    lines = []
    for kind, verb in (("sources", "changed since the build"), ("built", "not as it was built")):
        for name in sorted(then[kind].keys() | now[kind].keys()):
            if name not in now[kind]: lines.append(f"{name}: missing")
            elif name not in then[kind]: lines.append(f"{name}: new since the build")
            elif then[kind][name] != now[kind][name]: lines.append(f"{name}: {verb}")
    return lines


# ---------------------------------------------------------------- nbdev: notebooks as they are to be shown

def stage(folder):
    "Copy what the build reads, so that nothing nbdev generates on the way lands in the checkout"
    for path in [*source_files(ROOT), ROOT / "pyproject.toml"]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def declare_package(folder):
    "Package metadata with the `nbdev` entry point, which turns backticks into links; needs no installation"
    info = folder / f"{PACKAGE}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[nbdev]\n{PACKAGE} = {PACKAGE}._modidx:d\n", encoding="utf-8")
    return folder


def process_notebooks(folder):
    "Run nbdev in the staged copy; the folder of processed notebooks, and what nbdev warned of"
    metadata = declare_package(folder / "metadata")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(metadata), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore,default::UserWarning:nbdev.processors",  # nbdev's own warnings only
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(folder / "ipython"),  # not the profile of whoever builds
    }
    done = subprocess.run([sys.executable, "-c", NBDEV_STEPS], cwd=folder, env=env, text=True, stderr=subprocess.PIPE)
    if done.returncode: raise SystemExit(f"{done.stderr}\nnbdev could not process the notebooks; docs/ is as it was")
    warnings = [done.stderr.strip()] if "warning" in done.stderr.lower() else []  # as a whole: it shows the cell
    return folder / "_proc", warnings


# `show_doc` writes a rule, a link to the source, a heading, the signature, and the docstring between two asterisks
SHOW_DOC = re.compile(
    r"---\n\n(?:\[source\]\((?P<source>[^)]*)\)\{[^}]*\}\n\n)?(?P<level>#+) (?P<name>\S+)\n\n"
    r"(?P<signature>```python\n.*?\n```)(?:\n\n\*(?P<docstring>.*)\*)?\s*", re.DOTALL)


def anchor(name):
    "Id of the entry of a symbol: no heading of prose has such a one"
    return f"def-{name}"


def read_entry(markdown):
    "The entry of one symbol as nbdev writes it, as (name, its Markdown without the signature, the rest), or None"
    entry = SHOW_DOC.fullmatch(markdown)
    if entry is None: return None
    name, source = entry["name"].replace("\\", ""), entry["source"]
    # Without a repository address a link to our own source leads nowhere
    link = f"[source]({source}){{.api-source}}\n\n" if source and SCHEME.match(source) else ""
    heading = f"{link}{entry['level']} `{name}` {{#{anchor(name)}}}"  # as code: `__len__` is a name, not bold print
    docstring = f"\n\n{entry['docstring']}" if entry["docstring"] else ""  # not between asterisks: it may hold some
    return name, heading, f"\n\n{entry['signature']}{docstring}"


def entry_of(cell):
    "The output of a cell that shows one symbol, and what `read_entry` says of it, or None"
    for output in cell.get("outputs", ()):
        markdown = output.get("data", {}).get("text/markdown")
        found = read_entry("".join(markdown)) if markdown else None
        if found is not None: return output, found
    return None


EXPORTS = re.compile(r"^#\|\s*exports\b", re.MULTILINE)  # nbdev writes the directive of such a cell as an option
FOLDING = re.compile(r"^#\|\s*(code-fold|code-summary)\b.*\n", re.MULTILINE)


def full_name(node):
    "Name of a function or class as its entry has it: a function that is patched into a class has the name of a method"
    if isinstance(node, ast.FunctionDef) and "patch" in map(ast.unparse, node.decorator_list):
        return f"{ast.unparse(node.args.args[0].annotation)}.{node.name}"
    return node.name


def parts_of(source):
    "A cell cut before each function and class, as pairs of its name (None where there is none) and text"
    lines, nodes = source.split("\n"), ast.parse(source).body
    nodes = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if not nodes: return [(None, source)]
    starts = [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1 for node in nodes]
    ends = [*starts[1:], len(lines)]
    starts[0] = 0  # what stands before the first belongs to it
    return [(full_name(node), "\n".join(lines[start:end]).strip("\n"))
            for node, start, end in zip(nodes, starts, ends)]


def each_definition_once(cells):
    "Cells in which a definition that the page shows is its own entry: a heading and the source, without a signature"
    entries = {found[1][0]: (cell, found[1][1]) for cell in cells if (found := entry_of(cell))}
    shown, told = [], []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not EXPORTS.search(source):
            shown.append(cell)
            continue
        lines = FOLDING.sub("", source).split("\n")
        options = "".join(line + "\n" for line in lines if line.startswith("#|"))
        parts = parts_of("\n".join(line for line in lines if not line.startswith("#|")))
        for name, text in parts:
            if name in entries:
                entry, heading = entries[name]
                told.append(entry)
                shown.append({"cell_type": "markdown", "metadata": {}, "source": heading})
            last = text is parts[-1][1]
            shown.append({**cell, "source": options + text, "outputs": cell["outputs"] if last else []})
    return [cell for cell in shown if not any(cell is entry for entry in told)]


# nbdev links backticks inside the text of a link too: [the [`name`](/page.html#name) of it](where the author points)
LINK_IN_LINK = re.compile(r"\[([^\[\]]*)\[(`[^`]+`)\]\([^()\s]*\)([^\[\]]*)\](?=\()")

# and in lines of HTML, where Markdown is not read
HTML_LINE, CODE_LINK = re.compile(r"^<.*$", re.MULTILINE), re.compile(r"\[`([^`]+)`\]\(/[^)]*\)")

IMAGE = ("image/png", "image/jpeg", "image/svg+xml")
MARKS = re.compile(r"\$[^$]*\$|[*`_#>]|\[([^\]]*)\]\([^)]*\)")


def with_alt_text(cells):
    "Give each picture without a description the sentence before it, which says what to notice"
    said = ["A figure"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            said = [part for part in source.split("\n\n") if part.strip() and part[0] not in "#|:"][-1:] or said
        elif any(kind in output.get("data", {}) for output in cell.get("outputs", ()) for kind in IMAGE):
            text = " ".join(MARKS.sub(r"\1", said[0]).split()).rstrip(":")[:300]
            told = re.search(r"^#\| fig-alt: *(.*)$", source, re.MULTILINE)
            told = json.dumps(told[1].strip("\"'") if told else text)  # quoted: YAML would take a colon for a key
            cell["source"] = f"#| fig-alt: {told}\n" + re.sub(r"^#\| fig-alt:.*\n", "", source, flags=re.MULTILINE)


def tidy(path):
    "Prepare a processed notebook for smalldocs, in place; the names that it documents"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names = {found[1][0] for cell in notebook["cells"] if (found := entry_of(cell))}
    notebook["cells"] = each_definition_once(notebook["cells"])
    with_alt_text(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = LINK_IN_LINK.sub(r"[\1\2\3]", "".join(cell["source"]))
            cell["source"] = HTML_LINE.sub(lambda line: CODE_LINK.sub(r"<code>\1</code>", line[0]), text)
        if cell["cell_type"] != "code": continue
        if "execution" in cell["metadata"]:  # an import that nbdev ran again: what it logs depends on the machine
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        if found := entry_of(cell):  # a definition that the page does not show: its heading, signature and docstring
            output, (_, heading, rest) = found
            output["data"]["text/markdown"] = f":::: {{.api}}\n\n{heading}{rest}\n\n::::\n"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return {name.lower(): name for name in names}


# ---------------------------------------------------------------- smalldocs: pages

class NotebookSite(Site):
    "smalldocs with nbdev's page names (`10_core.ipynb` is `core.html`), and links that need no address of the site"

    def __init__(self, project, documented):
        super().__init__(project, quiet=True)
        self.documented = documented  # {source: {name in lower case: name} of the entries on its page}

    def read(self, src):
        "Read a page, and name its output as nbdev does"
        page = super().read(src)
        if name := page.front.get("output-file"): page.out = page.src.with_name(str(name))
        return page

    def find_page(self, target):
        "The page for a source, a folder, or an output as nbdev's links name it"
        by_output = {page.out: page for page in self.pages.values()}
        return by_output.get(PurePosixPath(target)) or super().find_page(target)

    def resolve(self, href, page, record=True):
        "Rewrite a link; one that nbdev made from backticks (`/core.html#mixup.mix`) goes to the nearest entry"
        if href.startswith("/") and "#" in href:
            path, _, name = href.partition("#")
            target = self.find_page(PurePosixPath(path.lstrip("/")))
            documented = self.documented.get(target.src, {}) if target else {}
            while name and name.lower() not in documented: name = name.rpartition(".")[0]  # a method: its class's entry
            href = f"{path}#{anchor(documented[name.lower()])}" if name else path
        return super().resolve(href, page, record)

    def llms_link(self, href, page):
        "Rewrite a link for the README: pages are the notebooks themselves, so that it works in the repository"
        path = href.partition("#")[0]
        if not path or SCHEME.match(href): return href
        start = "" if path.startswith("/") else str(page.src.parent)
        path = posixpath.normpath(posixpath.join(start, path.lstrip("/")))
        found = self.find_page(PurePosixPath(path))
        return posixpath.normpath(f"nbs/{found.src if found else path}")


def drop_empty_sections(site):
    "Leave out the sections of the sidebar whose notebooks are not written yet"
    sidebar = site.project.website["sidebar"]
    sources = [path.relative_to(site.root).as_posix() for path in sorted(site.root.rglob("*.ipynb"))]
    sidebar["contents"] = [
        entry for entry in sidebar["contents"] if "section" not in entry
        or any(glob_match(source, pattern) for source in sources for pattern in as_list(entry["contents"]))]


# What may be wider than the page and scrolls within itself: Tab must reach it
SCROLLS = re.compile(r'<(pre|div|span)((?<=pre)>|(?<=pre) class=| class="(?:sd-table|cell-output|math display)\b)')
# Menus by the start of their tag, and what a screen reader calls them
MENUS = {'<nav class="navbar ': "Site", '<nav class="quarto-secondary-nav"': "Where you are",
         '<nav id="quarto-sidebar"': "Pages", '<nav class="page-navigation"': "Next and previous page"}
STRIP = 3.5  # From this ratio of width to height on, a figure scrolls on a telephone instead of shrinking
FIGURE = re.compile(r'<img (?=[^>]*src="data:image/(?:png|jpeg);base64,([^"]*)")')
# In text that machines read: a link to a page, and one that starts at the top of the repository or of the site
TO_PAGE = re.compile(r"\]\(((?:[\w.]+/)*)(?:\d+_)?(\w+)\.(?:ipynb|html)(?:#[^)]*)?\)")
FROM_TOP = re.compile(r"\]\((?:nbs/|/)(?=[\w./]+\.(?:ipynb|html)\b)")
PICTURE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")
SKIP_LINK = '<a class="skip-link" href="#quarto-document-content">Skip to the content</a>'


def figure_class(image):
    "The start of the tag of an embedded figure, with a class if it is a strip of pictures"
    width, height = Image.open(io.BytesIO(base64.b64decode(image[1]))).size
    return '<img class="strip" ' if width >= STRIP * height else image[0]


def finish_page(page, up):
    "A page with the vendored KaTeX and our own search, a link that skips the menus, and toggles that Tab reaches"
    page = re.sub(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist/(?:contrib/)?", f"{up}site_libs/katex/", page)
    page = page.replace("site_libs/fuse/fuse.min.js", "site_libs/search.js")
    page = re.sub(r"(<body[^>]*>)", rf"\1\n{SKIP_LINK}", page, count=1)
    toggle = re.compile(r'(<a class="sidebar-item-toggle[^>]*) role="navigation"')
    page = toggle.sub(r'\1 role="button" tabindex="0"', page)
    page = re.sub(r'(<a class="sidebar-item-text[^>]*) role="navigation"', r'\1 role="button"', page)
    for start, name in MENUS.items(): page = page.replace(start, start.replace("<nav ", f'<nav aria-label="{name}" '))
    return SCROLLS.sub(r'<\1 tabindex="0"\2', FIGURE.sub(figure_class, page))


def plain_search(entries):
    "The entries of the search without LaTeX's marks"
    for entry in entries:
        text = re.sub(r"\\(?:tilde|hat)\s*\{?\\?(\w+)\}?", r"\1~", entry["text"])
        entry["text"] = " ".join(re.sub(r"\\(?:\w+|[()\[\],;!])|[{}$^]", " ", text).split())
    return entries


def make_offline(docs):
    "Point the pages at the vendored KaTeX, and drop what would ask the network or change from build to build"
    libs = docs / "site_libs"
    shutil.copytree(ROOT / "tools/vendor/katex", libs / "katex")
    shutil.rmtree(libs / "fuse")
    shutil.copy(ROOT / "tools/site/search.js", libs)
    for path in sorted(docs.rglob("*.html")):
        up = "../" * (len(path.relative_to(docs).parts) - 1)
        path.write_text(finish_page(path.read_text(encoding="utf-8"), up), encoding="utf-8")
    for path in sorted(docs.rglob("*.llms.md")):  # copies for machines that read: what pictures show, in words
        up = "../" * (len(path.relative_to(docs).parts) - 1)
        text = PICTURE.sub(r"[Figure: \1]", path.read_text(encoding="utf-8"))
        text = TO_PAGE.sub(r"](\1\2.llms.md)", FROM_TOP.sub(f"]({up}", text))
        path.write_text(text, encoding="utf-8")
    for folder in sorted(docs.rglob("*_files")): shutil.rmtree(folder)
    search = docs / "search.json"
    search.write_text(json.dumps(plain_search(json.loads(search.read_text(encoding="utf-8"))), ensure_ascii=False),
                      encoding="utf-8")
    web_font = re.compile(r"@import\s*(?:url\([\"']?https?:[^)]*\)|\"https?:[^\"]*\"|'https?:[^']*')[^;]*;")
    other_formats = re.compile(r",url\(fonts/KaTeX_[\w-]+\.(?:woff|ttf)\) format\(\"\w+\"\)")  # woff2 is enough
    for path in sorted(docs.rglob("*.css")):
        css = path.read_text(encoding="utf-8")
        path.write_text(other_formats.sub("", web_font.sub("", css)), encoding="utf-8")
    (docs / "sitemap.xml").unlink(missing_ok=True)  # holds dates, and addresses that we do not know
    (docs / ".nojekyll").touch()


def write_readme(site, folder):
    "`README.md` from the home page, with its figures in `docs/index_files/`"
    page = site.find_page(PurePosixPath("index.html"))
    text, figures = site.llms_copy(page)
    text = re.sub(r"<style.*?</style>\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\(nbs/index_files/|\]\(index_files/", "](docs/index_files/", text)
    warning = "<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->"
    text = f"{warning}\n\n{text.replace(warning, '').strip()}\n"
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    for name, data in figures.items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_bytes(data)


def page_problems(site):
    "What is wrong with the pages as a whole: two of one name, one that the sidebar lacks, text from this machine"
    seen = {}
    for page in site.pages.values():
        if page.out in seen: yield f"{page.src} and {seen[page.out]} would both be {page.out}: rename one"
        seen[page.out] = page.src
    sections = [item for bar in SiteNav(site).sidebars for item in bar["items"]]
    for page in site.pages.values():
        if not any(item.contains(page) for item in sections): yield f"{page.src} is not in nbs/sidebar.yml"
        text = DATA_URI.sub("", (site.out / page.out).read_text(encoding="utf-8"))
        for found in sorted(set(MACHINE.findall(text))): yield f"{page.src} shows text from this machine: {found}"


# ---------------------------------------------------------------- the two commands

def publish(built):
    "Swap the new site and README in; copied next to the old ones first, so that the swap itself is a few renames"
    scratch = Path(tempfile.mkdtemp(prefix=".docs-", dir=ROOT))
    try:
        shutil.copytree(built / "docs", scratch / "docs")
        shutil.copy(built / "README.md", scratch / "README.md")
        if (ROOT / "docs").exists(): (ROOT / "docs").rename(scratch / "old")
        (scratch / "docs").rename(ROOT / "docs")
        (scratch / "README.md").replace(ROOT / "README.md")
    finally:
        if not (ROOT / "docs").exists() and (scratch / "old").exists(): (scratch / "old").rename(ROOT / "docs")
        shutil.rmtree(scratch)


def build():
    "Build the site and the README; 0 if they were replaced, 1 if problems were found and nothing was touched"
    if find_spec("nbdev") is None: raise SystemExit("nbdev is not installed: pip install -e '.[dev]'")
    if not (ROOT / "nbs/index.ipynb").is_file(): raise SystemExit("nbs/index.ipynb, the home page, is missing")
    with tempfile.TemporaryDirectory(prefix="sumix-docs-") as name:
        folder = Path(name).resolve()
        stage(folder)
        processed, problems = process_notebooks(folder)
        notebooks = sorted(processed.rglob("*.ipynb"))
        documented = {PurePosixPath(path.relative_to(processed).as_posix()): tidy(path) for path in notebooks}
        site = NotebookSite(load(processed), documented)
        drop_empty_sections(site)
        count = site.build()
        built = folder / "built"
        built.mkdir()
        site.out = site.out.rename(built / "docs")
        make_offline(site.out)
        write_readme(site, built)
        problems += [warning for warning in site.warnings if not EXPECTED.match(warning)]
        problems += page_problems(site)
        if problems:
            print("\n".join(f"problem: {problem}" for problem in problems), file=sys.stderr)
            print("docs/ and README.md are as they were", file=sys.stderr)
            return 1
        write_record(folder, built)
        publish(built)
    print(f"{count} pages in docs/, and README.md")
    return 0


def check():
    "Say whether `docs/` and `README.md` are stale; 1 if they are"
    lines = stale()
    verdict = "stale: run python tools/build_docs.py" if lines else "docs/ and README.md are up to date"
    print("\n".join([*lines, verdict]))
    return 1 if lines else 0


def main():
    "The command line"
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether docs/ and README.md are stale")
    return check() if parser.parse_args().check else build()


if __name__ == "__main__": sys.exit(main())
