"""Published versions: how they are made, found, listed and verified. Subsets and trained policies are alike here.

A version is a folder <kind>/<name>/<version>/. Its manifest.json is written last and has two parts: `content`, which
holds the sha256 of every other file, the counts and the lineage, and whose digest is the version's name; and around it
what may differ between two makings of the same thing (time, software). `latest.json` beside the versions names one of
them, and `builds/<inputs>.json` says which version a given set of inputs gave, so that a rerun finds it at once.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError
from tasks.records import Counts, Version
from tasks.store import Store, to_json

_SOFTWARE = ("prefsieve", "pyarrow", "torch", "transformers", "trl", "ray", "prefect")


def publish_folder(store: Store, kind: str, name: str, folder: Path, content: dict[str, Any]) -> Version:
    """Make a finished local folder a version. `content` needs `counts`; the digests of the files are added."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    listed = [
        {"path": file.relative_to(folder).as_posix(), "bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    ]
    content = {**content, "files": listed}
    version = Version(name, content_version(content), Counts(**content["counts"]), kind=kind)
    for file in files:
        store.create_file(f"{version.place}/{file.relative_to(folder).as_posix()}", file)
    manifest = {
        "version": version.version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": {"python": platform.python_version(), **{package: installed(package) for package in _SOFTWARE}},
        "content": content,
    }
    store.create_json(f"{version.place}/manifest.json", manifest)
    return version


def find_build(store: Store, kind: str, name: str, inputs: str) -> Version | None:
    """The version that these inputs gave before, if any; it becomes the latest again."""
    path = _build(kind, name, inputs)
    if not store.exists(path):
        return None
    version = find_version(store, f"{name}@{store.read_json(path)['version']}", kind)
    _point_latest(store, version)
    return version


def remember_build(store: Store, version: Version, inputs: str) -> None:
    store.create_json(_build(version.kind, version.name, inputs), {"version": version.version})
    _point_latest(store, version)


def find_version(store: Store, wanted: str, kind: str = "subsets") -> Version:
    """NAME or NAME@VERSION (its first 8 characters will do) to a version that exists; ConfigError otherwise."""
    name, _, version = wanted.partition("@")
    if not version:
        pointer = f"{kind}/{name}/latest.json"
        if not store.exists(pointer):
            raise ConfigError(f"no {_one(kind)} {name!r} in {store.url}; there are: {_known(store, kind)}")
        version = store.read_json(pointer)["version"]
    there = [found for _, found in _places(store, f"{kind}/{name}")]
    matches = [found for found in there if found.startswith(version)]
    if len(matches) != 1:
        problem = "is ambiguous" if matches else "does not exist"
        raise ConfigError(f"{_one(kind)} {name}@{version} {problem}; there are: {', '.join(there) or 'none'}")
    content = store.read_json(f"{kind}/{name}/{matches[0]}/manifest.json")["content"]
    return Version(name, matches[0], Counts(**content["counts"]), kind=kind)


def read_manifest(store: Store, version: Version) -> dict[str, Any]:
    return store.read_json(f"{version.place}/manifest.json")


def list_versions(store: Store, kind: str = "subsets") -> list[dict[str, Any]]:
    """The manifest of each published version, with `latest`: whether it is the one its name points to."""
    manifests = []
    for name, version in _places(store, kind):
        latest = store.read_json(f"{kind}/{name}/latest.json")["version"] == version
        manifests.append({**store.read_json(f"{kind}/{name}/{version}/manifest.json"), "latest": latest})
    return manifests


def damage(store: Store, version: Version, below: str = "") -> list[str]:
    """Recompute every digest (of files below a folder); what is wrong, in words. Empty: all is as published."""
    try:
        content = read_manifest(store, version)["content"]
    except (ValueError, KeyError):
        return ["manifest.json: cannot be read"]
    problems = []
    if content_version(content) != version.version:
        problems.append("manifest.json: its content does not give this version's name")
    for file in content["files"]:
        path = f"{version.place}/{file['path']}"
        if not file["path"].startswith(below):
            continue
        if not store.exists(path):
            problems.append(f"{file['path']}: missing")
        elif store.sha256(path) != file["sha256"]:
            problems.append(f"{file['path']}: sha256 differs from the manifest's")
    return problems


def fetch_version(store: Store, version: Version, below: str, target: Path) -> Path:
    """Copy a version's files below a folder to a local folder, after checking their digests."""
    problems = damage(store, version, below)
    if problems:
        raise ConfigError(f"{version} is damaged: {'; '.join(problems)}. Remove it and run again to make it anew.")
    for file in read_manifest(store, version)["content"]["files"]:
        if file["path"].startswith(below):
            store.fetch(f"{version.place}/{file['path']}", target / file["path"].removeprefix(below))
    return target


def content_version(content: dict[str, Any]) -> str:
    """The version's name: a digest of the manifest's `content`."""
    return hashlib.sha256(to_json(content)).hexdigest()[:16]


def _places(store: Store, below: str) -> Iterator[tuple[str, str]]:
    for path in store.list(below):
        parts = path.split("/")
        if len(parts) == 4 and parts[3] == "manifest.json":
            yield parts[1], parts[2]


def _point_latest(store: Store, version: Version) -> None:
    pointer, value = f"{version.kind}/{version.name}/latest.json", {"version": version.version}
    if not store.exists(pointer) or store.read_json(pointer) != value:
        store.replace(pointer, to_json(value))


def _build(kind: str, name: str, inputs: str) -> str:
    return f"{kind}/{name}/builds/{inputs}.json"


def _known(store: Store, kind: str) -> str:
    return ", ".join(sorted({path.split("/")[1] for path in store.list(kind)})) or "none yet"


def _one(kind: str) -> str:
    return {"subsets": "subset", "policies": "policy"}[kind]


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
