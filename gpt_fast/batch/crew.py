"""Workers in processes of their own, here or elsewhere: each has an engine and asks the dealer over a socket."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from gpt_fast.batch.answering import Answering, Plan
from gpt_fast.batch.dealer import Deal, Dealer, Done
from gpt_fast.cli.errors import MISTAKES, text
from gpt_fast.config import EngineConfig
from gpt_fast.llm import Engine
from gpt_fast.serve.startup import prepare

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Post:
    """What a worker is started with: the dealer's address and key, the engine to load, what to answer with it."""

    address: tuple[str, int]
    key: bytes
    engine: EngineConfig
    plan: Plan


def work(post: Post, name: str) -> None:
    """Be a worker until no rows are left or the dealer is gone."""
    with Client(post.address, authkey=post.key) as connection:
        try:
            engine = Engine.load(**vars(prepare(post.engine, None)))
        except MISTAKES as error:
            return send(connection, {"worker": name, "failure": text(error)})
        with suppress(EOFError, ConnectionError):  # whoever asked does not want to know any more
            Answering(engine, post.plan, trade_over(connection, name)).run()


def trade_over(connection: Connection, name: str) -> Callable[[list[Done], int], Deal]:
    def trade(done: list[Done], want: int) -> Deal:
        send(connection, {"worker": name, "done": [dataclasses.astuple(each) for each in done], "want": want})
        reply = json.loads(connection.recv_bytes())
        return Deal([(number, line) for number, line in reply["rows"]], reply["over"])

    return trade


def send(connection: Connection, message: dict[str, object]) -> None:
    """As JSON, which keeps a lone surrogate as it is."""
    connection.send_bytes(json.dumps(message).encode())


@dataclass
class Counter:
    """Where workers come to, on this machine's address: a thread each. Use as a context manager."""

    dealer: Dealer
    host: str = "127.0.0.1"
    key: bytes = field(default_factory=lambda: os.urandom(32))
    failure: str | None = None  # why a worker could not begin

    def __enter__(self) -> Counter:
        self._listener = Listener((self.host, 0), authkey=self.key, backlog=64)
        self._connections: set[Connection] = set()
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in list(self._connections):
            connection.close()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.address
        return str(host), int(port)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except AuthenticationError:
                continue
            except OSError:
                return  # closed
            self._connections.add(connection)
            threading.Thread(target=self._attend, args=(connection,), name="attend", daemon=True).start()

    def _attend(self, connection: Connection) -> None:
        name = ""
        try:
            while True:
                message = json.loads(connection.recv_bytes())
                name = message["worker"]
                if "failure" in message:
                    self.failure = message["failure"]
                    return
                done = [Done(*each) for each in message["done"]]
                deal = self.dealer.trade(name, done, message["want"])
                send(connection, {"rows": deal.rows, "over": deal.over})
        except (EOFError, OSError):
            pass
        finally:
            self.dealer.lost(name)
            self._connections.discard(connection)
            connection.close()
