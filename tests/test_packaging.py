"""What `pip install .` brings: both packages, and torch as the only requirement."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import sharded_shampoo4

ROOT = Path(__file__).parent.parent


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
    expected = {f"sharded_shampoo4/{path.name}" for path in (ROOT / "sharded_shampoo4").glob("*.py")}
    expected |= {f"sharded_shampoo4/integrations/{path.name}" for path in (ROOT / "integrations").glob("*.py")}
    assert modules == expected and "sharded_shampoo4/py.typed" in names


def test_the_core_imports_torch_only() -> None:
    for path in (ROOT / "sharded_shampoo4").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"{path.name} imports {name}"
