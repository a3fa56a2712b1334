"""Packing and block-wise quantisation, against the reference and over random shapes."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_shampoo4 import quantization

BITS = (3, 4, 8)
BOOKS = ("linear2", "dynamic_tree")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("book", BOOKS)
def test_code_books_follow_their_formulae(book: str, bits: int) -> None:
    levels = quantization.CODE_BOOKS[book](bits)
    assert torch.equal(levels, reference.CODEBOOKS[book](bits))
    assert levels.numel() == 2**bits and (levels.diff() > 0).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_packing_is_reversible_and_tight(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    shape = (*data.draw(st.lists(st.integers(1, 3), max_size=2)), data.draw(st.integers(1, 70)))
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    packed = quantization.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(quantization.unpack(packed, bits, shape[-1]), codes.to(torch.uint8))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_quantises_as_the_reference(data: st.DataObject) -> None:
    bits, book = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from(BOOKS))
    block = data.draw(st.sampled_from([1, 5, 16, 64, 100]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    batch, rows, length = (data.draw(st.integers(1, largest)) for largest in (3, 4, 150))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    values = torch.randn(batch, rows, length, generator=generator, dtype=torch.float64).to(dtype)
    values[torch.rand(values.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0.0

    codes, scales = quantization.quantize(values, codebook=book, bits=bits, block=block)
    restored = quantization.dequantize(codes, scales, length, codebook=book, bits=bits, block=block)
    levels = reference.CODEBOOKS[book](bits)
    for index in range(batch):
        expected_codes, expected_scales = reference.quantise(values[index], levels, block)
        assert torch.equal(quantization.unpack(codes[index], bits, length), expected_codes.to(torch.uint8))
        assert torch.equal(scales[index], expected_scales)
        assert torch.equal(restored[index], reference.dequantise(expected_codes, expected_scales, levels, block))


def test_ties_take_the_smaller_level() -> None:
    levels = quantization.linear2(4)
    middles = ((levels[:-1].double() + levels[1:].double()) / 2).float()
    exact = middles.double() == (levels[:-1].double() + levels[1:].double()) / 2
    assert exact.any()
    row = torch.cat([middles, torch.ones(1)])
    codes, _ = quantization.quantize(row, codebook="linear2", bits=4, block=64)
    assert torch.equal(quantization.unpack(codes, 4, 16)[:-1][exact], torch.arange(15, dtype=torch.uint8)[exact])
    above, _ = quantization.quantize(torch.nextafter(row, row + 1), codebook="linear2", bits=4, block=64)
    assert not torch.equal(above, codes)


def test_blocks_do_not_cross_rows_and_zeros_stay() -> None:
    values = torch.zeros(2, 65)
    values[0, 64], values[1, 0] = 1e6, -1e-6
    codes, scales = quantization.quantize(values, codebook="linear2", bits=4, block=64)
    assert scales.tolist() == [[0.0, 1e6], [torch.tensor(1e-6).item(), 0.0]]
    assert torch.equal(quantization.dequantize(codes, scales, 65, codebook="linear2", bits=4, block=64), values)


@pytest.mark.parametrize(("bits", "bytes_per_row"), [(3, 25), (4, 33), (8, 65)])
def test_bytes_of_an_odd_row(bits: int, bytes_per_row: int) -> None:
    codes, scales = quantization.quantize(torch.randn(3, 65), codebook="linear2", bits=bits, block=64)
    assert codes.shape == (3, bytes_per_row) and scales.shape == (3, 2) and scales.dtype == torch.float32
