"""What is published: library and launch scripts in the wheel, torch as the only requirement, all files in the sdist."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from support.marks import slow_except

import sharded_shampoo4

ROOT = Path(__file__).parents[2]
CONSTRAINTS = {
    "minimum": ROOT / "tests" / "versions" / "minimum.txt",
    "pinned": ROOT / "constraints.txt",
    "newest": ROOT / "tests" / "versions" / "newest.txt",
}
# Extras of programs that ask for other versions of what the tests need: `make test-peers` installs them by themselves.
BY_THEMSELVES = {"axolotl", "timm", "torchtitan"}
SCRIPTS = ("train_vit", "compare", "memory_report", "benchmark")


FOLDERS = ("sharded_shampoo4", "integrations", "launch", "tests", ".ci", ".github")
FILES = (
    *("setup.cfg", "pyproject.toml", "MANIFEST.in", "ruff.toml", "Makefile", "constraints.txt", ".gitignore"),
    *("README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", ".pre-commit-config.yaml"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the repository: a build leaves others behind."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns(*(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    return source


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, cwd=source, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is in the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder


def run_module(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m`` with the wheel's files, in a folder without any of ours."""
    paths = os.pathsep.join([str(installed), *(path for path in sys.path if path.endswith("site-packages"))])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = (sys.executable, "-m", *command)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_sdist_has_all_files(source: Path, sdist: Path) -> None:
    """Tests can run from it: scripts, configurations and recorded digests are there."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(source).as_posix() for name in FOLDERS for path in (source / name).rglob("*")}
    assert files | set(FILES) <= names


def test_twine_has_no_objection(sdist: Path, wheel: Path) -> None:
    if importlib.util.find_spec("twine") is None:
        pytest.skip("twine is not installed")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], check=True)


def test_a_published_page_has_no_links_that_lead_nowhere(source: Path, tmp_path: Path) -> None:
    """The workflow knows the repository's address, and a package index resolves no relative links."""
    checkout = shutil.copytree(source, tmp_path / "checkout")
    address = "https://example.com/someone/sharded_shampoo4"
    script = checkout / ".github" / "absolute_links.py"
    tag = f"v{sharded_shampoo4.__version__}"
    wrong = subprocess.run([sys.executable, str(script), address, "v99"], cwd=checkout, capture_output=True, text=True)
    assert wrong.returncode == 1 and "v99 is not the version" in wrong.stderr
    subprocess.run([sys.executable, str(script), address, tag], check=True, cwd=checkout)
    program = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=checkout, stdout=subprocess.DEVNULL)
    (found,) = checkout.glob("*.dist-info")
    metadata = Parser().parsestr((found / "METADATA").read_text())
    targets = re.findall(r"\]\(([^)]*)\)", metadata.get_payload())
    assert f"{address}/raw/{tag}/launch/rivals.png" in targets
    before = re.findall(r"\]\(([^)]*)\)", (source / "README.md").read_text())
    for target, was in zip(targets, before, strict=True):
        if was.startswith(("https:", "#")):
            assert target == was
        else:
            assert (checkout / target.split(f"/{tag}/")[1].partition("#")[0]).is_file() and target.endswith(was)
    assert f"Issues, {address}/issues" in metadata.get_all("Project-URL")


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {sharded_shampoo4.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel(wheel: Path) -> None:
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
    scripts = [path for path in files_of("launch") if path.suffix == ".py" and path.parts[1] != "docs"]
    expected |= {f"sharded_shampoo4/{path}" for path in scripts}
    assert modules == expected and "sharded_shampoo4/py.typed" in names
    for folder in ("configs", "kubernetes", "recipes", "slurm"):
        assert {f"sharded_shampoo4/{path}" for path in files_of(f"launch/{folder}")} <= set(names)
    assert {f"sharded_shampoo4/launch/{name}" for name in ("node.sh", "hostfile.example")} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sharded_shampoo4"}


def files_of(folder: str) -> list[Path]:
    """List the files in a folder, relative to the root, without outputs of runs and Python's caches."""
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in files if not {"runs", "__pycache__"} & set(path.parts)]


@pytest.mark.parametrize("script", slow_except(["train_vit"], SCRIPTS))
def test_a_script_runs_from_the_wheel(script: str, installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("kornia")  # of the extra `launch`
    (tmp_path / "plots.py").write_text("raise RuntimeError('of the user')")
    module = f"sharded_shampoo4.launch.{script}"
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m") if script == "train_vit" else ()
    found = run_module(installed, tmp_path, *launcher, module, "--help")
    assert found.returncode == 0 and found.stdout.startswith("usage: "), found.stderr


def test_a_script_of_the_wheel_starts_the_others(installed: Path, tmp_path: Path) -> None:
    flags = ("--max_train_steps", "2", "--max_train_samples", "96", "--max_eval_samples", "32")
    command = ("--output_dir", "made", "--optimizers", "adamw", "--", *flags)
    found = run_module(installed, tmp_path, "sharded_shampoo4.launch.compare", *command)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "made/adamw-seed0/all_results.json").exists() and (tmp_path / "made/comparison.png").exists()


def test_the_memory_of_a_configuration_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=96, num_hidden_layers=1, architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return run_module(installed, tmp_path, "sharded_shampoo4.integrations.memory", *options)

    found = run(str(tmp_path), "--world_size", "2", "preset=compact", "--host", "zero3")
    assert found.returncode == 0, found.stderr
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert str(sharded_shampoo4.estimate_memory(shapes, 2, host="zero3", preset="compact")) in found.stdout
    wrong = run(str(tmp_path), "bit=3")
    assert wrong.returncode == 2 and "did you mean 'bits'?" in wrong.stderr


def test_what_the_memory_command_cannot_read_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    memory = importlib.import_module("sharded_shampoo4.integrations.memory")
    for wrong, said in (
        ((str(tmp_path), "--nothing"), "unrecognized arguments: --nothing"),
        ((str(tmp_path / "none"),), f"there is no folder or file {tmp_path / 'none'}"),
        ((str(tmp_path),), "config.json"),
        (("nobody/no-model",), "nobody/no-model: "),
    ):
        with pytest.raises(SystemExit) as ended:
            memory.main(wrong)
        printed = capsys.readouterr().err
        assert ended.value.code == 2 and said in printed and printed.count("\n") == 2, printed


def declared() -> dict[str, SpecifierSet]:
    """What setup.cfg allows, by package: its requirements and those of every extra."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    ranges: dict[str, SpecifierSet] = {}
    for requirement in (Requirement(line) for line in "\n".join(lines).splitlines() if line):
        same = ranges.setdefault(requirement.name, requirement.specifier)
        assert same == requirement.specifier, f"two ranges of {requirement.name}"
    for name in BY_THEMSELVES:
        assert pins(CONSTRAINTS["pinned"])[name] in ranges.pop(name), name
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


def test_the_workflow_runs_every_kind_of_test() -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    run = {job["steps"][-1]["run"] for job in workflow["jobs"].values()}
    targets = [target for job in workflow["jobs"].values() for target in job["strategy"]["matrix"].get("target", [])]
    assert run == {".ci/run test", ".ci/run ${{ matrix.target }}"}
    made = (ROOT / "Makefile").read_text()
    assert {"lint", "docs", "test-slow", "test-peers", "test-minimum", "test-newest"} == set(targets)
    assert all(re.search(rf"^\.PHONY:.* {target}\b", made, re.M) for target in targets)


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
