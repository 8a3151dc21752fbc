"""Costs: costs/<what>/<digest>.json, seconds measured when a thing was made. Never part of its version."""

from __future__ import annotations

from collections.abc import Iterable

from tasks.store import Store


def remember_cost(store: Store, what: str, digest: str, seconds: float) -> None:
    store.create_json(_place(what, digest), {"seconds": round(seconds, 2)})


def known_costs(store: Store, what: str, digests: Iterable[str]) -> dict[str, float]:
    """Seconds by digest, of those that were measured."""
    there = set(store.list(f"costs/{what}"))
    wanted = {digest: _place(what, digest) for digest in digests}
    return {digest: store.read_json(path)["seconds"] for digest, path in wanted.items() if path in there}


def _place(what: str, digest: str) -> str:
    return f"costs/{what}/{digest}.json"
