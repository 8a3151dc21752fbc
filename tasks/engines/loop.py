"""Keeps one engine busy across shards.

A single thread owns the engine. Shards hand in their requests whenever they are ready and wait for a future; the next
shard's requests enter while the last one's tail still decodes, so the engine never drains in between.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tasks.engines import Engine, Refused


@dataclass
class _Batch:
    future: Future[list[Any]]
    answers: list[Any]
    open: int


class EngineLoop:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests = 0
        self._inbox: queue.SimpleQueue[tuple[Sequence[Any], _Batch] | None] = queue.SimpleQueue()
        self._waiting: dict[int, tuple[_Batch, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Any]) -> Future[list[Any]]:
        """Answers in the order of the requests; a Refused where the engine cannot take one."""
        future: Future[list[Any]] = Future()
        if requests:
            self._inbox.put((requests, _Batch(future, [None] * len(requests), len(requests))))
        else:
            future.set_result([])
        return future

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while self._take_in():
                for key, answer in self.engine.step():
                    self._settle(key, answer)
        except BaseException as error:  # the thread must not die silently: whoever waits gets the error
            self.engine.close()
            self._fail(error)
        else:
            self.engine.close()

    def _take_in(self) -> bool:
        """Add what has arrived; wait only when there is nothing else to do. False: closed."""
        wait = not self._waiting
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            self._add(*item)
            wait = False

    def _add(self, requests: Sequence[Any], batch: _Batch) -> None:
        for index, request in enumerate(requests):
            key = self.requests
            self.requests += 1
            self._waiting[key] = (batch, index)
            try:
                self.engine.add(key, request)
            except ValueError as error:
                self._settle(key, Refused((str(error) or type(error).__name__).splitlines()[0]))

    def _settle(self, key: int, answer: Any) -> None:
        batch, index = self._waiting.pop(key)
        batch.answers[index] = answer
        batch.open -= 1
        if batch.open == 0:
            batch.future.set_result(batch.answers)

    def _fail(self, error: BaseException) -> None:
        batches = {id(batch): batch for batch, _ in self._waiting.values()}
        self._waiting.clear()
        for batch in batches.values():
            batch.future.set_exception(error)
        while True:  # later submissions would wait for ever
            item = self._inbox.get()
            if item is None:
                return
            item[1].future.set_exception(error)
