"""What the benchmark counts: bytes kept and allocated, flops, parts of steps. Every number here is known otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launching import LAUNCH
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# isort: split
import benchmark  # found through launching
from bench.blocks import blocks_of, orders_of, step_flops
from bench.growth import stack_shapes
from bench.measure import Contender, most_allocated, state_bytes, watched
from bench.optimizers import Choice, Products, is_ordinary, vit
from bench.ranks import PROFILED, parts_of, rank_row

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.planning.blocks import Block

assert Path(benchmark.__file__).parent == LAUNCH

CPU = torch.device("cpu")


# -- what is kept ------------------------------------------------------------------------------------------------------


class Quantized(Tensor):
    """A tensor made of codes and a scale, as quantised states are."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class Slotted:
    __slots__ = ("__hidden", "plain")

    def __init__(self) -> None:
        self.plain, self.__hidden = torch.zeros(3), torch.zeros(4)


class Keeper:
    """What an optimizer may look like inside."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.itself = self
        self.view_of_a_parameter = parameter.detach()[1:]
        whole = torch.zeros(10)
        self.state: dict[Any, Any] = {
            parameter: {"nested": [(torch.zeros(1, dtype=torch.float64),), {"deep": torch.zeros(2)}], "step": 1},
            "shared": [whole, whole[2:4], whole.view(2, 5)],
            "object": Slotted(),
        }
        self.quantized = Quantized(torch.zeros(100, dtype=torch.uint8), torch.zeros(5))


def test_state_bytes_by_hand() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    keeper = Keeper(parameter)
    apart = [parameter, parameter.grad]
    assert state_bytes(keeper, apart) == (8 + 4 * 2) + 4 * 10 + 4 * (3 + 4) + (100 + 4 * 5)
    assert state_bytes(keeper, []) == state_bytes(keeper, apart) + 4 * 1000
    keeper.state["shared"].append(torch.zeros(6))
    assert state_bytes([keeper, keeper], apart) == 16 + 40 + 28 + 120 + 24


# -- what a step allocates ---------------------------------------------------------------------------------------------


class Allocates:
    """It makes new states of 40 kB at each step, with 80 kB beside them for a moment, and drops the old ones last."""

    def __init__(self) -> None:
        self.states = torch.empty(10_000)

    def step(self) -> None:
        new = torch.empty(10_000)
        beside = torch.empty(20_000)
        del beside
        self.states = new


class Frees:
    """It drops 40 kB before it allocates 60 kB."""

    def __init__(self) -> None:
        with watched(CPU):
            self.gradient: Tensor | None = torch.empty(10_000)

    def step(self) -> None:
        self.gradient = None
        torch.empty(15_000)


def test_the_most_that_a_step_has_allocated() -> None:
    allocates = Allocates()
    assert [most_allocated(allocates.step, CPU) for _ in range(3)] == [120_000] * 3
    assert most_allocated(lambda: [allocates.step(), torch.empty(20_000)], CPU) == 120_000  # old states are gone
    assert most_allocated(Frees().step, CPU) == 20_000
    assert most_allocated(lambda: None, CPU) == 0


class Refreshes:
    """Every other step replaces its two states of 40 kB, one after the other."""

    def __init__(self) -> None:
        self.taken, self.states = 0, [torch.empty(10_000), torch.empty(10_000)]

    def step(self) -> None:
        self.taken += 1
        if self.taken % 2 == 0:
            for index in range(2):
                self.states[index] = torch.empty(10_000)


def test_a_refresh_allocates_no_more_than_it_holds_at_once() -> None:
    contender = Contender(
        Choice("refreshes", lambda *_: Refreshes()), [], benchmark.parse(["modes", "--interval", "2"])
    )
    contender.warm_up([[]])
    assert contender.transient == [0, 40_000]


# -- the floor ---------------------------------------------------------------------------------------------------------


def test_the_floor_is_every_blocks_product(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((2048, 300), (1024, 300), (4, 6, 5), (6, 20), (7,), (1, 9), (5000, 3))
    parameters = [torch.zeros(shape) for shape in shapes]
    experts, square, thin = Block(0, 0, 6, 5), Block(0, 0, 1024, 300), Block(0, 0, 5000, 3, left=False)
    assert blocks_of(p.shape for p in parameters) == {square: 3, experts: 4, Block(0, 0, 6, 20): 1, thin: 1}
    products = Products(parameters)
    bmm, made = torch.bmm, []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        made.append(bmm(left, right))
        return made[-1]

    monkeypatch.setattr(torch, "bmm", counted)
    products.step()
    assert [tuple(product.shape) for product in made] == [
        *2 * [(3, 1024, 300)], *2 * [(4, 6, 5)], *2 * [(1, 6, 20)], (1, 5000, 3)
    ]  # fmt: skip
    for (gradients, left, right), product in zip(products.batches, [*made[1::2], made[-1]], strict=True):
        assert product.dtype == torch.float32
        for block in range(len(gradients)):
            half = gradients[block] if left is None else left[block] @ gradients[block]
            torch.testing.assert_close(product[block], half @ right[block])


def test_the_floor_has_the_blocks_that_ours_preconditions() -> None:
    model = vit(48, 2)
    optimizer = Shampoo4(model.parameters())
    blocks = [int(count) for count in re.findall(r"(\d+) of \d+ x \d+", optimizer.describe())]
    assert blocks_of(p.shape for p in model.parameters()).total() == sum(blocks) == 15


# -- steps on ranks ----------------------------------------------------------------------------------------------------


def test_parts_of_a_trace_by_hand() -> None:
    def event(name: str, begin: float, end: float) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}

    events = [
        event("benchmark::step", 100, 120), event("benchmark::step", 0, 20), event("benchmark::optimizer", 8, 18),
        event("shampoo4::gather", 8, 10), event("shampoo4::precondition", 10, 14), event("shampoo4::gather", 14, 14.5),
        event("aten::gather", 10, 11), event("gloo:all_to_all", 9, 12), event("gloo:all_to_all", 13, 17),
        {"ph": "i", "name": "shampoo4::gather"}, event("shampoo4::base", 110, 111),
    ]  # fmt: skip
    first, second = parts_of(events)
    parts = {"gather": 2.5, "statistics": 0, "roots": 0, "precondition": 4, "graft": 0, "send_back": 0, "base": 0}
    whole = {"step": 20, "optimizer": 10, "transfers": 3 + 4, "overlapped": 2 + 1}
    assert first == pytest.approx({**parts, **whole})
    assert second["step"] == 20 and second["base"] == pytest.approx(1) and second["gather"] == 0


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    def step(seconds: float, sent: int) -> dict[str, float]:
        return {"step": seconds, "optimizer": seconds / 2, "processor": 0.001, "sent": sent}

    def parts(seconds: float) -> dict[str, float]:
        return {**dict.fromkeys(PROFILED, 0.0), "step": seconds, "gather": seconds / 4, "send_back": seconds / 8}

    first = {
        "steps": {7: step(1, 20), 8: step(9, 50), 9: step(3, 20)},
        "profiled": {10: parts(1), 11: parts(1), 12: parts(8)}, "preconditioner": 30, "base": 8,
    }  # fmt: skip
    second = {
        "steps": {7: step(2, 10), 8: step(8, 50), 9: step(2, 10)},
        "profiled": {10: parts(2), 11: parts(2), 12: parts(4)}, "preconditioner": 10, "base": 8,
    }  # fmt: skip
    row = rank_row("shampoo4", [first, second], interval=4)  # steps 8 and 12 are no ordinary ones
    assert row["step_ms"] == {"median": 3000, "worst": 9000} and row["optimizer_cpu_ms"]["median"] == 1
    assert row["sent_bytes"] == [20, 10]
    assert row["parts_ms"]["ordinary"]["step"] == 2000 and row["parts_ms"]["refresh"]["gather"] == 2000
    assert row["exchange_share"] == 3 / 8 and row["balance"] == 1.5 and row["state_bytes"] == [38, 18]
    assert rank_row("shampoo4-staggered", [first, second], 4)["sent_bytes"] == [20, 10]
    assert rank_row("adamw", [first, second], interval=4)["balance"] == pytest.approx(38 / 28)


def test_ordinary_steps() -> None:
    assert [step for step in range(1, 9) if is_ordinary("shampoo4", step, 4)] == [1, 2, 3, 5, 6, 7]
    assert all(is_ordinary("shampoo4-staggered", step, 4) for step in range(1, 9))


# -- flops -------------------------------------------------------------------------------------------------------------


SHAPES = [(70, 150), (128, 128), (20, 65), (4, 6, 5), (9,), (2000, 4)]


def counted_flops(**options: Any) -> list[int]:
    """The flops of the products in four steps, of which every second is due to refresh everything."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = Shampoo4(parameters, max_preconditioner_dim=80, statistics_interval=2, **options)
    counted = []
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        counted.append(counter.get_total_flops())
    return counted


def test_flops_are_those_that_torch_counts() -> None:
    """torch counts products, but not the 8/3 n^3 of a QR."""
    blocks = blocks_of(SHAPES, 80)
    assert blocks.total() == 2 + 4 + 1 + 4 + 4
    flops = step_flops(blocks)
    factorized = sum(count * 8 / 3 * order**3 for order, count in orders_of(blocks).items())
    both = flops["ordinary"] + flops["refresh"] - factorized
    first, *others = counted_flops(interval_warmup=False)
    assert first > 0 and others == pytest.approx([both, flops["ordinary"], both])


def test_flops_of_shampoo_are_those_that_torch_counts() -> None:
    """A factorization has 8/3 n^3, or 9 n^3 where a factor stays in float32; nothing happens before the first roots."""
    blocks = blocks_of(SHAPES, 80)
    flops = step_flops(blocks, "shampoo")
    factorized = sum(count * (8 / 3 if order >= 64 else 9) * order**3 for order, count in orders_of(blocks).items())
    both = flops["ordinary"] + flops["refresh"] - factorized
    assert counted_flops(method="shampoo", root_interval=2) == pytest.approx([0, both, flops["ordinary"], both])


def test_flops_of_a_block_by_hand() -> None:
    rows, columns = 100, 50  # 2500 elements: the right factor stays in float32
    product = 2 * rows**2 * columns + 2 * rows * columns**2
    cubes = 4 + 4 + 8 / 3 + 2 + 2
    expected = {"ordinary": product, "refresh": product + cubes * rows**3 + (9 + 2) * columns**3}
    assert step_flops(blocks_of([(rows, columns)]), "shampoo") == pytest.approx(expected)
    square = blocks_of([(256, 256)])
    assert step_flops(square, "shampoo")["refresh"] == pytest.approx((28 + 16 / 3) * 256**3)
    assert step_flops(square) == pytest.approx({"ordinary": 8 * 256**3, "refresh": (24 + 16 / 3) * 256**3})


def test_stacks_have_the_parameters_that_were_asked_for() -> None:
    for wanted in (1e6, 3e6, 1e7, 3e7, 1e8):
        shapes = stack_shapes(wanted)
        assert sum(rows * columns for rows, columns in shapes) == pytest.approx(wanted, rel=0.12)
        assert 50 <= shapes[0][0] / (len(shapes) / 6) <= 100
    assert stack_shapes(1)[0] == (64, 64) and len(stack_shapes(1)) == 6
