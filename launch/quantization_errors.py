"""What low precision does to the inverse root of a preconditioner: the paper's tables 1 and 5.

    python launch/quantization_errors.py runs/shampoo32/checkpoint-600/shampoo4

The argument is a portable checkpoint of a 32-bit run, of which the largest preconditioner is taken. For each way to
store it: the normwise relative error of A^(-1/4) in the Frobenius norm, and the angle to the exact one in degrees; also
on a synthetic matrix of order 1200 with two eigenvalues, 1 and 1000. A second table is about the layouts that Shampoo4
offers, as its factors store them, with the bits that an element of the factor takes in all.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.numerics import eigenbasis, quantization
from sharded_shampoo4.numerics.factors import FactorPool
from sharded_shampoo4.options import PreconditionerOptions

BLOCK = 64  # elements that share a scale
MATRIX_EPS = 1e-6
RECTIFY_STEPS = 4
# Code book, bits, what is quantized, whether the eigenbasis is rectified: as in table 1, then with 3 bits and "normal".
WAYS = [
    *((book, 8, "A", False) for book in ("dynamic_tree", "linear2")),
    *(
        (book, bits, what, rectified)
        for bits in (4, 3)
        for book in ("dynamic_tree", "linear2", "normal")
        for what, rectified in (("A", False), ("U", False), ("U", True), ("U and root", True))
    ),
]

LAYOUTS: dict[str, dict[str, Any]] = {
    "stored roots": {},
    "implicit roots": {"root": "implicit"},
    "bfloat16 scales": {"scale_dtype": "bfloat16"},
    "normal levels": {"codebook": "normal"},
    "compact": Shampoo4.compact_settings(),
}


def largest_preconditioner(folder: Path) -> tuple[str, Tensor]:
    """The side of the highest order in a checkpoint of a 32-bit run, and its name.

    Raises:
        SystemExit: the checkpoint is of another kind.
    """
    manifest = checkpoint.read_manifest(folder)
    entries = manifest["parameters"]
    bits = {entry["options"]["bits"] for entry in entries.values() if "factors" in entry}
    if bits != {32}:
        raise SystemExit(f"{folder} is of a run with {bits} bits: the errors need one with 32")
    groups = [
        {"params": [(name, nn.Parameter(torch.zeros(entry["shape"])))], **entry["options"]}
        for name, entry in entries.items()
    ]
    optimizer = Shampoo4(groups, base={"AdamW": "adamw", "SGD": "sgd", "Adagrad": "adagrad"}[manifest["base"]])
    checkpoint.load(optimizer, folder)
    pools = [pool for binding in optimizer._session.all() for pool in binding.preconditioner.pools]
    pool = max((pool for pool in pools if "statistics" in pool.tensors), key=lambda pool: pool.order)
    return f"a preconditioner of order {pool.order}", pool.tensors["statistics"][0].double()


def two_eigenvalues(order: int = 1200) -> Tensor:
    """Few eigenvalues of 1, the others 1000, in a random basis: A^(-1/4) then has two very different parts."""
    noise = torch.randn(order, order, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    values = torch.where(torch.arange(order) < (1000 / 0.02) ** -0.25 * order, 1.0, 1000.0).double()
    return (basis * values) @ basis.mT


def errors(matrix: Tensor) -> dict[tuple[str, int, str, bool], tuple[float, float]]:
    """For each of ``WAYS``, the relative error and the angle of the inverse root of ``matrix``, float64 (n, n)."""
    values, basis = (found[None] for found in torch.linalg.eigh(matrix))
    exact = eigenbasis.inverse_root(values, basis, MATRIX_EPS)
    return {way: _compare(_inverse_root(matrix[None], values, basis, *way), exact) for way in WAYS}


def _inverse_root(
    matrix: Tensor, values: Tensor, basis: Tensor, codebook: str, bits: int, what: str, rectified: bool
) -> Tensor:
    def stored(full: Tensor) -> Tensor:
        options = {"codebook": codebook, "bits": bits, "block": BLOCK}
        return quantization.dequantize(*quantization.quantize(full, **options), full.shape[-1], **options).double()

    if what == "A":
        return eigenbasis.inverse_root_of(_off_diagonal(stored, matrix), MATRIX_EPS)
    rough = stored(basis.mT).mT
    if rectified:
        rough = eigenbasis.rectify(rough, RECTIFY_STEPS)
    root = eigenbasis.inverse_root(values, rough, MATRIX_EPS)
    return root if what == "U" else _off_diagonal(stored, root)


def layout_errors(matrix: Tensor) -> dict[tuple[str, int], tuple[float, float, float]]:
    """For each of ``LAYOUTS`` and 4 and 3 bits, error and angle of a factor's root, and its bits for each element.

    The factor has the eigenvalues and the eigenbasis of ``matrix``, float64 (n, n).
    """
    order = len(matrix)
    values, basis = (found[None] for found in torch.linalg.eigh(matrix))
    exact = eigenbasis.inverse_root(values, basis, MATRIX_EPS)
    identity = torch.eye(order, dtype=torch.float64)[None]
    found = {}
    for (name, layout), bits in itertools.product(LAYOUTS.items(), (4, 3)):
        pool = FactorPool(order, 1, PreconditionerOptions(**{**layout, "bits": bits}), torch.device("cpu"))
        for key, value in {"eigenvalues": values, **pool._encode("basis", basis.mT)}.items():
            pool.tensors[key].copy_(value)
        pool.invert(torch.tensor([0]))
        error, angle = _compare(pool.root(slice(0, 1), torch.float64).left_of(identity), exact)
        found[name, bits] = error, angle, 8 * pool.nbytes / order**2
    return found


def _off_diagonal(stored: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """``matrix`` with everything but its diagonal as it comes back."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).diag_embed()
    rest = stored(matrix - diagonal)
    return rest - rest.diagonal(dim1=-2, dim2=-1).diag_embed() + diagonal


def _compare(found: Tensor, exact: Tensor) -> tuple[float, float]:
    cosine = (found * exact).sum() / (found.norm() * exact.norm())
    return ((found - exact).norm() / exact.norm()).item(), math.degrees(math.acos(min(1.0, cosine.item())))


def print_errors(folder: Path) -> None:
    """Print the tables for the largest preconditioner of a checkpoint, and for a synthetic matrix."""
    name, matrix = largest_preconditioner(folder)
    spectrum = torch.linalg.eigvalsh(matrix)
    name += f" (condition {(spectrum[-1] / spectrum[0].clamp_min(1e-30)).item():.3g})"
    matrices = {name: matrix, "two eigenvalues, order 1200": two_eigenvalues()}
    title = "error of A^(-1/4): relative / angle in degrees"
    found = {name: errors(each) for name, each in matrices.items()}
    _print_table(title, ("code book", "bits", "quantized", "rectified"), found)
    layouts = {name: layout_errors(each) for name, each in matrices.items()}
    _print_table(f"{title} / bits an element, as factors store it", ("layout", "bits"), layouts)


def _print_table(title: str, keys: tuple[str, ...], found: dict[str, dict[Any, tuple[float, ...]]]) -> None:
    """A line for each way that all of ``found`` have, with the numbers of each."""
    table = Table(*keys, *found, title=title)
    for way in next(iter(found.values())):
        words = [("yes" if part else "") if isinstance(part, bool) else str(part) for part in way]
        table.add_row(*words, *(" / ".join(f"{number:.4g}" for number in each[way]) for each in found.values()))
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder that checkpoint.save wrote")
    print_errors(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
