"""Block-wise quantization of matrices to 3, 4 or 8 bits, packed.

Values are scaled by the largest magnitude of their block, a run of ``block`` elements along the last dimension that
never crosses a row, and stored as the index of the nearest level of a code book (Wang et al., NeurIPS 2024,
section 3.3). All functions are pure and take any number of leading (batch) dimensions.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Dequantizing looks up whole words, not single codes: bytes, or for 3 bits half of three bytes; on a CPU, whose cache
# keeps a table of 1 MiB, two bytes where that can be.
_WORD_BITS = {3: 12, 4: 8, 8: 8}
_TWICE = {torch.uint8: torch.int16, torch.int16: torch.int32, torch.int32: torch.int64}  # two such numbers as one
_TYPES = {1: torch.float32, 2: torch.int64, 4: torch.complex128}  # as large as so many float32 values


def linear2(bits: int) -> Tensor:
    """The signed squares of ``2**bits`` equidistant points in [-1, 1], the lower middle one replaced by 0.

    Source: the paper's "linear square" quantization (section 3.3). Returns float32 levels in ascending order.
    """
    points = torch.linspace(-1.0, 1.0, 2**bits, dtype=torch.float64, device="cpu")
    points[2 ** (bits - 1) - 1] = 0.0
    return (points.sign() * points.square()).to(torch.float32)


def dynamic_tree(bits: int) -> Tensor:
    """0, 1 and the levels ``±q_k 10**-E``: E bits of exponent, one sign bit, one flag, the other F bits choose k.

    Source: the paper's appendix C (``bits = 2 + E + F``). Returns float32 levels in ascending order.
    """
    levels = [0.0, 1.0]
    for exponent in range(bits - 1):
        count = 2 ** (bits - 2 - exponent)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64, device="cpu")
        centers = (edges[:-1] + edges[1:]) / 2 * 10.0**-exponent
        levels += [*centers.tolist(), *(-centers).tolist()]
    return torch.tensor(sorted(levels), dtype=torch.float64, device="cpu").to(torch.float32)


def normal(bits: int, block: int) -> Tensor:
    """The levels with the least squared error for blocks of ``block`` Gaussian values over their largest magnitude.

    That is what the rows of a random orthogonal matrix are. Lloyd's algorithm (Least squares quantization in PCM,
    1982): every level moves to the mean of the values that are nearest to it. Given the largest magnitude m, one value
    in ``block`` is -1 or 1 and the others are Gaussian between -m and m, whose means are known; what is integrated
    numerically is m alone. One level stays at zero, so that zeros are stored exactly; of the others the positive side
    has one more. Returns float32 levels in ascending order.
    """
    largest = torch.linspace(1e-2, 9.0, 900, dtype=torch.float64, device="cpu").unsqueeze(1)
    inside = torch.erf(largest / math.sqrt(2))  # the share of all Gaussian values
    chance = torch.exp(-largest.square() / 2) * inside.pow(block - 1)
    weight = chance / chance.sum() * (block - 1) / block / inside
    outermost = torch.tensor([1.0], dtype=torch.float64, device="cpu")
    levels, zero = _good_start(weight * largest, largest, 2**bits), 2 ** (bits - 1) - 1
    levels[zero] = 0.0
    for _ in range(500):
        edges = torch.cat([-outermost, (levels[:-1] + levels[1:]) / 2, outermost])
        mass = (weight * torch.erf(largest * edges / math.sqrt(2)) / 2).sum(0).diff()
        moment = -(weight / largest * torch.exp(-(largest * edges).square() / 2)).sum(0).diff() / math.sqrt(2 * math.pi)
        for end, sign in ((0, -1), (-1, 1)):
            mass[end] += 0.5 / block
            moment[end] += sign * 0.5 / block
        levels = moment / mass
        levels[zero] = 0.0
    return (levels * _GRID).round().to(torch.float32) / _GRID  # no platform's last digits


def _good_start(weight: Tensor, largest: Tensor, count: int) -> Tensor:
    """Levels as dense as the cube root of the density, which is best for many of them (Panter and Dite, 1951)."""
    points = torch.linspace(-1.0, 1.0, 4001, dtype=torch.float64, device="cpu")
    share = (weight * torch.exp(-(largest * points).square() / 2)).sum(0).pow(1 / 3).cumsum(0)
    wanted = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count * share[-1]
    return points[torch.searchsorted(share, wanted)]


def levels_of(codebook: str, bits: int, block: int) -> Tensor:
    """The ``2**bits`` levels of a code book, ascending; ``block`` matters to "normal" only."""
    return normal(bits, block) if codebook == "normal" else CODE_BOOKS[codebook](bits)


CODE_BOOKS = {"linear2": linear2, "dynamic_tree": dynamic_tree}
# Shares of a block's largest magnitude that are tried as its scale with the code book "normal".
_SHARES = (0.88, 0.96, 1.04)
# The levels of "normal" are multiples of 1 / _GRID, so that twice as fine a grid has all middles between two.
_GRID = 2**12


class _Tables(NamedTuple):
    thresholds: Tensor  # (2**bits - 1,) float32; a value equal to thresholds[i] still belongs to level i
    words: Tensor  # one entry per word, holding that word's float32 levels
    pairs: Tensor | None  # the same for two bytes
    cells: _Cells | None  # on a CPU, unless the thresholds are too close
    levels: Tensor  # float64, for each place: see _places
    codes: Tensor | None  # uint8, for each place; None where places are codes
    shares: Tensor  # _SHARES, float32


class _Cells(NamedTuple):
    """[-1, 1] cut into ``number`` cells, each with at most one threshold in it."""

    number: int
    below: Tensor  # (number + 1,) uint8: the thresholds in the cells before this one
    inside: Tensor  # (number + 1,) float32: the threshold in this cell, or infinity


@functools.lru_cache(maxsize=32)
def _tables(codebook: str, bits: int, block: int, device: torch.device) -> _Tables:
    levels = levels_of(codebook, bits, block)
    middles = (levels[:-1].double() + levels[1:].double()) / 2
    # Rounded down to float32, so that the comparison of a float32 value with the exact middle is exact.
    thresholds = middles.to(torch.float32)
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -torch.inf))
    thresholds = torch.where(thresholds.double() > middles, below, thresholds)

    words = _table_of_words(levels, bits, _WORD_BITS[bits]).to(device)
    in_pairs = device.type == "cpu" and bits != 3 and sys.byteorder == "little"
    pairs = _table_of_words(levels, bits, 16) if in_pairs else None
    cells = _cut(thresholds) if device.type == "cpu" else None  # accelerators search as fast, in one kernel
    levels, codes = levels.double(), None
    if codebook == "normal" and device.type == "cpu":
        grid = torch.linspace(-1.0, 1.0, 4 * _GRID + 1, dtype=torch.float64, device="cpu")
        places = torch.bucketize(grid, middles)
        levels, codes = levels[places], places.to(torch.uint8)
    shares = torch.tensor(_SHARES, dtype=torch.float32, device="cpu").to(device)
    return _Tables(thresholds.to(device), words, pairs, cells, levels.to(device), codes, shares)


def _cut(thresholds: Tensor) -> _Cells | None:
    """The fewest cells that part the thresholds; None if that takes more than a cache holds."""
    for number in (2**power for power in range(6, 17)):
        cells = _cell(thresholds, number)
        if (cells.diff() > 0).all():
            all_cells = torch.arange(number + 1, dtype=torch.int32, device="cpu")
            inside = torch.full((number + 1,), torch.inf, dtype=torch.float32, device="cpu")
            inside[cells.long()] = thresholds
            return _Cells(number, torch.bucketize(all_cells, cells).to(torch.uint8), inside)
    return None


def _cell(ratios: Tensor, number: int) -> Tensor:
    """The cells, int32 from 0 to ``number``, of numbers in [-1, 1]: the first one and the last are half as wide.

    Smaller numbers are in the first cell, larger ones in the last, and NaN may be in any. Cells rise with the numbers.
    """
    cells: Tensor = (ratios * (number / 2)).add_(number / 2 + 0.5).to(torch.int32)
    return cells.clamp_(0, number)


def _table_of_words(levels: Tensor, bits: int, word_bits: int) -> Tensor:
    words = torch.arange(2**word_bits, device="cpu")
    codes = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, word_bits, bits)], dim=-1)
    return levels[codes].view(_TYPES[word_bits // bits]).flatten()


def packed_width(length: int, bits: int) -> int:
    """Bytes of one packed row of ``length`` codes."""
    return -(-length * bits // 8)


def block_count(length: int, block: int) -> int:
    """Scales of one row of ``length`` values."""
    return -(-length // block)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., n) below ``2**bits`` into uint8 (..., packed_width(n, bits)), the first code in the low bits."""
    length = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    together = 2 if bits == 4 else 8
    if length % together:
        codes = pad(codes, (0, -length % together))
    if bits == 4:
        return _joined(codes, 4).to(torch.uint8)
    words = _joined(_joined(_joined(codes.to(torch.uint8), 3) & 63, 6) & 4095, 12)
    three_bytes = torch.stack([words, words >> 8, words >> 16], dim=-1).to(torch.uint8)
    packed: Tensor = three_bytes.flatten(-2)[..., : packed_width(length, bits)]
    return packed


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Pairs of neighbors below ``2**bits`` as one number, the first lower; bits above those of both are anything."""
    even = codes.is_contiguous() and codes.storage_offset() % 2 == 0
    if sys.byteorder == "little" and codes.dtype in _TWICE and even:
        pairs = codes.flatten().view(_TWICE[codes.dtype]).view(*codes.shape[:-1], codes.shape[-1] // 2)
        return (pairs >> 8 * codes.element_size() - bits).bitwise_or_(pairs)
    first, second = codes.int().unflatten(-1, (-1, 2)).unbind(-1)
    joined: Tensor = first | second << bits
    return joined


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The ``length`` codes of each row of :func:`pack`'s result, as uint8 (..., length)."""
    words = _words(packed, bits)
    codes = torch.stack([words >> shift & (2**bits - 1) for shift in range(0, _WORD_BITS[bits], bits)], dim=-1)
    return codes.flatten(-2)[..., :length].to(torch.uint8)


def _words(packed: Tensor, bits: int) -> Tensor:
    """Indices into the table of words: the bytes themselves, or for 3 bits two 12-bit halves of three bytes."""
    if bits != 3:
        return packed.int()
    first, second, third = pad(packed, (0, -packed.shape[-1] % 3)).int().unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], dim=-1).flatten(-2)


# How many elements a CPU takes at once for each thread. Larger temporary tensors take new memory each time.
_AT_ONCE = 2**18


def quantize(
    values: Tensor, *, codebook: str, bits: int, block: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``values`` (..., n), of any floating type, in blocks of ``block`` elements.

    Returns packed codes, uint8 (..., packed_width(n, bits)), and scales, ``scale_dtype`` (..., block_count(n, block)):
    the largest magnitude of each block, or, with the code book "normal", the scale of the least squared error among
    some. A value takes the nearest level of the code book; midway between two, the smaller level. A block of zeros has
    scale 0 and comes back as zeros.
    """
    most = _AT_ONCE * torch.get_num_threads()
    if values.device.type != "cpu" or values.numel() <= most or values.ndim == 1:
        return _quantize(values, codebook, bits, block, scale_dtype)
    parts = values.flatten(0, -2).split(max(1, most // values.shape[-1]))
    done = [_quantize(part, codebook, bits, block, scale_dtype) for part in parts]
    codes, scales = (torch.cat(pieces).unflatten(0, values.shape[:-1]) for pieces in zip(*done, strict=True))
    return codes, scales


def _quantize(values: Tensor, codebook: str, bits: int, block: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    length = values.shape[-1]
    tables = _tables(codebook, bits, block, values.device)
    values = values.to(torch.float32)
    if length % block:
        values = pad(values, (0, -length % block))
    blocks = values.contiguous().unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1)
    if codebook == "normal":
        scales, codes = _least_squares(blocks, scales, tables, scale_dtype)
    else:
        scales = scales.to(scale_dtype)
        codes = _nearest(blocks / _divisors(scales).unsqueeze(-1), tables)
    return pack(codes.flatten(-2)[..., :length], bits), scales


def _divisors(scales: Tensor) -> Tensor:
    """The scales in float32, and 1 where a block has only zeros."""
    scales = scales.to(torch.float32)
    return torch.where(scales > 0, scales, 1.0)


def _nearest(ratios: Tensor, tables: _Tables) -> Tensor:
    """The codes of the nearest levels, int32 or uint8; midway between two, of the smaller level."""
    if tables.codes is not None:
        return tables.codes.index_select(0, _places(ratios, tables)).view(ratios.shape)
    if tables.cells is None:
        return torch.bucketize(ratios, tables.thresholds, out_int32=True)
    number, below, inside = tables.cells
    cells = _cell(ratios, number).flatten()
    above = inside.index_select(0, cells).lt_(ratios.flatten())  # as numbers, several times as fast as booleans
    codes = below.index_select(0, cells).add_(above.to(torch.int8).view(torch.uint8))
    return codes.view(ratios.shape)


def _places(ratios: Tensor, tables: _Tables) -> Tensor:
    """Where ``tables`` have what belongs to a value: by its code, or by the next larger multiple of 1 / (2 _GRID)."""
    if tables.codes is None:
        return torch.bucketize(ratios, tables.thresholds, out_int32=True).flatten()
    places = (ratios * (2.0 * _GRID)).ceil_().add_(2.0 * _GRID).to(torch.int32)
    return places.clamp_(0, 4 * _GRID).flatten()


def _least_squares(blocks: Tensor, largest: Tensor, tables: _Tables, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and codes with the least squared error: of each share of ``largest`` the codes, and their best scale.

    With the levels l and the scale s, the error is the sum of x x, less s (2 sum(x l) - s sum(l l)): what is gained.
    Sums are taken in float64: the same whatever their order. Zeros that fill up a block have the level 0.
    """
    divisors, exact = _divisors(largest), blocks.double()
    sums = [_sums(blocks / (share * divisors).unsqueeze(-1), exact, tables) for share in _SHARES]
    products, squares = (torch.stack(each) for each in zip(*sums, strict=True))
    scales = torch.where(largest > 0, (products / squares).to(torch.float32), largest).to(scale_dtype)
    wide = scales.double()
    best = (wide * (2 * products - wide * squares)).max(0, keepdim=True).indices
    divisors *= tables.shares.index_select(0, best.flatten()).view(largest.shape)
    return scales.gather(0, best).squeeze(0), _nearest(blocks / divisors.unsqueeze(-1), tables)


def _sums(ratios: Tensor, values: Tensor, tables: _Tables) -> tuple[Tensor, Tensor]:
    """sum(x l) and sum(l l) of each block: float64 values, and the levels that are nearest to the ratios."""
    levels = tables.levels.index_select(0, _places(ratios, tables)).view(ratios.shape)
    squares = torch.linalg.vector_norm(levels, dim=-1).square()  # without squares in memory of their own
    return levels.mul_(values).sum(-1), squares


def dequantize(
    codes: Tensor,
    scales: Tensor,
    length: int,
    *,
    codebook: str,
    bits: int,
    block: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of :func:`quantize`'s codes and scales (..., length), computed in float32 and rounded to ``dtype``."""
    tables = _tables(codebook, bits, block, codes.device)
    flat = codes.flatten()
    if tables.pairs is not None and len(flat) % 2 == 0 and flat.storage_offset() % 2 == 0:
        found = tables.pairs.index_select(0, flat.view(torch.uint16).int())
    else:
        found = tables.words.index_select(0, _words(codes, bits).flatten())
    values = found.view(torch.float32).view(*codes.shape[:-1], -1)
    if values.shape[-1] > length:
        values = values[..., :length].contiguous()
    result = values if dtype == torch.float32 else torch.empty_like(values, dtype=dtype)
    whole = length // block
    if whole:
        blocks = _whole_blocks(values, whole, block)
        target = blocks if result is values else _whole_blocks(result, whole, block)
        torch.mul(blocks, scales[..., :whole, None], out=target)
    if whole * block < length:
        torch.mul(values[..., whole * block :], scales[..., whole:], out=result[..., whole * block :])
    return result


def _whole_blocks(values: Tensor, count: int, block: int) -> Tensor:
    """The first blocks of each row (..., n), as (..., count, block)."""
    found: Tensor = values[..., : count * block].unflatten(-1, (count, block))
    return found
