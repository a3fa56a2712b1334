"""What a state_dict holds beside the base optimizer's states, and its checks before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import matrix_shape
from .options import PreconditionerOptions
from .preconditioner import Matrix
from .ranks import Ranks

FORMAT_VERSION = 2  # 1: the code book "normal" had other levels, none of them zero
VERSION_KEY = "preconditioner_format"  # in each parameter group
STATE_KEY = "preconditioner"  # in state_dict()["state"][i]: one uint8 vector for each preconditioned parameter
PIECES_KEY = "preconditioner_pieces"  # in state_dict(), where flat tensors have replaced the parameters (ZeRO)


@dataclass
class PackedState:
    """A parameter's preconditioner as bytes, and the options that shaped them."""

    options: PreconditionerOptions
    data: Tensor  # uint8 (Matrix.packed_bytes,), whole or a DTensor

    def full(self, matrix: Matrix, ranks: Ranks) -> Tensor:
        """The whole of the bytes on every rank; collective if they are sharded."""
        if not hasattr(self.data, "full_tensor"):
            return self.data
        data: Any = self.data
        whole: Tensor = data.to(matrix.device).full_tensor()  # the host's part may not be able to travel
        return whole

    def check(self, matrix: Matrix) -> None:
        """Raise ValueError, naming the parameter, unless the bytes are those of ``matrix``."""
        _check_options(self.options, matrix)
        if self.data.dtype != torch.uint8 or self.data.shape != (matrix.packed_bytes,):
            raise ValueError(
                f"the stored preconditioner of {matrix.name} does not belong to a matrix of shape {matrix.shape}: "
                f"{matrix.packed_bytes} bytes were expected, not {self.data.numel()} elements of {self.data.dtype}"
            )


@dataclass
class PackedPieces:
    """One rank's part of a parameter's preconditioner, and the options that shaped its bytes."""

    options: PreconditionerOptions
    shape: tuple[int, int]  # of the matrix
    blocks: list[int]  # numbers of the blocks that are there
    data: Tensor  # uint8: the header, then the factors of those blocks

    def full(self, matrix: Matrix, ranks: Ranks) -> Tensor:
        """The whole of the bytes on every rank, put together from the parts of all; collective.

        Raises ValueError, on every rank alike, unless the parts belong together.
        """
        header = len(matrix.header)
        everyone = ranks.gather((bytes(self.data[:header].tolist()), self.blocks))
        if any(other != everyone[0][0] for other, _ in everyone):
            raise ValueError(f"the ranks have loaded preconditioners of {matrix.name} from different steps")
        found = sorted(number for _, blocks in everyone for number in blocks)
        if found != list(range(len(matrix.blocks))):
            raise ValueError(
                f"the ranks have loaded blocks {found} of the preconditioner of {matrix.name}, which has "
                f"{len(matrix.blocks)}: every rank must load what the same number of ranks have saved"
            )
        sizes = [[matrix.block_bytes(matrix.blocks[number]) for number in blocks] for _, blocks in everyone]
        mine = self.data[header:].to(matrix.device)
        parts = ranks.gather_bytes(mine, [sum(size) for size in sizes])
        cut: dict[int, Tensor] = {}
        for (_, blocks), size, part in zip(everyone, sizes, parts, strict=True):
            cut.update(zip(blocks, part.split(size), strict=True))
        return torch.cat([self.data[:header].to(matrix.device), *(cut[number] for number in sorted(cut))])

    def check(self, matrix: Matrix) -> None:
        """Raise ValueError, naming the parameter, unless the bytes are those of ``matrix``."""
        _check_options(self.options, matrix)
        if self.shape != matrix.shape:
            raise ValueError(
                f"the stored preconditioner of {matrix.name} belongs to a matrix of shape {self.shape}, not of "
                f"{matrix.shape}"
            )
        known = range(len(matrix.blocks))
        if not set(self.blocks) <= set(known) or self.data.dtype != torch.uint8:
            raise ValueError(f"the stored preconditioner of {matrix.name} has blocks {self.blocks} of {len(known)}")
        size = len(matrix.header) + sum(matrix.block_bytes(matrix.blocks[number]) for number in self.blocks)
        if self.data.shape != (size,):
            raise ValueError(
                f"the stored preconditioner of {matrix.name} has {self.data.numel()} bytes where {size} were expected"
            )

    def as_plain(self) -> dict[str, Any]:
        """Everything but the options, to stand in a state_dict."""
        return {"shape": self.shape, "blocks": self.blocks, "data": self.data}

    @classmethod
    def of_plain(cls, options: PreconditionerOptions, stored: Mapping[str, Any]) -> PackedPieces:
        """Undo :meth:`as_plain`."""
        rows, columns = stored["shape"]
        return cls(options, (rows, columns), list(stored["blocks"]), stored["data"].detach().clone())


def check_that_ranks_agree(ranks: Ranks, stored: Mapping[str, PackedState | PackedPieces | None]) -> None:
    """Raise ValueError, on every rank alike, if some ranks have stored bytes of a parameter and others none."""
    everyone = ranks.gather([name for name, entry in stored.items() if entry is not None])
    for rank, names in enumerate(everyone):
        if names != everyone[0]:
            name = min(set(names) ^ set(everyone[0]))
            having = "has" if name in names else "has not"
            raise ValueError(f"rank {rank} {having} loaded a preconditioner of {name}, unlike rank 0")


def check_same_bytes(old: Matrix, new: Matrix) -> None:
    """Raise ValueError, naming the parameter, unless the factors of ``old`` can serve ``new``."""
    _check_options(old.options, new)
    if old.shape != new.shape:
        raise ValueError(f"the shape of {new.name} was {old.shape} and is now {new.shape}")


def _check_options(stored: PreconditionerOptions, matrix: Matrix) -> None:
    difference = shaping_difference(stored, matrix.options)
    if difference:
        raise ValueError(f"the stored preconditioner of {matrix.name} has {difference}")


def refuse_former_levels(version: int, stored: PreconditionerOptions, what: str) -> None:
    """Raise ValueError if bytes of this format have codes for levels that are no longer there."""
    if version < 2 and stored.precondition and stored.bits != 32 and stored.codebook == "normal":
        raise ValueError(
            f"{what} has codebook='normal' in format {version}, whose levels had no zero and can no longer be read: "
            "go on with the version of Shampoo4 that wrote it, or begin with new states"
        )


def shaping_difference(stored: PreconditionerOptions, wanted: PreconditionerOptions) -> str:
    """The options whose different values make stored bytes unreadable, in words; empty if there are none."""
    old, new = stored.shaping_bytes(), wanted.shaping_bytes()
    names = [name for name in {**old, **new} if name in old and name in new and old[name] != new[name]]
    return ", ".join(f"{name}={old[name]!r} where this optimizer has {name}={new[name]!r}" for name in names)


def join(plain: dict[str, Any], packed: Sequence[Tensor | None]) -> dict[str, Any]:
    """A base optimizer's state_dict with ``packed`` preconditioners, given in the order of the groups' parameters.

    What stood for them in it is taken out.
    """
    state = separate(plain)[0]["state"]
    for key, data in zip(_keys(plain), packed, strict=True):
        if data is not None:
            state[key] = {**state.get(key, {}), STATE_KEY: data}
    return {**plain, "state": state}


def separate(state_dict: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Undo :func:`join`."""
    plain = {
        key: {name: value for name, value in entry.items() if name != STATE_KEY}
        for key, entry in state_dict["state"].items()
    }
    packed = [state_dict["state"].get(key, {}).get(STATE_KEY) for key in _keys(state_dict)]
    return {**state_dict, "state": {key: entry for key, entry in plain.items() if entry}}, packed


def check_loadable(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], shapes: Sequence[tuple[str, Sequence[int]]]
) -> None:
    """Raise ValueError, with the option and both values or the parameter's name, unless ``state_dict`` fits.

    ``shapes`` are the names and whole shapes of the parameters.
    """
    saved_groups = state_dict["param_groups"]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(f"the state_dict has param groups of {saved_sizes} parameters, this optimizer of {sizes}")
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        version = saved.get(VERSION_KEY)
        if version is None:
            raise ValueError(f"param group {index} of the state_dict was not written by Shampoo4")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"the state_dict has format {version}, this version of Shampoo4 reads up to {FORMAT_VERSION}"
            )
        stored = PreconditionerOptions.of_group(saved)
        refuse_former_levels(version, stored, f"param group {index} of the state_dict")
        difference = shaping_difference(stored, PreconditionerOptions.of_group(group))
        if difference:
            raise ValueError(f"param group {index} of the state_dict has {difference}")

    plain, packed = separate(state_dict)
    options = [PreconditionerOptions.of_group(group) for group in saved_groups for _ in group["params"]]
    for key, data, option, (name, whole) in zip(_keys(plain), packed, options, shapes, strict=True):
        shape = matrix_shape(whole) if option.precondition else None
        if shape and data is not None:
            PackedState(option, data).check(Matrix(name, shape, option, data.device))
        elif shape and key in plain["state"]:
            raise ValueError(
                f"the state_dict has a state of {name}, but no preconditioner: it is of another optimizer, or was "
                "collected from optimizer.state. Save optimizer.state_dict(), or use sharded_shampoo4.checkpoint"
            )
        elif data is not None:
            raise ValueError(f"the state_dict has a preconditioner of {name}, which is not preconditioned here")


def _keys(state_dict: dict[str, Any]) -> list[Any]:
    return [key for group in state_dict["param_groups"] for key in group["params"]]
