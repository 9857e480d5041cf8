"""The directory in tensor operations against a dict: random batches, candidates, failed begins, rows that leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec_mtrains.kernels.device_directory import HOST, SLOT, WINDOW, DeviceDirectory
from torchrec_mtrains.kernels.device_ids import Batch

from torchrec_mtrains.errors import ConfigurationError, IdOutOfRangeError

CPU = torch.device("cpu")
ROWS, SLOTS, HOSTS = [40, 25], [16, 9], [17, 9]
TABLE_OF_FEATURE = [0, 0, 1]


def make() -> DeviceDirectory:
    return DeviceDirectory(["a", "b"], ROWS, SLOTS, HOSTS, TABLE_OF_FEATURE, CPU)


def rows_in(directory: DeviceDirectory, kind: int, table: int) -> dict[int, int]:
    """Place of each row, and whether the map says the same (``check``)."""
    mine = directory.segment(kind, table)
    return {int(row): mine.start + i for i, row in enumerate(directory.row_of_place[mine]) if row >= 0}


def bring(directory: DeviceDirectory, ids: list[list[int]], seq: int, before: int, dirty: bool) -> list[tuple[int, int]]:
    """A batch as the pool brings it, evicting from host places into nowhere. Returns (table, row) of what left a slot."""
    flat = torch.tensor([i for of_feature in ids for i in of_feature], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(of_feature) for of_feature in ids)]).cumsum(0)
    found = directory.lookup(Batch(flat, offsets, 1), seq, dirty)
    resident = [rows_in(directory, SLOT, t) for t in range(2)]
    wanted = [{i for f, of_feature in enumerate(ids) if TABLE_OF_FEATURE[f] == t for i in of_feature} for t in range(2)]
    assert found.hits == [len(wanted[t] & resident[t].keys()) for t in range(2)]
    assert found.lookups == [len(of_feature) for of_feature in ids]
    if found.missing_count:
        misses = directory.claim(found, seq)
        counts, below = misses.count.tolist(), misses.below_count.tolist()
        hosts_of = [rows_in_hosts(directory, t) for t in range(2)]
        assert counts == [len(wanted[t] - resident[t].keys()) for t in range(2)]
        assert below == [len(wanted[t] - resident[t].keys() - hosts_of[t]) for t in range(2)]
        places = []
        for kind, need, as_tensor in ((SLOT, counts, misses.count), (HOST, below, misses.below_count)):
            choice = directory.choose(kind, as_tensor, max(sum(need), 1))
            if any(have < n for have, n in zip(choice.available.tolist(), need, strict=True)):
                directory.refill(kind, need, seq, before if kind == SLOT else seq)
                choice = directory.choose(kind, as_tensor, max(sum(need), 1))
            assert all(have >= n for have, n in zip(choice.available.tolist(), need, strict=True))
            places.append(choice.places[: sum(need)])
        total = sum(counts)
        hosts = misses.was[:total].clone()
        hosts[misses.below[:total]] = places[1]
        directory.give_up(places[1], misses.table[:total][misses.below[:total]])
        directory.commit(misses, places[0], hosts, seq, dirty)
        directory.settle(found, misses)
    directory.check()
    now = [rows_in(directory, SLOT, t) for t in range(2)]
    starts = offsets.tolist()
    for f, of_feature in enumerate(ids):
        t = TABLE_OF_FEATURE[f]
        for k, row in enumerate(of_feature):
            at = starts[f] + k
            assert int(found.place[at]) == now[t][row]
            assert int(found.slot[at]) == now[t][row] - directory.segment(SLOT, t).start
            assert int(directory.stamp[found.place[at]]) >> 1 == seq
    return [(t, row) for t in range(2) for row in resident[t].keys() - now[t].keys()]


def rows_in_hosts(directory: DeviceDirectory, table: int) -> set[int]:
    return set(rows_in(directory, HOST, table))


def histories(least: int) -> st.SearchStrategy[list]:
    """Batches of at most 4 ids a feature, so that two batches just fit the pools, and whether each trains."""
    of_feature = [st.lists(st.integers(0, rows - 1), min_size=least, max_size=4) for rows in (ROWS[0], ROWS[0], ROWS[1])]
    return st.lists(st.tuples(*of_feature, st.booleans()), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(st.one_of(histories(0), histories(4)))
def test_every_batch_finds_its_rows_in_slots_and_only_rows_of_older_batches_leave(history: list) -> None:
    directory = make()
    last_used: dict[tuple[int, int], int] = {}
    dirty_rows: set[tuple[int, int]] = set()
    for seq, (*ids, dirty) in enumerate(history, start=1):
        # The batch before is outstanding: its rows are pinned.
        left = bring(directory, ids, seq, max(1, seq - 1), dirty)
        assert all(last_used[row] < seq - 1 for row in left)
        for f, of_feature in enumerate(ids):
            for row in of_feature:
                last_used[TABLE_OF_FEATURE[f], row] = seq
                if dirty:
                    dirty_rows.add((TABLE_OF_FEATURE[f], row))
        for t in range(2):
            for kind in (SLOT, HOST):
                for row, place in rows_in(directory, kind, t).items():
                    if int(directory.stamp[place]) & 1:
                        assert (t, row) in dirty_rows
                    elif (t, row) in dirty_rows:  # it was below meanwhile: its volume has it
                        dirty_rows.discard((t, row))


@settings(max_examples=30, deadline=None)
@given(histories(0))
def test_two_directories_with_one_history_are_equal(history: list) -> None:
    one, other = make(), make()
    for seq, (*ids, dirty) in enumerate(history, start=1):
        for directory in (one, other):
            bring(directory, ids, seq, seq, dirty)
    for name in ("place_of_row", "row_of_place", "stamp"):
        assert torch.equal(getattr(one, name)[:-1], getattr(other, name)[:-1])


@settings(max_examples=40, deadline=None)
@given(histories(0))
def test_a_claim_taken_back_leaves_every_row_where_it_was(history: list) -> None:
    directory = make()
    for seq, (*ids, dirty) in enumerate(history, start=1):
        flat = torch.tensor([i for of_feature in ids for i in of_feature], dtype=torch.int64)
        offsets = torch.tensor([0, *(len(of_feature) for of_feature in ids)]).cumsum(0)
        places = directory.place_of_row[:-1].clone()
        found = directory.lookup(Batch(flat, offsets, 1), seq, dirty)
        if found.missing_count:
            directory.unclaim(directory.claim(found, seq))
        assert torch.equal(places, directory.place_of_row[:-1])
        bring(directory, ids, seq, seq, dirty)


def test_the_longest_unused_rows_leave_first() -> None:
    directory = make()
    for seq, first in enumerate(range(0, 16, 4), start=1):
        bring(directory, [[first, first + 1, first + 2, first + 3], [], []], seq, seq, True)
    left = bring(directory, [[30, 31, 32, 33], [], []], 5, 5, True)
    assert {row for _, row in left} == {0, 1, 2, 3}


def test_ids_and_offsets_that_do_not_fit_are_refused_by_name() -> None:
    directory = make()
    with pytest.raises(IdOutOfRangeError, match=r"id 25 of table 'b' \(feature 2 of the group, position 1\) is outside \[0, 25\)"):
        directory.lookup(Batch(torch.tensor([0, 1, 2, 25]), torch.tensor([0, 1, 2, 4]), 1), 1, True)
    for offsets in ([0, 2, 1, 4], [1, 2, 3, 4], [0, 1, 2, 3]):
        with pytest.raises(ConfigurationError, match="offsets must not decrease"):
            directory.lookup(Batch(torch.tensor([0, 1, 2, 3]), torch.tensor(offsets), 1), 1, True)
    directory.check()


def test_rows_of_outstanding_batches_are_no_candidates() -> None:
    directory = make()
    for seq, first in enumerate(range(0, 16, 4), start=1):
        bring(directory, [[first, first + 1, first + 2, first + 3], [], []], seq, seq, True)
    for before, expected in ((1, 0), (2, 4), (5, 16)):
        directory.refill(SLOT, [16, 0], 5, before)
        assert directory.choose(SLOT, torch.tensor([16, 0]), 16).available.tolist()[0] == expected
    pinned = torch.zeros(25, dtype=torch.bool)
    pinned[[0, 3, 9]] = True
    directory.refill(SLOT, [16, 0], 5, 0, pinned)
    assert directory.choose(SLOT, torch.tensor([16, 0]), 16).available.tolist()[0] == 13


def flat(ids: list[list[int]]) -> Batch:
    return Batch(
        torch.tensor([i for of_feature in ids for i in of_feature], dtype=torch.int64),
        torch.tensor([0, *(len(of_feature) for of_feature in ids)]).cumsum(0),
        1,
    )


@settings(max_examples=60, deadline=None)
@given(histories(2), st.integers(1, 3), st.integers(0, 100))
def test_rows_of_announced_batches_are_the_last_to_go_and_those_used_last_the_first_of_them(history: list, window: int, first: int) -> None:
    """A batch is announced ``window`` batches before it begins, every fifth is withdrawn and announced again; numbers go round the bits."""
    directory, awaited = make(), {}  # by (table, row), the announced batches that will use it, of rows that were in places
    batches = [ids for *ids, _ in history]

    def announce(b: int, comes: bool) -> None:
        directory.announce(flat(batches[b]), first + b, comes)
        for f, of_feature in enumerate(batches[b]):
            t = TABLE_OF_FEATURE[f]
            in_places = rows_in(directory, SLOT, t).keys() | rows_in(directory, HOST, t).keys()
            for row in in_places & set(of_feature):
                (set.add if comes else set.discard)(awaited.setdefault((t, row), set()), first + b)

    for seq, (*ids, dirty) in enumerate(history, start=1):
        for b in range(seq if seq > 1 else 1, min(seq + window, len(batches))):
            if b == seq + window - 1 or seq == 1:
                announce(b, True)
                if b % 5 == 0:
                    announce(b, False)
                    announce(b, True)
        for t in range(2):  # the batch begins: nobody awaits it any more
            for row in (i for f, of_feature in enumerate(ids) if TABLE_OF_FEATURE[f] == t for i in of_feature):
                awaited.get((t, row), set()).discard(first + seq - 1)
        directory.announce(flat(ids), first + seq - 1, False)
        bring(directory, ids, seq, seq, dirty)
        for t in range(2):
            here = {kind: rows_in(directory, kind, t) for kind in (SLOT, HOST)}
            for row in [r for (of, r) in awaited if of == t and r not in here[SLOT] and r not in here[HOST]]:
                del awaited[t, row]  # of rows that are below nothing is remembered
            for kind in (SLOT, HOST):
                for row, place in here[kind].items():
                    assert int(directory.window[place]) == sum(1 << n % WINDOW for n in awaited.get((t, row), ()))
        directory.refill(SLOT, [4, 2], seq + 1, seq + 1, first_announced=first + seq)
        chosen = set(directory.choose(SLOT, torch.tensor([4, 2]), 6).places.tolist())
        for t, count in enumerate((4, 2)):
            mine = directory.segment(SLOT, t)
            row_in = {place: row for row, place in rows_in(directory, SLOT, t).items()}

            def turn(place: int, t: int = t, row_in: dict[int, int] = row_in) -> tuple[int, int]:
                if place not in row_in:
                    return 0, 0
                coming = awaited.get((t, row_in[place]))
                return (2, -min(coming)) if coming else (1, int(directory.stamp[place]) >> 1)

            taken = [p for p in range(mine.start, mine.stop) if p in chosen]
            left = [p for p in range(mine.start, mine.stop) if p not in chosen]
            assert len(taken) == count
            assert max(map(turn, taken)) <= min(map(turn, left))
