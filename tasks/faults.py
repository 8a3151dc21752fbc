"""Requests that an engine dies over: found while the run goes on, and refused; the others are answered as ever.

An engine that raises, hangs or crashes takes its process along, and Ray gives what that process had in hand to a fresh
one. Who begins a batch leaves a note in the store and takes it away at the end; a note that is there already tells of a
process that died over the batch. Its requests are then asked one by one, each with notes of its own, and what an engine
raised or hung at alone is refused, as is what two processes ended at. Notes belong to a run: the next one tries again.

    faults/<run>/<batch or request>.<number>.json
    faults/<run>/refused.<request>.json

A run's folder holds the notes of what is in hand just now, so a look into it is one small request.
"""

from __future__ import annotations

import uuid

from tasks.errors import RunError
from tasks.store import Store

_DEATHS = 2  # of processes over one request, where nobody saw why: a machine may be lost once without its fault
_MOST = 5  # requests of a run that engines die over; more, and it is not the requests


class EngineDied(RuntimeError):
    """An engine raised or hung: its process has to end."""


class Faults:
    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run

    def begin(self, name: str) -> list[str]:
        """Leave a note. Returns all that are there: one for each process that died over it, and this one."""
        died = self._notes(name)
        note = f"faults/{self.run}/{name}.{uuid.uuid4().hex}.json"
        self.store.create_json(note, {})
        return [*died, note]

    def end(self, notes: list[str]) -> None:
        """Take notes away."""
        for note in notes:
            self.store.remove_file(note)

    def refused(self, request: str, deaths: int) -> str:
        """Why a request is not asked again; empty when it is. deaths: of processes over it."""
        note = self._refused(request)
        if self.store.exists(note):
            return str(self.store.read_json(note)["reason"])
        return f"engine died: {deaths} processes ended at it" if deaths >= _DEATHS else ""

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
