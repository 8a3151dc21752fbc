"""How far a stage is. Stages report; whoever runs them decides where that is shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    stage: str
    done: int
    total: int  # 0: not known
    unit: str
    rate: float  # units per second since the first one was there: without the start of engines
    reused: int = 0  # of done: found in the store, took no time
    note: str = ""  # further numbers, in words

    @property
    def finished(self) -> bool:
        return self.done >= self.total > 0

    @property
    def eta(self) -> float | None:
        """Seconds left; None while there is no rate to go by."""
        return (self.total - self.done) / self.rate if self.total and self.rate else None

    def __str__(self) -> str:
        parts = [f"{self.done:,}" + (f"/{self.total:,}" if self.total else "") + f" {self.unit}"]
        if self.rate:
            parts.append(f"{self.rate:,.1f} {self.unit}/s")
        if self.eta:
            parts.append(f"{duration(self.eta)} left")
        if self.reused:
            parts.append(f"{self.reused:,} reused")
        return ", ".join([*parts, *([self.note] if self.note else [])])


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report to nobody."""


class Meter:
    """Counts a stage's units and reports each change."""

    def __init__(self, report: Report, stage: str, total: int, unit: str, reused: int = 0) -> None:
        self.report, self.stage, self.total, self.unit, self.reused = report, stage, total, unit, reused
        self.done = reused
        self.started = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first units were there, and how many
        self.add(0)

    @property
    def seconds(self) -> float:
        """Since the stage started."""
        return time.monotonic() - self.started

    def add(self, units: int, note: str = "") -> None:
        self.done += units
        if units and self._first is None:
            self._first = (time.monotonic(), self.done)
        self.report(Progress(self.stage, self.done, self.total, self.unit, self._rate(), self.reused, note))

    def _rate(self) -> float:
        if self._first is None:
            return 0.0
        since, done = self._first
        elapsed = time.monotonic() - since
        if self.done > done and elapsed > 1:
            return (self.done - done) / elapsed
        if self.total and self.done < self.total:
            return 0.0  # the first units came with the start of the engine: that is no rate to go by
        return (self.done - self.reused) / max(self.seconds, 1e-3)


def duration(seconds: float) -> str:
    """3 s, 4 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
