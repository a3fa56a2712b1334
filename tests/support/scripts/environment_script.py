"""Started by launchers for test_forked.py: writes the environment and the arguments of every worker.

    accelerate launch ... tests/support/scripts/environment_script.py FOLDER [STATUS]

Ends with STATUS on rank 1, and waits on the others if that is not 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

rank = os.environ.get("RANK", "0")
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps({"environment": dict(os.environ), "arguments": sys.argv}))
if len(sys.argv) > 2:
    if rank == "1":
        raise SystemExit(int(sys.argv[2]))
    time.sleep(100)
