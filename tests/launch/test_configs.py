"""Every file of launch/configs, launched for three steps on the CPU: it runs what it claims. And train_trainer.py.

So do the flags of ``accelerate launch`` that launch/README.md names for bf16 and for two machines. Files that
test_accelerate.py launches, for longer, are not launched again. There, each launcher really runs; here all workers are
forked (support/forked.py). The JSON files are launched as torchrun does.

All but one of each kind are slow.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import forked
from support.configurations import BY_JSON, CONFIGS, HOSTS
from support.launching import LAUNCH, SCRIPTS, free_port, results
from support.marks import slow_except

Process = subprocess.CompletedProcess[str]
Runs = Callable[[str], tuple[Path, str]]

BIN = Path(sys.executable).parent
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node", 2)
SCRIPT = SCRIPTS / "config_script.py"  # train_vit.py, watched
FLAGS = (
    *("--max_train_steps", 3, "--max_train_samples", 96, "--max_eval_samples", 32, "--num_hidden_layers", 1),
    *("--per_device_train_batch_size", 8, "--statistics_interval", 1, "--logging_steps", 1),
)


@dataclass(frozen=True)
class Claim:
    """What a file says that runs."""

    host: str
    computes_in: str = "float32"
    sharded_between_passes: bool = False  # FSDP2's parameters, between forward and backward
    offloaded: tuple[str, ...] = ()  # DeepSpeed's options
    names_the_optimizer: bool = False

    @property
    def processes(self) -> int:
        """How many the file starts."""
        return 1 if self.host == "one process" else int(self.host.split()[-2])


FSDP2 = Claim("FSDP2 on 2 processes", sharded_between_passes=True)
BOTH = ("offload_optimizer", "offload_param")
BF16, TWO_MACHINES = "--mixed_precision bf16", "--num_machines 2"
# A file, and flags of accelerate launch beside it.
CLAIMS = {
    "single.yaml": Claim("one process"),
    f"ddp.yaml {BF16}": Claim("DDP on 2 processes", computes_in="bfloat16"),
    f"ddp.yaml {TWO_MACHINES}": Claim("DDP on 2 processes"),
    "fsdp1.yaml": Claim("FSDP1 on 2 processes"),
    f"fsdp2.yaml {BF16}": Claim(FSDP2.host, computes_in="bfloat16", sharded_between_passes=True),
    "fsdp2.yaml --fsdp_reshard_after_forward false": Claim(FSDP2.host),
    f"fsdp2.yaml {TWO_MACHINES}": FSDP2,
    f"hsdp.yaml {TWO_MACHINES}": Claim("HSDP 2x2 on 4 processes", sharded_between_passes=True),
    "zero1.yaml": Claim("ZeRO-1 on 2 processes"),
    f"zero3.yaml {BF16}": Claim("ZeRO-3 on 2 processes", computes_in="bfloat16"),
    f"zero3.yaml {TWO_MACHINES} --deepspeed_multinode_launcher standard": Claim("ZeRO-3 on 2 processes"),
    "zero3-offload.yaml": Claim("ZeRO-3 on 2 processes", offloaded=BOTH),
    "zero3-offload.json": Claim("ZeRO-3 on 2 processes", offloaded=BOTH, names_the_optimizer=True),
    "zero3-offload-client.json": Claim("ZeRO-3 on 2 processes", offloaded=BOTH),
}
ELSEWHERE = {f"{config}.yaml" for config in (*HOSTS, *CONFIGS)} | {f"{file}.json" for _, file, _ in BY_JSON.values()}

ACCELERATE = (BIN / "accelerate", "launch", "--main_process_port", 0, "--config_file")

# train_trainer.py: the command without the script, flags, and what it says that ran.
TRAINERS: dict[str, tuple[tuple[object, ...], tuple[object, ...], str]] = {
    "ddp": (TORCHRUN, (), "DDP on 2 processes"),
    "fsdp2": (
        (*ACCELERATE, LAUNCH / "configs" / "fsdp2.yaml", "--fsdp_transformer_layer_cls_to_wrap", "ViTLayer"),
        (),
        "FSDP2 on 2 processes",
    ),
    "zero2": (TORCHRUN, ("--deepspeed", LAUNCH / "configs" / "zero2.json"), "ZeRO-2 on 2 processes"),
    # Goes on with the last of the three epochs of "fsdp2".
    "resumed": (
        (sys.executable,),
        ("--per_device_train_batch_size", 64, "--resume_from_checkpoint", "latest"),
        "one process",
    ),
}
TRAINER_FLAGS = (
    *("--num_train_epochs", 3, "--num_hidden_layers", 1, "--learning_rate", 3e-3),
    *("--statistics_interval", 5),
)
STEPS = 23  # of an epoch: 1437 images, 64 a step


def by_file(name: str, folder: Path) -> list[Process]:
    """Train by a file of launch/configs and flags beside it: a result for every launcher that this takes."""
    name, *flags = name.split()
    file, script = LAUNCH / "configs" / name, (SCRIPT, "--output_dir", folder, *FLAGS)
    if file.suffix == ".json":
        return [forked.run(*TORCHRUN, *script, "--deepspeed_config", file)]
    if "--num_machines" not in flags:
        return [forked.run(*ACCELERATE, file, *flags, *script)]
    meeting = (*flags, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    return forked.run_machines([(*ACCELERATE, file, *meeting, "--machine_rank", rank, *script) for rank in range(2)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function from a name to its folder and what it printed. A launch is made when it is first asked for."""
    base = tmp_path_factory.mktemp("configs")

    def trainer(name: str) -> list[Process]:
        command, flags, _ = TRAINERS[name]
        if name == "resumed":
            finished("fsdp2")
            shutil.copytree(base / "fsdp2", base / name, ignore=shutil.ignore_patterns(f"checkpoint-{3 * STEPS}"))
        return [forked.run(*command, LAUNCH / "train_trainer.py", "--output_dir", base / name, *TRAINER_FLAGS, *flags)]

    @functools.cache
    def start(name: str) -> list[Process]:
        return trainer(name) if name in TRAINERS else by_file(name, base / name)

    def finished(name: str) -> tuple[Path, str]:
        processes = start(name)
        for process in processes:
            assert process.returncode == 0, process.stderr[-3000:]
        return base / name, "".join(process.stdout + process.stderr for process in processes)

    return finished


def test_every_file_is_launched() -> None:
    files = {name.split()[0] for name in CLAIMS}
    assert {path.name for path in (LAUNCH / "configs").iterdir()} == files | ELSEWHERE


@pytest.mark.parametrize("name", slow_except(["fsdp1.yaml", "zero3-offload.json"], CLAIMS))
def test_a_file_runs_what_it_claims(runs: Runs, name: str) -> None:
    claim, (folder, printed) = CLAIMS[name], runs(name)
    found = results(folder)
    assert found["host"] == claim.host and found["steps"] == 3
    held = [process["preconditioner"] for process in found["state_bytes_per_process"]]
    assert len(held) == claim.processes and all(held)
    assert ("--optimizer and its options have no effect" in printed) is claim.names_the_optimizer
    assert (found["deepspeed_optimizer"] is not None) is claim.names_the_optimizer
    assert found["mixed_precision"] == {"float32": "no", "bfloat16": "bf16"}[claim.computes_in]
    for process in range(claim.processes):
        assert json.loads((folder / f"facts-{process}.json").read_text()) == {
            "host": claim.host,
            "computes in": f"torch.{claim.computes_in}",
            "sharded between forward and backward": claim.sharded_between_passes,
            "optimizer": "Shampoo4",
            "steps in": ["torch.float32"],
            "offloaded": list(claim.offloaded),
            "intervals": [[5, 500] if claim.names_the_optimizer else [1, 500]],
        }


def trainer_losses(folder: Path) -> list[float]:
    """The mean training loss of every epoch, also of those before a resume."""
    state = json.loads((folder / f"checkpoint-{3 * STEPS}" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


@pytest.mark.parametrize("name", slow_except(["fsdp2"], TRAINERS))
def test_the_example_of_the_trainer(runs: Runs, name: str) -> None:
    folder, printed = runs(name)
    assert f"{TRAINERS[name][2]}, Shampoo4: " in printed
    losses = trainer_losses(folder)
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_the_example_of_the_trainer_goes_on_under_another_host(runs: Runs) -> None:
    full, resumed = (trainer_losses(runs(name)[0]) for name in ("fsdp2", "resumed"))
    assert resumed[:2] == full[:2]
    assert resumed[2] == pytest.approx(full[2], abs=0.02), "but for the epoch's last step, which fills its batch up"
