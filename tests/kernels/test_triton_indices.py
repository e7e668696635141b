"""A layer's lists, and pages for all layers, name the cells that their twins resolve, whatever the batch holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lethe_sglang.cache.layout import offsets, packed_blocks, packed_cell
from lethe_sglang.kernels import reference, table
from lethe_sglang.kernels.common import Batch, Lists, token_lists
from lethe_sglang.kernels.triton import config, indices
from lethe_sglang.kernels.triton.indices import fill_lists, fill_pages

ROWS, WIDTH, BLOCKS, UNSET = 7, 160, 400, -7


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        for kernel in (indices._KERNEL, indices._PAGES):
            patch.setattr(kernel, "configs", [config(BLOCK=32)])
        yield


def make(layers, seed):
    """Rows of six requests, pruned ones among them, and their table; row 0 is padding."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    req_to_token = torch.zeros(ROWS, WIDTH, dtype=torch.int32)
    lines = torch.zeros(ROWS, table.width(layers), dtype=torch.int32)
    lengths = [0] * ROWS
    for row in range(1, ROWS):
        prefix = number(0, 1) * number(0, 50)
        kept = [number(0, 30) * (row % 3 > 0) for _ in range(layers)]
        packed = packed_blocks(kept, 1, (False,) * layers)
        tail = prefix + packed + number(0, 10) * (packed > 0)
        lengths[row] = tail + number(1, 40)
        slots = torch.randperm(BLOCKS - 1, generator=generator)[: lengths[row]].to(torch.int32) + 1
        req_to_token[row, : lengths[row]] = slots
        req_to_token[row, prefix + packed : tail] = 0
        single = {"prefix": prefix, "packed": packed, "tail": tail, "score_from": prefix, "score_after": 0}
        excess, holes = offsets(kept, packed)
        columns = {name: [value] for name, value in (single | {"kept": kept, "excess": excess, "holes": holes}).items()}
        lines[row] = torch.from_numpy(table.numbers(columns)[0])
    return req_to_token, lines, lengths


def expected_lists(req_to_token, lines, rows, seq_lens, layer):
    """Lists of flat cells, by the host's arithmetic alone."""
    lists = []
    for row, seq in zip(rows.tolist(), seq_lens.tolist(), strict=True):
        line = table.read(lines[row])
        kept, prefix, tail = line.kept.tolist(), int(line.prefix), int(line.tail)
        packed = [packed_cell(kept, int(line.packed), layer, q) for q in range(kept[layer])]
        places = [(layer, p) for p in range(prefix)] + [(owner, prefix + place) for owner, place in packed]
        places += [(layer, p) for p in range(tail, seq)]
        lists.append(torch.tensor([owner * BLOCKS + int(req_to_token[row, p]) for owner, p in places]).long())
    return lists


def test_the_reference_resolves_lists_as_the_host_does():
    for layers in (1, 2, 5):
        req_to_token, lines, lengths = make(layers, 3 + layers)
        rows, seq_lens = torch.arange(ROWS), torch.tensor(lengths)
        spans = table.read(lines).spans
        assert layers == 1 or int(spans.excess.max()) > 0, "no layer has excess: the test says nothing"
        lists = token_lists(req_to_token, rows, seq_lens, spans, BLOCKS, WIDTH)
        own = token_lists(req_to_token, rows, seq_lens, spans, BLOCKS, WIDTH, skip_prefix=True)
        some = token_lists(req_to_token, rows, seq_lens, spans, BLOCKS, WIDTH, layers=torch.tensor([layers - 1]))
        assert torch.equal(some.cells[0], lists.cells[-1])
        for layer in range(layers):
            expected = expected_lists(req_to_token, lines, rows, seq_lens, layer)
            for row, cells in enumerate(expected):
                prefix = int(spans.prefix[row])
                assert lists.cells[layer, row, : int(lists.length[layer, row])].tolist() == cells.tolist()
                assert own.cells[layer, row, : int(own.length[layer, row])].tolist() == cells[prefix:].tolist()
                assert not lists.cells[layer, row, len(cells) :].any()


def test_a_layer_without_excess_has_a_list_of_slots(device):
    batch = arguments(device, (1, 2, 4, 5))
    spans = table.read(batch.table[batch.rows]).spans
    for layer in range(3):
        if bool((spans.kept[:, layer] > spans.packed).any()):
            continue
        cells, slots = (
            Lists(torch.zeros(5, dtype=torch.int64, device=device), torch.zeros(600, device=device).long())
            for _ in range(2)
        )
        fill_lists(batch, layer, BLOCKS, cells, True)
        fill_lists(batch, layer, None, slots, True)
        end = int(slots.indptr[-1])
        assert torch.equal(cells.indptr, slots.indptr) and end > 40
        assert torch.equal(cells.indices[:end], slots.indices[:end] + layer * BLOCKS)
        return
    raise AssertionError("every layer has excess: take another seed")


@settings(deadline=None, derandomize=True, phases=[Phase.generate], max_examples=14)
@given(
    layers=st.sampled_from([1, 2, 5]),
    batch=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9),
    integer=st.sampled_from([torch.int32, torch.int64]),
    fill_value=st.sampled_from([0, 1]),
    programs=st.sampled_from([1, 64]),
    seed=st.integers(0, 99),
)
def test_lists_are_the_twins(device, layers, batch, integer, fill_value, programs, seed):
    req_to_token, lines, lengths = make(layers, seed)
    rows = torch.tensor(batch)
    seq_lens = torch.tensor([lengths[row] if row else fill_value for row in batch])
    layer = seed % layers
    lists = expected_lists(req_to_token, lines, rows, seq_lens, layer)
    flat = torch.cat(lists)
    ends = torch.tensor([0, *(len(cells) for cells in lists)]).cumsum(0)
    there = Batch(*(t.to(device) for t in (req_to_token, lines, rows.to(integer), seq_lens.to(integer))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indices, "_PROGRAMS", programs)
        for known in (False, True):
            indptr = torch.full((len(batch) + 3,), UNSET, dtype=integer, device=device)
            if known:
                indptr[: len(batch) + 1] = ends.to(device)
            out = torch.full((len(flat) + 40,), UNSET, dtype=integer, device=device)
            fill_lists(there, layer, BLOCKS, Lists(indptr, out), not known)
            assert indptr.tolist() == [*ends.tolist(), UNSET, UNSET]
            assert torch.equal(out[: len(flat)].cpu().long(), flat)
            assert (out[len(flat) :] == UNSET).all(), "written beyond the last list"
    for known in (False, True):
        host_indptr, host = ends.to(integer), torch.full((len(flat) + 40,), UNSET, dtype=integer)
        requests = Batch(req_to_token, lines, rows, seq_lens)
        reference.fill_lists(requests, layer, BLOCKS, Lists(host_indptr, host), not known)
        assert torch.equal(host, out.cpu()) and host_indptr.tolist() == ends.tolist()


def arguments(device, batch=(1, 2)):
    req_to_token, lines, lengths = make(3, 1)
    rows = torch.tensor(batch)
    seq_lens = torch.tensor([lengths[row] for row in batch])
    return Batch(*(t.to(device) for t in (req_to_token, lines, rows, seq_lens)))


def test_padded_rows_are_empty_or_the_padding_cell(device):
    batch = arguments(device, (0, 4, 0))
    indptr, out = torch.zeros(4, dtype=torch.int32, device=device), torch.zeros(200, dtype=torch.int32, device=device)
    fill_lists(batch, 2, BLOCKS, Lists(indptr, out), True)
    assert indptr[1] == 0 and indptr[2] == indptr[3]
    batch.seq_lens[batch.rows == 0] = 1
    fill_lists(batch, 2, BLOCKS, Lists(indptr, out), True)
    assert indptr[1] == 1 and out[0] == 2 * BLOCKS and out[indptr[2]] == 2 * BLOCKS


def test_what_does_not_fit_the_buffer_is_left_out(device):
    whole, short = torch.full((300,), UNSET, device=device), torch.full((300,), UNSET, device=device)
    indptr = torch.zeros(3, dtype=torch.int64, device=device)
    fill_lists(arguments(device), 1, BLOCKS, Lists(indptr, whole), True)
    fill_lists(arguments(device), 1, BLOCKS, Lists(indptr, short[:50]), True)
    assert indptr[2] > 50
    assert torch.equal(short[:50], whole[:50]) and (short[50:] == UNSET).all()


def test_a_known_end_is_never_written_past(device):
    whole = torch.full((300,), UNSET, device=device)
    indptr = torch.zeros(3, dtype=torch.int64, device=device)
    fill_lists(arguments(device), 1, BLOCKS, Lists(indptr, whole), True)
    end = int(indptr[1])
    out = torch.full((300,), UNSET, device=device)
    known = torch.tensor([0, end - 3, end], device=device)
    fill_lists(arguments(device), 1, BLOCKS, Lists(known, out), False)
    assert torch.equal(out[: end - 3], whole[: end - 3])
    assert torch.equal(out[end - 3 : end], whole[end : end + 3]) and (out[end:] == UNSET).all()


def test_an_empty_batch_has_an_empty_indptr(device):
    empty = torch.empty(0, dtype=torch.int64, device=device)
    batch = arguments(device)._replace(rows=empty, seq_lens=empty)
    indptr = torch.full((2,), UNSET, device=device)
    fill_lists(batch, 0, BLOCKS, Lists(indptr, empty), True)
    assert indptr.tolist() == [0, UNSET]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"req_to_token": torch.zeros(7, 9)}, "req_to_token must be int32"),
        ({"table": torch.zeros(7, 9, dtype=torch.int32)}, "9 columns"),
        ({"layer": 3}, "layer 3 is not among"),
        ({"seq_lens": torch.ones(3, dtype=torch.int64)}, "seq_lens must be int32 or int64 of shape \\[2\\]"),
        ({"indptr": torch.zeros(2, dtype=torch.int32)}, "2 requests need 3"),
        ({"blocks": 2**30}, "32 bits"),
        ({"indices": torch.zeros(8)}, "indices must be int32 or int64"),
    ],
)
def test_bad_shapes_are_named(change, message):
    def of(kind):
        return {name: value for name, value in change.items() if name in kind._fields}

    zeros = torch.zeros(300, dtype=torch.int64)
    batch, lists = arguments("cpu")._replace(**of(Batch)), Lists(zeros[:3], zeros)._replace(**of(Lists))
    with pytest.raises(ValueError, match=message):
        fill_lists(batch, change.get("layer", 1), change.get("blocks", BLOCKS), lists, True)


# -- page tables ------------------------------------------------------------------------------------------------------


def make_pages(page, layers, seed):
    """Rows of six requests in whole pages, all layers alike, and what their packed rows are, by the host alone."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    req_to_token, lines = torch.zeros(ROWS, 40 * page, dtype=torch.int32), torch.zeros(ROWS, table.width(layers))
    lines, lengths, packed_rows = lines.to(torch.int32), [0] * ROWS, [[0]] * ROWS
    for row in range(1, ROWS):
        prefix, kept = number(0, 1) * number(0, 6) * page, number(1, 7) * page * (row % 3 > 0)
        tail = prefix + kept + number(0, 9) * page * (kept > 0)
        lengths[row] = tail + number(1, 12 * page)
        pages = torch.randperm(60, generator=generator)[: -(-lengths[row] // page)].to(torch.int32) + 1
        slots = (pages.unsqueeze(1) * page + torch.arange(page, dtype=torch.int32)).flatten()[: lengths[row]]
        req_to_token[row, : lengths[row]] = slots
        req_to_token[row, prefix + kept : tail] = 0
        packed_rows[row] = req_to_token[row].tolist()[: prefix + kept] + slots.tolist()[tail:]
        single = {"prefix": prefix, "packed": kept, "tail": tail, "score_from": prefix, "score_after": 0}
        layered = {"kept": (kept,) * layers, "excess": (0,) * layers, "holes": (0,) * layers}
        lines[row] = torch.from_numpy(table.numbers({name: [n] for name, n in (single | layered).items()})[0])
    return req_to_token, lines, lengths, packed_rows


@settings(deadline=None, derandomize=True, phases=[Phase.generate], max_examples=12)
@given(
    page=st.sampled_from([1, 8, 16]),
    batch=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=9),
    integer=st.sampled_from([torch.int32, torch.int64]),
    programs=st.sampled_from([1, 64]),
    seed=st.integers(0, 99),
)
def test_pages_are_those_of_the_packed_rows(device, page, batch, integer, programs, seed):
    req_to_token, lines, lengths, packed_rows = make_pages(page, 1 + seed % 3, seed)
    rows, seq_lens = torch.tensor(batch), torch.tensor([lengths[row] if row else 1 for row in batch])
    host = Batch(req_to_token, lines, rows, seq_lens)
    there = Batch(*(t.to(device) for t in (req_to_token, lines, rows.to(integer), seq_lens.to(integer))))
    width = 40  # columns of a wider buffer, as a captured one is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indices, "_PROGRAMS", programs)
        for fill, requests, where in ((fill_pages, there, device), (reference.fill_pages, host, "cpu")):
            pages = torch.full((len(batch), width + 5), UNSET, dtype=torch.int32, device=where)
            filled = torch.full((len(batch) + 2,), UNSET, dtype=torch.int32, device=where)
            fill(requests, page, filled[: len(batch)], pages[:, :width])
            assert filled.tolist() == [*(len(packed_rows[row]) for row in batch), UNSET, UNSET]
            for row, table_of_row in zip(batch, pages.tolist(), strict=True):
                used = packed_rows[row][::page]
                assert table_of_row[: len(used)] == [slot // page for slot in used]
                assert set(table_of_row[len(used) :]) == {UNSET}, "written behind the last page"


def test_pages_that_do_not_fit_are_left_out(device):
    req_to_token, lines, lengths, packed_rows = make_pages(8, 2, 5)
    rows, seq_lens = torch.tensor([1, 2]), torch.tensor(lengths[1:3])
    there = Batch(*(t.to(device) for t in (req_to_token, lines, rows, seq_lens)))
    pages = torch.full((2, 9), UNSET, dtype=torch.int32, device=device)
    filled = torch.zeros(2, dtype=torch.int32, device=device)
    fill_pages(there, 8, filled, pages[:, :3])
    assert all(len(packed_rows[row]) > 24 for row in (1, 2)), "take another seed"
    assert pages[:, :3].tolist() == [[slot // 8 for slot in packed_rows[row][:24:8]] for row in (1, 2)]
    assert (pages[:, 3:] == UNSET).all()
    empty = there._replace(rows=there.rows[:0], seq_lens=there.seq_lens[:0])
    fill_pages(empty, 8, filled[:0], pages[:0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths must be int32 of shape"),
        ({"pages": torch.zeros(3, 9, dtype=torch.int32)}, "pages must be int32 of shape \\[2, any\\]"),
        ({"pages": torch.zeros(9, 2, dtype=torch.int32).t()}, "last axis contiguous"),
        ({"page_size": 0}, "a page has at least one token, not 0"),
        ({"table": torch.zeros(7, 9, dtype=torch.int32)}, "9 columns"),
    ],
)
def test_bad_page_tables_are_named(change, message):
    req_to_token, lines, *_ = make_pages(8, 2, 5)
    batch = Batch(req_to_token, change.get("table", lines), torch.tensor([1, 2]), torch.tensor([9, 9]))
    lengths = change.get("lengths", torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        fill_pages(batch, change.get("page_size", 8), lengths, change.get("pages", torch.zeros(2, 9).to(torch.int32)))
