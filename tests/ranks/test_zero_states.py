"""What DeepSpeed saves and loads of the optimizer, what each rank keeps, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from support import worlds as hosts
from support import zero_worlds as zero
from support.marks import batch_of, slow_except
from support.worlds import said
from support.zero_cases import BF16, CASES, CPU, OPTIONS, Case, groups_of, make_gradients, make_model, start, train
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, estimate_memory
from sharded_shampoo4.integrations.zero import refuse_untested

FIRST, THEN = range(5), range(5, 10)
SAVED = {
    **{f"stage {stage}": Case(f"zero{stage}") for stage in range(4)},
    "groups, stage 2": CASES["groups, stage 2"],
    "sub-groups of groups, stage 3": CASES["sub-groups of groups, stage 3"],
    "bf16, stage 0": CASES["bf16, stage 0"],
    "bf16, stage 3": CASES["bf16, stage 3"],
    "bf16 with gradients in float32": CASES["bf16 with gradients in float32"],
    "offloaded, stage 2": Case("zero2", {"zero": {"offload_optimizer": CPU}}),
    "offloaded, stage 3": Case("zero3", {"zero": {"offload_optimizer": CPU, "offload_param": CPU}}),
    "the program's, stage 1": Case("zero1", optimizer="program"),
    **{f"soap, stage {stage}": Case(f"zero{stage}", method="soap") for stage in range(4)},
    "soap, groups, stage 2": CASES["groups, stage 2, soap"],
    "soap, sub-groups, stage 3": CASES["small sub-groups, stage 3, soap"],
    "soap, bf16 with gradients in float32": CASES["bf16 with gradients in float32, soap"],
}


def shared_folder() -> str:
    """A new folder of rank 0's, on every rank."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def save_and_go_on(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after ten steps, without a stop and with a new engine that has loaded the first five."""
    folder, engine = shared_folder(), start(case)
    train(engine, case, FIRST)
    engine.save_checkpoint(folder)
    train(engine, case, THEN)
    expected, held = zero.full_parameters(engine), engine.basic_optimizer.state_bytes()
    engine.destroy()
    other = start(case)
    other.load_checkpoint(folder)
    other.save_checkpoint(folder, tag="again")  # what was loaded and not yet used must not be lost
    other.destroy()
    third = start(case)
    third.load_checkpoint(folder, tag="again")
    train(third, case, THEN)
    assert third.basic_optimizer.state_bytes() == held
    found = zero.full_parameters(third)
    third.destroy()
    return expected, found


def float32_weights(stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of an engine, and what DeepSpeed's own tool makes of its checkpoint."""
    case, folder = Case(f"zero{stage}"), shared_folder()
    engine = start(case)
    train(engine, case, FIRST)
    engine.save_checkpoint(folder)
    expected = zero.full_parameters(engine)
    dist.barrier()
    found = get_fp32_state_dict_from_zero_checkpoint(folder)
    engine.destroy()
    return expected, dict(found)


QUICK = ("stage 2", "groups, stage 2", "stage 3", "soap, groups, stage 2", "soap, stage 3")


def save_cases(rank: int, names: tuple[str, ...]) -> dict[str, Any]:
    zero.prepare()
    return {name: save_and_go_on(SAVED[name]) for name in names}


def save_for_zero_to_fp32(rank: int) -> dict[int, Any]:
    zero.prepare()
    return {stage: float32_weights(stage) for stage in (1, 2, 3)}


@pytest.mark.parametrize("name", slow_except(QUICK, SAVED))
def test_a_checkpoint_of_deepspeed_continues_bitwise(name: str) -> None:
    for rank in hosts.run_ranks_once(2, save_cases, batch_of(name, QUICK, SAVED)):
        expected, found = rank[name]
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32_still_works(stage: int) -> None:
    for rank in hosts.run_ranks_once(2, save_for_zero_to_fp32):
        expected, found = rank[stage]
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# -- DeepSpeed's universal checkpoint, at another number of ranks ------------------------------------------------------


UNIVERSAL = {"2": Case("zero2"), "3": Case("zero3"), "groups": Case("zero3", optimizer="groups")}


def save_for_all_worlds(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    zero.prepare()
    weights = {}
    for name, case in {**UNIVERSAL, "soap": Case("zero2", method="soap")}.items():
        engine = start(case)
        train(engine, case, FIRST)
        engine.save_checkpoint(f"{folder}/{name}", tag="saved")
        weights[name] = zero.full_parameters(engine)
        engine.destroy()
    return weights


def load_from_another_world(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    zero.prepare()
    results = {}
    for name, saved in UNIVERSAL.items():
        case = dataclasses.replace(saved, config={"checkpoint": {"load_universal": True}})
        engine = start(case)
        engine.load_checkpoint(f"{folder}/{name}", tag="universal")
        if name == "groups":
            refusal = said(lambda: train(engine, case, range(5, 6)))  # noqa: B023
            for group, own in zip(engine.basic_optimizer.param_groups, groups_of([]), strict=True):
                group.update(
                    {"weight_decay": OPTIONS["weight_decay"], "bits": 4, "statistics_interval": 2, **own, "params": []}
                )
        loaded = zero.full_parameters(engine)
        state = next(iter(engine.basic_optimizer.state.values()))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            train(engine, case, range(5, 6))
        results[name] = {
            "weights": loaded,
            "said": [str(warning.message) for warning in warned if "start anew" in str(warning.message)],
            "refusal": refusal if name == "groups" else None,
            "steps": float(state["step"]),
            "moments": float(state["exp_avg"].abs().sum()),
        }
        engine.destroy()
    return results


def test_universal_checkpoints_move_the_base_and_warn_that_the_factors_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(name: str) -> None:
        folders = ("--input_folder", f"{tmp_path}/{name}/saved", "--output_folder", f"{tmp_path}/{name}/universal")
        workers = ("--num_extract_workers", "1", "--num_merge_workers", "1")
        monkeypatch.setattr(sys, "argv", ["ds_to_universal", "--inject_missing_state", *folders, *workers])
        ds_to_universal.main(ds_to_universal.parse_arguments())

    expected = hosts.run_ranks(2, save_for_all_worlds, str(tmp_path))[0]
    with pytest.raises(RuntimeError, match="exceeds dimension size"):  # the base has no states of matrices
        convert("soap")
    for name in UNIVERSAL:
        convert(name)
    for rank in hosts.run_ranks(3, load_from_another_world, str(tmp_path)):
        for name, found in rank.items():
            assert all(torch.equal(found["weights"][key], expected[name][key]) for key in expected[name])
            assert found["steps"] == 6 and found["moments"] > 0
            assert len(found["said"]) >= 1 and "without preconditioners" in found["said"][0]
        # DeepSpeed gives all groups the options of the first.
        assert "bits of param group 1 was 8 and is 4" in rank["groups"]["refusal"]


# -- a rank's share ----------------------------------------------------------------------------------------------------


def shares(rank: int) -> dict[str, dict[str, int]]:
    zero.prepare()
    held = {}
    for name, stage, options in (
        ("stage 0", 0, {}),
        ("stage 1", 1, {}),
        ("stage 2", 2, {}),
        ("stage 3", 3, {}),
        ("stage 1, soap", 1, {}),
        ("stage 3, soap", 3, {}),
        ("stage 3, a sub-group for each parameter", 3, {"sub_group_size": 64}),
        ("stage 3, a sub-group for a few", 3, {"sub_group_size": 20_000}),
    ):
        torch.manual_seed(0)
        widths, bias = (192 if layer % 3 == 0 else 96 for layer in range(12)), name.endswith("soap")
        model = nn.Sequential(*(nn.Linear(96, width, bias) for width in widths))
        fresh = copy.deepcopy(model)
        gradients = {key: torch.ones_like(parameter) for key, parameter in fresh.named_parameters()}
        cut: dict[str, Any] = {"method": "shampoo", "max_preconditioner_dim": 48}
        often = {"statistics_interval": 1, "root_interval": 1}
        if name.endswith("soap"):
            cut["method"] = "soap"
            del often["root_interval"]
        optimizer = Shampoo4(model.named_parameters(), **cut, **often)
        engine = zero.start(zero.Replay(model), zero.configuration(f"zero{stage}", zero=options), optimizer)
        zero.step(engine, gradients)
        held[name] = optimizer.state_bytes()
        if name in (f"stage {stage}", f"stage {stage}, soap"):
            named = {key: parameter.shape for key, parameter in fresh.named_parameters()}
            size = dist.get_world_size()
            estimate = estimate_memory(named, size, host=f"zero{stage}", **cut)
            assert estimate.preconditioner[rank] == held[name]["preconditioner"]
            assert estimate.base[rank] == held[name]["base"]
            before = optimizer.traffic_bytes()
            zero.step(engine, gradients)
            assert estimate.traffic[rank] == optimizer.traffic_bytes() - before, (name, estimate.traffic)
        engine.destroy()
    return held


@pytest.mark.parametrize("world_size", slow_except([2], [2, 3]))
def test_every_rank_keeps_an_even_share(world_size: int) -> None:
    ranks = hosts.run_ranks(world_size, shares)
    for name in ranks[0]:
        held = [rank[name]["preconditioner"] for rank in ranks]
        assert max(held) <= 1.1 * sum(held) / world_size, (name, held)
        print(f"{name}, {world_size} ranks: fullest / even share {max(held) * world_size / sum(held):.3f}")
        if name != "stage 0" and "soap" not in name:
            base = [rank[name]["base"] for rank in ranks]
            assert max(base) <= 1.1 * ranks[0]["stage 0"]["base"] / world_size, (name, base)


# -- clipping, which rounds otherwise ----------------------------------------------------------------------------------


def clip(rank: int) -> dict[str, dict[str, Tensor]]:
    zero.prepare()
    found = {}
    for stage in range(4):
        case = Case(f"zero{stage}", {"gradient_clipping": 3.0, "gradient_accumulation_steps": 2}, optimizer="program")
        model = zero.Replay(make_model(case))
        optimizer = Shampoo4(model.named_parameters(), **{**OPTIONS, "bits": 32, "refresh_dtype": "float64"})
        engine = zero.start(model, zero.configuration(case.host, **case.config), optimizer)
        train(engine, case, range(20))
        found[case.host] = zero.full_parameters(engine)
        engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_clipped_gradients(world_size: int) -> None:
    model = make_model(Case("none"))
    optimizer = Shampoo4(model.named_parameters(), **{**OPTIONS, "bits": 32, "refresh_dtype": "float64"})
    with hosts.one_thread():
        for step in range(20):
            for name, gradient in make_gradients(Case("none"), step).items():
                model.get_parameter(name).grad = gradient
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
    for rank in hosts.run_ranks(world_size, clip):
        for host, found in rank.items():
            difference = max(float((found[name] - p.detach()).abs().max()) for name, p in model.named_parameters())
            print(f"{host}, {world_size} ranks: largest difference after 20 clipped steps {difference:.1e}")
            assert difference <= 1e-6, host


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusals(rank: int) -> dict[str, Any]:
    """What is said by engines that must not train, and whether any weight has changed."""
    zero.prepare()
    heard: dict[str, Any] = {}

    # First: after an engine whose step has raised, DeepSpeed 0.19.0 partitioned nothing.
    with deepspeed.zero.Init(config_dict_or_path=zero.configuration("zero3")):
        model = make_model(Case("zero3"))
    optimizer = Shampoo4(model.parameters())
    heard["without an engine"] = said(optimizer.step)

    configurations = {
        "elastic": ("zero2", {"zero": {"elastic_checkpoint": True}}),
        "elastic, stage 1": ("zero1", {"zero": {"elastic_checkpoint": True}}),
        "hpz": ("zero3", {"zero": {"zero_hpz_partition_size": 2}}),
        "autocast": ("zero2", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    }
    for name, (host, config) in configurations.items():
        case = Case(host, config)
        engine = start(case)
        before = zero.full_parameters(engine)
        heard[name] = said(lambda: train(engine, case, range(1)))  # noqa: B023
        after = zero.full_parameters(engine)
        assert all(torch.equal(before[key], after[key]) for key in before)
        engine.destroy()

    case = Case("zero1")
    engine = start(case)
    engine.module.stem.weight.data = engine.module.stem.weight.data.clone()
    heard["moved"] = said(lambda: train(engine, case, range(1)))
    engine.destroy()

    engine = start(case)
    train(engine, case, range(1))
    state = engine.basic_optimizer.state_dict()
    heard["whole from a part"] = said(lambda: Shampoo4(make_model(case).parameters()).load_state_dict(state))
    heard["part from a whole"] = said(
        lambda: engine.basic_optimizer.load_state_dict(Shampoo4(make_model(case).parameters()).state_dict())
    )
    if rank == 1:
        middle = state["preconditioner_pieces"][4]
        middle["blocks"] = middle["blocks"][:-1]
    heard["torn"] = said(lambda: engine.basic_optimizer.load_state_dict(state))
    engine.destroy()

    engine = start(case)
    train(engine, case, range(2))
    state = engine.basic_optimizer.state_dict()
    if rank == 1:
        del state["preconditioner_pieces"][0]
    engine.basic_optimizer.load_state_dict(state)
    heard["lost"] = said(lambda: train(engine, case, range(1)))
    engine.destroy()

    vectors = zero.Replay(nn.LayerNorm(8))
    engine = zero.start(vectors, zero.configuration("zero2"), Shampoo4(vectors.named_parameters()))
    heard["no matrix"] = said(lambda: zero.step(engine, {"weight": torch.ones(8)}))
    engine.destroy()

    misspelt = {"type": "Shampoo4", "params": {**OPTIONS, "statistic_interval": 3}}
    model = make_model(case)
    heard["misspelt"] = said(lambda: zero.start(model, zero.configuration("zero1", optimizer=misspelt)))
    heard["stage 0, alone"] = said(lambda: start_and_ask(Case("zero0")))
    return heard


def start_and_ask(case: Case) -> None:
    engine = start(case)
    train(engine, case, range(1))
    engine.basic_optimizer.state_dict()


def test_what_is_refused() -> None:
    for heard in hosts.run_ranks(2, refusals):
        for name in ("elastic", "elastic, stage 1"):
            assert "zero_optimization.elastic_checkpoint = True" in heard[name] and "leave it out" in heard[name]
        assert "zero_optimization.zero_hpz_partition_size (ZeRO++) = 2" in heard["hpz"]
        assert "torch_autocast = True" in heard["autocast"] and 'use "bf16" or "fp16"' in heard["autocast"]
        assert "the weights of stem.weight are in a storage of 880 elements" in heard["moved"]
        assert "one rank's part of a state_dict under ZeRO" in heard["whole from a part"]
        assert "a state_dict with whole parameters" in heard["part from a whole"]
        assert "rank 1 has not loaded a preconditioner of stem.weight" in heard["lost"]
        assert "partitioned by deepspeed.zero.Init" in heard["without an engine"]
        assert "no matrix to precondition" in heard["no matrix"] and "ValueError" in heard["no matrix"]
        assert "unknown option 'statistic_interval'" in heard["misspelt"]
        assert "did you mean 'statistics_interval'" in heard["misspelt"]
        assert "consolidate_state_dict() on every rank" in heard["stage 0, alone"]
    assert "bytes where" in heard["torn"]  # of rank 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_optimizer.device = 'nvme'"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}, "offload_param.device = 'nvme'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio = 0.5"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "offload_optimizer.super_offload = True"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights (ZeRO++) = True"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights (ZeRO++) = True"),
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients (ZeRO++) = True"),
    ],
)
def test_options_that_this_machine_cannot_run_are_refused_too(options: dict[str, Any], named: str) -> None:
    """On DeepSpeed's own configuration; these engines need NVMe, CUDA or their own optimizer to start."""
    stated = zero.configuration("zero3", zero=options)
    engine = types.SimpleNamespace(_config=DeepSpeedConfig(stated), zero_optimization_stage=lambda: 3)
    with pytest.raises(ValueError) as error:
        refuse_untested(engine)
    assert named in str(error.value)


@pytest.mark.parametrize("feature", ["has_moe_layers", "pipeline_parallelism"])
def test_parallelism_that_was_not_tested_is_refused(feature: str) -> None:
    engine = types.SimpleNamespace(_config=None, zero_optimization_stage=lambda: 0, **{feature: True})
    with pytest.raises(ValueError, match=r"mixture of experts|pipeline parallelism"):
        refuse_untested(engine)


def test_ordinary_offloading_is_not_refused() -> None:
    stated = zero.configuration("zero3", zero={"offload_optimizer": CPU, "offload_param": CPU}, **BF16)
    refuse_untested(types.SimpleNamespace(_config=DeepSpeedConfig(stated), zero_optimization_stage=lambda: 3))
