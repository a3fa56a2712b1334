"""States under every host: nothing is lost, mangled or loaded in silence; and ranks fail together."""

from __future__ import annotations

import copy
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import worlds as hosts
from support.contract import make_optimizer
from support.marks import slow_except
from support.worlds import said
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from sharded_shampoo4 import Shampoo4

OPTIONS: dict[str, Any] = {"max_preconditioner_dim": 30, "min_quant_numel": 0}
SOAP: dict[str, Any] = {
    **OPTIONS,
    "method": "soap",
    "bits": 4,
    "momentum_dtype": "bfloat16",
    "second_moment_dtype": "int8",
}
KIND = "mlp"  # DCP, and not we, stumbles over parameters that never have a gradient: their states come and go


def advance(model: torch.nn.Module, host: str, optimizer: Shampoo4, steps: range) -> dict[str, torch.Tensor]:
    for step in steps:
        hosts.set_gradients(model, host, hosts.make_gradients(KIND, step))
        optimizer.step()
    return hosts.full_parameters(model, host)


def make(host: str, options: dict[str, Any] = OPTIONS) -> tuple[torch.nn.Module, Shampoo4]:
    model = hosts.wrap(hosts.make_model(KIND), host)
    return model, make_optimizer(model, host, options)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continues(
    host: str, how: Callable[[torch.nn.Module, Shampoo4, torch.nn.Module, Shampoo4], None], options: dict[str, Any]
) -> bool:
    """Five steps, a transfer of all states to a fresh model and optimizer, five steps of both: equal in the end?"""
    model, optimizer = make(host, options)
    advance(model, host, optimizer, range(5))
    other_model, other = make(host, options)
    other_model.load_state_dict(model.state_dict())
    how(model, optimizer, other_model, other)
    held = optimizer.state_bytes()
    expected = advance(model, host, optimizer, range(5, 10))
    found = advance(other_model, host, other, range(5, 10))
    same_bytes = optimizer.state_bytes() == other.state_bytes() == held
    return same_bytes and all(torch.equal(found[name], expected[name]) for name in expected)


def by_state_dict(_: Any, optimizer: Shampoo4, __: Any, other: Shampoo4) -> None:
    optimizer.consolidate_state_dict()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def by_file(_: Any, optimizer: Shampoo4, __: Any, other: Shampoo4) -> None:
    optimizer.consolidate_state_dict()
    other.load_state_dict(through_a_file(optimizer.state_dict()))


def by_full_state_dict(model: Any, optimizer: Shampoo4, other_model: Any, other: Shampoo4) -> None:
    """As Accelerate does under FSDP2 with FULL_STATE_DICT: rank 0 alone has the file."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    state = through_a_file(state) if dist.get_rank() == 0 else {}
    set_optimizer_state_dict(other_model, other, state, options=options)


def by_dcp(model: Any, optimizer: Shampoo4, other_model: Any, other: Shampoo4) -> None:
    """As Accelerate does under FSDP2 with SHARDED_STATE_DICT: a dry step makes the states that are then loaded."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder[0])
    state = {"optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(state, checkpoint_id=folder[0])
    set_optimizer_state_dict(other_model, other, state["optimizer"])
    dist.barrier()


WAYS = {
    by_state_dict: hosts.HOSTS,
    by_file: ("ddp", "fsdp1", "fsdp2"),
    by_full_state_dict: ("fsdp2", "hsdp"),
    by_dcp: ("fsdp2", "hsdp"),
}


def transfers(rank: int) -> dict[tuple[str, ...], bool]:
    return {
        (method, host, how.__name__): continues(host, how, options)
        for method, options in (("shampoo", OPTIONS), ("soap", SOAP))
        for how, ran in WAYS.items()
        for host in ran
    }


@pytest.mark.parametrize("world_size", slow_except([2], [2, 3]))
def test_states_continue_bitwise(world_size: int) -> None:
    for found in hosts.run_ranks(world_size, transfers):
        assert len(found) == 22 and all(found.values()), found


def save_for_others(rank: int, folder: str) -> None:
    model, optimizer = make("fsdp2")
    advance(model, "fsdp2", optimizer, range(5))
    dcp.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )


def load_from_others(rank: int, folder: str) -> dict[str, torch.Tensor]:
    model, optimizer = make("fsdp2")
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return advance(model, "fsdp2", optimizer, range(5, 10))


@pytest.mark.slow
def test_a_sharded_checkpoint_moves_to_another_rank_count(tmp_path: Path) -> None:
    """Two ranks save, three go on: as one process that never stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = advance(*(lambda made: (made[0], "none", made[1]))(make("none")), range(10))
    torch.set_num_threads(threads)
    hosts.run_ranks(2, save_for_others, str(tmp_path))
    for found in hosts.run_ranks(3, load_from_others, str(tmp_path)):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def disagreements(rank: int) -> dict[str, str]:
    """Each of these must raise on both ranks, and leave both able to go on."""

    def step(
        options: dict[str, Any], change: Callable[[dict[str, Any]], None] = lambda g: None, turned: bool = False
    ) -> None:
        model = hosts.make_model("mlp")
        named = list(hosts.named(model, "none").items())[:: -1 if turned else 1]
        optimizer = Shampoo4(named, **{"statistics_interval": 1, **options})
        gradients = hosts.make_gradients("mlp", 0)
        change(gradients)
        hosts.set_gradients(model, "none", gradients)
        for _ in range(options.get("max_failures", 1)):
            optimizer.step()

    def nan(gradients: dict[str, Any]) -> None:
        gradients["head.weight"][0, 0] = torch.nan

    def own(gradients: dict[str, Any]) -> None:
        gradients["head.weight"] += rank

    def fewer() -> None:
        model = hosts.make_model("mlp")
        parameters = list(model.named_parameters())[: 6 if rank else None]
        hosts.set_gradients(model, "none", hosts.make_gradients("mlp", 0))
        Shampoo4(parameters).step()

    def sparse() -> None:
        embedding = torch.nn.Embedding(10, 4, sparse=rank == 1)
        embedding(torch.tensor([1, 2])).sum().backward()
        Shampoo4(embedding.named_parameters()).step()

    def unbound() -> None:
        model = hosts.wrap(hosts.make_model("mlp"), "fsdp1")
        hosts.set_gradients(model, "fsdp1", hosts.make_gradients("mlp", 0))
        Shampoo4(hosts.named(model, "fsdp1").items()).step()

    def unconsolidated() -> None:
        model, optimizer = make("ddp")
        advance(model, "ddp", optimizer, range(2))
        optimizer.state_dict()

    model, optimizer = make("ddp")
    advance(model, "ddp", optimizer, range(2))
    return {
        "bits": said(lambda: step({"bits": 8 if rank else 4})),
        "interval": said(lambda: step({"method": "shampoo", "root_interval": 7 + rank})),
        "order": said(lambda: step({}, turned=rank == 1)),
        "lr": said(lambda: step({"lr": torch.tensor(1e-3 * 2**rank)})),
        "betas": said(lambda: step({"betas": (0.9, 0.5 + rank / 4)})),
        "base": said(lambda: step({"base": "sgd" if rank else "adagrad"})),
        "own gradients": said(lambda: step({}, own)),
        "failures": said(lambda: step({"max_failures": 3}, nan)),
        "fewer": said(fewer),
        "sparse": said(sparse),
        "unbound": said(unbound),
        "unconsolidated": said(unconsolidated),
        "copy": said(lambda: copy.deepcopy(optimizer)),
        "well": said(lambda: step({})),
    }


def disagree_later(rank: int) -> list[str]:
    """Give the ranks different learning rates after some steps, and then all another option."""
    model, optimizer = make("ddp")
    advance(model, "ddp", optimizer, range(2))
    optimizer.param_groups[0]["lr"] *= 1 + rank
    optimizer.param_groups[0]["shampoo_beta"] = 0.8
    told = [said(lambda: advance(model, "ddp", optimizer, range(2, 3)))]
    optimizer.param_groups[0]["lr"] /= 1 + rank
    return [*told, said(lambda: advance(model, "ddp", optimizer, range(2, 3)))]


def test_groups_are_compared_again_when_options_have_changed() -> None:
    for first, second in hosts.run_ranks(2, disagree_later):
        assert re.match(r"ValueError: lr of param group 0 is \S+ on rank 0 and \S+ on rank 1", first), first
        assert second == "nothing was raised"


def test_ranks_fail_together_and_say_why() -> None:
    for found in hosts.run_ranks(2, disagreements):
        assert found["bits"].startswith("ValueError: bits of stem.weight is 4 on rank 0 and 8 on rank 1; where every")
        assert found["interval"].startswith("ValueError: root_interval of stem.weight is 7 on rank 0 and 8 on rank 1; ")
        assert "ranks precondition different parameters: rank 0 3 (stem.weight," in found["order"]
        assert "(head.weight," in found["order"]
        assert found["lr"].startswith("ValueError: lr of param group 0 is 0.00100000")
        betas = "betas of param group 0 is (0.9, 0.5) on rank 0 and (0.9, 0.75) on rank 1"
        assert found["betas"].startswith(f"ValueError: {betas}; where every rank trains a model of its own")
        assert found["base"].startswith(
            "ValueError: base of param group 0 is 'Adagrad' on rank 0 and 'SGD' on rank 1; "
        )
        assert (
            "ranks 0 and 1 hold the same elements of head.weight, but their gradients differ" in found["own gradients"]
        )
        assert "preconditioner of head.weight" in found["failures"] and "3 times in a row" in found["failures"]
        assert "ranks precondition different parameters" in found["fewer"]
        assert "the gradient of weight is sparse" in found["sparse"]
        assert "is sharded by FSDP1, which does not tell its shape" in found["unbound"]
        assert "consolidate_state_dict() on every rank" in found["unconsolidated"]
        assert "cannot be copied or pickled" in found["copy"]
        assert found["well"] == "nothing was raised"
