"""A store to try things out on: it reads what is there, and what is written goes to a folder that is thrown away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from tasks.store import Store


class Drafts(Store):
    """Looks like `store`, with what was written to it in `folder` on top."""

    def __init__(self, store: Store, folder: Path) -> None:
        super().__init__(store.url)
        self.store, self.drafts = store, Store(folder)

    def _holder(self, path: str) -> Store:
        return self.drafts if self.drafts.exists(path) else self.store

    def read(self, path: str) -> bytes:
        return self._holder(path).read(path)

    def exists(self, path: str) -> bool:
        return self._holder(path).exists(path)

    def list(self, prefix: str) -> Sequence[str]:
        return sorted({*self.store.list(prefix), *self.drafts.list(prefix)})

    @contextmanager
    def room(self) -> Iterator[Path]:
        with self.drafts.room() as folder:
            yield folder

    def fetch(self, path: str, target: Path) -> Path:
        return self._holder(path).fetch(path, target)

    def at_hand(self, path: str, room: Path) -> Path:
        return self._holder(path).at_hand(path, room)

    def read_table(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        return self._holder(path).read_table(path, columns)

    def columns(self, path: str) -> Sequence[str]:
        return self._holder(path).columns(path)

    def create(self, path: str, data: bytes) -> bool:
        return not self.exists(path) and self.drafts.create(path, data)

    def create_file(self, path: str, source: Path) -> bool:
        return not self.exists(path) and self.drafts.create_file(path, source)

    def replace(self, path: str, data: bytes) -> None:
        self.drafts.replace(path, data)

    def remove_file(self, path: str) -> None:
        self.drafts.remove_file(path)

    def remove(self, path: str) -> None:
        self.drafts.remove(path)
