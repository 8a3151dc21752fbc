"""What lies on the shelf: listing, showing and verifying published subsets."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import imports
from tasks.card import selection_words
from tasks.config import CurateConfig
from tasks.errors import ConfigError, RunError
from tasks.explain import overlaps
from tasks.pair import id_bits
from tasks.progress import Progress
from tasks.records import Counts, Version
from tasks.sections import ImportConfig
from tasks.store import Store
from tasks.versions import damage, find_version, list_versions, locate, read_manifest


@contextlib.contextmanager
def manifests_of(store: Store) -> Iterator[None]:
    """RunError for what prefsieve did not write: a seal tells that a manifest was changed, not who made it."""
    try:
        yield
    except (ConfigError, UnicodeEncodeError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"{store.url} holds a manifest that prefsieve did not write: {type(error).__name__}: {str(error)[:200]}; "
            "`prefsieve verify` does not tell, since it is whole; remove that version"
        ) from error


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
    """One subset's manifest, what it shares with the others, and the first rows of its first file."""
    version = find_version(store, wanted)
    manifest = read_manifest(store, version)
    files = [file["path"] for file in manifest["content"]["files"] if file["path"].endswith(".parquet")]
    rows = itertools.islice(_rows(store, f"{version.place}/{files[0]}"), examples)
    return {
        "name": version.name,
        "version": version.version,
        "place": store.full(version.place),
        "manifest": manifest,
        "overlap": _overlap(store, version),
        "examples": list(rows),
    }


def _overlap(store: Store, version: Version) -> list[dict[str, Any]]:
    """How many prompts a subset shares with the latest version of each other name; that of a damaged one is unknown."""
    mine = _prompts(store, version)
    rows = []
    for name in sorted({path.split("/")[1] for path in store.list("subsets")} - {version.name}):
        try:
            other = find_version(store, name)
            rows += overlaps({str(version): mine, str(other): _prompts(store, other)})
        except (ConfigError, RunError, FileNotFoundError) as error:
            rows.append({"subset": str(version), "other": name, "shared": None, "of_smaller": None, "why": str(error)})
    return rows


def _prompts(store: Store, version: Version) -> NDArray[np.uint64]:
    """64 bits of each different prompt id."""
    files = [file["path"] for file in read_manifest(store, version)["content"]["files"]]
    columns = [
        id_bits(store.read_table(f"{version.place}/{file}", ["prompt_id"])["prompt_id"])
        for file in files
        if file.endswith(".parquet")
    ]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *columns]))


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
    with store.open_table(path) as file:
        for batch in file.iter_batches(batch_size=16):
            yield from batch.to_pylist()
