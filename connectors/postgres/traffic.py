"""Live traffic on the demo's shop: one session that keeps changing it at a steady rate, from a thread of its own.

Every kind of change comes up within a second or two: see `KINDS`. What it has done is counted; an error ends it and
is kept for whoever looks. It verifies nothing.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg

from cdc.errors import CdcError
from connectors.postgres.connection import translate

STOP_S = 10.0
"""Bound of waiting for the thread: a transaction of ours takes milliseconds."""


@dataclass(frozen=True)
class Done:
    """What the traffic has done so far."""

    transactions: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Transactions by kind, as people would name them."""


class Traffic(threading.Thread):
    """`start`, then `done` at any time, then `stop`. The rate is an aim: a slow server gets less."""

    def __init__(self, dsn: str, sizes: Mapping[str, int], *, transactions_per_s: float = 120.0, seed: int = 7) -> None:
        """`sizes`: how many customers, products and orders there are."""
        super().__init__(name="shop-traffic", daemon=True)
        self._dsn = dsn
        self._pause_s = 1.0 / transactions_per_s
        self._random = random.Random(seed)
        self._customers, self._products, self._orders = sizes["customers"], sizes["products"], sizes["orders"]
        self._stopping = threading.Event()
        self._channel = False
        self._counts: Counter[str] = Counter()
        self.error: CdcError | None = None
        """Why it ended by itself, if it did."""

    def use_channel(self) -> None:
        """From now on orders have a channel. Thread-safe."""
        self._channel = True

    def done(self) -> Done:
        """Thread-safe."""
        counts = dict(self._counts)
        return Done(sum(counts.values()), counts)

    def stop(self) -> None:
        """End it after the transaction under way; bounded, idempotent."""
        self._stopping.set()
        if self.is_alive():
            self.join(STOP_S)

    def run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as session:
                session.execute("set statement_timeout = '20s'")
                due = time.monotonic()
                while not self._stopping.is_set():
                    self._transaction(session)
                    # A server that was slow for a while is not flooded afterwards.
                    due = max(due + self._pause_s, time.monotonic() - 0.2)
                    self._stopping.wait(max(0.0, due - time.monotonic()))
        except psycopg.Error as error:
            if not self._stopping.is_set():
                self.error = translate(error, "the demo's traffic")

    def _transaction(self, session: psycopg.Connection[Any]) -> None:
        kind = self._random.choices(list(KINDS), weights=[weight for weight, _ in KINDS.values()])[0]
        work = KINDS[kind][1]
        # Closed by an exception as well as by its end: a rolled back transaction is one of the kinds.
        with session.transaction(force_rollback=kind == "rolled back"):
            work(self, session)
        self._counts[kind] += 1

    # ---- the kinds ----

    def _order(self, session: psycopg.Connection[Any]) -> None:
        customer = self._random.randint(1, self._customers)
        row = session.execute("insert into orders (customer_id) values (%s) returning order_id", [customer]).fetchone()
        assert row is not None
        if self._channel:
            channel = self._random.choice(["app", "phone", "web", "shop “Zürich”"])
            session.execute("update orders set channel = %s where order_id = %s", [channel, row[0]])
        for line in range(1, self._random.randint(1, 4) + 1):
            session.execute(
                "insert into order_items select %s, %s, sku, %s, price from products where sku = %s",
                [row[0], line, self._random.randint(1, 5), self._sku(session)],
            )

    def _advance(self, session: psycopg.Connection[Any]) -> None:
        """A few recent orders at once."""
        session.execute(
            "update orders set status = case status when 'new' then 'paid' else 'sent' end::order_status"
            " where order_id in (select order_id from orders order by order_id desc limit 200) and random() < 0.02"
        )

    def _customer(self, session: psycopg.Connection[Any]) -> None:
        row = session.execute(
            "insert into customers (email, name, tags) values (%s, %s, %s) returning customer_id",
            [f"{self._random.getrandbits(60):x}@example.org", "Zoë\tN’Guessan", ["new"]],
        ).fetchone()
        assert row is not None
        self._customers = int(row[0])

    def _profile(self, session: psycopg.Connection[Any]) -> None:
        session.execute(
            "update customers set newsletter = not newsletter, tags = array_append(tags[1:3], 'seen')"
            " where customer_id = %s",
            [self._random.randint(1, self._customers)],
        )

    def _price(self, session: psycopg.Connection[Any]) -> None:
        session.execute("update products set price = price + 0.01 where sku = %s", [self._sku(session)])

    def _revise(self, session: psycopg.Connection[Any]) -> None:
        """Leaves the body alone: the stream says only that it is unchanged."""
        session.execute(
            "update manuals set revision = revision + 1, revised_at = now() where sku = %s", [self._sku(session)]
        )

    def _rewrite(self, session: psycopg.Connection[Any]) -> None:
        session.execute(
            "update manuals set body = %s || substr(body, 1, 20000) where sku = %s",
            [f"revised {self._random.random()}\n", self._sku(session)],
        )

    def _cancel(self, session: psycopg.Connection[Any]) -> None:
        """Its items go with it."""
        session.execute("delete from orders where order_id = %s", [self._random.randint(1, self._orders)])

    def _rename(self, session: psycopg.Connection[Any]) -> None:
        """Changes a key, and by cascade the key of the manual (its body unchanged) and a column of many items."""
        old = self._sku(session)
        session.execute("update products set sku = %s where sku = %s", [f"SKU-{self._random.getrandbits(40):x}", old])

    def _sku(self, session: psycopg.Connection[Any]) -> str:
        row = session.execute(
            "select sku from products order by sku offset %s limit 1", [self._random.randrange(self._products)]
        ).fetchone()
        assert row is not None
        return str(row[0])


KINDS = {
    "orders": (40, Traffic._order),
    "status updates": (14, Traffic._advance),
    "profile updates": (10, Traffic._profile),
    "manuals revised": (10, Traffic._revise),
    "price changes": (8, Traffic._price),
    "new customers": (6, Traffic._customer),
    "orders deleted": (6, Traffic._cancel),
    "manuals rewritten": (2, Traffic._rewrite),
    "keys changed": (1, Traffic._rename),
    "rolled back": (3, Traffic._order),
}
"""Kinds of transactions: how often (of 100), and what they do."""
