"""Requests that an engine dies over: found while the run goes on, and refused; the others are answered as ever.

An engine that raises, hangs or crashes takes its process along, and Ray gives what that process had in hand to a fresh
one of the same actor. Who begins a batch leaves a note in the store and takes it away at the end; a note of an earlier
process tells that it died over the batch. Its requests are then asked one by one, each with notes of its own, and what
an engine raised or hung at alone is refused, as is what two processes ended at. Notes belong to a run: the next one
tries again. The start of an engine has a note as well: Ray would start one process after the other.

    faults/<run>/<fingerprint>/<batch, request or start>.<actor>.<process>.<number>.json
    faults/<run>/<fingerprint>/refused.<request>.json

Other actors, and engines of another fingerprint, may be asked the same just then. A folder holds the notes of what is
in hand just now, so a look into it is one small request.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from tasks.errors import RunError
from tasks.store import Store

_DEATHS = 2  # of processes over one request, where nobody saw why: a machine may be lost once without its fault
_MOST = 5  # requests of a run that engines die over; more, and it is not the requests
_TAIL = 4096  # bytes of a log in which its last line is looked for
_LINE = 300  # characters of it
_RAYS_OWN = re.compile(r":[a-z_]+:")  # lines in a log by which Ray finds its way


class EngineDied(RuntimeError):
    """An engine raised or hung: its process has to end."""


class Faults:
    def __init__(self, store: Store, run: str) -> None:
        """run: with the fingerprint of what is asked, run/fingerprint."""
        self.store, self.run = store, run
        self.actor, self.process = _actor(), uuid.uuid4().hex[:16]

    def begin(self, name: str, about: Mapping[str, str] | None = None) -> list[str]:
        """Leave a note. Returns this actor's: one for each of its processes that died over it, and this one."""
        mine = f"{name}.{self.actor}"
        died = [note for note in self._notes(mine) if f"/{mine}.{self.process}." not in note]
        note = f"faults/{self.run}/{mine}.{self.process}.{uuid.uuid4().hex}.json"
        self.store.create_json(note, dict(about or {}))
        return [*died, note]

    def end(self, notes: list[str]) -> None:
        """Take notes away."""
        for note in notes:
            self.store.remove_file(note)

    @contextlib.contextmanager
    def attempt(self, what: str, deadline: float = threading.TIMEOUT_MAX) -> Iterator[None]:
        """Around what a process in an actor may end at as a whole: the start of its engine, or a trial of it.

        deadline: seconds it may take; then the process ends. Raises RunError when that happened before to this actor,
        or two of its processes ended here without a word.
        """
        notes = self.begin(what, {"log": log_of_this_process()})
        late = threading.Timer(deadline, self._late, (what, f"it was not ready after {deadline:g} s"))
        late.daemon = True
        try:
            if len(notes) > _DEATHS:
                raise RunError(self._why(notes[:-1]))
            late.start()
            yield
        finally:
            late.cancel()
            self.end(notes)

    def _late(self, name: str, reason: str) -> None:
        """What took too long would do so again: with this note it counts as two."""
        print(reason, file=sys.stderr, flush=True)
        try:
            self.begin(name, {"said": reason})
        finally:
            os._exit(1)

    def _why(self, notes: list[str]) -> str:
        about = [self.store.read_json(note) for note in notes]
        if said := [note["said"] for note in about if "said" in note]:
            return str(said[-1])
        line = _last_line(log := about[-1]["log"])
        told = f"the last line of {log} is {line!r}" if line else f"the log of the last: {log or 'not kept by Ray'}"
        return f"{len(notes)} processes ended at it; {told}"

    def refused(self, request: str, deaths: int) -> str:
        """Why a request is not asked again; empty when it is. deaths: of processes over it. Raises as `refuse` does."""
        note = self._refused(request)
        if deaths >= _DEATHS and not self.store.exists(note):
            self.refuse(request, f"{deaths} processes ended at it")
        return str(self.store.read_json(note)["reason"]) if self.store.exists(note) else ""

    def refuse(self, request: str, reason: str) -> None:
        """Raises RunError when engines die over too many."""
        self.store.create_json(self._refused(request), {"reason": f"engine died: {reason}"})
        if len(self._notes("refused")) > _MOST:
            raise RunError(f"an engine dies over one request after the other, the last time: {reason}")

    def _refused(self, request: str) -> str:
        return f"faults/{self.run}/refused.{request}.json"

    def _notes(self, name: str) -> list[str]:
        folder = f"faults/{self.run}"
        return [path for path in self.store.list(folder) if path.startswith(f"{folder}/{name}.")]


def log_of_this_process() -> str:
    """HOST:FILE, as Ray keeps what a process in an actor writes; empty where it keeps nothing."""
    with contextlib.suppress(OSError):
        file = os.readlink("/proc/self/fd/2")
        return f"{socket.gethostname()}:{file}" if file.endswith(".err") else ""
    return ""


def _last_line(log: str) -> str:
    """Empty when it is on another machine."""
    host, _, file = log.partition(":")
    if host != socket.gethostname():
        return ""
    with contextlib.suppress(OSError):
        lines = Path(file).read_bytes()[-_TAIL:].decode(errors="replace").split("\n")
        return next((line[:_LINE] for line in reversed(lines) if line.strip() and not _RAYS_OWN.match(line)), "")
    return ""


def _actor() -> str:
    """Which actor this process is; the one that takes its place when it dies is the same."""
    ray = sys.modules.get("ray")
    return (ray.get_runtime_context().get_actor_id() if ray and ray.is_initialized() else None) or "none"
