"""Golden digests: record what this version computes, or print it.

    python tests/golden/digests.py --write          # after a change that means to change numbers (`make golden`)
    python tests/golden/digests.py --worlds 2 3     # what every host computes at 2 and 3 ranks, as JSON

Nothing is recorded without --write.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# Variables that choose kernels which all x86 CPUs have. They must be set before torch is imported.
PORTABLE = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
TESTS = Path(__file__).resolve().parents[1]


def start_portable() -> None:
    """Run this command again with PORTABLE set, if it is not set yet."""
    if any(os.environ.get(name) != value for name, value in PORTABLE.items()):
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        wanted = {**os.environ, **PORTABLE, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)


def main() -> None:
    start_portable()
    import torch
    from support import golden
    from support.training import ALL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what one process computes in digests.json")
    parser.add_argument("--worlds", type=int, nargs="*", default=[], help="numbers of ranks to run the hosts at")
    parser.add_argument("--hosts", nargs="*", default=ALL, choices=ALL, help="default: all")
    parser.add_argument(
        "--cases", nargs="*", default=list(golden.CASES), choices=list(golden.CASES), help="default: all"
    )
    parser.add_argument("--file_hosts", nargs="*", default=[], choices=ALL, help="hosts that load the files")
    args = parser.parse_args()
    golden.prepare()
    if args.write:
        record = golden.record()
        golden.DIGESTS.write_text(json.dumps({"torch": torch.__version__, **record}, indent=1) + "\n")
        return
    found = {
        "probe": golden.probe(),
        "alone": golden.run_alone(args.cases),
        "worlds": {size: golden.run_world(size, args.hosts, args.cases) for size in args.worlds},
        "files": {
            0: golden.files_alone(),
            **{size: golden.files_in_world(size, args.file_hosts) for size in args.worlds},
        },
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
