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
    return (levels * 2**12).round().to(torch.float32) / 2**12  # no platform's last digits


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


class _Tables(NamedTuple):
    levels: Tensor  # (2**bits,) float32
    thresholds: Tensor  # (2**bits - 1,) float32; a value equal to thresholds[i] still belongs to level i
    words: Tensor  # one entry per word, holding that word's float32 levels
    pairs: Tensor | None  # the same for two bytes
    edges: Tensor | None  # of "linear2" on a CPU: the thresholds between two numbers that nothing is beyond


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
    beyond = torch.tensor([torch.nan], dtype=torch.float32, device="cpu")
    searched = codebook != "linear2" or device.type != "cpu"  # accelerators search as fast, in one kernel
    edges = None if searched else torch.cat([beyond, thresholds, beyond])
    return _Tables(levels.to(device), thresholds.to(device), words, pairs, edges)


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
        return codes.to(torch.uint8)
    if bits == 4:
        low, high = pad(codes, (0, length % 2)).unflatten(-1, (-1, 2)).unbind(-1)
        pairs: Tensor = low | high << 4
        return pairs.to(torch.uint8)
    eight = pad(codes, (0, -length % 8)).unflatten(-1, (-1, 8)).long()
    word = (eight << torch.arange(0, 24, 3, device=codes.device)).sum(-1)
    three_bytes = torch.stack([word & 255, word >> 8 & 255, word >> 16], dim=-1).to(torch.uint8)
    packed: Tensor = three_bytes.flatten(-2)[..., : packed_width(length, bits)]
    return packed


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


def quantize(
    values: Tensor, *, codebook: str, bits: int, block: int, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``values`` (..., n), of any floating type, in blocks of ``block`` elements.

    Returns packed codes, uint8 (..., packed_width(n, bits)), and scales, ``scale_dtype`` (..., block_count(n, block)):
    the largest magnitude of each block, or, with the code book "normal", the scale of the least squared error among
    some. A value takes the nearest level of the code book; midway between two, the smaller level. A block of zeros has
    scale 0 and comes back as zeros.
    """
    length = values.shape[-1]
    tables = _tables(codebook, bits, block, values.device)
    blocks = pad(values.to(torch.float32), (0, -length % block)).contiguous().unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1)
    if codebook == "normal":
        there = pad(torch.ones(length, dtype=torch.float32, device=values.device), (0, -length % block)).view(-1, block)
        scales, codes = _least_squares(blocks, largest, there, tables, scale_dtype)
    else:
        scales = largest.to(scale_dtype)
        codes = _nearest(blocks, scales, tables)
    return pack(codes.flatten(-2)[..., :length], bits), scales


def _nearest(blocks: Tensor, scales: Tensor, tables: _Tables) -> Tensor:
    scales = scales.to(torch.float32).unsqueeze(-1)
    ratios = blocks / torch.where(scales > 0, scales, 1.0)
    if tables.edges is None:
        return torch.bucketize(ratios, tables.thresholds, out_int32=True)
    return _nearest_square(ratios, tables.edges)


def _nearest_square(ratios: Tensor, edges: Tensor) -> Tensor:
    """Find the levels of "linear2" as torch.bucketize does, several times as fast.

    A square root gives the level or one of its two neighbors.
    """
    top = len(edges) - 2
    near = ratios.abs().sqrt_().copysign_(ratios).add_(1.0).mul_(top / 2).round_()
    codes = near.nan_to_num_(0.0).clamp_(0, top).to(torch.int32).flatten()
    values = ratios.flatten()
    above = values > edges.index_select(0, codes + 1)
    below = values <= edges.index_select(0, codes)
    return codes.add_(above.view(torch.int8)).sub_(below.view(torch.int8)).view(ratios.shape)


def _least_squares(
    blocks: Tensor, largest: Tensor, there: Tensor, tables: _Tables, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales and codes with the least squared error: for each share of ``largest`` its codes, and their best scale.

    ``there`` is 0 where a block has been filled up.
    """
    best_error = torch.full_like(largest, torch.inf, dtype=torch.float64)
    best_scales, best_codes = largest.to(scale_dtype), torch.zeros_like(blocks, dtype=torch.int32)
    for share in _SHARES:
        codes = _nearest(blocks, share * largest, tables)
        levels = (tables.levels[codes] * there).double()  # sums in float64: the same whatever their order
        fitted = (blocks * levels).sum(-1) / levels.square().sum(-1)
        scales = torch.where(largest > 0, fitted.to(torch.float32), largest).to(scale_dtype)
        error = (blocks - levels * scales.double().unsqueeze(-1)).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    return best_scales, best_codes


def dequantize(codes: Tensor, scales: Tensor, length: int, *, codebook: str, bits: int, block: int) -> Tensor:
    """Values of :func:`quantize`'s codes and scales, float32 (..., length)."""
    tables = _tables(codebook, bits, block, codes.device)
    flat = codes.flatten()
    if tables.pairs is not None and len(flat) % 2 == 0 and flat.storage_offset() % 2 == 0:
        found = tables.pairs.index_select(0, flat.view(torch.uint16).int())
    else:
        found = tables.words.index_select(0, _words(codes, bits).flatten())
    values = found.view(torch.float32).view(*codes.shape[:-1], -1)
    if values.shape[-1] > length:
        values = values[..., :length].contiguous()
    whole = length // block
    if whole * block == length:
        values.view(*codes.shape[:-1], whole, block).mul_(scales.unsqueeze(-1))
        return values
    if whole:
        values[..., : whole * block].unflatten(-1, (whole, block)).mul_(scales[..., :whole, None])
    values[..., whole * block :].mul_(scales[..., whole:])
    return values
