"""Settings of every test: one thread, nothing from the network, and processes that find ``support``.

Set before anything imports torch or a package that reads them; the processes that tests start inherit them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads is part of the arithmetic
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait for work leave the core to other tests
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# For processes that are forked from a server (support/worlds.py), which takes its path from here only.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
sys.path.insert(0, str(TESTS))

collect_ignore = ["support", "golden", "faults.py", "soak.py"]  # no tests, and none of them is imported for doctests
