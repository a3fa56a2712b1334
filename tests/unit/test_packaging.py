"""What `pip install .` brings: both packages, and torch as the only requirement; and what is said of versions."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import sharded_shampoo4

ROOT = Path(__file__).parents[2]
CONSTRAINTS = {
    "minimum": ROOT / "tests" / "versions" / "minimum.txt",
    "pinned": ROOT / "constraints.txt",
    "newest": ROOT / "tests" / "versions" / "newest.txt",
}


def test_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sharded_shampoo4", "integrations"):
        shutil.copytree(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    assert metadata["Version"] == sharded_shampoo4.__version__ and "MIT" in (
        metadata["License-Expression"],
        metadata["License"],
    )
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(required) == 1 and required[0].startswith("torch")
    modules = {name for name in names if name.endswith(".py")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "sharded_shampoo4").rglob("*.py")}
    expected |= {f"sharded_shampoo4/integrations/{path.name}" for path in (ROOT / "integrations").glob("*.py")}
    assert modules == expected and "sharded_shampoo4/py.typed" in names


def declared() -> dict[str, SpecifierSet]:
    """What setup.cfg allows, by package: its requirements and those of every extra."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    ranges: dict[str, SpecifierSet] = {}
    for requirement in (Requirement(line) for line in "\n".join(lines).splitlines() if line):
        same = ranges.setdefault(requirement.name, requirement.specifier)
        assert same == requirement.specifier, f"two ranges of {requirement.name}"
    return ranges


def pins(path: Path) -> dict[str, Version]:
    """The versions in a file of constraints, which must be exact."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_versions_that_are_declared_are_those_that_are_tested() -> None:
    ranges, versions = declared(), {column: pins(path) for column, path in CONSTRAINTS.items()}
    least = {name: Version(str(specifier).removeprefix(">=")) for name, specifier in ranges.items()}
    assert versions["minimum"] == least
    for name in ranges:
        ascending = [versions[column][name] for column in CONSTRAINTS]
        assert ascending == sorted(ascending), name


def test_the_readme_has_the_versions_that_are_tested() -> None:
    versions = [pins(path) for path in CONSTRAINTS.values()]
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    shown = {cells[0]: [Version(cell) for cell in cells[1:]] for cells in rows if cells[0] in versions[0]}
    assert shown.keys() == {"torch", "accelerate", "transformers", "deepspeed"}
    for name, row in shown.items():
        assert row == [column[name] for column in versions], name


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, in functions too."""
    package = ["sharded_shampoo4", *path.relative_to(ROOT).parent.parts[1:]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(parents + ([node.module] if node.module else []))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_core_imports_torch_and_itself_and_no_host() -> None:
    for path in (ROOT / "sharded_shampoo4").glob("**/*.py"):
        for name in imported(path):
            top, *rest = name.split(".")
            assert top in {"torch", "sharded_shampoo4", *sys.stdlib_module_names}, f"{path.name} imports {name}"
            assert "integrations" not in rest, f"{path.name} imports {name}"


def test_adapters_are_named_where_a_checkout_does_not_need_them(tmp_path: Path) -> None:
    """A plain checkout, in which nothing is installed, imports; its first optimizer says what is missing."""
    shutil.copytree(ROOT / "sharded_shampoo4", tmp_path / "sharded_shampoo4")
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, sharded_shampoo4
assert sharded_shampoo4.__file__.startswith(sys.argv[1]), sharded_shampoo4.__file__
try:
    sharded_shampoo4.Shampoo4([torch.nn.Parameter(torch.zeros(4, 4))])
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("is not installed: run pip install -e .")


def test_no_test_module_imports_another() -> None:
    """What several of them need is in tests/support."""
    names = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    modules = set(names)
    assert len(modules) == len(names), "names are unique"
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imported(path):
            assert not modules & set(name.split(".")), f"{path.relative_to(ROOT)} imports {name}"
