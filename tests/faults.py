"""Deliberate faults: does the quick tier catch them?

    python tests/faults.py                      # each fault in a copy of the repository, one after the other
    python tests/faults.py --only checksum      # one of them

For each fault, prints how many tests of the quick tier fail because of it. Exits with status 1 if a fault makes no test
fail. The launch tests run only with ``--launch``: the other tests must catch every fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Name and file; the right code, which stands there once; the faulty code.
FAULTS_AS_TEXT = """
quantizer: numerics/quantization.py
- scales = scales.to(scale_dtype)
+ scales = (1.001 * scales).to(scale_dtype)

Bjorck constant: numerics/eigenbasis.py
- (1.5, rows, -0.5,
+ (1.5, rows, -0.499,

owner choice: planning/plan.py
- owners[index] = owner = loads
+ owners[index] = owner = 0 * loads

offset of a piece: planning/plan.py
- column=piece.column - block.column)
+ column=0)

rows of experts: planning/views.py
- _split(name, rows, options.split_rows) * count
+ _split(name, rows * count, options.split_rows)

thin matrices: planning/blocks.py
- return rows <= aspect * columns, columns <= aspect * rows
+ return rows <= aspect * columns, True

exponent of one side: numerics/factors.py
- 2 if alone else 4
+ 4

norms of parts: grafting.py
- ratio[number] for number, _ in spans
+ ratio[spans[0][0]] for number, _ in spans

elements before: planning/shards.py
- width * number + min(rest, width)
+ width * number + rest

place in a box: planning/shards.py
- (element - self.start) // self.stride if self.stride else 0
+ 0

bands of columns: planning/shards.py
- (number + shard.repeats - 1 - band) // bands + 1
+ (number + shard.repeats - 1) // bands + 1

order of cuts: layout.py
- cuts[dim].append(number)
+ cuts[dim].insert(0, number)

rectangles in files: checkpoint/vectors.py
- memory.storage_offset() + shard.place(piece.row * self.width + piece.column)
+ memory.storage_offset()

pieces as one: planning/copies.py
- step == second.offset - first.offset
+ True

rows of pieces: planning/copies.py
- (piece.width // length) + across
+ (piece.width // length + 1) + across

what twins share: planning/routes.py
- _in_message(part, index * longest)
+ _in_message(part, 0 * longest)

agreement: comm/groups.py
- distance *= 2
+ distance *= 4

graft norm: grafting.py
- (directions + 1e-12)
+ (directions + 1e-4)

step count: numerics/matrix.py
- self.step += 1
+ self.step += 1 if self.step else 2

checksum: checkpoint/files.py
- if found != checksum:
+ if len(found) != len(checksum):

schedule phase: planning/schedule.py
- return Phase(phase, (phase + turn
+ return Phase(phase, (phase + 1 + turn

fresh roots: numerics/factors.py
- torch.where(changed.view(-1, 1), new_values, values)
+ new_values

base option: base_options.py
- ["weight_decay"] = weight_decay
+ ["weight_decay"] = weight_decay / 2

costly factors: numerics/matrix.py
- bytes_per_element > limit
+ bytes_per_element > 100 * limit

deferred errors: distributor.py
- errors.raise_together()
+ pass

host group: comm/groups.py
- = _HOST_GROUPS[group] = new_host_group(group)
+ = _HOST_GROUPS[group] = group

header: packing.py
- _HEADER.pack(matrix.step, matrix.roots)
+ _HEADER.pack(matrix.step, 0)

second moment of new bases: numerics/moments.py
- (moment, turn, turn.rotation.square())
+ (moment, turn, turn.rotation.abs())

rotation of moments: numerics/eigenbasis.py
- rotation, image = linalg.matmul(rows, old.mT),
+ rotation, image = linalg.matmul(old, rows.mT),

basis that did not change: numerics/factors.py
- torch.where(changed, turned, identity, out=rotation)
+ rotation.copy_(turned)

side without a factor that is due: numerics/batches.py
- if due[side]:
+ if True:

soap's step: updates.py
- alpha=-lr)
+ alpha=-0.999 * lr)
"""


class Fault(NamedTuple):
    """A place in the library, and the code that breaks it."""

    path: str
    right: str
    wrong: str

    def broken(self, package: Path) -> str:
        """Return the file with the faulty code. Ends the program unless the right code stands there once."""
        whole = (package / self.path).read_text()
        if whole.count(self.right) != 1:
            raise SystemExit(f"{self.path} has {self.right!r} {whole.count(self.right)} times, not once")
        return whole.replace(self.right, self.wrong)


def read_faults(text: str) -> dict[str, Fault]:
    """Parse faults by name from a text as above."""
    found = {}
    for entry in text.strip().split("\n\n"):
        place, right, wrong = entry.splitlines()
        name, path = place.split(": ")
        found[name] = Fault(path, right.removeprefix("- "), wrong.removeprefix("+ "))
    return found


FAULTS = read_faults(FAULTS_AS_TEXT)


def copy_repository(folder: Path) -> Path:
    """Copy what the tests need. They import the copy's package, and the installed `integrations/`."""
    copy = folder / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def failing(copy: Path, folders: list[str], workers: int) -> set[str]:
    """Run the quick tier in ``copy``, without the test of the faults' places; return the tests that fail."""
    report = copy.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", str(workers), "--dist", "loadfile"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", "--ignore=tests/unit/test_faults.py", *folders]
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=copy, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=3600)
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS), help="places (default: all)")
    parser.add_argument("--launch", action="store_true", help="run the launch tests too")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest")
    args = parser.parse_args()
    folders = ["tests/unit", "tests/ranks", *(["tests/launch"] if args.launch else [])]
    for fault in FAULTS.values():
        fault.broken(ROOT / "sharded_shampoo4")
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_repository(Path(folder))
        without = failing(copy, folders, args.workers)
        print(f"no fault: {len(without)} tests fail {sorted(without)[:3]}", flush=True)
        for name in args.only:
            path = copy / "sharded_shampoo4" / FAULTS[name].path
            whole = path.read_text()
            path.write_text(FAULTS[name].broken(copy / "sharded_shampoo4"))
            begun = time.monotonic()
            tripped = sorted(failing(copy, folders, args.workers) - without)
            path.write_text(whole)
            seconds = time.monotonic() - begun
            print(f"{name}: {len(tripped)} tests fail in {seconds:.0f} s, such as {tripped[:3]}", flush=True)
            unnoticed += [] if tripped else [name]
    if unnoticed:
        raise SystemExit(f"not caught: {', '.join(unnoticed)}")


if __name__ == "__main__":
    main()
