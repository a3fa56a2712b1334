"""Records when one rank's exchange sends, waits and computes, from outside the library; see timeline.py.

Times are milliseconds from the start of the recorded step, by time.perf_counter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch.profiler import record_function

from sharded_shampoo4 import exchange
from sharded_shampoo4.exchange import Exchange

Span = tuple[float, float]


class Transfer:
    """One way of one batch: when it was posted and done, waited for, and when what came was written to its place."""

    def __init__(self, posted: float) -> None:
        self.posted = posted
        self.done = math.inf  # as far as the process group has told
        self.waited: Span = (math.inf, math.inf)
        self.written = math.inf

    def spans(self) -> dict[str, Span]:
        """From when to when it was under way, and waited for; the end of the wait is the latest that it was done."""
        return {"under_way": (self.posted, min(self.done, self.waited[1])), "waited": self.waited}


class Recorder:
    """The parts of one step's exchange, by the numbers of its batches, and the bytes that this rank ever sent."""

    def __init__(self) -> None:
        self._exchanges: list[Exchange] = []
        self._clear()

    def _clear(self) -> None:
        self._begun = time.perf_counter()
        self._length = 0.0
        self._gradients: dict[int, Transfer] = {}
        self._directions: dict[int, Transfer] = {}
        self._computed: dict[int, Span] = {}
        self._transfers: WeakKeyDictionary[Any, Transfer] = WeakKeyDictionary()  # by what arrives

    @property
    def bytes_sent(self) -> int:
        """To other ranks, so far."""
        return sum(one.bytes_sent for one in self._exchanges)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record what happens within, from its start."""
        self._clear()
        yield
        self._length = self._now()

    def _now(self) -> float:
        return 1e3 * (time.perf_counter() - self._begun)

    @contextmanager
    def _part(self, label: str) -> Iterator[list[float]]:
        """A part with a label in the trace; its begin, and after it its end."""
        span = [self._now()]
        with record_function(f"shampoo4: {label}"):
            yield span
        span.append(self._now())

    def watch(self) -> None:
        """Record every exchange of this process from now on."""
        send_gradients, compute_batch = Exchange._send_gradients, Exchange._compute
        send_directions, arriving_class = Exchange._send_directions, exchange._Arriving
        wait, write = arriving_class.wait, arriving_class.write

        def sending(method: Callable[..., Any], what: str) -> Callable[..., Any]:
            def send(self_: Exchange, part: Any, *arguments: Any) -> Any:
                if self_ not in self._exchanges:
                    self._exchanges.append(self_)
                with self._part(f"send {what} of batch {part.number}"):
                    arriving = method(self_, part, *arguments)
                kept = self._gradients if what == "gradients" else self._directions
                kept[part.number] = self._transfers[arriving] = self._posted(arriving)
                return arriving

            return send

        def computing(self_: Exchange, part: Any, arriving: Any, shards: Any, compute: Any) -> Any:
            def timed(*arguments: Any) -> Any:
                with self._part(f"compute batch {part.number}") as span:
                    directions = compute(*arguments)
                self._computed[part.number] = span[0], span[1]
                return directions

            return compute_batch(self_, part, arriving, shards, timed)

        def waiting(self_: Any) -> None:
            with self._part("wait") as span:
                wait(self_)
            self._transfers[self_].waited = span[0], span[1]

        def writing(self_: Any, places: Any = None) -> None:
            with self._part("write what arrived") as span:
                write(self_, places)
            self._transfers[self_].written = span[1]

        patches: dict[type, dict[str, Callable[..., Any]]] = {
            Exchange: {
                "_send_gradients": sending(send_gradients, "gradients"),
                "_send_directions": sending(send_directions, "directions"),
                "_compute": computing,
            },
            arriving_class: {"wait": waiting, "write": writing},
        }
        for patched, methods in patches.items():
            for name, method in methods.items():
                setattr(patched, name, method)

    def _posted(self, arriving: Any) -> Transfer:
        """A transfer that was posted now, and notes itself when it is done."""
        transfer, begun = Transfer(self._now()), self._begun

        def done(_: object) -> None:  # in a thread of the process group's
            transfer.done = 1e3 * (time.perf_counter() - begun)

        if arriving._work is not None:
            arriving._work.get_future().add_done_callback(done)
        return transfer

    def summary(self) -> dict[str, Any]:
        """The recorded step: its length, and for each batch its spans."""
        batches = [
            {
                "batch": number,
                "gradients": gradients.spans(),
                "computed": self._computed.get(number),
                "directions": self._directions[number].spans(),
                "written": self._directions[number].written,
            }
            for number, gradients in self._gradients.items()
        ]
        return {"step_ms": self._length, "batches": batches}


def overlap(span: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    """How long ``span`` shares with ``others``, of which no two overlap."""
    return sum(max(0.0, min(span[1], end) - max(span[0], begin)) for begin, end in others)


def totals(summary: dict[str, Any]) -> dict[str, Any]:
    """Of a rank's step: time computing, waiting and with transfers under way, and how these overlap with computing."""
    computed = [batch["computed"] for batch in summary["batches"] if batch["computed"]]
    transfers = [batch[way] for batch in summary["batches"] for way in ("gradients", "directions")]
    under_way = [transfer["under_way"] for transfer in transfers]
    length = sum(end - begin for begin, end in under_way)
    return {
        "step_ms": summary["step_ms"],
        "computing_ms": sum(end - begin for begin, end in computed),
        "waiting_ms": sum(end - begin for begin, end in (transfer["waited"] for transfer in transfers)),
        "transfer_ms": length,
        "overlapped_share": sum(overlap(span, computed) for span in under_way) / length if length else 0.0,
        "transfers": len(transfers),
        "in_time": sum(transfer["under_way"][1] <= transfer["waited"][0] for transfer in transfers),
    }
