"""Mistakes are told at once, with the option, the value and the parameter."""

from __future__ import annotations

import copy
import linecache
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from sharded_shampoo4 import Shampoo4, checkpoint, estimate_memory


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (8, 6))))


NAIVE = {"method": "shampoo", "quantize": "preconditioner"}
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"bits": 5}, "bits must be one of 3, 4, 8, 32, got 5"),
    ({"bits": True}, "bits must be one of"),
    ({"bits": 4.5}, "bits must be one of"),
    ({"quantize": "eigen"}, "quantize must be one of 'eigenbasis', 'preconditioner', got 'eigen'"),
    ({"codebook": "linear"}, "codebook must be one of 'linear2', 'dynamic_tree', 'normal'"),
    ({"codebook": "normal", "quant_block_size": 1}, "codebook='normal' needs a quant_block_size of at least 2"),
    ({"method": "shampoo", "root": "implicit", "bits": 32}, "root='implicit' is about low precision"),
    (
        {"root": "triangle"},
        "root must be one of 'stored', 'rectified', 'implicit', got 'triangle', which is no longer there",
    ),
    ({"root": "implicit"}, "root='implicit' is for method='shampoo', got method='soap'"),
    ({"protect": True}, "protect=True is for eigenbases in 3 or 4 bits, got bits=8"),
    ({**NAIVE, "root": "implicit"}, "root='implicit' needs quantize='eigenbasis'"),
    ({"refresh_iterations": 3}, "refresh_iterations must be one of 1, 2, got 3"),
    ({"quant_block_size": 0}, "quant_block_size must be an integer of at least 1, got 0"),
    ({"min_quant_numel": -1}, "min_quant_numel must be"),
    ({"shampoo_beta": 1.0}, r"shampoo_beta must be in \[0, 1\), got 1.0"),
    ({"matrix_eps": 0.0}, "matrix_eps must be a positive number, got 0.0"),
    ({"matrix_eps": float("nan")}, "matrix_eps"),
    ({"statistics_interval": 0}, "statistics_interval must be an integer of at least 1, got 0"),
    ({"root_interval": 2.5}, "root_interval"),
    ({"rectify_steps": 3}, "rectify_steps must be two integers"),
    ({"bits": {}}, "bits must be one of"),
    ({"rectify_steps": (1, -4)}, "rectify_steps must be an integer of at least 0, got -4"),
    ({"refresh_dtype": "float16"}, "refresh_dtype must be one of 'float64', 'float32', got 'float16'"),
    ({"max_preconditioner_dim": 0}, "max_preconditioner_dim"),
    ({"split": "odd"}, "split must be one of 'aligned', 'even', 'remainder'"),
    ({"grafting": None}, "grafting must be one of"),
    ({"max_failures": 0}, "max_failures"),
    ({"precondition": "yes"}, "precondition must be True or False, got 'yes'"),
    ({"base": "adam8"}, "base must be one of 'adamw', 'sgd', 'adagrad' or a torch optimizer class, got 'adam8'"),
    ({"base": torch.optim.LBFGS}, "base=LBFGS is not an elementwise rule"),
    ({"base": torch.optim.Muon}, "base=Muon is not an elementwise rule"),
    ({"differentiable": True}, "differentiable"),
    ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
    ({"betas": (1.5, 0.9)}, "Invalid beta"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=str)
def test_impossible_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shampoo4([matrix()], **options)
    if "lr" not in options:
        with pytest.raises(ValueError, match=message):
            estimate_memory({"w": (8, 6)}, **options)
    if next(iter(options)) not in ("base", "lr", "betas", "differentiable"):
        with pytest.raises(ValueError, match=f"param group 1: {message}"):
            Shampoo4([{"params": [matrix()]}, {"params": [matrix()], **options}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betaz": (0.9, 0.99)}, "unknown option 'betaz'.*of AdamW; did you mean 'betas'"),
        ({"root_intervall": 3}, "did you mean 'root_interval'"),
        ({"base": "sgd", "betas": (0.9, 0.99)}, "unknown option 'betas'.*of SGD"),
        ({"base": 3}, "base must be a name or a subclass of torch.optim.Optimizer"),
        ({"base": torch.optim.Rprop, "weight_decay": 0.1}, "weight_decay=0.1 was given, but Rprop has no weight_decay"),
    ],
    ids=str,
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    for make in (lambda: Shampoo4([matrix()], **options), lambda: estimate_memory({"w": (8, 6)}, **options)):
        with pytest.raises(TypeError, match=message):
            make()


def test_a_misspelt_option_in_a_group_and_notes_of_others() -> None:
    with pytest.raises(TypeError, match="unknown option 'statistic_interval' in param group 0; did you mean"):
        Shampoo4([{"params": [matrix()], "statistic_interval": 5}])
    optimizer = Shampoo4([{"params": [matrix()], "name": "head", "initial_lr": 0.1}])
    with pytest.raises(TypeError, match="in param group 1"):
        optimizer.add_param_group({"params": [matrix()], "graftin": "none"})
    assert len(optimizer.param_groups) == 1


def test_a_base_is_not_for_one_group() -> None:
    for groups in (
        [{"params": [matrix()], "base": "sgd"}],
        [{"params": [matrix()]}, {"params": [matrix()], "base": 1}],
    ):
        with pytest.raises(TypeError, match="base belongs to the whole optimizer, not to a param group"):
            Shampoo4(groups)
    optimizer = Shampoo4([matrix()])
    with pytest.raises(TypeError, match="base belongs to the whole optimizer"):
        optimizer.add_param_group({"params": [matrix()], "base": "adamw"})
    assert len(optimizer.param_groups) == 1


def test_tensors_without_data_are_named() -> None:
    on_meta = [("bias", nn.Parameter(torch.zeros(6, device="meta"))), ("weight", nn.Parameter(matrix().to("meta")))]
    with FakeTensorMode():
        fake = [("bias", nn.Parameter(torch.zeros(6))), ("weight", matrix())]
        sparse = [("weight", matrix())]
    for named, first in ((on_meta, "bias"), (fake, "bias"), (sparse, "weight")):
        optimizer = Shampoo4(named)
        for _, parameter in named:
            parameter.grad = torch.empty_like(parameter)
        with pytest.raises(
            RuntimeError, match=rf"{first} is a meta or fake tensor.* estimate_memory\(\) tells the bytes"
        ):
            optimizer.step()
    Shampoo4(on_meta[:1]).step()  # the base's, for which values make no difference


def test_parameters_that_are_not_tensors() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        Shampoo4([3.0])
    with pytest.raises(ValueError, match="empty parameter list"):
        Shampoo4([])


def test_gradients_that_cannot_be_preconditioned() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = Shampoo4(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of weight is sparse \(torch.sparse_coo\)"):
        optimizer.step()
    parameter = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    parameter.grad = torch.randn(4, 4, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"gradient of parameter 0 of group 0 is of type torch.complex64"):
        Shampoo4([parameter]).step()


def stepped(parameter: nn.Parameter, **options: Any) -> Shampoo4:
    optimizer = Shampoo4([("layer.weight", parameter)], statistics_interval=1, **options)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


SHAPING: list[tuple[str, object]] = [
    ("bits", 3),
    ("codebook", "dynamic_tree"),
    ("quant_block_size", 32),
    ("min_quant_numel", 0),
    ("split", "remainder"),
    ("max_preconditioner_dim", 50),
    ("precondition", False),
]
SHAPING_CASES = [
    *(("shampoo", *case) for case in [*SHAPING, ("quantize", "preconditioner"), ("scale_dtype", "bfloat16")]),
    *(("soap", *case) for case in [*SHAPING, ("momentum_dtype", "int8"), ("scale_dtype", "float32")]),
]


def test_options_that_cut_a_matrix_alike_make_no_difference() -> None:
    """A state_dict of an earlier version, whose default was split="even", loads where no block is another one."""
    parameter = matrix(96, 48)
    saved = stepped(parameter, split="even", max_preconditioner_dim=48).state_dict()
    optimizer = Shampoo4([("layer.weight", parameter)], max_preconditioner_dim=48)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["split"] == "even"
    optimizer.step()
    other = Shampoo4([("layer.weight", matrix(70, 48))], max_preconditioner_dim=48)
    saved = stepped(matrix(70, 48), split="even", max_preconditioner_dim=48).state_dict()
    message = "split='even' where .* as earlier versions cut matrices: make it with split='even'"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)


def test_an_option_that_is_no_longer_there_is_left_out() -> None:
    parameter = matrix(96, 48)
    saved = stepped(parameter).state_dict()
    saved["param_groups"][0]["compile"] = True
    optimizer = Shampoo4([("layer.weight", parameter)])
    optimizer.load_state_dict(saved)
    assert "compile" not in optimizer.param_groups[0] and saved["param_groups"][0]["compile"]
    optimizer.step()
    with pytest.raises(TypeError, match="compile"):
        Shampoo4([parameter], compile=True)


@pytest.mark.parametrize(("method", "name", "value"), SHAPING_CASES)
def test_options_that_shape_bytes_must_match(method: str, name: str, value: object) -> None:
    """In a checkpoint, and when a group's option is changed after the first step."""
    cut = {"max_preconditioner_dim": 60} if name == "split" else {}  # which cuts 70 rows otherwise
    saved = stepped(matrix(70, 65), method=method, **cut).state_dict()
    other = Shampoo4([matrix(70, 65)], **{"method": method, name: value, **cut})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"{name}=.* where this optimizer has {name}={value!r}"):
        other.load_state_dict(saved)
    assert other.state_dict() == before

    if name != "precondition":
        parameter = matrix(70, 65)
        optimizer = stepped(parameter, method=method, **cut)
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"preconditioner of layer.weight has {name}="):
            optimizer.step()


def test_checkpoints_that_do_not_fit() -> None:
    saved = stepped(matrix(70, 65)).state_dict()
    with pytest.raises(ValueError, match=r"param groups of \[1\] parameters, this optimizer of \[2\]"):
        Shampoo4([matrix(70, 65), matrix()]).load_state_dict(saved)
    with pytest.raises(
        ValueError, match=r"preconditioner of layer.weight does not belong to a matrix of shape \(70, 66\)"
    ):
        Shampoo4([("layer.weight", matrix(70, 66))]).load_state_dict(saved)
    parameter = matrix(70, 65)
    plain = torch.optim.AdamW([parameter])
    with pytest.raises(ValueError, match="was not written by Shampoo4"):
        Shampoo4([parameter]).load_state_dict(plain.state_dict())
    lost = stepped(matrix(70, 65), method="shampoo").state_dict()
    del lost["state"][0]["preconditioner"]
    with pytest.raises(ValueError, match=r"has a state of .*, but no preconditioner"):
        Shampoo4([parameter], method="shampoo").load_state_dict(lost)
    cast = copy.deepcopy(saved)
    cast["state"][0]["preconditioner"] = cast["state"][0]["preconditioner"].float()
    with pytest.raises(ValueError, match=r"elements of torch.float32"):
        Shampoo4([parameter]).load_state_dict(cast)
    dropped = copy.deepcopy(saved)
    dropped["param_groups"][0]["root"] = "triangle"
    before = copy.deepcopy((optimizer := Shampoo4([parameter])).state_dict())
    with pytest.raises(ValueError, match="got 'triangle', which is no longer there, nor are its states read"):
        optimizer.load_state_dict(dropped)
    assert optimizer.state_dict() == before
    newer = copy.deepcopy(saved)
    newer["param_groups"][0]["preconditioner_format"] = 99
    with pytest.raises(ValueError, match="has format 99, this version of Shampoo4 reads up to 2"):
        Shampoo4([parameter]).load_state_dict(newer)


def test_states_of_an_optimizer_with_other_names_say_so() -> None:
    """Names tell stacked biases, which are left to the base."""
    names = ("experts.down_proj", "experts.down_proj_bias")
    parameters = [matrix(8, 16, 24), matrix(8, 24)]
    named, unnamed = Shampoo4(list(zip(names, parameters, strict=True))), Shampoo4(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for first, second, expected in (
        (named, unnamed, "a state of parameter 1 of group 0, but no preconditioner: .* was made without names"),
        (unnamed, named, "a preconditioner of experts.down_proj_bias, which is not .* was made without names"),
    ):
        first.step()
        with pytest.raises(ValueError, match=expected):
            second.load_state_dict(copy.deepcopy(first.state_dict()))


def test_loading_warns_of_factors_that_are_missing() -> None:
    """A matrix of method="soap" has no other states, whose presence would make it an error."""
    named = [("weight", matrix(70, 65)), ("bias", matrix(70)), ("frozen", matrix(8, 8).requires_grad_(False))]
    optimizer = Shampoo4(named, statistics_interval=1)
    for _, parameter in named[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Shampoo4(named).load_state_dict(copy.deepcopy(saved))
    del saved["state"][0]["preconditioner"]
    with pytest.warns(UserWarning, match="has no states of weight, so these are reset"):
        Shampoo4(named).load_state_dict(saved)


def test_failures_keep_the_old_factors_then_raise() -> None:
    parameter, healthy = matrix(70, 65), matrix(70, 65)
    options = {"method": "shampoo", "statistics_interval": 1, "root_interval": 1, "max_failures": 3}
    optimizer = Shampoo4([("sick", parameter), ("healthy", healthy)], base="sgd", **options)

    def step(poison: bool) -> None:
        for p in (parameter, healthy):
            p.grad = torch.randn_like(p)
        if poison:
            parameter.grad[3, 4] = torch.nan
        optimizer.step()

    step(False)
    pools = optimizer._session.last.preconditioner.pools
    before = [{name: tensor[0].clone() for name, tensor in pool.tensors.items()} for pool in pools]
    step(True)
    step(True)
    for pool, old in zip(pools, before, strict=True):
        assert pool.tensors["failures"].tolist() == [[2, 0], [0, 0]]
        changed = {name for name in old if not torch.equal(old[name], pool.tensors[name][0])}
        assert changed <= {"failures", "root.codes", "root.scales", "root.diagonal"}, changed
        assert all(tensor.isfinite().all() for tensor in pool.tensors.values())
    assert healthy.isfinite().all()
    step(False)
    assert all((pool.tensors["failures"] == 0).all() for pool in pools)
    step(True)
    step(True)
    with pytest.raises(
        RuntimeError, match=r"left preconditioner of sick, block at row 0, column 0 .* failed .* 3 times"
    ):
        step(True)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize(("method", "bits"), [("shampoo", 4), ("shampoo", 32), ("soap", 4), ("soap", 8), ("soap", 32)])
def test_extreme_gradients_stay_finite(scale: float, method: str, bits: int) -> None:
    parameter = matrix(70, 10)
    roots = {"root_interval": 2} if method == "shampoo" else {}
    options = {"method": method, "bits": bits, "statistics_interval": 1, **roots}
    optimizer = Shampoo4([parameter], base="sgd", lr=0.0, **options)
    for _ in range(30):
        gradient = scale * torch.randn(70, 10)
        parameter.grad = gradient.clone()
        optimizer.step()
        assert parameter.grad.isfinite().all()
        if scale > 1e-10 and method == "shampoo":  # grafted
            assert torch.isclose(parameter.grad.double().norm(), gradient.double().norm(), rtol=1e-5)
    assert all((pool.tensors["failures"] == 0).all() for pool in optimizer._session.last.preconditioner.pools)


def test_parameters_that_were_replaced_beyond_recognition() -> None:
    """Whatever shards a model in a way that is not known must not leave the base optimizer alone at work."""
    parameters = [matrix(4, 5), matrix(6, 7)]
    optimizer = Shampoo4(parameters)
    flat = torch.nn.Parameter(torch.zeros(62))
    flat.grad = torch.ones(62)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"given 2 parameters of shapes \(4, 5\), \(6, 7\) and now has 1 of shapes"):
        optimizer.step()
    assert not flat.any()


def test_warnings_of_loading_name_the_line_that_loads(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    first, second = (
        [(f"{number}.{name}", p) for name, p in part.named_parameters()] for number, part in enumerate(model)
    )
    optimizer = Shampoo4([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.2}])
    checkpoint.save(optimizer, tmp_path, model=model)
    (tmp_path / "data-unfinished").mkdir()
    model[0].bias.requires_grad_(True)
    model[1].bias.requires_grad_(False)
    optimizer = Shampoo4(model.named_parameters())
    with pytest.warns(UserWarning) as warned:
        checkpoint.load(optimizer, tmp_path, model=model)
    for message in ("cut off", "were not trained when", "are frozen now", "several groups of the checkpoint"):
        assert any(message in str(warning.message) for warning in warned), message
    for warning in warned:
        assert "checkpoint.load(" in linecache.getline(warning.filename, warning.lineno), warning
