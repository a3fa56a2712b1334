"""States that do not fit what loads or holds them: an error on every rank that names what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import worlds as hosts
from support import zero_worlds as zero
from support.training import Training
from support.worlds import said
from support.zero_cases import Case, start, train
from torch.distributed.fsdp import FullyShardedDataParallel

from sharded_shampoo4 import checkpoint


def load_on_one_rank(rank: int, host: str) -> str:
    training = Training(host)
    fresh = training.optimizer.state_dict()
    training.train(range(2))
    if rank == 1:
        training.optimizer.load_state_dict(fresh)
    return said(lambda: training.train(range(1)))


@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_a_fresh_state_dict_that_one_rank_loads(host: str) -> None:
    """It holds no factors, which ranks would compare."""
    for heard in hosts.run_ranks(2, load_on_one_rank, host):
        assert heard == "ValueError: rank 1 has called load_state_dict(), unlike rank 0: call it on every rank"


def inside_summon_full_params(rank: int, folder: str) -> list[str]:
    training = Training("fsdp1")
    training.train(range(2))
    before = hosts.full_parameters(training.model, "fsdp1")
    with FullyShardedDataParallel.summon_full_params(training.model):
        heard = [said(lambda: checkpoint.save(training.optimizer, folder, model=training.model))]
        heard.append(said(lambda: checkpoint.load(training.optimizer, folder, model=training.model)))
    after = hosts.full_parameters(training.model, "fsdp1")
    return [*heard, *(name for name in before if not before[name].equal(after[name]))]


def test_whole_weights_of_fsdp1(tmp_path: Path) -> None:
    """A checkpoint needs the shards; FSDP1 writes the whole weights over them at the end of its context."""
    for heard in hosts.run_ranks(2, inside_summon_full_params, str(tmp_path)):
        assert len(heard) == 2
        for message in heard:
            assert message.startswith("RuntimeError: inside FSDP.summon_full_params()"), message


def other_blocks(rank: int, host: str, folder: str) -> str:
    zero.prepare()
    case = Case(host)
    engine = start(case)
    train(engine, case, range(2))
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = start(case)
    for group in engine.basic_optimizer.param_groups:
        group["max_preconditioner_dim"] = 13
    heard = said(lambda: engine.load_checkpoint(folder))
    engine.destroy()
    return heard


@pytest.mark.parametrize("host", ["zero1", "zero3"])
def test_zeros_states_of_other_blocks(host: str, tmp_path: Path) -> None:
    """The option is named, although flat tensors stand in the groups."""
    for heard in hosts.run_ranks(2, other_blocks, host, str(tmp_path)):
        assert "param group 0 of the state_dict has max_preconditioner_dim=" in heard
        assert "where this optimizer has max_preconditioner_dim=13" in heard


def given_up(rank: int) -> list[int]:
    zero.prepare()
    case = Case("zero1")
    engine = start(case)
    train(engine, case, range(2))
    found = [len(engine.basic_optimizer.state_dict()["preconditioner_pieces"])]
    for group in engine.basic_optimizer.param_groups:
        group["precondition"] = False
    found.append(len(engine.basic_optimizer.state_dict()["preconditioner_pieces"]))
    engine.destroy()
    return found


def test_zeros_states_after_preconditioning_was_given_up() -> None:
    for before, after in hosts.run_ranks(2, given_up):
        assert before and not after
