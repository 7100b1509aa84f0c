"""Streamed transactions by hand: what is held, what is given on, what is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cdc.errors import ProtocolError, SpoolFailed, Verdict
from connectors.postgres import spool as module
from connectors.postgres.spool import Spool
from tests.support.decoding import Row, batches_of, decode_streamed, rows_of
from tests.support.streaming import abort, commit, framed, start, stop, with_xid
from tests.support.wire import INT4, Wire, WireColumn, WireTable

TABLE = WireTable(16384, "public", "t", (WireColumn("id", INT4, key=True),))
WIDER = WireTable(16384, "public", "t", (WireColumn("id", INT4, key=True), WireColumn("note")))


def relation(table: WireTable = TABLE, xid: int = 7) -> bytes:
    wire = Wire()
    wire.relation(table)
    return with_xid(wire.frames[0], xid)


def insert(*cells: bytes, xid: int = 7, table: WireTable = TABLE) -> bytes:
    wire = Wire()
    wire.insert(table, cells)
    return with_xid(wire.frames[0], xid)


def ordinary(*frames: bytes, xid: int, lsn: int) -> list[bytes]:
    """An ordinary transaction of these (ordinary) frames."""
    wire = Wire()
    wire.begin(xid=xid, commit_lsn=lsn)
    wire.commit()
    return [wire.frames[0], *frames, wire.frames[1]]


def plain(frame: bytes) -> bytes:
    return frame[:26] + frame[30:]


def keepalive(wal_end: int) -> bytes:
    wire = Wire()
    wire.keepalive(wal_end=wal_end)
    return wire.frames[0]


def rows(frames: Sequence[bytes], folder: Path, **options: int) -> list[Row]:
    return rows_of(batches_of(decode_streamed(frames, range(len(frames)), folder=folder / "spool", **options)))


def ids(found: list[Row]) -> list[tuple[int, int, int, int]]:
    return [(row.image["id"], row.seq, row.xid, row.lsn) for row in found]


def block(*frames: bytes, xid: int = 7, first: bool = False) -> list[bytes]:
    return [start(xid, first=first), *frames, stop()]


def test_a_transaction_stands_where_it_committed_with_its_ordinals(tmp_path: Path) -> None:
    stream = [
        *block(relation(), insert(b"1"), first=True),
        *ordinary(plain(relation()), plain(insert(b"9")), xid=8, lsn=500),
        *block(insert(b"2", xid=70)),
        commit(7, 600, 650),
    ]

    assert ids(rows(stream, tmp_path)) == [(9, 0, 8, 500), (1, 0, 7, 600), (2, 1, 7, 600)]


def test_only_what_was_rolled_back_is_left_out_and_takes_no_ordinal(tmp_path: Path) -> None:
    stream = [
        *block(relation(), insert(b"1"), insert(b"2", xid=70), insert(b"3", xid=71), first=True),
        abort(7, 71),
        *block(insert(b"4")),
        commit(7, 600, 650),
    ]

    assert ids(rows(stream, tmp_path)) == [(1, 0, 7, 600), (2, 1, 7, 600), (4, 2, 7, 600)]


def test_a_transaction_that_is_rolled_back_leaves_nothing_and_another_with_its_id_may_come(tmp_path: Path) -> None:
    stream = [
        *block(relation(), insert(b"1"), first=True),
        abort(7, 7),
        *block(relation(), insert(b"2"), first=True),
        commit(7, 600, 650),
    ]

    assert ids(rows(stream, tmp_path, memory_bytes=0)) == [(2, 0, 7, 600)]


def test_word_of_a_transaction_that_was_never_sent_means_nothing(tmp_path: Path) -> None:
    stream = [abort(3, 4), *ordinary(plain(relation()), plain(insert(b"9")), xid=8, lsn=500), abort(3, 3)]

    assert ids(rows(stream, tmp_path)) == [(9, 0, 8, 500)]


def test_the_relations_of_a_streamed_transaction_hold_for_those_behind_it_those_rolled_back_do_not(
    tmp_path: Path,
) -> None:
    stream = [
        *block(relation(WIDER, xid=70), insert(b"0", b"gone", xid=70, table=WIDER), first=True),
        abort(7, 70),
        *block(relation(), insert(b"1")),
        commit(7, 600, 650),
        *ordinary(plain(insert(b"2")), xid=8, lsn=700),
    ]

    assert ids(rows(stream, tmp_path)) == [(1, 0, 7, 600), (2, 0, 8, 700)]


def test_of_two_relations_the_one_that_was_sent_last_holds_whoever_commits_last(tmp_path: Path) -> None:
    wide = plain(insert(b"2", b"x", table=WIDER))
    stream = [
        *block(relation(), insert(b"1"), first=True),
        *ordinary(plain(relation(WIDER)), wide, xid=8, lsn=500),
        commit(7, 600, 650),
        *ordinary(wide, xid=9, lsn=700),
    ]

    found = rows(stream, tmp_path)

    assert [(row.image, row.xid) for row in found] == [
        ({"id": 2, "note": "x"}, 8),
        ({"id": 1}, 7),
        ({"id": 2, "note": "x"}, 9),
    ]


def test_an_origin_said_in_the_first_block_is_that_of_all_blocks(tmp_path: Path) -> None:
    origin = framed(b"O" + bytes(8) + b"elsewhere\0")
    stream = [
        *block(origin, relation(), insert(b"1"), first=True),
        *block(insert(b"2")),
        commit(7, 600, 650),
        *ordinary(plain(insert(b"3")), xid=8, lsn=700),
    ]

    assert [row.origin for row in rows(stream, tmp_path)] == ["elsewhere", "elsewhere", None]


def test_a_keepalive_inside_of_a_block_stands_between_transactions(tmp_path: Path) -> None:
    stream = [*block(relation(), insert(b"1"), keepalive(400), insert(b"2"), first=True), commit(7, 600, 650)]

    portions = decode_streamed(stream, range(len(stream)), folder=tmp_path / "spool")

    reached = [portion.boundary for portion in portions if portion.boundary is not None]
    assert [(boundary.lsn, boundary.end_lsn) for boundary in reached] == [(0, 400), (600, 650)]


def test_a_transaction_of_which_nothing_is_published_is_one_without_rows(tmp_path: Path) -> None:
    stream = [*block(first=True), commit(7, 600, 650)]

    portions = decode_streamed(stream, folder=tmp_path / "spool")

    assert [portion.xids.tolist() for portion in portions] == [[7]]


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([stop()], "no Stream Start before it"),
        ([commit(7, 600, 650)], "no Stream Start before it"),
        ([start(7, first=False)], "the first block is missing"),
        ([*block(first=True), start(7, first=True)], "it is not the first block"),
        ([start(7, first=True), start(8, first=True)], "inside of a streamed block"),
        ([start(7, first=True), commit(7, 600, 650)], "inside of a streamed block"),
        ([start(7, first=True), abort(7, 7)], "inside of a streamed block"),
        ([start(7, first=True), *ordinary(xid=8, lsn=500)], "inside of a streamed block"),
        ([ordinary(xid=8, lsn=500)[0], start(7, first=True)], "inside of another transaction"),
        ([ordinary(xid=8, lsn=500)[0], abort(7, 8)], "inside of another transaction"),
        ([start(7, first=True), framed(b"I\0\0\0")], "it is cut short"),
        ([framed(b"S\0\0\0\7")], "wrong length"),
        ([framed(b"E\0")], "no Stream Start before it"),
        ([start(7, first=True), framed(b"E\0")], "wrong length"),
        ([framed(b"A\0\0\0\7")], "wrong length"),
        ([*block(first=True), framed(b"c\0\0\0\7\0")], "wrong length"),
        ([*block(first=True), abort(7, 70), *block(insert(b"1", xid=70))], "its subtransaction was rolled back before"),
    ],
)
def test_what_no_server_sends_is_refused_with_its_position(frames: list[bytes], why: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=f"at [0-9A-F]+/[0-9A-F]+: {why}$"):
        decode_streamed(frames, range(len(frames)), folder=tmp_path / "spool")


def test_what_does_not_fit_into_memory_is_on_disk_until_the_transaction_ends(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    spool = Spool(folder, memory_bytes=20_000, bytes_max=1 << 30)

    def take(*frames: bytes) -> int:
        lengths = np.fromiter(map(len, frames), np.int64, len(frames))
        return len(list(spool.take(b"".join(frames), lengths, in_transaction=False)))

    for xid in (7, 8):
        take(start(xid, first=True), relation(xid=xid), *[insert(b"1", xid=xid)] * 100, stop())
        take(start(xid, first=False), *[insert(b"2", xid=xid)] * 900, stop())
        assert spool.held_bytes <= 20_000
    assert sorted(path.name for path in folder.iterdir()) == ["7.frames", "8.frames"]
    assert spool.written_bytes > 2 * 900 * len(insert(b"2"))

    assert take(abort(7, 7)) == 0
    assert [path.name for path in folder.iterdir()] == ["8.frames"]
    assert take(commit(8, 600, 650)) >= 1
    assert (list(folder.iterdir()), spool.held_bytes, spool.written_bytes) == ([], 0, 0)


def test_the_files_are_bounded(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", memory_bytes=0, bytes_max=10_000)
    frames = [start(7, first=True), relation(), *[insert(b"1")] * 1000, stop()]
    lengths = np.fromiter(map(len, frames), np.int64, len(frames))

    with pytest.raises(SpoolFailed, match="spool_bytes_max is reached"):
        list(spool.take(b"".join(frames), lengths, in_transaction=False))


def test_what_lies_there_from_before_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "7.frames").write_bytes(b"of a process that died")

    found = rows([*block(relation(), insert(b"1"), first=True), commit(7, 600, 650)], tmp_path, memory_bytes=0)

    assert ids(found) == [(1, 0, 7, 600)]
    assert not folder.exists()


def test_a_full_disk_says_which_folder_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "write", full)

    with pytest.raises(
        SpoolFailed, match=r"spool fails to hold .*: No space left on device; 0 bytes .* more"
    ) as failed:
        rows(block(relation(), insert(b"1"), first=True), tmp_path, memory_bytes=0)

    assert failed.value.verdict is Verdict.RETRY
    assert "spool_bytes_max" in failed.value.hint
