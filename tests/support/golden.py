"""What every later version must reproduce: the bits of weights, directions and factors of the contract's cases.

Every case is trained under every host, saved as a portable checkpoint, and read back in one process. So the digests
rest on the public API alone, and do not depend on the host or the number of ranks. Two files written by an early
version, ``golden/checkpoint`` and ``golden/state_dict.pt``, must load and continue with the recorded bits.

``golden/digests.py`` is the command. It also chooses kernels that all x86 CPUs share, since CPUs round differently.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_shampoo4 import Shampoo4, checkpoint
from support import worlds as hosts
from support import zero_worlds as zero
from support.contract import CASES, STEPS, make_optimizer, train_case, train_case_as_zero_does
from support.training import FIRST, THEN, Training

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
DIGESTS, CHECKPOINT, STATE_DICT = GOLDEN / "digests.json", GOLDEN / "checkpoint", GOLDEN / "state_dict.pt"
# The defaults of the version that wrote the files.
EARLIER: dict[str, Any] = {
    "split": "even", "max_aspect": 0, "batch_dims": 0, "refresh_dtype": "float64", "rectify_steps": (1, 4),
}  # fmt: skip
Digests = dict[str, Any]


# -- directions, step by step, in the base optimizer's states ----------------------------------------------------------


class _Recording(torch.optim.Optimizer):
    """Keeps the gradient of every step, which is Shampoo4's direction, in an elementwise state of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._record(parameter)
        return super().step(closure)

    def _record(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state.update({_key(step): torch.zeros_like(parameter) for step in range(STEPS)}, **self._fresh(parameter))
        state[_key(int(state["step"]))].copy_(parameter.grad)

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states that the optimizer itself makes for a parameter that has none, and the count of steps."""
        return {"step": torch.tensor(0.0)}


def _key(step: int) -> str:
    return f"direction {step + 1}"


class RecordingSGD(_Recording, torch.optim.SGD):
    """SGD that records."""

    def _record(self, parameter: Tensor) -> None:
        super()._record(parameter)
        self.state[parameter]["step"] += 1


class RecordingAdamW(_Recording, torch.optim.AdamW):
    """AdamW that records."""

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {**super()._fresh(parameter), **moments}


# -- one case under one host -------------------------------------------------------------------------------------------


def recording_base(name: str) -> type[_Recording]:
    """The base optimizer of a case, as one that records."""
    return RecordingSGD if CASES[name][1].get("base") == "sgd" else RecordingAdamW


def digests_in(folder: str, host: str, name: str) -> Digests:
    """What a case's checkpoint holds, read in one process."""
    kind, options = CASES[name]
    model = hosts.make_model(kind)
    model = model.float() if host.startswith("zero") else model
    optimizer = make_optimizer(model, "none", {**options, "base": recording_base(name)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.load(optimizer, folder)
    names = {parameter: key for key, parameter in model.named_parameters()}
    states = {names[parameter]: state for parameter, state in optimizer.state.items()}
    return {
        "weights": digest(dict(model.named_parameters())),
        "directions": " ".join(
            digest({key: state[_key(step)] for key, state in states.items() if _key(step) in state})
            for step in range(STEPS)
        ),
        "factors": digest(factors(optimizer)),
    }


def factors(optimizer: Shampoo4) -> dict[str, Tensor]:
    """The packed factors of a process by itself, by the place of their parameters."""
    state = optimizer.state_dict()["state"]
    return {str(key): entry["preconditioner"] for key, entry in state.items() if "preconditioner" in entry}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The beginning of :func:`support.worlds.digest`: enough here."""
    return hosts.digest(tensors)[:16]


def probe() -> str:
    """Digest of what the arithmetic of this machine makes of fixed numbers: products, factorisations, sums, powers."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.float64):
        for order in (13, 30, 64, 101):
            a = torch.randn(3, order, order + 7, generator=generator, dtype=torch.float64).to(dtype)
            square = torch.bmm(a, a.mT)
            values, vectors = torch.linalg.eigh(square)
            found[f"{dtype} {order}"] = torch.cat(
                [square, torch.mm(a[0], a[1].mT)[None], torch.linalg.qr(square)[0], vectors]
            )
            found[f"{dtype} {order} vectors"] = torch.cat([values, values.sqrt(), values.abs() ** 0.3, square.sum(1)])
            found[f"{dtype} {order} norms"] = torch.linalg.vector_norm(square, dim=2)
    low = torch.randn(2, 30, 30, generator=generator).to(torch.bfloat16)
    return digest({**found, "bfloat16": torch.bmm(low, low)})


# -- in ranks ----------------------------------------------------------------------------------------------------------


def save_all(rank: int, folder: str, ran: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Train every case under every host, and save each."""
    prepare(ran)
    for host in ran:
        for name in names:
            trained, optimizer = train_case(host, name, base=recording_base(name))
            by_zero = host.startswith("zero")
            checkpoint.save(trained if by_zero else optimizer, f"{folder}/{host} {name}")
            if by_zero:
                trained.destroy()


def prepare(ran: Iterable[str] = ()) -> None:
    """Before anything is computed in a process: choose the kernels, and start DeepSpeed if hosts need it.

    Left out are kernels that no environment variable reaches and that round differently from CPU to CPU: oneDNN's
    products, and MKL's square roots, which are not correctly rounded with AVX-512.
    """
    torch.backends.mkldnn.set_flags(_enabled=False)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _replace_square_roots()
    if any(host.startswith("zero") for host in ran):
        zero.prepare()


@functools.cache
def _replace_square_roots() -> torch.library.Library:
    kernels = torch.library.Library("aten", "IMPL")
    for overload, function in (("sqrt", _sqrt), ("sqrt_", lambda x: x.copy_(_sqrt(x))), ("sqrt.out", _sqrt_out)):
        kernels.impl(overload, function, "CPU", allow_override=True)
    return kernels


def _sqrt(values: Tensor) -> Tensor:
    """Square roots by numpy, which every CPU rounds correctly."""
    wide = values.detach() if values.dtype == torch.float64 else values.detach().to(torch.float32)
    roots = np.sqrt(wide.numpy())
    return torch.empty_like(values).copy_(torch.as_tensor(roots))


def _sqrt_out(values: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_sqrt(values))


def run_world(world_size: int, ran: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Digests]]:
    """What hosts at a number of ranks have saved, by host and case."""
    with tempfile.TemporaryDirectory() as folder:
        hosts.run_ranks(world_size, save_all, folder, tuple(ran), tuple(names), timeout=600.0)
        return {host: {name: digests_in(f"{folder}/{host} {name}", host, name) for name in names} for host in ran}


def run_alone(names: Iterable[str]) -> dict[str, dict[str, Digests]]:
    """The same cases in one process, as hosts of torch do ("plain") and as DeepSpeed does ("zero")."""
    found: dict[str, dict[str, Digests]] = {"plain": {}, "zero": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            base = recording_base(name)
            for kind, (_, optimizer) in (
                ("plain", train_case("none", name, base=base)),
                ("zero", train_case_as_zero_does(name, base=base)),
            ):
                checkpoint.save(optimizer, f"{folder}/{kind} {name}")
                found[kind][name] = digests_in(f"{folder}/{kind} {name}", kind, name)
    return found


# -- files of an early version -----------------------------------------------------------------------------------------


def write_files() -> None:
    """The two files that every later version must load: a checkpoint of FSDP1 on two ranks, and a state_dict."""
    hosts.run_ranks(2, _write_checkpoint, str(CHECKPOINT))
    training = Training("none", kind="vit")
    training.train(FIRST)
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, STATE_DICT)


def _write_checkpoint(rank: int, folder: str) -> None:
    prepare()
    training = Training("fsdp1", kind="vit")
    training.train(FIRST)
    training.save(folder)


def continue_files(rank: int, ran: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Load the files under hosts, and train on; digests of the weights at once and at the end."""
    prepare(ran)
    found = {}
    for host in ran:
        training = Training(host, seed=1, kind="vit", **EARLIER)
        training.load(CHECKPOINT)
        found[f"checkpoint, {host}"] = _go_on(training)
        if host in ("none", "ddp"):
            training = Training(host, seed=1, kind="vit", split="even", max_aspect=0, batch_dims=0)
            saved = torch.load(STATE_DICT, weights_only=True)
            getattr(training.model, "module", training.model).load_state_dict(saved["model"])
            training.optimizer.load_state_dict(saved["optimizer"])
            found[f"state_dict, {host}"] = _go_on(training)
    return found


def _go_on(training: Training) -> dict[str, str]:
    loaded = digest(training.parameters())
    for group in training.optimizer.param_groups:
        group["root"] = "rectified"  # the only way to compute roots that the early version knew
    found = {"loaded": loaded, "continued": digest(training.train(THEN))}
    training.end()
    return found


def files_alone() -> dict[str, dict[str, str]]:
    """The files in this process."""
    return continue_files(0, ("none",))


def files_in_world(world_size: int, ran: Sequence[str]) -> dict[str, dict[str, str]]:
    """The files under hosts at a number of ranks."""
    found: dict[str, dict[str, str]] = hosts.run_ranks(world_size, continue_files, tuple(ran))[0]
    return found


def record() -> dict[str, Any]:
    """What ``digests.json`` holds. The two files are written only if they are missing: they stay those of old."""
    if not CHECKPOINT.exists():
        write_files()
    cases, files = run_alone(CASES), files_alone()
    if files["state_dict, none"] != files["checkpoint, none"]:
        raise RuntimeError(f"the two files hold the same training, but continue differently: {files}")
    return {"probe": probe(), "cases": cases, "files": files["checkpoint, none"]}
