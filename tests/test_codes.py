"""Matrices of integers as streams of bytes."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitshrink.errors import CheckpointError
from vitshrink.models.codes import Codes, decode, decode_each, encode
from vitshrink.models.normal_tables import tables


def drawn(rows: int, columns: int, deviation: float = 1.5, seed: int = 0) -> Codes:
    """Normal integers whose deviations differ by row and by column, and column steps that go the other way."""
    generator = np.random.default_rng(seed)
    wide, high = np.exp(generator.normal(0, 0.5, columns)), np.exp(generator.normal(0, 0.3, rows))
    integers = np.rint(generator.normal(size=(rows, columns)) * deviation * wide * high[:, None])
    kind = np.int8 if np.abs(integers).max() < 128 else np.int16
    return Codes(torch.from_numpy(integers.astype(kind)), torch.from_numpy((0.01 / wide).astype(np.float32)))


def assert_comes_back(codes: Codes) -> None:
    found = decode(encode(codes), (codes.integers.shape[0], codes.integers.shape[1]))
    assert torch.equal(found.integers.short(), codes.integers.short())
    assert found.integers.dtype == (torch.int8 if codes.integers.int().abs().max() < 128 else torch.int16)
    assert torch.equal(found.columns, codes.columns.half().float())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    deviation=st.sampled_from([0.0, 0.1, 0.7, 5.0, 90.0, 3000.0]),
    odd=st.lists(st.tuples(st.integers(0, 1599), st.integers(-32768, 32767)), max_size=4),
    seed=st.integers(0, 1000),
)
def test_integers_of_every_size_come_back(
    shape: tuple[int, int], deviation: float, odd: list[tuple[int, int]], seed: int
) -> None:
    integers = drawn(*shape, deviation, seed).integers.short().flatten()
    for place, value in odd:
        integers[place % len(integers)] = value
    steps = 2.0 ** torch.randint(-20, 10, (shape[1],), generator=torch.Generator().manual_seed(seed))
    assert_comes_back(Codes(integers.view(shape), steps))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (300, 4000)])
def test_matrices_of_every_shape_come_back(shape: tuple[int, int]) -> None:
    assert_comes_back(drawn(*shape))


def test_a_matrix_of_extremes_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(-32768, 32768, (50, 30), generator=generator).short()
    assert_comes_back(Codes(uniform, torch.full((30,), 1e-7)))


def test_a_large_matrix_takes_its_entropy() -> None:
    codes = drawn(768, 768)
    generator = np.random.default_rng(0)
    wide, high = np.exp(generator.normal(0, 0.5, 768)), np.exp(generator.normal(0, 0.3, 768))
    deviation = torch.from_numpy(1.5 * wide * high[:, None])
    values = codes.integers.double()
    cdf = [torch.special.ndtr((values.abs() + side) / deviation) for side in (0.5, -0.5)]
    ideal = -float((cdf[0] - cdf[1]).clamp_min(1e-12).log2().sum()) / 8
    sides = 768 * (2 + 1)
    assert len(encode(codes)) < 1.01 * ideal + sides


def test_zeros_take_next_to_nothing() -> None:
    stream = encode(Codes(torch.zeros(500, 400, dtype=torch.int8), torch.ones(400)))
    assert len(stream) < 1500


def test_lanes_cost_little_on_a_small_matrix() -> None:
    assert len(encode(drawn(192, 192, 0.8))) < 10_500


def test_a_stream_of_today_is_read_for_good() -> None:
    stream = "63c149263200182b001b050017001f0e000000a0f8d9c3d75ecffa3e6757b9c9f8502e7a262d"
    found = decode(torch.frombuffer(bytearray.fromhex(stream), dtype=torch.uint8), (3, 4))
    assert found.integers.tolist() == [[0, -1, 2, 30], [1, 0, -3, -300], [0, 0, 1, 20]]
    assert found.columns.tolist() == [0.5, 0.25, 0.125, 0.01000213623046875]


def test_tables_are_the_same_everywhere() -> None:
    counts = tables().frequencies
    assert (counts.sum(1) == 4096).all()
    assert counts[11, :7].tolist() == [1569, 990, 248, 24, 1, 0, 0]


def test_streams_are_read_side_by_side() -> None:
    """Of all sizes, with escapes and lower bits; what is wrong with one of them says nothing of the others."""
    shapes = [(1, 1), (3, 4), (20, 30), (200, 70), (64, 512)]
    codes = [
        drawn(*shape, deviation, seed=rows) for rows, shape in enumerate(shapes) for deviation in (0.3, 4.0, 900.0)
    ]
    streams = [(encode(each), (each.integers.shape[0], each.integers.shape[1])) for each in codes]
    damaged = streams[7][0].clone()
    damaged[9] ^= 1
    found = decode_each([*streams[:7], (damaged, streams[7][1]), *streams[8:]])
    for number, (each, read) in enumerate(zip(codes, found, strict=True)):
        if number == 7:
            assert isinstance(read, CheckpointError)
            continue
        assert isinstance(read, Codes)
        alone = decode(*streams[number])
        assert torch.equal(read.integers, alone.integers)
        assert torch.equal(read.integers.short(), each.integers.short())
        assert torch.equal(read.columns, alone.columns)


@pytest.mark.parametrize("shape", [(1, 1), (20, 30), (192, 192)])
def test_a_damaged_stream_is_refused(shape: tuple[int, int]) -> None:
    stream, generator = encode(drawn(*shape)), np.random.default_rng(0)
    for _ in range(100):
        damaged = stream.clone()
        damaged[generator.integers(len(stream))] ^= 1 << int(generator.integers(8))
        with pytest.raises(CheckpointError, match="the integers of this checkpoint"):
            decode(damaged, shape)
    for length in [0, 1, 4, *generator.integers(len(stream), size=20)]:
        with pytest.raises(CheckpointError, match="the integers of this checkpoint"):
            decode(stream[:length], shape)
    for other in [(shape[0] + 1, shape[1]), (shape[0], shape[1] + 1), (1000, 1000)]:
        with pytest.raises(CheckpointError, match="the integers of this checkpoint"):
            decode(stream, other)


def test_a_damaged_stream_with_a_right_checksum_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that someone made: no crash and no endless loop; other integers cannot be known."""
    from vitshrink.models import codes

    stream, generator = encode(drawn(20, 30)), np.random.default_rng(0)
    monkeypatch.setattr(codes, "_sum", lambda *_: bytes(4))
    started, refused = time.perf_counter(), 0
    for _ in range(300):
        damaged = stream.clone()
        damaged[:4] = 0
        damaged[4 + generator.integers(len(stream) - 4)] = int(generator.integers(256))
        try:
            decode(damaged[: math.ceil(len(stream) * generator.choice([1, 1, generator.random()]))], (20, 30))
        except CheckpointError:
            refused += 1
    assert refused > 200
    assert time.perf_counter() - started < 60


def test_rows_may_differ_by_orders_of_magnitude() -> None:
    """As those of word vectors do, of which some are used in every text."""
    generator = np.random.default_rng(0)
    deviations = np.exp2(generator.uniform(-1, 3, 4000))
    deviations[:20] = 1500
    integers = np.rint(generator.normal(size=(4000, 64)) * deviations[:, None]).astype(np.int16)
    ideal = np.log2(np.maximum(deviations, 0.3) * np.sqrt(2 * np.pi * np.e)).sum() * 64 / 8
    stream = encode(Codes(torch.from_numpy(integers), torch.ones(64)))
    assert len(stream) < 1.06 * ideal
    assert torch.equal(decode(stream, (4000, 64)).integers.short(), torch.from_numpy(integers))
