"""The entropy coder's tables and a slow decoder in numpy: what native/ must agree with, written from the specification.

The automaton (tabled asymmetric numeral systems; Duda, arXiv 1311.2540): 128 states, each standing for a symbol. A
symbol with f states numbers them x = f .. 2f - 1 in order; leaving number x, the decoder reads as many bits b as bring
x into 128 .. 255, and (x << b) + bits is the next state, counted from 128. A symbol is so likely as it has states.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

STATES, LANES, STREAMS = 128, 64, 8
START_BYTES = LANES * 7 // 8
ESCAPE = 7  # an exception's code that goes on in a number of its own


class Table(NamedTuple):
    """A code is ((low + symbol) << shift) | raw; state i means ``symbol[i]``, reads ``bits[i]``, adds ``base[i]``."""

    low: int
    shift: int
    symbol: Int[ndarray, "128"]
    bits: Int[ndarray, "128"]
    base: Int[ndarray, "128"]


class Segment(NamedTuple):
    """Where a panel's block of rows lies: its rows and columns in the matrix, and its bytes."""

    table: Table
    rows: range
    columns: range
    exceptions: bytes
    raw: bytes
    states: bytes
    streams: list[bytes]


def table(low: int, shift: int, symbol: Int[ndarray, "128"]) -> Table:
    """Bits and bases of states from the symbols that they stand for."""
    number = np.empty(STATES, np.int64)
    for s in np.unique(symbol):
        (states,) = np.nonzero(symbol == s)
        number[states] = len(states) + np.arange(len(states))
    bits = 7 - np.floor(np.log2(number)).astype(np.int64)
    return Table(low, shift, symbol.astype(np.int64), bits, (number << bits) - STATES)


def expected_bits(table: Table, p: Float[ndarray, "symbols"]) -> float:
    """Bits a symbol that the automaton spends on independent symbols of probabilities ``p``, in the long run.

    Exact: the stationary distribution of the encoder's states, as the solution of its linear system.
    """
    moves = np.zeros((STATES, STATES))
    spent = np.zeros(STATES)
    for state in range(STATES):  # the decoder goes from `state` to `before`, the encoder from `before` to `state`
        q = p[table.symbol[state]] if table.symbol[state] < len(p) else 0.0
        before = table.base[state] + np.arange(1 << table.bits[state])
        moves[before, state] += q
        spent[before] += q * table.bits[state]
    system = np.vstack([moves.T - np.eye(STATES), np.ones(STATES)])
    stationary = np.linalg.lstsq(system, np.append(np.zeros(STATES), 1.0), rcond=None)[0]
    return float(stationary @ spent)


def segments(stream: bytes) -> tuple[tuple[int, int], list[Segment]]:
    """The shape and the parts of a well-formed stream, read as docs/reference/stream.md says."""
    magic, version, tables, panels, block, rows, columns = struct.unpack_from("<4sHHIIQQ", stream)
    assert magic == b"LBEC", magic
    assert version == 1, version
    at = 32
    widths = [struct.unpack_from("<IH", stream, at + 6 * i) for i in range(panels)]
    at += 6 * panels
    known = []
    for _ in range(tables):
        low, shift = struct.unpack_from("<hB", stream, at)
        known.append(table(low, shift, _fields(stream[at + 3 : at + 99], 6, STATES)))
        at += 99
    heads = []
    column = 0
    for width, number in widths:
        for row in range(0, rows, block or 1):
            sizes = []
            for _ in range(1 + STREAMS):
                size, at = _varint(stream, at)
                sizes.append(size)
            heads.append((known[number], range(row, min(row + block, rows)), range(column, column + width), sizes))
        column += width
    out = []
    for one, of_rows, of_columns, (exceptions, *lengths) in heads:
        raw = len(of_rows) * -(-len(of_columns) // LANES) * 8 * one.shift
        parts = []
        for size in (START_BYTES, exceptions, raw, *lengths):
            parts.append(stream[at : at + size])
            at += size
        out.append(Segment(one, of_rows, of_columns, parts[1], parts[2], parts[0], parts[3:]))
    assert at == len(stream), (at, len(stream))
    return (rows, columns), out


def decode(stream: bytes) -> Int[ndarray, "rows columns"]:
    """Every code of a well-formed stream; cost about a microsecond a code."""
    shape, parts = segments(stream)
    out = np.zeros(shape, np.int64)
    for part in parts:
        out[part.rows.start : part.rows.stop, part.columns.start : part.columns.stop] = decode_segment(part)
    return out


def decode_segment(s: Segment) -> Int[ndarray, "rows columns"]:
    """One segment, all lanes of a step at once."""
    steps = len(s.rows) * -(-len(s.columns) // LANES)
    state = _fields(s.states, 7, LANES)
    streams = [int.from_bytes(stream, "little") for stream in s.streams]
    at = [0] * STREAMS
    symbols = np.empty((steps, LANES), np.int64)
    for t in range(steps):
        symbols[t], read, base = s.table.symbol[state], s.table.bits[state], s.table.base[state]
        for lane in range(LANES):
            i, bits = lane * STREAMS // LANES, int(read[lane])
            state[lane] = base[lane] + (streams[i] >> at[i] & ((1 << bits) - 1))
            at[i] += bits
    assert not state.any(), "the automata did not end in state 0"
    assert [-(-a // 8) for a in at] == [len(stream) for stream in s.streams], "a stream has bytes left"

    planes = np.unpackbits(np.frombuffer(s.raw, np.uint8), bitorder="little").reshape(steps, s.table.shift, LANES)
    raw = (planes.astype(np.int64) << np.arange(s.table.shift)[:, None]).sum(1)
    codes = ((symbols + s.table.low) << s.table.shift) + raw
    flat = codes.reshape(len(s.rows), -1)[:, : len(s.columns)].reshape(-1)
    where, position = 0, -1
    while where < len(s.exceptions):
        first, where = _varint(s.exceptions, where)
        code = first & ESCAPE
        if code == ESCAPE:
            more, where = _varint(s.exceptions, where)
            code += more
        position += 1 + (first >> 3)
        flat[position] += (-1 if code % 2 else 1) * (code // 2 + 1) * (1 << s.table.shift)
    out: Int[ndarray, "rows columns"] = flat.reshape(len(s.rows), len(s.columns))
    return out


def _fields(data: bytes, width: int, count: int) -> Int[ndarray, "count"]:
    """Consecutive fields of ``width`` bits, least significant bit first."""
    number = int.from_bytes(data, "little")
    return np.array([number >> (width * i) & ((1 << width) - 1) for i in range(count)], np.int64)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in bytes of seven bits, the least significant first, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
