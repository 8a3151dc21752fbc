"""What machine a measurement was taken on, and measuring in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Processor, memory, GPUs and the versions of the packages that matter."""
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in packages},
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    found = Path("/proc/driver/nvidia/gpus")
    models = [(gpu / "information").read_text() for gpu in sorted(found.iterdir())] if found.is_dir() else []
    return [line.split(":", 1)[1].strip() for text in models for line in text.splitlines() if line.startswith("Model")]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measured(work: Callable[[Path, int], dict[str, Any]], folder: Path, size: int) -> dict[str, Any]:
    """`work(folder, size)` in a fresh process: what it found, and its peak memory, its own imports included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, folder, size))


def _measured(work: Callable[[Path, int], dict[str, Any]], folder: Path, size: int) -> dict[str, Any]:
    found = work(folder, size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {name: round(value, 3) for name, value in {**found, "peak_gib": peak}.items()}
