"""What lies on the shelf: listing, showing and verifying published subsets."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import imports
from tasks.card import selection_words
from tasks.config import CurateConfig
from tasks.progress import Progress
from tasks.records import Counts, Version
from tasks.sections import ImportConfig
from tasks.store import Store
from tasks.versions import damage, find_version, list_versions, locate, read_manifest


def list_subsets(store: Store) -> dict[str, Any]:
    """Every published subset, the newest last under each name."""
    rows = [
        {
            "name": manifest["content"]["name"],
            "version": manifest["version"],
            "latest": manifest["latest"],
            "pairs": manifest["content"]["summary"]["rows"],
            "selection": selection_words(manifest["content"]),
            "pvar": manifest["content"]["summary"]["mean_pvar"],
            "margin": manifest["content"]["summary"]["mean_margin"],
            "created": manifest["created"],
        }
        for manifest in list_versions(store)
    ]
    return {"store": store.url, "subsets": sorted(rows, key=lambda row: (row["name"], row["created"]))}


def show_subset(store: Store, wanted: str, examples: int = 3) -> dict[str, Any]:
    """One subset's manifest and the first rows of its first file."""
    version = find_version(store, wanted)
    manifest = read_manifest(store, version)
    files = [file["path"] for file in manifest["content"]["files"] if file["path"].endswith(".parquet")]
    rows = itertools.islice(_rows(store, f"{version.place}/{files[0]}"), examples)
    return {
        "name": version.name,
        "version": version.version,
        "place": store.full(version.place),
        "manifest": manifest,
        "examples": list(rows),
    }


def import_source(config: CurateConfig) -> dict[str, Any]:
    """Import what the configuration names; what is in the store then."""
    assert config.import_
    store = Store(config.store_url)
    store.check()
    rewards = imports.import_(config.import_, store, _tell)
    completions = rewards.completions
    return {
        "store": store.url,
        "source": config.import_.source,
        "prompts": completions.prompts.counts.out,
        "completions": asdict(completions.counts),
        "ratings": {"names": list(rewards.scorers), **asdict(rewards.counts)},
        "generators": list(completions.authors),
        "reused": completions.work.shards_made == 0,
    }


def preview_source(config: ImportConfig) -> dict[str, Any]:
    """The first prompts as they would be imported."""
    shown = imports.preview(config)
    for prompt in shown["prompts"]:
        del prompt["prompt_id"]
        prompt["fields"] = json.loads(prompt["fields"])
    return shown


def _tell(progress: Progress) -> None:
    if progress.done and sys.stderr.isatty():
        print(f"\r{progress.stage}: {progress}", end="", file=sys.stderr)


def verify_subset(store: Store, wanted: str) -> dict[str, Any]:
    """Recompute every digest of a subset's files and of its manifest."""
    version = Version(*locate(store, wanted), Counts(0, 0))
    problems = damage(store, version)
    files = 0 if problems else len(read_manifest(store, version)["content"]["files"])
    return {"name": version.name, "version": version.version, "files": files, "problems": problems}


def _rows(store: Store, path: str) -> Any:
    with pq.ParquetFile(pa.BufferReader(store.read(path))) as file:
        for batch in file.iter_batches(batch_size=16):
            yield from batch.to_pylist()
