"""Packing and block-wise quantization, against the reference and over random shapes."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from sharded_shampoo4.numerics import eigenbasis, quantization

BITS = (3, 4, 8)
BOOKS = ("linear2", "dynamic_tree")
normal_levels = functools.cache(quantization.normal)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_part_comes_back_as_in_the_whole(bits: int) -> None:
    """Look-ups by two bytes need even numbers of them, from an even address on."""
    options = {"codebook": "linear2", "bits": bits, "block": 8}
    for rows, length in ((3, 5), (4, 6), (2, 16), (1, 9), (3, 22)):
        values = torch.randn(5, rows, length, generator=torch.Generator().manual_seed(length))
        codes, scales = quantization.quantize(values, **options)
        whole = quantization.dequantize(codes, scales, length, **options)
        for part in (slice(0, 1), slice(1, 2), slice(1, 3), slice(2, 4), slice(0, 3)):
            found = quantization.dequantize(codes[part], scales[part], length, **options)
            assert torch.equal(found, whole[part])
            levels = quantization.levels_of("linear2", bits, 8)[quantization.unpack(codes[part], bits, length).int()]
            assert torch.equal(found, levels * scales[part].repeat_interleave(8, -1)[..., :length])


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
def test_quantizes_as_the_reference(data: st.DataObject) -> None:
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
        expected_codes, expected_scales = reference.quantize(values[index], levels, block)
        assert torch.equal(quantization.unpack(codes[index], bits, length), expected_codes.to(torch.uint8))
        assert torch.equal(scales[index], expected_scales)
        assert torch.equal(restored[index], reference.dequantize(expected_codes, expected_scales, levels, block))


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


@pytest.mark.parametrize(("bits", "block"), [(3, 64), (4, 64), (4, 7), (8, 64)])
def test_normal_levels_but_zero_are_the_means_of_what_is_nearest_to_them(bits: int, block: int) -> None:
    levels = normal_levels(bits, block).double()
    assert levels.numel() == 2**bits and (levels.diff() > 0).all() and levels[2 ** (bits - 1) - 1] == 0
    values = torch.randn(2**22 // block, block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = (values / values.abs().amax(1, keepdim=True)).flatten()
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    means = torch.zeros_like(levels).index_add_(0, codes, values) / torch.bincount(codes, minlength=2**bits)
    means[2 ** (bits - 1) - 1] = 0.0  # that level stays, whatever is nearest to it
    assert (means - levels).abs().max() < 2e-3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scales_of_least_squared_error_as_the_reference(data: st.DataObject) -> None:
    bits, block = data.draw(st.sampled_from((3, 4))), data.draw(st.sampled_from([5, 16, 64]))
    scale_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    values = torch.randn(rows, length, generator=generator)
    values[torch.rand(values.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0.0
    codes, scales = quantization.quantize(values, codebook="normal", bits=bits, block=block, scale_dtype=scale_dtype)
    levels = normal_levels(bits, block)
    expected_codes, expected_scales = reference.quantize(values, levels, block, scale_dtype, search=True)
    assert scales.dtype == scale_dtype and torch.equal(scales, expected_scales)
    assert torch.equal(quantization.unpack(codes, bits, length), expected_codes.to(torch.uint8))
    restored = quantization.dequantize(codes, scales, length, codebook="normal", bits=bits, block=block)
    assert torch.equal(restored, reference.dequantize(expected_codes, expected_scales, levels, block))


def test_each_refinement_lessens_the_error() -> None:
    """Of an orthogonal matrix: better levels and fitted scales; bfloat16 scales cost next to nothing."""
    basis = torch.linalg.qr(torch.randn(256, 256, generator=torch.Generator().manual_seed(0))).Q

    def error(**ways: object) -> float:
        codes, scales = quantization.quantize(basis, bits=4, block=64, **ways)
        restored = quantization.dequantize(codes, scales, 256, codebook=ways["codebook"], bits=4, block=64)
        return ((restored - basis).norm() / basis.norm()).item()

    tree, square, normal = (error(codebook=book) for book in ("dynamic_tree", "linear2", "normal"))
    assert normal < 0.81 * square < 0.81 * tree
    assert error(codebook="normal", scale_dtype=torch.bfloat16) < 1.005 * normal


def root_error(quantized: str = "eigenbasis", root: str = "rectified", steps: int = 4, **options: object) -> float:
    """Relative error of A^(-1/4), where A is of order 192 with eigenvalues from 1e-3 to 1, stored in some way.

    Args:
        quantized: the "eigenbasis" or the "preconditioner" itself.
        root: "rectified" also quantizes the root of the quantized basis, "implicit" does not, "stored" quantizes that
            of the basis itself.
        steps: of Björck's iteration on the dequantized basis.
        **options: of ``quantize``, beside the default ones.
    """
    noise = torch.randn(192, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, basis = torch.logspace(0, -3, 192, dtype=torch.float64)[None], torch.linalg.qr(noise).Q[None]
    exact = eigenbasis.inverse_root(values, basis, 1e-6)
    options = {"codebook": "linear2", "bits": 4, "block": 64, **options}
    book = {name: value for name, value in options.items() if name != "scale_dtype"}

    def stored(matrix: torch.Tensor) -> torch.Tensor:
        return quantization.dequantize(*quantization.quantize(matrix, **options), 192, **book).double()

    def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1).diag_embed()
        rest = stored(matrix - diagonal)
        return rest - rest.diagonal(dim1=-2, dim2=-1).diag_embed() + diagonal

    if quantized == "preconditioner":
        found = eigenbasis.inverse_root_of(off_diagonal((basis * values.unsqueeze(-2)) @ basis.mT), 1e-6)
    else:
        known = basis if root == "stored" else eigenbasis.rectify(stored(basis.mT).mT, steps)
        found = eigenbasis.inverse_root(values, known, 1e-6)
    if root != "implicit":
        found = off_diagonal(found)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", [4, 3])
def test_errors_of_the_inverse_root_have_the_order_of_the_results(bits: int) -> None:
    """launch/RESULTS.md recommends options by these errors; the first four lines are the paper's tables 1 and 5."""
    default = root_error(bits=bits)
    assert root_error("preconditioner", bits=bits) > 5 * default
    assert root_error(bits=bits, steps=0) > 2 * default
    assert root_error(bits=bits, codebook="dynamic_tree") > 1.05 * default
    assert bits == 4 or default > 2 * root_error(bits=4)
    assert root_error(bits=bits, scale_dtype=torch.bfloat16) == pytest.approx(default, rel=0.02)
    assert root_error(bits=bits, codebook="normal") < 0.9 * default
    assert root_error(bits=bits, root="stored") < root_error(bits=bits, root="implicit") < 0.8 * default
    compact = {"codebook": "normal", "scale_dtype": torch.bfloat16, "root": "implicit", "steps": 1}
    assert root_error(bits=bits, **compact) < 0.85 * default


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("book", [*BOOKS, "normal"])
def test_codes_are_those_of_a_search(book: str, bits: int) -> None:
    """Also at the boundaries of two levels and a rounding error beside them, and for numbers that are not finite."""
    tables = quantization._tables(book, bits, 64, torch.device("cpu"))
    edges = tables.thresholds
    beside = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-torch.inf, torch.inf)]
    values = torch.cat([edges, *beside, torch.linspace(-1.15, 1.15, 100_003), torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    assert torch.equal(quantization._nearest(values, tables).int(), torch.bucketize(values, edges, out_int32=True))
    broken = quantization._nearest(torch.tensor([torch.nan, torch.inf, -torch.inf]), tables).int()
    assert ((broken >= 0) & (broken < 2**bits)).all()


@pytest.mark.parametrize("at_once", [2**18, 300])
@pytest.mark.parametrize("length", [64, 65, 200])
@pytest.mark.parametrize("book", ["linear2", "normal"])
def test_rows_are_quantized_alike_in_any_company(
    book: str, length: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In smaller batches, from any address, in other layouts of memory, by other threads, a few rows at once."""
    ways = {"codebook": book, "bits": 4, "block": 64}
    values = torch.randn(7, 96, length, generator=torch.Generator().manual_seed(length))
    whole = quantization.quantize(values, **ways)

    def same(found: tuple[torch.Tensor, torch.Tensor], *where: slice) -> bool:
        return all(torch.equal(a, b[where]) for a, b in zip(found, whole, strict=True))

    monkeypatch.setattr(quantization, "_AT_ONCE", at_once)
    assert same(quantization.quantize(values, **ways))
    assert same(quantization.quantize(values[2:3, 5:6], **ways), slice(2, 3), slice(5, 6))
    assert same(quantization.quantize(values[1:, 3:].mT.contiguous().mT, **ways), slice(1, None), slice(3, None))
    for offset in (1, 3):
        moved = torch.empty(values.numel() + offset)[offset:].view_as(values).copy_(values)
        assert same(quantization.quantize(moved, **ways))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert same(quantization.quantize(values, **ways))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("book", [*BOOKS, "normal"])
def test_a_search_as_on_accelerators_gives_the_same(book: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"codebook": book, "bits": bits, "block": 64, "scale_dtype": torch.bfloat16}
    values = torch.randn(3, 70, 197, generator=torch.Generator().manual_seed(bits))
    expected = quantization.quantize(values, **ways)
    tables = quantization._tables(book, bits, 64, torch.device("cpu"))
    levels = quantization.levels_of(book, bits, 64).double()
    searched = tables._replace(cells=None, codes=None, levels=levels)
    monkeypatch.setattr(quantization, "_tables", lambda *_: searched)
    assert all(map(torch.equal, quantization.quantize(values, **ways), expected))


@pytest.mark.parametrize("book", ["linear2", "normal"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_shows_in_its_scale_alone(broken: float, book: str) -> None:
    ways = {"codebook": book, "bits": 4, "block": 16}
    values = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    expected = quantization.quantize(values, **ways)
    values[1, 20] = broken
    codes, scales = quantization.quantize(values, **ways)
    assert torch.equal(scales.isfinite(), torch.tensor([[True] * 3, [True, False, True], [True] * 3]))
    assert torch.equal(scales[scales.isfinite()], expected[1][scales.isfinite()])
    others = torch.tensor([0, 2])
    assert torch.equal(codes[others], expected[0][others])


@pytest.mark.parametrize("bits", [3, 4])
def test_packing_is_the_same_anywhere_in_memory_and_where_the_highest_byte_is_first(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(2**bits, (5, 31), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = quantization.pack(codes, bits)
    assert all(torch.equal(quantization.pack(codes.to(dtype), bits), packed) for dtype in (torch.int32, torch.int64))
    for part in (slice(1, 2), slice(1, 4)):
        assert torch.equal(quantization.pack(codes[part, 1:], bits), quantization.pack(codes[part, 1:].clone(), bits))
        assert torch.equal(quantization.pack(codes[part], bits), packed[part])
    assert torch.equal(quantization.pack(codes[:1, :24], bits), packed[:1, : quantization.packed_width(24, bits)])
    monkeypatch.setattr(quantization, "sys", SimpleNamespace(byteorder="big"))
    assert torch.equal(quantization.pack(codes, bits), packed)
