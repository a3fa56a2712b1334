"""Complex and sparse gradients: the base optimizer's where nothing is preconditioned, else refused with a way out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_shampoo4 import Shampoo4, checkpoint, estimate_memory

OPTIONS: dict[str, Any] = {"lr": 1e-3, "statistics_interval": 1, "min_quant_numel": 0}


@pytest.fixture(params=["shampoo", "soap"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both methods: with "soap" the base has no states of matrices."""
    monkeypatch.setitem(OPTIONS, "method", request.param)
    if request.param == "shampoo":
        monkeypatch.setitem(OPTIONS, "root_interval", 2)


class Mixed(nn.Module):
    """A sparse embedding, complex numbers in a matrix, a vector and a scalar, and a matrix to precondition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 6, sparse=True)
        self.filter = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.randn((), dtype=torch.complex128))
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = (self.embedding(tokens) * self.phase * self.scale.to(torch.complex64)) @ self.filter.mT
        return self.head(torch.cat([mixed.real, mixed.imag[:, :2]], dim=1))

    def groups(self) -> list[dict[str, Any]]:
        """Everything that is sparse or a complex matrix is left to the base; complex vectors stay where they are."""
        named = dict(self.named_parameters())
        base = {name: named.pop(name) for name in ("embedding.weight", "filter")}
        return [{"params": list(base.items()), "precondition": False}, {"params": list(named.items())}]


def backward(model: Mixed, step: int) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(step)
    model(torch.randint(10, (3,), generator=generator)).square().sum().backward()
    assert model.embedding.weight.grad.is_sparse and model.filter.grad.is_complex()


def train(model: Mixed, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


BASES: list[tuple[Any, type[Optimizer], dict[str, Any]]] = [
    ("adagrad", torch.optim.Adagrad, {}),
    ("sgd", torch.optim.SGD, {}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("base", "rule", "options"), BASES, ids=["adagrad", "sgd", "momentum"])
def test_what_is_not_preconditioned_trains_as_with_the_base(
    base: Any, rule: type[Optimizer], options: dict[str, Any]
) -> None:
    model, plain = Mixed(), Mixed()
    for each in (model, plain):
        each.head.requires_grad_(False)
    optimizer = Shampoo4(model.groups(), base=base, lr=1e-3, **options)
    with pytest.warns(UserWarning, match="no matrix to precondition"):
        train(model, optimizer, range(1))
    train(model, optimizer, range(1, 5))
    train(plain, rule([p for p in plain.parameters() if p.requires_grad], lr=1e-3, **options), range(5))
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert not torch.equal(plain.filter, Mixed().filter)


@pytest.mark.usefixtures("method")
def test_beside_what_is_preconditioned() -> None:
    model, plain = Mixed(), Mixed()
    optimizer = Shampoo4(model.groups(), base="adagrad", **OPTIONS)
    replay = torch.optim.Adagrad(plain.parameters(), lr=1e-3)
    for step in range(5):
        backward(model, step)
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        replay.step()
    for name in ("embedding.weight", "filter", "phase", "scale", "head.bias"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name)), name
    assert not torch.equal(model.head.weight, plain.head.weight)
    described = {line.split()[0]: line for line in optimizer.describe().splitlines()}
    assert "no: precondition=False" in described["filter"] and "no: not a matrix" in described["phase"]
    assert "yes" in described["head.weight"]
    assert optimizer.state_bytes()["base"] > 0 and set(optimizer.health()) == {"head.weight"}


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("portable", [False, True], ids=["state_dict", "checkpoint"])
@pytest.mark.parametrize("base", ["adagrad", "sgd"])
def test_states_go_on(tmp_path: Path, portable: bool, base: str) -> None:
    def make() -> tuple[Mixed, Shampoo4]:
        model = Mixed()
        momentum = {"momentum": 0.9} if base == "sgd" else {}
        return model, Shampoo4(model.groups(), base=base, **OPTIONS, **momentum)

    model, optimizer = make()
    train(model, optimizer, range(3))
    resumed, other = make()
    if portable:
        checkpoint.save(optimizer, tmp_path, model=model)
        checkpoint.load(other, tmp_path, model=resumed)
    else:
        resumed.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    for (name, parameter), again in zip(model.named_parameters(), resumed.parameters(), strict=True):
        if portable and base == "sgd":  # its sparse momentum is saved dense, which adds up rows in another order
            torch.testing.assert_close(parameter, again, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(parameter, again), name


def test_complex_numbers_with_adam_are_saved_and_copied(tmp_path: Path) -> None:
    def make() -> tuple[nn.Parameter, Shampoo4]:
        parameter = nn.Parameter(torch.ones(4, 6, dtype=torch.complex64))
        return parameter, Shampoo4([{"params": [("w", parameter)], "precondition": False}], lr=0.1)

    def step(parameter: nn.Parameter, optimizer: Shampoo4, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(4, 6, dtype=torch.complex64, generator=generator)
        optimizer.step()

    parameter, optimizer = make()
    plain = nn.Parameter(parameter.detach().clone())
    adam = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for number in range(3):
        step(parameter, optimizer, number)
        plain.grad = parameter.grad.clone()
        adam.step()
    assert torch.equal(parameter, plain)
    checkpoint.save(optimizer, tmp_path)
    resumed, other = make()
    checkpoint.load(other, tmp_path)
    copied = copy.deepcopy({"parameter": parameter, "optimizer": optimizer})
    for number in range(3, 6):
        step(parameter, optimizer, number)
        step(resumed, other, number)
        step(copied["parameter"], copied["optimizer"], number)
    assert torch.equal(parameter, resumed) and torch.equal(parameter, copied["parameter"])
    assert (
        optimizer.state_bytes()["base"]
        == estimate_memory({"w": (4, 6)}, host="none", dtype=torch.complex64, precondition=False).base[0]
    )


def said(function: Any) -> str:
    with pytest.raises(TypeError) as error:
        function()
    return str(error.value)


def test_what_is_preconditioned_names_the_parameter_and_the_way_out(tmp_path: Path) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = Shampoo4(embedding.named_parameters(), base="adagrad")
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    message = said(optimizer.step)
    for words in ("gradient of weight is sparse (torch.sparse_coo)", "leave weight to the base optimizer"):
        assert words in message
    assert "precondition=False" in message and "'adagrad'" in message and "sparse=False" in message
    assert torch.equal(embedding.weight, before)

    parameter = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    optimizer = Shampoo4([("filter", parameter)])
    for function in (optimizer.step, lambda: checkpoint.save(optimizer, tmp_path)):
        message = said(function)  # also before it has a gradient
        assert "filter is of type torch.complex64" in message and "precondition=False" in message
    parameter.grad = torch.randn_like(parameter)
    assert "the gradient of filter is of type torch.complex64" in said(optimizer.step)
    message = said(lambda: estimate_memory({"filter": (4, 4)}, dtype=torch.complex64))
    assert "torch.complex64" in message and "precondition=False" in message


def test_a_frozen_complex_matrix_is_no_obstacle() -> None:
    frozen = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64), requires_grad=False)
    codes = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    trained = nn.Parameter(torch.randn(8, 6))
    optimizer = Shampoo4([("frozen", frozen), ("codes", codes), ("trained", trained)])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert "no: frozen" in optimizer.describe()


@pytest.mark.parametrize("precondition", [True, False])
def test_two_parameters_with_one_gradient_are_refused(precondition: bool) -> None:
    """Directions are written over gradients. The base optimizer only reads them."""
    first, second = (nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    optimizer = Shampoo4([("first", first), ("second", second)], precondition=precondition)
    first.grad = second.grad = torch.ones(8, 8)
    if not precondition:
        optimizer.step()
        return
    with pytest.raises(ValueError, match="first and second have one tensor as their gradients"):
        optimizer.step()


def test_a_lazy_module_must_have_run() -> None:
    with pytest.raises(ValueError, match="weight has no shape yet: run the model once"):
        Shampoo4(nn.LazyLinear(4).named_parameters())
