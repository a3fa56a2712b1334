"""One attached set of parameters: their plan, the exchange that carries it out, this rank's factors, and grafting.

Made at a step, not in a constructor: hosts replace parameters, shard them and move them afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .agreement import gather_shards
from .comm.exchange import Arrived, Exchange
from .comm.ranks import OWN_MODELS, DeferredErrors, Ranks
from .grafting import Grafting
from .held import HeldParameter
from .numerics.matrix import Due, Matrix
from .numerics.preconditioner import Preconditioner, fresh_block
from .placement import local_tensor
from .planning.loads import Work
from .planning.plan import Owned, Plan
from .report import shorten

logger = logging.getLogger(__name__)


class Distributor:
    """One attached set of parameters: plan, exchange, preconditioner and grafting.

    The constructor is collective: all ranks make the same plan of their shards.

    Args:
        ranks: the ranks that hold the parameters between them.
        held: the parameters to precondition, in the same order on every rank.
        matrices: their matrices, with fresh factors.
        others: the work that every rank has by other distributors.

    Raises:
        ValueError: on every rank alike, where ranks disagree or shards do not tile.
    """

    def __init__(
        self,
        ranks: Ranks,
        held: Sequence[HeldParameter],
        matrices: Sequence[Matrix],
        others: Work | None = None,
    ) -> None:
        self.ranks = ranks
        self.parameters = [parameter.parameter for parameter in held]
        self.holders = [parameter.holder for parameter in held]
        self._spans = [_span(parameter) for parameter in held]  # of this rank's shards in flattened gradients
        self.matrices = list(matrices)
        shards = gather_shards(ranks, self.matrices, [parameter.shard for parameter in held])
        with ranks.together():
            planned = [matrix.planned([own[index] for own in shards]) for index, matrix in enumerate(self.matrices)]
            self.plan = Plan(planned, ranks.size, others)
            self.preconditioner = Preconditioner(self.matrices, self.plan.batches[ranks.rank])
            self.grafting = Grafting(self.plan, self.matrices, ranks.rank)
            devices, dtypes = [m.device for m in self.matrices], [m.dtype for m in self.matrices]
            rounded = [matrix.options.exchange_dtype == "bfloat16" for matrix in self.matrices]
            self.exchange = Exchange(self.plan, ranks, devices, dtypes, rounded)
        twins = self.plan.twins.of(ranks.rank)
        if twins:
            ranks.join_twins(twins, self.exchange.device)
        try_out(ranks, self.matrices, twins)
        self.has_stepped = False  # whether the base optimizer has made a step with this one
        self._replicas_differ = ranks.size > 1  # as far as is known
        self._present: tuple[bool, ...] = ()  # which parameters had a gradient on any rank in the last step

    def fits(self, parameters: Sequence[Tensor], holders: Sequence[Tensor], matrices: Sequence[Matrix]) -> bool:
        """Whether these are the same parameters, held as before, with the same shapes, options, types and devices."""
        return (
            len(parameters) == len(self.parameters)
            and all(new is old for new, old in zip(parameters, self.parameters, strict=True))
            and all(new is old for new, old in zip(holders, self.holders, strict=True))
            and all(new.like(old) for new, old in zip(matrices, self.matrices, strict=True))
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def presence_changed(self) -> bool:
        """Whether a gradient that this rank can see came or went since the last step."""
        before = self._present or (False,) * len(self.holders)
        return any(
            (holder.grad is not None) != was_present and span is not None
            for holder, span, was_present in zip(self.holders, self._spans, before, strict=True)
        )

    def agree_on_presence(self) -> None:
        """Find out which parameters have a gradient on any rank; collective."""
        self._present = self.ranks.any(
            [span is not None and h.grad is not None for h, span in zip(self.holders, self._spans, strict=True)]
        )

    def check_replicas(self) -> None:
        """Raise RuntimeError, on every rank, if ranks that hold the same elements have different gradients; collective.

        That is a model which is not wrapped, but trained by several processes, each on its own. Looked at once.
        """
        if not self._replicas_differ or not any(self._present):
            return
        rank = self.ranks.rank
        with self.ranks.together():
            digests = [
                (matrix.shards[rank], _digest(self._gradient_shard(index)))
                for index, matrix in enumerate(self.plan.matrices)
                if self._present[index] and matrix.replicas > 1
            ]
        names = [m.name for m, p in zip(self.plan.matrices, self._present, strict=True) if p and m.replicas > 1]
        seen: dict[tuple[int, ...], tuple[int, int]] = {}
        for other, theirs in enumerate(self.ranks.gather(digests)):
            for position, (shard, digest) in enumerate(theirs):
                first, expected = seen.setdefault((position, *shard.elements), (other, digest))
                if digest != expected:
                    raise RuntimeError(
                        f"ranks {first} and {other} hold the same elements of {names[position]}, but their gradients "
                        "differ: wrap the model in DistributedDataParallel or FSDP, which average gradients; give "
                        "experts on parts of a mesh, which are no copies, to a Shampoo4 of their own; "
                        f"{OWN_MODELS}, as with local SGD, which averages parameters now and then"
                    )
        self._replicas_differ = False

    def precondition(self) -> None:
        """Overwrite the gradients by their directions; collective.

        What fails on one rank is raised on every rank, before any has changed a parameter. Gradients may then be
        anything, and factors may have absorbed them.
        """
        errors = DeferredErrors(self.ranks)
        self._advance()
        pairs = list(zip(self._present, self.matrices, strict=True))
        active = tuple(present and matrix.busy for present, matrix in pairs)
        directed = tuple(present and matrix.rooted for present, matrix in pairs)
        due = Due.any(matrix for present, matrix in pairs if present)
        shards = errors.attempt(self._gradient_shards) or []
        targets = errors.attempt(self.grafting.targets, shards, directed) or []
        self.grafting.begin()
        for arrived in self.exchange.gather(shards, targets, active, directed, errors):
            self.exchange.send_back(arrived, errors.attempt(self._directions, arrived, due))
        if due.check:
            errors.attempt(self._raise_failure)
        self.grafting.apply(shards, targets, directed, self.ranks, errors)
        errors.raise_together()

    def _directions(self, arrived: Arrived, due: Due) -> Tensor | None:
        """Let a batch of blocks take its step: its directions, or its gradients before the first roots."""
        part, gradients = arrived.part, arrived.gradients
        if gradients is None:
            return None
        is_due = due.statistics or due.root
        refreshed = self.preconditioner.refresh(part.number, part.chosen, gradients) if is_due else None
        directions = self.preconditioner.precondition(part.number, part.chosen, gradients, refreshed)
        if directions is None:
            return gradients
        self.grafting.note(part.blocks, gradients, directions)
        return directions

    def _advance(self) -> None:
        """Count a step of every matrix with a gradient."""
        begins = []
        for matrix, has_gradient in zip(self.matrices, self._present, strict=True):
            if has_gradient:
                was_rooted = matrix.rooted
                matrix.advance()
                if matrix.rooted and not was_rooted:
                    begins.append(matrix)
        if begins and self.ranks.rank == 0:
            names = shorten(matrix.name for matrix in begins)
            logger.info(f"Preconditioning begins with step {begins[0].step} of {names}")

    def _gradient_shards(self) -> list[Tensor]:
        return [self._gradient_shard(index) for index in range(len(self.matrices))]

    def _raise_failure(self) -> None:
        failure = self.preconditioner.failure()
        if failure is not None:
            raise failure

    def _gradient_shard(self, index: int) -> Tensor:
        """This rank's shard of a gradient, contiguous, in its storage; empty where there is none."""
        holder, span = self.holders[index], self._spans[index]
        if span is None or not self._present[index]:
            return torch.empty(0, dtype=holder.dtype, device=holder.device)
        if holder.grad is None:  # it has one on another rank
            holder.grad = torch.zeros_like(holder)
        gradient: Tensor = local_tensor(holder.grad)
        if not gradient.is_contiguous():  # say, channels_last: its matrix could not be a view
            holder.grad = holder.grad.contiguous()
            gradient = local_tensor(holder.grad)
        start, stop = span
        return gradient if stop - start == gradient.numel() else gradient.view(-1)[start:stop]

    def owners(self) -> dict[Tensor, str]:
        """The ranks that own blocks of each parameter."""
        found: dict[int, set[int]] = {}
        for owned, owner in self.plan.owner_of.items():
            found.setdefault(owned.matrix, set()).add(owner)
        return {self.parameters[index]: ", ".join(map(str, sorted(ranks))) for index, ranks in found.items()}

    # -- states --------------------------------------------------------------------------------------------------------

    def own_blocks(self, index: int) -> dict[int, Owned]:
        """The blocks of a matrix that this rank owns, by their numbers."""
        owned = (Owned(index, block) for block in self.matrices[index].blocks)
        return {number: block for number, block in enumerate(owned) if self.plan.owner_of[block] == self.ranks.rank}

    def reset(self, index: int) -> None:
        """Make this rank's part of a matrix's preconditioner a fresh one."""
        matrix = self.matrices[index]
        matrix.step, matrix.roots = 0, 0
        for owned in self.own_blocks(index).values():
            self.preconditioner.from_bytes(owned, fresh_block(matrix, owned.block))


def _span(held: HeldParameter) -> tuple[int, int] | None:
    """Where this rank's shard begins and ends in the flattened holder; None if it holds nothing."""
    place = held.in_holder
    return (place.start, place.stop) if held.shard.length else None


def _digest(values: Tensor) -> int:
    """Return a checksum of the bits of ``values``."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return int(values.contiguous().view(integers).sum(dtype=torch.int64))


def try_out(ranks: Ranks, matrices: Sequence[Matrix], twins: Sequence[int] = ()) -> None:
    """Try what might otherwise fail late, once for each device: memory, solvers, connections to all ranks; collective.

    A rank that fails raises on every rank, now and not after hours.
    """
    needs = {matrix.device: matrix for matrix in matrices if matrix.device not in ranks.tried}
    on_host = all(device.type == "cpu" for device in needs)
    if on_host and ranks.size == 1:
        return
    with ranks.together():
        for device, matrix in needs.items():
            ranks.check_device(matrix.name, device)
            _try_solvers(device, {m.options.refresh_dtype for m in matrices if m.device == device})
            if device.type != "cpu":
                most = max(m.options.scratch_on(device) for m in matrices if m.device == device)
                torch.empty(most * 2**20, dtype=torch.uint8, device=device)
    for device in needs:
        each = [1] * ranks.size
        with ranks.together():
            receive, send = torch.zeros(ranks.size, device=device), torch.zeros(ranks.size, device=device)
        if ranks.size > 1:
            work = ranks.start_all_to_all(receive, send, each, each)
            with ranks.explaining():
                work.wait()
        if twins:
            with ranks.together():
                joined = torch.zeros(len(twins), device=device)
            work = ranks.start_all_gather(joined, send[:1], twins)
            with ranks.explaining():
                work.wait()
        ranks.tried.add(device)


def _try_solvers(device: torch.device, dtypes: Iterable[str]) -> None:
    for name in sorted(dtypes):
        matrix = torch.eye(8, dtype=getattr(torch, name), device=device)
        torch.linalg.qr(matrix)
        torch.linalg.eigh(matrix)
