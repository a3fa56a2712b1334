"""Values of options as configuration files and command lines write them, and names of options in other libraries."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
import yaml
from torch import nn

from sharded_shampoo4 import Shampoo4, estimate_memory

NAN = float("nan")
SHAMPOO = {"method": "shampoo"}


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(8, 6))


CONVERTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lr": "1e-3"}, {"lr": 0.001}),
    ({"lr": " 0.5 "}, {"lr": 0.5}),
    ({"lr": numpy.float32(0.5)}, {"lr": 0.5}),
    ({"lr": Fraction(1, 4)}, {"lr": 0.25}),
    ({"weight_decay": "0.1"}, {"weight_decay": 0.1}),
    ({"eps": "1e-6"}, {"eps": 1e-6}),
    ({"betas": "(0.9, 0.99)"}, {"betas": (0.9, 0.99)}),
    ({"betas": "[0.9, 0.99]"}, {"betas": (0.9, 0.99)}),
    ({"betas": "0.9,0.99"}, {"betas": (0.9, 0.99)}),
    ({"betas": [0.9, "0.99"]}, {"betas": (0.9, 0.99)}),
    ({**SHAMPOO, "amsgrad": "True"}, {**SHAMPOO, "amsgrad": True}),
    ({"foreach": "false"}, {"foreach": False}),
    ({"foreach": "null"}, {"foreach": None}),
    ({"base": "SGD", "momentum": "0.9", "nesterov": "true"}, {"momentum": 0.9, "nesterov": True}),
    ({"base": "Adagrad", "lr_decay": "1e-2"}, {"lr_decay": 0.01}),
    ({"base": torch.optim.Rprop, "etas": "(0.4, 1.3)"}, {"etas": (0.4, 1.3)}),
    ({"bits": "8"}, {"bits": 8}),
    ({"bits": 3.0}, {"bits": 3}),
    ({"statistics_interval": "1e1", "soap_betas": "(0.5, .9)"}, {"statistics_interval": 10, "soap_betas": (0.5, 0.9)}),
    ({**SHAMPOO, "root_interval": "5e1"}, {**SHAMPOO, "root_interval": 50}),
    ({"method": "Shampoo"}, SHAMPOO),
    ({"statistics_interval": 10.0}, {"statistics_interval": 10}),
    ({"statistics_interval": numpy.int64(10)}, {"statistics_interval": 10}),
    ({"matrix_eps": "1e-5", "shampoo_beta": ".9"}, {"matrix_eps": 1e-5, "shampoo_beta": 0.9}),
    ({"rectify_steps": [2, 3]}, {"rectify_steps": (2, 3)}),
    ({"rectify_steps": "(2, 3)"}, {"rectify_steps": (2, 3)}),
    ({"rectify_steps": "2, 3.0"}, {"rectify_steps": (2, 3)}),
    ({"precondition": "false"}, {"precondition": False}),
    ({"protect": "False"}, {"protect": False}),
    ({"refresh": "Staggered"}, {"refresh": "staggered"}),
    ({"matmul_dtype": torch.bfloat16}, {"matmul_dtype": "bfloat16"}),
    ({"refresh_dtype": "torch.float32"}, {"refresh_dtype": "float32"}),
]


@pytest.mark.parametrize(("written", "meant"), CONVERTED, ids=str)
def test_what_can_mean_one_thing_is_converted(written: dict[str, Any], meant: dict[str, Any]) -> None:
    """In the constructor, in a group, in add_param_group and in estimate_memory; values, types and training."""
    base = {name: written[name] for name in written if name == "base"}
    own = {name: written[name] for name in written if name != "base"}
    optimizers = [
        Shampoo4([matrix()], **written),
        Shampoo4([{"params": [matrix()], **own}], **base),
        Shampoo4([matrix()], **base, **meant),
        Shampoo4([{"params": []}], **base),
    ]
    optimizers[3].add_param_group({"params": [matrix()], **own})
    trained = []
    for optimizer in optimizers:
        group = optimizer.param_groups[-1]
        for name, value in meant.items():
            assert group[name] == value and type(group[name]) is type(value)
        (parameter,) = group["params"]
        for _ in range(2):
            parameter.grad = torch.ones(8, 6)
            optimizer.step()
        trained.append(parameter)
    assert all(torch.equal(parameter, trained[2]) for parameter in trained)
    assert estimate_memory({"w": (8, 6)}, **written) == estimate_memory({"w": (8, 6)}, **base, **meant)


def test_files_that_people_write() -> None:
    """PyYAML reads 1e-3, without a point, as a string; JSON has no tuples."""
    by_yaml = yaml.safe_load("{lr: 1e-3, betas: '(0.9, 0.95)', statistics_interval: 1e1, max_failures: 5.0e+1}")
    by_json = json.loads('{"lr": "1e-3", "betas": [0.9, 0.95], "statistics_interval": 10.0, "max_failures": "50"}')
    for options in (by_yaml, by_json):
        group = Shampoo4([matrix()], **options).param_groups[0]
        assert [group[name] for name in options] == [0.001, (0.9, 0.95), 10, 50]
        state = Shampoo4([matrix()], **options).state_dict()
        assert json.loads(json.dumps(state["param_groups"]))[0]["max_failures"] == 50


def test_a_learning_rate_that_is_a_tensor_stays_it() -> None:
    rate = torch.tensor(1e-3)
    optimizer = Shampoo4([{"params": [matrix()]}, {"params": [matrix()], "lr": rate}], lr=rate)
    assert all(group["lr"] is rate for group in optimizer.param_groups)


AUTO = 'is "auto", which Hugging Face'
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    *(({name: "auto"}, f"{name} {AUTO}.*, such as {name}=") for name in ("lr", "weight_decay", "eps", "betas")),
    *(({name: "auto"}, f"{name} {AUTO}") for name in ("foreach", "precondition", "bits", "refresh", "rectify_steps")),
    ({"lr": None}, "lr must be a number, such as 0.001, got None"),
    ({"lr": NAN}, "lr must be a number, such as 0.001, got nan"),
    ({"lr": "nan"}, "lr must be a number, such as 0.001, got 'nan'"),
    ({"lr": "fast"}, "lr must be a number, such as 0.001, got 'fast'"),
    ({"lr": True}, "lr must be a number, such as 0.001, got True"),
    ({"lr": [1e-3]}, "lr must be a number"),
    ({"lr": "-1"}, "lr must be a finite number of at least 0, got '?-1"),
    ({"lr": math.inf}, "lr must be a finite number of at least 0, got inf"),
    ({"lr": torch.ones(2)}, r"lr must be a number or a tensor of one element, got one of shape \(2,\)"),
    ({"lr": torch.tensor(NAN)}, "lr must be a finite number"),
    ({"weight_decay": None}, "weight_decay must be a number, such as 0.0, got None"),
    ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
    ({"eps": None}, "eps must be a number, such as 1e-08, got None"),
    ({"eps": NAN}, "eps must be a number"),
    ({"eps": -1.0}, "Invalid epsilon value"),
    ({"base": "sgd", "momentum": "high"}, "momentum must be a number, such as 0, got 'high'"),
    ({"base": "sgd", "momentum": NAN}, "momentum must be a number"),
    ({"base": "sgd", "nesterov": "perhaps"}, "nesterov must be True or False, got 'perhaps'"),
    ({"betas": "0.9"}, r"betas must be 2 numbers, such as \(0.9, 0.999\), got '0.9'"),
    ({"betas": 0.9}, "betas must be 2 numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas must be 2 numbers"),
    ({"betas": (0.9, None)}, "betas must be 2 numbers"),
    ({"betas": "(0.9, high)"}, "betas must be 2 numbers"),
    ({"betas": (0.9, NAN)}, "betas must be 2 numbers"),
    ({"betas": (0.9, 1.5)}, "Invalid beta parameter at index 1: 1.5"),
    ({"statistics_interval": 100.5}, "statistics_interval must be an integer of at least 1, got 100.5"),
    ({"statistics_interval": "100.5"}, "statistics_interval must be an integer of at least 1, got '100.5'"),
    ({"max_failures": True}, "max_failures must be an integer of at least 1, got True"),
    ({"rectify_steps": "4"}, r"rectify_steps must be two integers, for a statistics and a root step, got"),
    ({"rectify_steps": (1, 4.5)}, "rectify_steps must be an integer of at least 0, got 4.5"),
    ({"matrix_eps": "small"}, "matrix_eps must be a positive number, got 'small'"),
    ({"shampoo_beta": None}, "shampoo_beta must be in"),
    ({"protect": "yes"}, "protect must be True or False, got 'yes'"),
    ({"bits": None}, "bits must be one of 3, 4, 8, 32, got None"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=str)
def test_what_cannot_be_meant_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    """Everywhere where options stand; a group that is refused is not kept."""
    base = {name: options[name] for name in options if name == "base"}
    own = {name: options[name] for name in options if name != "base"}
    with pytest.raises(ValueError, match=f"^{message}"):
        Shampoo4([matrix()], **options)
    with pytest.raises(ValueError, match=f"^{message}"):
        estimate_memory({"w": (8, 6)}, **options)
    with pytest.raises(ValueError, match=f"^param group 1: {message}"):
        Shampoo4([{"params": [matrix()]}, {"params": [matrix()], **own}], **base)
    optimizer = Shampoo4([matrix()], **base)
    with pytest.raises(ValueError, match=f"^param group 1: {message}"):
        optimizer.add_param_group({"params": [matrix()], **own})
    assert len(optimizer.param_groups) == 1


def test_an_integer_of_a_base_is_converted_too() -> None:
    class Blocks(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, block: int = 256) -> None:
            super().__init__(params, lr=lr, weight_decay=weight_decay)
            assert type(block) is int
            self.block = block

    assert Shampoo4([matrix()], base=Blocks, block="128").base.arguments["block"] == 128
    assert Shampoo4([matrix()], base=Blocks, block=128.0).base.arguments["block"] == 128
    with pytest.raises(ValueError, match=r"block must be an integer, such as 256, got 128\.5"):
        Shampoo4([matrix()], base=Blocks, block=128.5)


def test_a_base_that_takes_none_gets_it() -> None:
    class Clipped(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, clip: float | None = 1.0) -> None:
            super().__init__(params, lr=lr, weight_decay=weight_decay)
            self.clip = clip

    assert Shampoo4([matrix()], base=Clipped, clip=None).base.arguments["clip"] is None
    assert Shampoo4([matrix()], base=Clipped, clip="0.5").base.arguments["clip"] == 0.5


@pytest.mark.parametrize(
    ("base", "expected"),
    [("AdamW", torch.optim.AdamW), ("SGD", torch.optim.SGD), ("AdaGrad", torch.optim.Adagrad)],
)
def test_bases_in_any_case(base: str, expected: type[torch.optim.Optimizer]) -> None:
    assert Shampoo4([matrix()], base=base).base.rule is expected


@pytest.mark.parametrize(
    ("base", "hint"),
    [
        ("adam", "give the class itself, base=torch.optim.Adam; 'adamw' is Adam with decoupled weight decay"),
        ("RMSprop", "give the class itself, base=torch.optim.RMSprop"),
        ("adamw8bit", "did you mean 'adamw'"),
        ("muon", "got 'muon'$"),
    ],
)
def test_bases_that_have_no_name_here(base: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"base must be one of 'adamw', 'sgd', 'adagrad' or .*{hint}"):
        Shampoo4([matrix()], base=base)


OTHER_NAMES = {
    "precondition_frequency": "statistics_interval .*root_interval",
    "precond_freq": "statistics_interval .*root_interval",
    "precondition_freq": "statistics_interval .*root_interval",
    "precond_update_freq": "statistics_interval .*root_interval",
    "update_freq": "statistics_interval .*root_interval",
    "preconditioning_compute_steps": "statistics_interval .*root_interval",
    "statistics_compute_steps": "statistics_interval$",
    "T1": "statistics_interval$",
    "T2": "root_interval$",
    "block_size": "max_preconditioner_dim",
    "max_precond_dim": "max_preconditioner_dim",
    "precondition_1d": "never done: vectors go to the base optimizer",
    "shampoo_eps": "matrix_eps",
    "beta1": r"betas=\(beta1, beta2\)",
    "adam_beta2": r"betas=\(beta1, beta2\)",
    "stat_decay": "shampoo_beta",
    "graft_type": "grafting",
    "prec_bits": "bits",
    "learning_rate": "lr",
}


@pytest.mark.parametrize(("name", "hint"), OTHER_NAMES.items())
def test_names_that_other_libraries_use(name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=f"unknown option '{name}'.*; here this is {hint}"):
        Shampoo4([matrix()], **{name: 10})
    with pytest.raises(TypeError, match=f"unknown option '{name}' in param group 0; here this is {hint}"):
        Shampoo4([{"params": [matrix()], name: 10}])


def test_a_name_that_the_base_knows_is_the_base_s() -> None:
    class Blocks(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, block_size: int = 256) -> None:
            super().__init__(params, lr=lr, weight_decay=weight_decay)
            self.block_size = block_size

    assert Shampoo4([matrix()], base=Blocks, block_size=64).base.arguments["block_size"] == 64
