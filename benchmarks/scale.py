"""A million prompts through `prefsieve curate`: does the driver's memory stay flat, and what takes how long?

    .venv/bin/python benchmarks/scale.py [--prompts 10000 100000 1000000] [--shard-size 4096] [--out FILE]
    .venv/bin/python benchmarks/scale.py --requests 64 256

Writes a file of prompts of 40 to 400 characters from four sources, and runs the command line in a process of its own as
anybody would: local Ray, Prefect's own server, a local store, 4 samples of the fake generator, the fake reward model,
two workers each, the top 10 % by PVar and its random control. Of each size: seconds by stage (`rest` is what starts:
imports, Prefect, Ray), prompts per second, and peak resident memory of the driver's process alone and of the largest
actor, looked up while they run.

With --requests it counts the requests of such a run to a real S3 server instead, and those of the same run once more,
by place and kind, for as many shards as are named; and what each shard adds to them.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its `select` would stand for Python's own

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

from benchmarks.machine import machine
from benchmarks.publish import words
from tests.faults.proxy import proxy
from tests.services import ROOT, environment, seaweedfs

SOURCES = ("web", "math", "code", "chat")
STAGES = ("ingest", "generate", "score", "pair", "subset", "publish")
ACTOR = "ray::MapWorker"  # how the process of an engine calls itself
LOOK = 0.2  # seconds between two looks at the processes' memory
PLACES = ("prompts", "completions", "rewards", "pairs", "subsets", "faults", "fingerprints")  # folders of the store


def write_prompts(path: Path, number: int) -> None:
    """Different texts of words; a row per prompt."""
    rng = np.random.default_rng(0)
    corpus = words(rng, 8 << 20)
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, number, 10_000):
            rows = min(10_000, number - first)
            starts, lengths = rng.integers(0, len(corpus) - 400, rows), rng.integers(40, 400, rows)
            sources = rng.integers(0, len(SOURCES), rows)
            for row, (start, length, source) in enumerate(
                zip(starts.tolist(), lengths.tolist(), sources.tolist(), strict=True)
            ):
                text = f"{first + row}: {corpus[start : start + length]}"
                file.write(json.dumps({"prompt": text, "source": SOURCES[source]}) + "\n")


def configuration(source: Path, shard_size: int) -> dict[str, Any]:
    engine = {"engine": "fake", "workers": 2}
    top = {"name": "top", "steps": [{"rank": "pvar", "fraction": 0.1}], "controls": ["random"]}
    return {
        "ingest": {"source": str(source), "shard_size": shard_size},
        "generate": {"samples": 4, "generators": [{"name": "policy", **engine}]},
        "score": {"scorers": [{"name": "reward", **engine}]},
        "subset": [top],
    }


def curated(folder: Path, store: str, prompts: int, shard_size: int, **more: str) -> dict[str, Any]:
    """A run of the command line: its report, seconds, and peak memory in MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    source, config, log = folder / "prompts.jsonl", folder / "curate.yaml", folder / "log"
    write_prompts(source, prompts)
    config.write_text(yaml.safe_dump(configuration(source, shard_size)))
    command = [sys.executable, "-m", "flows.cli", "curate", str(config), "--store", store, "--json"]
    env = environment(PREFECT_HOME=str(folder / "prefect"), **more)
    started = time.perf_counter()
    with log.open("w") as said, (folder / "report.json").open("w") as out:
        run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=said)
        driver = actor = 0.0
        while run.poll() is None:
            driver = max(driver, peak(run.pid))
            actor = max([actor, *(peak(pid) for pid in below(run.pid) if name(pid).startswith(ACTOR))])
            time.sleep(LOOK)
    seconds = time.perf_counter() - started
    if run.returncode:
        raise RuntimeError(log.read_text()[-4000:])
    report = json.loads((folder / "report.json").read_text())
    return {"report": report, "seconds": seconds, "driver_mib": driver, "actor_mib": actor}


def peak(pid: int) -> float:
    """Highest resident memory of a process so far, in MiB; 0 once it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def below(pid: int) -> Iterator[int]:
    """All processes that a process started, and those that these did."""
    try:
        children = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return
    for child in map(int, children.split()):
        yield child
        yield from below(child)


def measured(folder: Path, prompts: int, shard_size: int) -> dict[str, Any]:
    """One row of the table."""
    run = curated(folder, str(folder / "store"), prompts, shard_size)
    seconds: Counter[str] = Counter()
    for row in run["report"]["stages"]:
        seconds[row["stage"].split()[0]] += row["seconds"]
    stored = [file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file()]
    return {
        "prompts": prompts,
        "shards": -(-prompts // shard_size),
        "seconds": round(run["seconds"], 1),
        "prompts_per_second": round(prompts / run["seconds"], 1),
        "stage_seconds": {
            **{stage: round(seconds[stage], 1) for stage in STAGES},
            "rest": round(run["seconds"] - seconds.total(), 1),
        },
        "stage_prompts_per_second": {stage: round(prompts / max(seconds[stage], 0.01)) for stage in STAGES},
        "driver_mib": round(run["driver_mib"], 1),
        "largest_actor_mib": round(run["actor_mib"], 1),
        "store_files": len(stored),
        "store_mib": round(sum(stored) / 2**20, 1),
        "subsets": [[subset["name"], subset["version"], subset["pairs"]] for subset in run["report"]["subsets"]],
    }


def requested(folder: Path, shards: int, shard_size: int = 16, **more: str) -> dict[str, Any]:
    """Requests of a run with so many shards, of a few prompts each, to a real S3 server, by place and kind.

    more: for the run's environment.
    """
    found: dict[str, Any] = {"shards": shards}
    with seaweedfs(folder / "s3") as server, proxy(server.endpoint) as between:
        env = {**server.environment(), **more, "AWS_ENDPOINT_URL": between.url}
        for which in ("first", "again"):
            between.seen.clear()
            curated(folder / which, f"s3://{server.bucket}/store", shards * shard_size, shard_size, **env)
            by_kind = Counter(kind(method, path, server.bucket) for method, path in between.seen)
            found[which] = {"all": by_kind.total(), **dict(sorted(by_kind.items()))}
    return found


def kind(method: str, path: str, bucket: str) -> str:
    """The place that a request is about, and what it does there."""
    key, _, query = path.removeprefix(f"/{bucket}").partition("?")
    if "list-type" in query:
        listed = re.search(r"prefix=store(?:%2F|/)([a-z]*)", query)
        return f"{listed[1] if listed else ''} LIST".strip()
    place = key.removeprefix("/store/").split("/")[0]
    return f"{place if place in PLACES else 'other'} {method}"


def per_shard(runs: list[dict[str, Any]], which: str) -> dict[str, float]:
    """What a shard adds to a run's requests, by kind, from the smallest and the largest."""
    small, large = runs[0][which], runs[-1][which]
    shards = runs[-1]["shards"] - runs[0]["shards"]
    more = {kind: round((number - small.get(kind, 0)) / shards, 2) for kind, number in large.items()}
    return {kind: number for kind, number in more.items() if number}


def table(runs: list[dict[str, Any]]) -> str:
    heads = ["prompts", "shards", "s", "prompts/s", *STAGES, "rest", "driver MiB", "more", "actor MiB"]
    lines = [heads]
    for run in runs:
        seconds = run["stage_seconds"]
        lines.append(
            [
                *(f"{run['prompts']:,}", f"{run['shards']:,}", f"{run['seconds']:.0f}"),
                f"{run['prompts_per_second']:,.0f}",
                *(f"{seconds[stage]:.1f}" for stage in (*STAGES, "rest")),
                *(f"{run['driver_mib']:.0f}", f"{run['driver_mib'] - runs[0]['driver_mib']:+.0f}"),
                f"{run['largest_actor_mib']:.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard-size", type=int, default=4096)
    parser.add_argument("--requests", type=int, nargs="+", default=[], help="numbers of shards, rising")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the stores, about 2 GB")
    parser.add_argument("--out", type=Path, default=None, help="JSON; what it holds of the other kind stays")
    arguments = parser.parse_args()
    runs = []
    for size in arguments.requests or arguments.prompts:
        folder = Path(tempfile.mkdtemp(prefix="prefsieve-scale-", dir=arguments.folder))
        try:
            run = requested(folder, size) if arguments.requests else measured(folder, size, arguments.shard_size)
        finally:
            shutil.rmtree(folder)
        runs.append(run)
        print(json.dumps(run), file=sys.stderr)
    if arguments.requests:
        added = {which: per_shard(runs, which) for which in ("first", "again")}
        result: dict[str, Any] = {"requests": {"runs": runs, "per_shard": added}}
    else:
        print(table(runs), file=sys.stderr)
        about = machine("numpy", "pyarrow", "ray", "prefect")
        result = {f"shard_size {arguments.shard_size}": {"runs": runs, "machine": about}}
    kept = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
    print(json.dumps({**kept, **result}, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({**kept, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
