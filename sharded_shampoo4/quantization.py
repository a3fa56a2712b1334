"""Block-wise quantisation of matrices to 3, 4 or 8 bits, packed.

Values are scaled by the largest magnitude of their block, a run of ``block`` elements along the last dimension that
never crosses a row, and stored as the index of the nearest level of a code book (Wang et al., NeurIPS 2024,
section 3.3). All functions are pure and take any number of leading (batch) dimensions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Dequantising looks up whole words, not single codes: one gather of an 8-byte word brings two 4-bit values.
# bits -> (bits of a word, type whose size is that of the word's float32 values)
_WORDS = {3: (12, torch.complex128), 4: (8, torch.int64), 8: (8, torch.float32)}


def linear2(bits: int) -> Tensor:
    """The signed squares of ``2**bits`` equidistant points in [-1, 1], the lower middle one replaced by 0.

    Source: the paper's "linear square" quantisation (section 3.3). Returns float32 levels in ascending order.
    """
    points = torch.linspace(-1.0, 1.0, 2**bits, dtype=torch.float64)
    points[2 ** (bits - 1) - 1] = 0.0
    return (points.sign() * points.square()).to(torch.float32)


def dynamic_tree(bits: int) -> Tensor:
    """0, 1 and the levels ``±q_k 10**-E``: E bits of exponent, one sign bit, one flag, the other F bits choose k.

    Source: the paper's appendix C (``bits = 2 + E + F``). Returns float32 levels in ascending order.
    """
    levels = [0.0, 1.0]
    for exponent in range(bits - 1):
        count = 2 ** (bits - 2 - exponent)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0**-exponent
        levels += [*centres.tolist(), *(-centres).tolist()]
    return torch.tensor(sorted(levels), dtype=torch.float64).to(torch.float32)


CODE_BOOKS = {"linear2": linear2, "dynamic_tree": dynamic_tree}


class _Tables(NamedTuple):
    levels: Tensor  # (2**bits,) float32
    thresholds: Tensor  # (2**bits - 1,) float32; a value equal to thresholds[i] still belongs to level i
    words: Tensor  # one entry per word, holding that word's float32 levels


@functools.lru_cache(maxsize=32)
def _tables(codebook: str, bits: int, device: torch.device) -> _Tables:
    levels = CODE_BOOKS[codebook](bits)
    middles = (levels[:-1].double() + levels[1:].double()) / 2
    # Rounded down to float32, so that the comparison of a float32 value with the exact middle is exact.
    thresholds = middles.to(torch.float32)
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -torch.inf))
    thresholds = torch.where(thresholds.double() > middles, below, thresholds)

    word_bits, word_type = _WORDS[bits]
    words = torch.arange(2**word_bits)
    codes = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, word_bits, bits)], dim=-1)
    table = levels[codes].view(word_type).flatten()
    return _Tables(levels.to(device), thresholds.to(device), table.to(device))


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
    word_bits, _ = _WORDS[bits]
    words = _words(packed, bits)
    codes = torch.stack([words >> shift & (2**bits - 1) for shift in range(0, word_bits, bits)], dim=-1)
    return codes.flatten(-2)[..., :length].to(torch.uint8)


def _words(packed: Tensor, bits: int) -> Tensor:
    """Indices into the table of words: the bytes themselves, or for 3 bits two 12-bit halves of three bytes."""
    if bits != 3:
        return packed.long()
    first, second, third = pad(packed, (0, -packed.shape[-1] % 3)).long().unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], dim=-1).flatten(-2)


def quantize(values: Tensor, *, codebook: str, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Quantise each row of ``values`` (..., n), of any floating type, in blocks of ``block`` elements.

    Returns packed codes, uint8 (..., packed_width(n, bits)), and scales, float32 (..., block_count(n, block)): the
    largest magnitude of each block. A value takes the nearest level of the code book; midway between two, the smaller
    level. A block of zeros has scale 0 and comes back as zeros.
    """
    length = values.shape[-1]
    tables = _tables(codebook, bits, values.device)
    blocks = pad(values.to(torch.float32), (0, -length % block)).contiguous().unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1)
    unit = blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    codes = torch.bucketize(unit, tables.thresholds, out_int32=True)
    return pack(codes.flatten(-2)[..., :length], bits), scales


def dequantize(codes: Tensor, scales: Tensor, length: int, *, codebook: str, bits: int, block: int) -> Tensor:
    """Values of :func:`quantize`'s codes and scales, float32 (..., length)."""
    words = _words(codes, bits)
    looked_up = _tables(codebook, bits, codes.device).words.index_select(0, words.flatten()).view(torch.float32)
    values = looked_up.view(*codes.shape[:-1], -1)[..., :length].contiguous()
    whole = length // block
    if whole:
        values[..., : whole * block].unflatten(-1, (whole, block)).mul_(scales[..., :whole, None])
    if whole * block < length:
        values[..., whole * block :].mul_(scales[..., whole:])
    return values
