"""Byte floors: every byte that an operation must read or write, once; and the memory that a point needs."""

from __future__ import annotations

from lethe_bench.gpu.grid import INTERVAL, Point
from lethe_bench.gpu.models import Shape


def score_bytes(shape: Shape, batch: int, kept: int, recurrence: bool = False, fp8: bool = False) -> int:
    """K, index and states of the own cells; query, log-sum-exp, list ends, first, decay and step of the requests."""
    cell = shape.kv_heads * shape.head_dim * (1 if fp8 else shape.itemsize) + 4 + (16 if recurrence else 8)
    request = shape.heads * (shape.head_dim * shape.itemsize + 4) + 4 + 4 + 4 + 8
    return batch * (kept * cell + request) + 4


def attention_bytes(shape: Shape, batch: int, length: int) -> int:
    """K, V and index of the list; query, output, log-sum-exp and list ends of the requests."""
    cell = 2 * shape.kv_heads * shape.head_dim * shape.itemsize + 4
    return batch * (length * cell + shape.heads * (2 * shape.head_dim * shape.itemsize + 4) + 4) + 4


def indices_bytes(layers: int, batch: int, prefix: int, packed: int, tail: int, layer: int) -> int:
    """Write each entry; read the row's entries of prefix and tail and each packed block once; table, row, length."""
    first = layer * packed
    blocks = (first + packed - 1) // layers - first // layers + 1 if packed else 0
    return batch * (4 * (prefix + packed + tail) + 4 * (prefix + blocks + tail) + 16 + 16 + 4) + 4


def repack_bytes(shape: Shape, cells: int) -> int:
    """Gather to scratch and scatter: K, V and score of a cell, read and written twice; both indices (int64), twice."""
    cell = 2 * shape.kv_heads * shape.head_dim * shape.itemsize + 4
    return cells * (4 * cell + 2 * 2 * 8)


def select_bytes(segments: int, candidates: int) -> int:
    """Rank, two flags and the choice of each candidate; the count (int64) of each segment."""
    return segments * (candidates * (4 + 1 + 1 + 1) + 8)


def places_bytes(segments: int, candidates: int) -> int:
    """Score, likeness and a flag of each candidate in, its rank out."""
    return segments * candidates * (4 + 4 + 1 + 4)


def likeness_bytes(shape: Shape, segments: int, candidates: int) -> int:
    """K, cell (int32) and a flag of each candidate in, its likeness out."""
    return segments * candidates * (shape.kv_heads * shape.head_dim * shape.itemsize + 4 + 1 + 4)


def zero_bytes(layers: int, tokens: int) -> int:
    """One state of each token's cells, and the token's slot (int64)."""
    return tokens * (4 * layers + 8)


def schedule_bytes(batch: int) -> int:
    """Two table entries, row and length (int64) in; first and decay out."""
    return batch * (4 + 4 + 8 + 8 + 4 + 4)


def floor_of(shape: Shape, point: Point) -> int:
    """Return the byte floor of a point; that of a round is that of its halves."""
    batch, layers = point.batch, shape.layers
    match point.kernel:
        case "score" | "score-fp8":
            return score_bytes(shape, batch, point.kept, fp8=point.kernel == "score-fp8")
        case "attention":
            return attention_bytes(shape, batch, point.length)
        case "indices":
            return indices_bytes(layers, batch, point.prefix, point.packed, point.tail, layers // 2)
        case "repack":
            return repack_bytes(shape, batch * layers * point.packed)
        case "select":
            return select_bytes(layers * batch, point.candidates)
        case "places":
            return places_bytes(layers * batch, point.candidates)
        case "likeness":
            return likeness_bytes(shape, layers * batch, point.candidates)
        case "round":
            return sum(floor_of(shape, point._replace(kernel=half)) for half in ("repack", "select"))
        case "zero":
            return zero_bytes(layers, batch)
        case "schedule":
            return schedule_bytes(batch)
    raise ValueError(f"no kernel {point.kernel}")


def memory_of(shape: Shape, point: Point) -> int:
    """Device bytes that a point needs, roughly: its cells, their scratch, lists and random numbers."""
    cell = 2 * shape.kv_heads * shape.head_dim * shape.itemsize
    if point.kernel in ("repack", "round"):
        return point.batch * shape.layers * point.kept * (2 * cell + 64)
    if point.kernel == "likeness":
        return point.batch * shape.layers * point.candidates * (cell // 2 + 64)
    if point.kernel == "places":
        return point.batch * shape.layers * point.candidates * 64
    if point.kernel in ("score", "score-fp8", "attention"):
        return point.batch * point.length * (cell + 32)
    return point.batch * (point.length + INTERVAL) * 64 * max(1, shape.layers // 4)
