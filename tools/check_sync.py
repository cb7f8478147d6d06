"""Exit 1 unless the library is what the notebooks export and the notebooks are clean.

Works on files, not on git: in a checkout with uncommitted work it says only what exporting or cleaning would change.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = ("__pycache__", ".ipynb_checkpoints", ".last_checked")


def contents(root):
    "Bytes of every file that exporting and cleaning may write, by path"
    files = [file for folder in ("sumix_nb", "nbs") for file in (root / folder).rglob("*") if file.is_file()]
    return {file.relative_to(root): file.read_bytes() for file in files if not set(SKIPPED) & set(file.parts)}


def changes():
    "Paths that `nbdev-export` and `nbdev-clean` would change, seen on a copy"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns(*SKIPPED)
        for name in ("sumix_nb", "nbs"): shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", copy)
        before = contents(copy)
        for command in ("nbdev-export", "nbdev-clean"): subprocess.run([command], cwd=copy, check=True)
        after = contents(copy)
    return sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))


if __name__ == "__main__":
    found = changes()
    for path in found: print(f"out of sync: {path}")
    if found: sys.exit("`make export` brings these up to date")
    print("notebooks are clean and the library is what they export")
