"""The shape of the house: layers, who reads the environment, no swallowed errors."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for root in (ROOT / "k2dist", ROOT / "kernels")
    for path in sorted(root.rglob("*.py"))
    if "_proto" not in path.parts
]


def test_layers_hold() -> None:
    """In a process of its own: import-linter configures logging anew, and would silence our loggers here."""
    lint = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"


def test_only_cli_reads_the_environment() -> None:
    """Setting a variable for a library that is about to be imported is allowed, where it says why."""
    reading = re.compile(r"os\.(getenv|environ(?!\.setdefault|\[[^\]]+\] = ))")
    readers = [path for path in SOURCES if path.parent.name != "cli" and reading.search(path.read_text())]
    assert not readers


def test_no_error_is_swallowed() -> None:
    swallowing = re.compile(r"except( Exception| BaseException)?( as \w+)?:\s*\n\s*(pass|continue)\b")
    assert not [p for p in SOURCES if swallowing.search(p.read_text())]


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_every_package_is_on_the_readmes_map() -> None:
    text = (ROOT / "README.md").read_text().partition("## The map")[2]
    packages = {path.parent.name for path in ROOT.glob("k2dist/*/__init__.py")} - {"_proto"}
    assert packages
    assert not [name for name in packages if not re.search(rf"`(k2dist/)?{name}/`", text)]
