"""Keeps one engine busy across shards.

A single thread owns the engine. Shards hand in their requests whenever they are ready and wait for a future; the next
shard's requests enter while the last one's tail still decodes, so the engine never drains in between. After an engine
died over a shard (tasks/faults.py), that shard's requests are asked one by one, with nothing beside them.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tasks import models
from tasks.engines import Engine, Refused, engine_of
from tasks.errors import ConfigError, RunError, is_network_fault
from tasks.faults import EngineDied, Faults
from tasks.sections import GeneratorConfig, ScorerConfig
from tasks.store import Store

_LOOK = 0.5  # seconds between two looks at whether the engine still moves


@dataclass
class _Batch:
    future: Future[list[Any]]
    answers: list[Any]
    open: int


class EngineLoop:
    def __init__(self, engine: Engine, faults: Faults | None = None, deadline: float = math.inf) -> None:
        """deadline: seconds that one step of the engine may take."""
        self.engine, self.faults, self.deadline = engine, faults, deadline
        self.requests = 0
        self._told = 0  # of the requests that were asked again
        self._again = 0  # requests that an engine died over before, or beside
        self.moved = time.monotonic()
        self.dead = ""  # why, once the engine is
        self._open: set[Future[list[Any]]] = set()  # what was handed in and is not answered
        self._turn = asyncio.Lock()  # of handing in, and of all that is asked alone
        self._inbox: queue.SimpleQueue[tuple[Sequence[Any], _Batch] | None] = queue.SimpleQueue()
        self._waiting: dict[int, tuple[_Batch, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def answers(self, requests: Sequence[Any]) -> list[Any]:
        """In the order of the requests; a Refused where the engine cannot take one, or dies over it.

        Raises EngineDied when it just did: then this process must end, and a fresh one be asked the same. Without
        faults only an engine that hangs has died; what it raises comes as it is.
        """
        if not self.faults or not requests:
            return await self._moving(self.submit(requests))
        notes = await asyncio.to_thread(self.faults.begin, _name(requests))
        died = len(notes) > 1
        async with self._turn:
            if died:
                self._again += len(requests)
                while self._open:
                    await asyncio.sleep(_LOOK)
                found = [await self._alone(request, self.faults) for request in requests]
            else:
                future = self.submit(requests)
        if not died:
            found = await self._moving(future)
        await asyncio.to_thread(self.faults.end, notes)
        return found

    async def _alone(self, request: Any, faults: Faults) -> Any:
        name = _name([request])
        notes = await asyncio.to_thread(faults.begin, name)
        if self.dead:  # over another request: the note would blame this one
            await asyncio.to_thread(faults.end, notes[-1:])
            raise EngineDied(self.dead)
        if reason := await asyncio.to_thread(faults.refused, name, len(notes) - 1):
            return Refused(reason)
        try:
            [answer] = await self._moving(self.submit([request]))
        except EngineDied as error:
            await asyncio.to_thread(faults.refuse, name, str(error))
            raise
        await asyncio.to_thread(faults.end, notes)
        return answer

    async def _moving(self, future: Future[list[Any]]) -> list[Any]:
        """The answers, as long as the engine moves."""
        answers = asyncio.wrap_future(future)
        while not (await asyncio.wait([answers], timeout=_LOOK))[0]:
            if time.monotonic() - self.moved > self.deadline:
                self.dead = f"no step within {self.deadline:g} s"
                raise EngineDied(self.dead)
        try:
            return await answers
        except Exception as error:
            if self.faults and _is_death(error):
                raise EngineDied(self.dead) from error
            raise

    def submit(self, requests: Sequence[Any]) -> Future[list[Any]]:
        """Answers in the order of the requests; a Refused where the engine cannot take one."""
        future: Future[list[Any]] = Future()
        if requests:
            self._open.add(future)
            future.add_done_callback(self._open.discard)
            self._inbox.put((requests, _Batch(future, [None] * len(requests), len(requests))))
        else:
            future.set_result([])
        return future

    def retries(self) -> int:
        """Requests that were asked again, since this was called last."""
        again = self._again + getattr(self.engine, "retries", 0)
        new, self._told = again - self._told, again
        return new

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while self._take_in():
                self.moved = time.monotonic()
                for key, answer in self.engine.step():
                    self._settle(key, answer)
        except BaseException as error:  # the thread must not die silently: whoever waits gets the error
            try:
                self.engine.close()
            except Exception:  # a GPU that failed once fails again, and that is not why
                traceback.print_exc()
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
            self.moved = time.monotonic()
            self._add(*item)
            wait = False

    def _add(self, requests: Sequence[Any], batch: _Batch) -> None:
        for index, request in enumerate(requests):
            self.moved = time.monotonic()
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
        if _is_death(error):
            self.dead = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        batches = {id(batch): batch for batch, _ in self._waiting.values()}
        self._waiting.clear()
        for batch in batches.values():
            batch.future.set_exception(error)
        while True:  # later submissions would wait for ever
            item = self._inbox.get()
            if item is None:
                return
            item[1].future.set_exception(error)


def started(config: GeneratorConfig | ScorerConfig, store: Store, run: str) -> EngineLoop:
    """A fresh engine, kept busy. RunError when processes end at its start, or one is at it for too long."""
    faults = Faults(store, run)
    with faults.attempt("start", config.start_deadline):
        engine = engine_of(config, models.local(config.model, store))
    return EngineLoop(engine, faults, config.deadline)


def _is_death(error: BaseException) -> bool:
    """Of the engine; else the configuration, the run or the network is at fault."""
    return not isinstance(error, ConfigError | RunError) and not is_network_fault(error)


def _name(requests: Sequence[Any]) -> str:
    """Of what is asked: the same in every process."""
    return hashlib.sha256("\x00".join(map(repr, requests)).encode("utf-8", "surrogatepass")).hexdigest()[:32]
