"""Shampoo4's promises to people who write training loops."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4

FAST: dict[str, Any] = {
    "method": "shampoo",
    "statistics_interval": 2,
    "root_interval": 4,
    "max_preconditioner_dim": 80,
}
METHODS: dict[str, dict[str, Any]] = {
    "shampoo": FAST,
    "soap": {"method": "soap", "statistics_interval": 2, "max_preconditioner_dim": 80},
}


@pytest.fixture(params=METHODS)
def fast(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of each method, with short intervals."""
    return METHODS[request.param]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 96), nn.LayerNorm(96), nn.Tanh(), nn.Linear(96, 70), nn.Tanh(), nn.Linear(70, 3))


def batches(count: int, start: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    data = []
    for index in range(start, start + count):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(32, 20, generator=generator)
        data.append((x.to(dtype), torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(1)], 1).to(dtype)))
    return data


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(map(torch.equal, left.parameters(), right.parameters()))


BASES: dict[str, tuple[dict[str, Any], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": ({"base": "adamw", "betas": (0.8, 0.99)}, torch.optim.AdamW, {"betas": (0.8, 0.99)}),
    "sgd": ({"base": "sgd", "momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        {"base": "sgd", "momentum": 0.9, "nesterov": True},
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    "plain sgd": ({"base": "sgd"}, torch.optim.SGD, {}),
    "adagrad": ({"base": "adagrad", "lr_decay": 0.1}, torch.optim.Adagrad, {"lr_decay": 0.1}),
    "a class": ({"base": torch.optim.RAdam, "eps": 1e-6}, torch.optim.RAdam, {"eps": 1e-6}),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_the_base_takes_the_direction_as_its_gradient(name: str) -> None:
    """What Shampoo4 does to the parameters is exactly what torch's optimizer does with the directions."""
    ours, rule, theirs = BASES[name]
    model = make_model()
    optimizer = Shampoo4(model.parameters(), lr=1e-2, weight_decay=0.1, **FAST, **ours)
    twin = make_model()
    plain = rule(twin.parameters(), lr=1e-2, weight_decay=0.1, **theirs)
    changed = False
    for x, y in batches(9):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, q, gradient in zip(model.parameters(), twin.parameters(), before, strict=True):
            q.grad = p.grad.clone()
            changed |= not torch.equal(p.grad, gradient)
            if p.ndim < 2:
                assert torch.equal(p.grad, gradient)
            assert torch.isclose(p.grad.norm(), gradient.norm(), rtol=1e-5)
        plain.step()
        assert same(model, twin)
    assert changed


@pytest.mark.parametrize(
    ("method", "name"), [*(("shampoo", name) for name in BASES), ("soap", "adamw"), ("soap", "plain sgd")]
)
@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_round_trips_continue_bitwise(method: str, name: str, how: str) -> None:
    options = {**METHODS[method], **BASES[name][0], "weight_decay": 0.1, "lr": 1e-2}
    model = make_model()
    optimizer = Shampoo4(model.named_parameters(), **options)
    train(model, optimizer, batches(7))

    if how in ("deepcopy", "pickle"):
        copied = (
            copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
        )
        other_model, other = copied
    else:
        other_model = make_model(1)
        other_model.load_state_dict(model.state_dict())
        other = Shampoo4(other_model.named_parameters(), **{**options, "lr": 5.0, "statistics_interval": 7})
        state = optimizer.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        else:
            state = copy.deepcopy(state)
        other.load_state_dict(state)
        repeated = other.state_dict()["state"]
        assert all(
            torch.equal(repeated[i]["preconditioner"], s["preconditioner"])
            for i, s in state["state"].items()
            if "preconditioner" in s
        )
    assert train(model, optimizer, batches(7, 7)) == train(other_model, other, batches(7, 7))
    assert same(model, other_model)
    assert other.state_bytes() == optimizer.state_bytes()


def test_loading_does_not_alias_the_given_state(fast: dict[str, Any]) -> None:
    model, other = make_model(), make_model()
    optimizer = Shampoo4(model.parameters(), **fast)
    train(model, optimizer, batches(5))
    state = copy.deepcopy(optimizer.state_dict())
    kept = state["state"][0]["preconditioner"].clone()
    second = Shampoo4(other.parameters(), **fast)
    second.load_state_dict(state)
    train(other, second, batches(5))
    assert torch.equal(state["state"][0]["preconditioner"], kept)


def test_the_state_before_the_first_step_is_empty() -> None:
    model = make_model()
    optimizer = Shampoo4(model.parameters())
    assert optimizer.state_dict()["state"] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_bytes() == {"preconditioner": 0, "base": 0}


def test_settings_of_groups(fast: dict[str, Any]) -> None:
    """Each group follows its own options, as an optimizer of its own would."""
    last = {"grafting": "none"} if fast["method"] == "shampoo" else {"bits": 32}
    first = {**FAST, "bits": 8, "statistics_interval": 3}
    choices = [first, {"precondition": False}, {**last, "lr": 1e-4}]
    model, twin = make_model(), make_model()
    layers, twins = ([m for m in net if isinstance(m, nn.Linear)] for net in (model, twin))
    together = Shampoo4(
        [{"params": m.parameters(), **o} for m, o in zip(layers, choices, strict=True)], lr=1e-3, **fast
    )
    alone = [Shampoo4(m.parameters(), **{"lr": 1e-3, **fast, **o}) for m, o in zip(twins, choices, strict=True)]
    for x, y in batches(9):
        for net in (model, twin):
            net.zero_grad()
            (net(x) - y).square().mean().backward()
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert same(model, twin)


def test_closure_scheduler_and_changed_learning_rate(fast: dict[str, Any]) -> None:
    model, twin = make_model(), make_model()
    optimizer, other = (Shampoo4(net.parameters(), lr=1e-2, **fast) for net in (model, twin))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for index, (x, y) in enumerate(batches(8)):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        other.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        expected = train(twin, other, [(x, y)])[0]
        assert optimizer.step(closure).item() == expected
        scheduler.step()
        assert scheduler.get_last_lr()[0] < 1e-2 or index == 0
    assert same(model, twin)


def test_grad_scaler_skips_a_step_that_overflowed(fast: dict[str, Any]) -> None:
    model = make_model()
    optimizer = Shampoo4(model.parameters(), lr=1e-2, **fast)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index, (x, y) in enumerate(batches(8)):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() * (torch.inf if index == 5 else 1.0)
        scaler.scale(loss).backward()
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, weights(model), before)) == (index == 5)
    assert {matrix.step for matrix in optimizer._session.last.preconditioner.matrices} == {7}


def test_steps_are_counted_per_parameter(fast: dict[str, Any]) -> None:
    """A parameter without a gradient stays, its step count too, and nothing about the others changes."""
    parameters = [nn.Parameter(torch.randn(20, 30)) for _ in range(3)]
    optimizer = Shampoo4(parameters, **fast)
    for step in range(6):
        for index, parameter in enumerate(parameters):
            skipped = (index == 1 and step % 2) or index == 2
            parameter.grad = None if skipped else torch.randn(20, 30)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert torch.equal(parameters[2], before[2])
        assert torch.equal(parameters[1], before[1]) == bool(step % 2)
    assert [matrix.step for matrix in optimizer._session.last.preconditioner.matrices] == [6, 3, 0]
    reloaded = Shampoo4(parameters, **fast)
    reloaded.load_state_dict(optimizer.state_dict())
    parameters[2].grad = torch.randn(20, 30)
    reloaded.step()


def test_add_param_group_and_unfreezing_keep_the_factors(fast: dict[str, Any]) -> None:
    model, twin = make_model(), make_model()
    layers, twins = ([m for m in net if isinstance(m, nn.Linear)] for net in (model, twin))
    grown = Shampoo4(layers[0].parameters(), lr=1e-3, **fast)
    first = Shampoo4(twins[0].parameters(), lr=1e-3, **fast)
    others = Shampoo4([*twins[1].parameters(), *twins[2].parameters()], lr=1e-3, **fast)
    for frozen in (layers[1].weight, twins[1].weight):
        frozen.requires_grad_(False)
    for index, (x, y) in enumerate(batches(12)):
        if index == 5:
            grown.add_param_group({"params": [*layers[1].parameters(), *layers[2].parameters()]})
        if index == 8:
            for frozen in (layers[1].weight, twins[1].weight):
                frozen.requires_grad_(True)
        for net in (model, twin):
            net.zero_grad()
            (net(x) - y).square().mean().backward()
        grown.step()
        first.step()
        if index >= 5:
            others.step()
    assert same(model, twin)


def test_moved_and_replaced_parameters(fast: dict[str, Any]) -> None:
    """Parameters may change their type, storage or memory format between construction and step, as hosts do."""
    model = make_model()
    optimizer = Shampoo4(model.parameters(), lr=1e-2, **fast)
    model.to(torch.float64)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    losses = train(model, optimizer, batches(30, dtype=torch.float64))
    assert losses[-1] < losses[0]
    moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
    assert moments and all(moment.dtype == torch.float64 for moment in moments)


def test_channels_last_gradients(fast: dict[str, Any]) -> None:
    every_step = {name: 1 for name in fast if name.endswith("_interval")}
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(16, 8, 3, 3).to(memory_format=memory_format))
        optimizer = Shampoo4([weight], base="sgd", lr=0.1, **{**fast, **every_step})
        for _ in range(3):
            weight.grad = torch.randn(16, 8, 3, 3).to(memory_format=memory_format)
            optimizer.step()
        results.append(weight.detach().contiguous())
    assert torch.equal(*results)


def test_bfloat16_parameters_follow_float32(fast: dict[str, Any]) -> None:
    """Directions are computed in float32 and rounded once, then scaled: within two roundings of the exact ones."""
    exact, rounded = nn.Parameter(torch.zeros(100, 90)), nn.Parameter(torch.zeros(100, 90, dtype=torch.bfloat16))
    optimizers = [Shampoo4([p], base="sgd", lr=0.0, **fast) for p in (exact, rounded)]
    for step in range(6):
        gradient = torch.randn(100, 90, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        exact.grad, rounded.grad = gradient.float(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert rounded.grad.dtype == torch.bfloat16
        assert torch.allclose(rounded.grad.float(), exact.grad, rtol=2**-7, atol=0)
    pools = [optimizer._session.last.preconditioner.pools for optimizer in optimizers]
    for left, right in zip(*pools, strict=True):
        assert all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)


def test_training_in_bfloat16(fast: dict[str, Any]) -> None:
    model = make_model().to(torch.bfloat16)
    optimizer = Shampoo4(model.parameters(), lr=1e-2, **fast)
    losses = train(model, optimizer, batches(40, dtype=torch.bfloat16))
    assert losses[-1] < 0.7 * losses[0]


def test_only_vectors_means_only_the_base_and_says_so() -> None:
    parameter, twin = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer, plain = Shampoo4([parameter], lr=0.1), torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    parameter.grad, twin.grad = torch.arange(5.0), torch.arange(5.0)
    with pytest.warns(UserWarning, match="no matrix to precondition"):
        optimizer.step()
    plain.step()
    assert torch.equal(parameter, twin)


def test_a_dry_step_creates_states_and_advances_nothing(fast: dict[str, Any]) -> None:
    """Frameworks take a step with zero gradients to see the states before they load them."""
    model, twin = make_model(), make_model()
    optimizer, other = (Shampoo4(net.parameters(), lr=1e-2, weight_decay=0.1, **fast) for net in (model, twin))
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, weights(model), before))
    assert optimizer.state_bytes()["preconditioner"] > 0 and len(optimizer.state) == len(before)
    assert train(model, optimizer, batches(8)) == train(twin, other, batches(8))
    assert same(model, twin)


def test_what_a_wrapper_keeps_in_states_survives_a_state_dict() -> None:
    """As Lookahead does; of a matrix, the base has no states beside it."""
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer, loaded = Shampoo4(model.named_parameters()), Shampoo4(other.named_parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    for parameter in model.parameters():
        optimizer.state[parameter]["slow"] = parameter.detach().clone()
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(loaded.state[twin]["slow"], optimizer.state[parameter]["slow"])
    other(torch.ones(2, 8)).sum().backward()
    loaded.step()
