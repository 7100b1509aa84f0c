"""The walsender protocol over psycopg: a thread that receives frames, answers keepalives, and does nothing else.

Guarantees: status goes out by the thread's own clock, whatever the reader does; frames are handed over in order,
joined into blobs of about `blob_bytes`, at most `buffer_bytes` of them waiting; when they wait, the socket is not read
and the server feels it. It does not decode and does not know what is durable: it reports what it was told by
`confirm`. Sources: PostgreSQL documentation, "Streaming Replication Protocol"; libpq COPY functions.
"""

from __future__ import annotations

import logging
import select
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from psycopg import pq

from cdc import metrics
from cdc.errors import SourceUnavailable
from connectors.postgres.connection import translated

log = logging.getLogger(__name__)

POSTGRES_EPOCH_US = 946_684_800_000_000
STATUS_EVERY_S = 5.0
"""Well below a third of the smallest sensible wal_sender_timeout (default 60 s)."""
KEEPALIVE = 0x6B
KEEPALIVE_BYTES = 18
"""Length of a keepalive; XLogData is longer by its header alone."""
CLOSE_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Blob:
    """Frames in stream order: their bytes joined, and the length of each (int64)."""

    data: bytes
    lengths: np.ndarray


def format_lsn(lsn: int) -> str:
    """`16/B374D848`, as Postgres prints it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str | None) -> int:
    """The integer of a printed LSN, 0 for None."""
    if not text:
        return 0
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


class Receiver:
    """Streams one slot into a bounded queue of blobs, in a thread of its own."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        *,
        start: str,
        where: str,
        buffer_bytes: int,
        blob_bytes: int = 2 << 20,
        poll_sleep_s: float = 0.00015,
        linger_s: float = 0.2,
        quiet_s: float = 0.003,
        silence_s: float = 60.0,
    ) -> None:
        """`start` is the START_REPLICATION statement. Raises SlotLost or SourceUnavailable if it is refused.

        A blob is handed over when it has `blob_bytes`, when its first frame is `linger_s` old, or when the stream has
        been quiet for `quiet_s`: whatever comes behind it costs a write to disk for each blob, so a stream that keeps
        coming is not cut into many. A server that says nothing for half of `silence_s` is asked for a sign of life;
        after the whole of it the stream ends with SourceUnavailable (Postgres' own wal_receiver_timeout works like
        this).
        """
        self._connection = connection
        self._where = where
        self._buffer_bytes = buffer_bytes
        self._blob_bytes = blob_bytes
        self._poll_sleep_s = poll_sleep_s
        self._linger_s = linger_s
        self._quiet_ms = quiet_s * 1000
        self._silence_s = silence_s
        self._heard_at = time.monotonic()
        self._asked = False
        self._queue: deque[Blob] = deque()
        self._queued_bytes = 0
        self._lent_bytes = 0
        self._changed = threading.Condition()
        self._confirmed = 0
        self._sent_confirmed = -1
        self._received = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._counted_s = 0.0
        with translated(where):
            result = connection.pgconn.exec_(start.encode())
            if result.status != pq.ExecStatus.COPY_BOTH:
                raise psycopg.errors.error_from_result(result)
        self._thread = threading.Thread(target=self._run, name="receive", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> Blob | None:
        """The next blob, None if none came in time; raises what ended the stream once all before it are taken."""
        with self._changed:
            if not self._queue and self._error is None:
                self._changed.wait(timeout_s)
            if self._queue:
                blob = self._queue.popleft()
                self._queued_bytes -= len(blob.data)
                self._changed.notify_all()
                return blob
            if self._error is not None:
                raise self._error
            return None

    def confirm(self, end_lsn: int) -> None:
        """What the next status update reports as flushed; never goes back."""
        self._confirmed = max(self._confirmed, end_lsn)

    def lend(self, used_bytes: int) -> None:
        """So much of `buffer_bytes` is used by whoever takes the blobs: the queue leaves it free."""
        self._lent_bytes = used_bytes

    def close(self) -> None:
        """Send a last status, end the stream, close the connection; idempotent."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(CLOSE_WAIT_S)
        self._connection.close()

    def _run(self) -> None:
        try:
            with translated(self._where):
                self._receive()
        except BaseException as e:  # noqa: BLE001 - the thread's last line: `take` raises it in the reader
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _receive(self) -> None:
        pgconn = self._connection.pgconn
        pgconn.nonblocking = 1
        poller = select.poll()
        poller.register(pgconn.socket, select.POLLIN)
        get = pgconn.get_copy_data
        frames: list[Any] = []
        append = frames.append
        size, before, first_at = 0, 0, 0.0
        next_status = time.monotonic() + STATUS_EVERY_S
        while not self._stop.is_set():
            asked, length = False, 1
            # The hot loop of the product: one turn per message.
            while size < self._blob_bytes:
                length, data = get(1)
                if length <= 0:
                    break
                append(data)
                size += length
                if length == KEEPALIVE_BYTES and data[0] == KEEPALIVE:
                    asked |= bool(data[KEEPALIVE_BYTES - 1])
            fresh = len(frames) > before
            now = time.monotonic()
            if fresh:
                first_at = first_at if before else now
                self._heard_at, self._asked = now, False
            if asked:
                self._send_status(pgconn)
            if length > 0:
                self._hand_over(frames, size, pgconn)
                frames.clear()
                size = before = 0
                continue
            if length < 0:
                self._ended(pgconn)
            if frames and (now - first_at >= self._linger_s or (not fresh and not poller.poll(self._quiet_ms))):
                self._hand_over(frames, size, pgconn)
                frames.clear()
                size = 0
            if now >= next_status or self._confirmed > self._sent_confirmed:
                self._send_status(pgconn)
                next_status = now + STATUS_EVERY_S
            elif now - self._heard_at > self._silence_s / 2:
                self._check_alive(pgconn, now)
            if fresh:
                # Waking for every message costs both sides more than decoding: let some arrive.
                time.sleep(self._poll_sleep_s)
            else:
                poller.poll(100)
            before = len(frames)
            pgconn.consume_input()
        self._send_status(pgconn)
        pgconn.put_copy_end()
        pgconn.flush()

    def _check_alive(self, pgconn: pq.abc.PGconn, now: float) -> None:
        """Ask a silent server for a sign of life, once; then give it up."""
        if now - self._heard_at > self._silence_s:
            raise SourceUnavailable(f"{self._where}: the server has been silent for {self._silence_s:g} s")
        if not self._asked:
            self._asked = True
            self._send_status(pgconn, ask=True)

    def _hand_over(self, frames: list[Any], size: int, pgconn: pq.abc.PGconn) -> None:
        """Join early (a queued frame costs 460 bytes besides its own) and wait while the queue is full."""
        blob = Blob(b"".join(frames), np.fromiter(map(len, frames), np.int64, len(frames)))
        used_s = time.thread_time()
        metrics.STAGE_SECONDS.labels("receive").inc(used_s - self._counted_s)
        self._counted_s = used_s
        with self._changed:
            while self._queue and not self._stop.is_set():
                if self._lent_bytes + self._queued_bytes + size <= self._buffer_bytes:
                    break
                if not self._changed.wait(1.0):
                    self._send_status(pgconn)
            self._queue.append(blob)
            self._queued_bytes += size
            self._changed.notify_all()
        # While the queue was full we did not listen: that silence is ours.
        self._heard_at = time.monotonic()

    def _send_status(self, pgconn: pq.abc.PGconn, *, ask: bool = False) -> None:
        confirmed = self._confirmed
        clock_us = time.time_ns() // 1000 - POSTGRES_EPOCH_US
        pgconn.put_copy_data(struct.pack("!cQQQQB", b"r", confirmed, confirmed, confirmed, clock_us, ask))
        deadline = time.monotonic() + CLOSE_WAIT_S
        while pgconn.flush() == 1:
            # The server may not read before we do: bounded, then the supervisor reconnects.
            if time.monotonic() > deadline:
                raise SourceUnavailable(f"{self._where}: the server takes no status updates")
            select.select([pgconn.socket], [pgconn.socket], [], 0.1)
            pgconn.consume_input()
        self._sent_confirmed = confirmed

    def _ended(self, pgconn: pq.abc.PGconn) -> None:
        result = pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result)
        raise SourceUnavailable(f"{self._where}: the server ended the stream")


def start_statement(slot: str, start_lsn: int, publications: tuple[str, ...], *, streaming: bool = False) -> str:
    """START_REPLICATION for pgoutput with logical messages: protocol 1, or 2 with big transactions while they run."""
    names = ",".join('"' + p.replace('"', '""') + '"' for p in publications)
    quoted = names.replace("'", "''")
    quoted_slot = '"' + slot.replace('"', '""') + '"'
    return (
        f"START_REPLICATION SLOT {quoted_slot} LOGICAL {format_lsn(start_lsn)} "
        + ("(proto_version '2', streaming 'on', " if streaming else "(proto_version '1', ")
        + f"publication_names '{quoted}', messages 'true')"
    )
