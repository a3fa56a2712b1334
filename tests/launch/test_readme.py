"""What the README tells people to write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support import forked
from support.launching import SCRIPTS
from support.scripts.readme_script import Model

from sharded_shampoo4 import estimate_memory

HOSTS = (
    *("One process, DDP, FSDP2, HSDP", "FSDP2 with tensor or expert parallelism", "FSDP1", "DeepSpeed"),
    *("Accelerate", "HF Trainer", "Some of the ranks"),
)


def test_the_lines_for_every_host_train_with_shared_factors(tmp_path: Path) -> None:
    launcher = (Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", 2)
    found = forked.run(*launcher, SCRIPTS / "readme_script.py", tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.keys() == second.keys() == set(HOSTS)
    # Both layers' factors, no factor twice, and under every host the same ones.
    alone = estimate_memory(Model().named_parameters()).preconditioner[0]
    for host in HOSTS:
        (name, held), (_, held_too) = first[host], second[host]
        assert name == "Shampoo4" and held + held_too == alone and min(held, held_too) > 0, (host, held, held_too)
