"""A judge behind an OpenAI-compatible endpoint.

Requests run in an asyncio loop on a thread of their own, a bounded number at once; `step` hands out what is finished.
What an endpoint answers decides how it goes on:

    429, 408, 409, 425, 5xx, time-out, lost connection, no chat completion
                        tried again `retries` times, after Retry-After or a growing pause
    401, 402, 403, 404  ConfigError: the key, the model or the address is wrong
    other 4xx           refused: the request itself is at fault, for example by its length

When the tries are used up, a request has no answer if others were answered meanwhile; else the endpoint is down, and
Unreachable ends the work of this engine. So do lost connections and 429 in any case: they say nothing about a request.
The key is read from the environment, and cut out of everything that is said. What the library raises holds it still, so
that it never is the cause of an error: logs show causes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import threading
import time
from email.utils import parsedate_to_datetime
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, Omit, OpenAI
from pydantic import SecretStr

from tasks.engines import ChatRequest, Refused, Reply
from tasks.errors import ConfigError, Unreachable
from tasks.sections import ScorerConfig

_LATER = {408, 409, 425, 429}
_MISTAKES = {
    401: "the endpoint wants a key, or refuses this one; set judge.api_key_env to the variable that holds it",
    402: "the endpoint wants to be paid; see to the account that the key in judge.api_key_env belongs to",
    403: "the endpoint refuses this key for this model; check judge.api_key_env and model",
    404: "the endpoint does not serve this model, or has no /chat/completions; check model and judge.base_url",
}
_LONGEST_PAUSE = 600.0  # seconds, whatever Retry-After says


class OpenAIJudge:
    def __init__(self, config: ScorerConfig) -> None:
        self.config = config
        self.key = api_key(config)
        self.client = AsyncOpenAI(**_connection(config, self.key), timeout=None)
        self.slots = asyncio.Semaphore(config.judge.concurrency)
        self.answered = 0
        self.retries = 0
        self.done: queue.SimpleQueue[tuple[int, Reply | Refused | BaseException]] = queue.SimpleQueue()
        self.running: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="judge", daemon=True)
        self.thread.start()

    def add(self, key: int, request: ChatRequest) -> None:
        self.loop.call_soon_threadsafe(self._start, key, request)

    def step(self) -> list[tuple[int, Reply | Refused]]:
        ready: list[tuple[int, Reply | Refused]] = []
        with contextlib.suppress(queue.Empty):
            # Waiting long would keep the next shard's requests out.
            key, answer = self.done.get(timeout=0.05)
            while True:
                if isinstance(answer, BaseException):
                    raise answer
                ready.append((key, answer))
                key, answer = self.done.get_nowait()
        return ready

    def close(self) -> None:
        if not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(timeout=10)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(timeout=10)
            self.loop.close()

    async def _end(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)
        await self.client.close()

    def _start(self, key: int, request: ChatRequest) -> None:
        task = self.loop.create_task(self._settle(key, request))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _settle(self, key: int, request: ChatRequest) -> None:
        try:
            async with self.slots:
                self.done.put((key, await self._ask(request)))
        except Exception as error:  # of a task: `step` raises it
            self.done.put((key, error))

    async def _ask(self, request: ChatRequest) -> Reply | Refused:
        tries = self.config.judge.retries + 1
        answered = self.answered
        for number in range(tries):
            if number == 1:
                answered = self.answered  # what is answered from here on shows that the endpoint is there
            try:
                reply = await self._try(request)
            except (TimeoutError, APIError, ValueError) as error:  # ValueError: of what should have been JSON
                fault = error
            else:
                self.answered += 1
                return reply
            status = getattr(fault, "status_code", 0)
            if 400 <= status < 500 and status not in _LATER:
                if status in _MISTAKES:
                    raise ConfigError(f"scorer {self.config.name!r}: {status}: {_MISTAKES[status]}")
                self.answered += 1
                return Refused(f"refused: {self._said(fault)}")
            if number + 1 < tries:
                self.retries += 1
                await asyncio.sleep(_pause(fault, number))
        why = f"{self._said(fault)}, {tries} times"
        if status != 429 and not isinstance(fault, APIConnectionError) and self.answered > answered:
            return Refused(f"no answer: {why}")
        hint = "raise judge.retries or lower judge.concurrency" if status == 429 else "see to the endpoint"
        raise Unreachable(
            f"scorer {self.config.name!r}: judge.base_url {self.config.judge.base_url}: {why}; {hint} and run again"
        )

    async def _try(self, request: ChatRequest) -> Reply:
        judge = self.config.judge
        question: dict[str, Any] = {
            "model": self.config.model,
            "messages": request.messages,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema, "strict": True},
            },
            "seed": request.seed,
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
            "extra_body": self.config.engine_args or None,
            "extra_headers": _headers(self.key),
        }
        async with asyncio.timeout(judge.timeout):
            completion: Any = await self.client.chat.completions.create(**question)
        try:
            message = completion.choices[0].message
            text = message.content or getattr(message, "refusal", None) or ""
        except (AttributeError, LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError("the answer is no chat completion; is this the right base_url?")
        return Reply(text, _tokens(completion, "prompt_tokens"), _tokens(completion, "completion_tokens"))

    def _said(self, fault: Exception) -> str:
        if isinstance(fault, TimeoutError):
            return f"timed out after {self.config.judge.timeout:g} s"
        return said(fault, self.key)


def _tokens(completion: Any, which: str) -> int:
    """0 where an endpoint does not say."""
    number = getattr(getattr(completion, "usage", None), which, 0)
    return number if isinstance(number, int) else 0


def api_key(config: ScorerConfig) -> SecretStr:
    """The judge's key, or an empty one where none is asked for. ConfigError when its variable is not set here."""
    name = config.judge.api_key_env
    if name and not os.environ.get(name):
        raise ConfigError(
            f"scorer {config.name!r}: judge.api_key_env: {name} is not set here; set it before Ray starts, and in the "
            "environment of every node of a cluster"
        )
    return SecretStr(os.environ[name].strip() if name else "")


def served(config: ScorerConfig) -> str:
    """What the endpoint says about the model, in words. ConfigError or Unreachable when it cannot serve it."""
    where = f"scorer {config.name!r}: judge.base_url {config.judge.base_url}"
    key = api_key(config)
    with OpenAI(**_connection(config, key), timeout=min(config.judge.timeout, 20)) as client:
        try:
            found: Any = client.models.list(extra_headers=_headers(key))
            names = sorted(model.id for model in getattr(found, "data", None) or [])
        except APIStatusError as error:
            if error.status_code in (401, 403):
                raise ConfigError(f"{where}: {error.status_code}: {_MISTAKES[error.status_code]}") from None
            if error.status_code >= 500 or error.status_code in _LATER:
                raise Unreachable(f"{where}: {said(error, key)}; see to the endpoint") from None
            names = []
        except APIConnectionError as error:
            raise Unreachable(
                f"{where}: cannot be reached: {said(error, key)}; check it, or start the server"
            ) from None
        except (APIError, ValueError):  # it answers in a way of its own
            names = []
    if not names:
        return "reached; it does not list its models"
    if config.model not in names:
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ConfigError(f"{where}: does not serve model {config.model!r} but {some}; check `model`")
    return f"serves {config.model}"


def said(fault: Exception, key: SecretStr) -> str:
    """An endpoint's or the connection's words in one short line, without the key."""
    body = getattr(fault, "body", None)
    words = body.get("message") if isinstance(body, dict) else None
    status = getattr(fault, "status_code", "")
    reason = words or str(fault.__cause__ or "") or str(fault)
    line = " ".join(f"{status} {reason}".split())
    return (line.replace(key.get_secret_value(), "***") if key else line)[:300]


def _connection(config: ScorerConfig, key: SecretStr) -> dict[str, Any]:
    """Without `api_key` the library would take OPENAI_API_KEY, and send it to whatever endpoint this is."""
    return {"base_url": config.judge.base_url, "api_key": key.get_secret_value() or "none", "max_retries": 0}


def _headers(key: SecretStr) -> dict[str, Any]:
    return {} if key else {"Authorization": Omit()}


def _pause(fault: Exception, number: int) -> float:
    """Seconds to wait after the number-th try."""
    headers = getattr(getattr(fault, "response", None), "headers", {})
    asked = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, TypeError):
        seconds = float(asked) if asked.replace(".", "", 1).isdigit() else _until(asked)
        return min(max(seconds, 0.0), _LONGEST_PAUSE)
    return min(0.5 * 2**number, 30.0) * random.uniform(0.5, 1.0)


def _until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
