from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.packing import pack_codes, unpack_codes

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 16]


def drawn(bits: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    number_format = NumberFormat(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(number_format.qmin, number_format.qmax + 1, shape, generator=generator)
    return codes.to(torch.int8 if bits <= 8 else torch.int16)


def decoded(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Another reading of the format: numpy's bit unpacking, then two's complement."""
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    unsigned = (stream.astype(np.int64) << np.arange(bits)).sum(axis=1)
    return np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned)


@given(
    st.sampled_from(WIDTHS),
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    st.integers(0, 1000),
)
def test_unpacking_undoes_packing(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = drawn(bits, shape, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.shape == (-(-codes.numel() * bits // 8),)
    back = unpack_codes(packed, bits, shape)
    assert back.dtype is codes.dtype
    assert back.equal(codes)


@given(st.sampled_from(WIDTHS), st.integers(1, 50), st.integers(0, 1000))
def test_the_bytes_are_what_numpy_reads(bits: int, count: int, seed: int) -> None:
    codes = drawn(bits, (count,), seed)
    packed = pack_codes(codes, bits).numpy()
    assert decoded(packed, bits, count).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes(bits: int) -> None:
    number_format = NumberFormat(bits)
    codes = torch.tensor([number_format.qmin, number_format.qmax, 0, -1])
    assert unpack_codes(pack_codes(codes, bits), bits, (4,)).tolist() == codes.tolist()


def test_spare_bits_of_the_last_byte_are_zero() -> None:
    assert pack_codes(torch.tensor([-1, -1, -1], dtype=torch.int8), 3).tolist() == [0xFF, 0x01]


@given(st.integers(1, 8), st.integers(1, 50), st.integers(0, 1000))
def test_bit_patterns_come_back_unsigned(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (count,), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    back = unpack_codes(packed, bits, (count,), signed=False)
    assert back.dtype is torch.uint8
    assert back.equal(codes)
    signed = unpack_codes(packed, bits, (count,)).long()
    assert torch.equal(signed % (1 << bits), codes.long())


def test_bytes_of_bit_patterns_are_torchs_own() -> None:
    x = torch.tensor([0.5, -448.0, 3.0])
    codes = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(pack_codes(codes, 8).view(torch.float8_e4m3fn).float(), x)


def test_a_transposed_tensor_is_packed_in_its_own_order() -> None:
    codes = drawn(4, (3, 5), 0)
    assert pack_codes(codes.T, 4).equal(pack_codes(codes.T.contiguous(), 4))
