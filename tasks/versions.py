"""Published versions: how they are made, found, listed and verified. Subsets and trained policies are alike here.

A version is a folder <kind>/<name>/<version>/. Its manifest.json is written last and has two parts: `content`, which
holds the sha256 of every other file, the counts and the lineage, and whose digest is the version's name; and around it
what may differ between two makings of the same thing (time, software). `latest.json` beside the versions names one of
them, and `builds/<inputs>.json` says which version a given set of inputs gave, so that a rerun finds it at once.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError, RunError
from tasks.records import Counts, Version
from tasks.store import Store, inside, sealed, to_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")  # of a control: its subset's, and what it is
_VERSION = re.compile(r"[0-9a-f]{0,64}")
_SOFTWARE = ("prefsieve", "pyarrow", "torch", "transformers", "trl", "ray", "prefect")


def installed(package: str) -> str | None:
    """A package's version, None where it is not installed: not every machine trains."""
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


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
        "software": {
            "python": platform.python_version(),
            **{package: found for package in _SOFTWARE if (found := installed(package))},
        },
        "content": content,
    }
    store.create_json(f"{version.place}/manifest.json", manifest)
    return version


def find_build(store: Store, kind: str, name: str, inputs: str, claim: bool = True) -> Version | None:
    """The version that these inputs gave before, if any; with `claim` it becomes the latest again."""
    path = _build(kind, name, inputs)
    if not store.exists(path):
        return None
    known = store.read_object(path, "version")["version"]
    if not store.exists(f"{kind}/{name}/{known}/manifest.json"):
        return None  # somebody removed it
    version = find_version(store, f"{name}@{known}", kind)
    if claim:
        _point_latest(store, version)
    return version


def remember_build(store: Store, version: Version, inputs: str) -> None:
    """Called when `find_build` found none: what a pointer of that name says was removed by somebody. Where another run
    was first meanwhile its version stays the one, so that who goes on from it finds what was made of it."""
    if find_build(store, version.kind, version.name, inputs):
        return
    store.replace(_build(version.kind, version.name, inputs), sealed({"version": version.version}))
    _point_latest(store, version)


def find_version(store: Store, wanted: str, kind: str = "subsets") -> Version:
    """NAME or NAME@VERSION (its first 8 characters will do) to a version that exists; ConfigError otherwise."""
    name, version = locate(store, wanted, kind)
    content = _read(store, f"{kind}/{name}/{version}/manifest.json")["content"]
    return Version(name, version, Counts(**content["counts"]), kind=kind)


def locate(store: Store, wanted: str, kind: str = "subsets") -> tuple[str, str]:
    """Name and version of a version that exists, whatever state its files are in; ConfigError otherwise."""
    name, _, version = wanted.partition("@")
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise ConfigError(f"no {_one(kind)} {wanted[:200]!r}: give its name, NAME or NAME@VERSION")
    version = version or _latest(store, kind, name)
    if not version:
        raise ConfigError(f"no {_one(kind)} {name!r} in {store.url}; there are: {_known(store, kind)}")
    there = [found for _, found in _places(store, f"{kind}/{name}")]
    matches = [found for found in there if found.startswith(version)]
    if len(matches) != 1:
        problem = "is ambiguous" if matches else "does not exist"
        raise ConfigError(f"{_one(kind)} {name}@{version} {problem}; there are: {', '.join(there) or 'none'}")
    return name, matches[0]


def read_manifest(store: Store, version: Version) -> dict[str, Any]:
    return _read(store, f"{version.place}/manifest.json")


def list_versions(store: Store, kind: str = "subsets") -> list[dict[str, Any]]:
    """The manifest of each published version, with `latest`: whether it is the one its name points to."""
    manifests = []
    for name, version in _places(store, kind):
        manifest = _read(store, f"{kind}/{name}/{version}/manifest.json")
        manifests.append({**manifest, "latest": _latest(store, kind, name) == version})
    return manifests


def damage(store: Store, version: Version, below: str = "") -> list[str]:
    """Recompute every digest (of files below a folder); what is wrong, in words. Empty: all is as published."""
    try:
        manifest = _intact(store.read(f"{version.place}/manifest.json"), version.name, version.version)
    except ValueError as error:
        return [f"manifest.json: {error}"]
    files = manifest["content"]["files"]
    listed = {file["path"]: file["sha256"] for file in files if file["path"].startswith(below)}
    there = {path.removeprefix(f"{version.place}/") for path in store.list(version.place)}
    problems = []
    for path, sha256 in listed.items():
        if path not in there:
            problems.append(f"{path}: missing")
        elif store.sha256(f"{version.place}/{path}") != sha256:
            problems.append(f"{path}: sha256 differs from the manifest's")
    strange = sorted(path for path in there - {*listed, "manifest.json"} if path.startswith(below))
    return problems + [f"{path}: not in the manifest" for path in strange]


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


def _read(store: Store, path: str) -> dict[str, Any]:
    """The manifest at <kind>/<name>/<version>/manifest.json; RunError when it is not as it was written."""
    _, name, version, _ = path.split("/")
    try:
        return _intact(store.read(path), name, version)
    except ValueError as error:
        raise RunError(f"{path} in {store.url} is damaged; remove that folder and run again ({error})") from error


def _intact(raw: bytes, name: str, version: str) -> dict[str, Any]:
    """A version's manifest, from the file's bytes; ValueError says what is wrong with it."""
    try:
        manifest = {key: value for key, value in json.loads(raw).items() if key != "sha256"}
        unchanged = sealed(manifest) == raw
        content = manifest["content"]
        named = content_version(content) == version == manifest["version"] and content.get("name", name) == name
        Counts(**content["counts"])
        astray = [file["path"] for file in content["files"] if not inside(file["path"]) or not file["sha256"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RunError):
        raise ValueError("cannot be read") from None
    if not unchanged or not named:
        raise ValueError("was changed: its digest or its content's name differs")
    if astray:
        raise ValueError(f"the file {str(astray[0])[:200]!r} leads out of the version's folder")
    return manifest


def _latest(store: Store, kind: str, name: str) -> str:
    """The version that a name points to; empty when there is none."""
    pointer = f"{kind}/{name}/latest.json"
    if not store.exists(pointer):
        return ""
    try:
        return str(store.read_object(pointer, "version")["version"])
    except RunError as error:
        raise RunError(f"{pointer} in {store.url} is damaged; run again to write it anew") from error


def _places(store: Store, below: str) -> Iterator[tuple[str, str]]:
    for path in store.list(below):
        parts = path.split("/")
        if len(parts) == 4 and parts[3] == "manifest.json":
            yield parts[1], parts[2]


def _point_latest(store: Store, version: Version) -> None:
    pointer, value = f"{version.kind}/{version.name}/latest.json", sealed({"version": version.version})
    if not store.exists(pointer) or store.read(pointer) != value:
        store.replace(pointer, value)


def _build(kind: str, name: str, inputs: str) -> str:
    return f"{kind}/{name}/builds/{inputs}.json"


def _known(store: Store, kind: str) -> str:
    return ", ".join(sorted({path.split("/")[1] for path in store.list(kind)})) or "none yet"


def _one(kind: str) -> str:
    return {"subsets": "subset", "policies": "policy"}[kind]


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
