"""Ray: which cluster this process uses, and pools of actors that pull shards.

Ray Data drives the pools (scheduling, restarts, back-pressure). The items that travel are shard names, the actors read
and write the store themselves, and what comes back are counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import queue
import re
import signal
import sys
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import PolicyConfig
from tasks.errors import ConfigError, RunError, Unreachable, is_network_fault
from tasks.faults import EngineDied, log_of_this_process
from tasks.prometheus import PoolSeries
from tasks.records import Work
from tasks.sections import ModelConfig

# Shards in flight per actor: one decodes, the next waits inside the engine, a third is read or written.
IN_FLIGHT = 3

# What items report of the work that they were, as in Work.
COUNTED = (
    "requests",
    "samples",
    "tokens",
    "paid_tokens",
    "retries",
    "engine_starts",
    "engine_restarts",
    "gpu_seconds",
)

_LAST_WORDS = 1.0  # seconds for what else goes on in a process whose engine died

# What Ray reports of a process that ended, and of each call that was open there.
_DIED = re.compile(r"worker died.*Worker IP address: (?P<host>\S+).*Worker PID: (?P<pid>\d+)", re.DOTALL)
_RETRIED = re.compile(r"Task \S+ failed\. There are infinite retries remaining")

_SHOWN = 300  # characters of anything else that it reports

_blocks = 0  # of `disconnecting`, in each other
_executors: dict[str, list[Any]] = {}  # Ray Data's, of the runs of pools that go on

# Not the credentials: what stands in runtime_env can be read in Ray's metadata. Workers inherit those from the process
# that starts Ray here, and from their node's environment on a cluster.
_WORKER_ENVIRONMENT = ("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PREFSIEVE_STORE", "XDG_CACHE_HOME")


def connect(address: str = "local") -> Any:
    """Ray, started or joined on first use and kept until `disconnect`.

    `local` starts Ray on this machine, on loopback; `auto`, or HOST:PORT, joins a cluster, and takes the code along. A
    process that has Ray keeps it. Raises ConfigError when there is no cluster, or it refuses the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data makes the core log an error per pool
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray._private.worker

    if ray.is_initialized():
        return ray
    ray._private.worker.print_to_stdstream = _say  # type: ignore[assignment]
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {name: os.environ[name] for name in _WORKER_ENVIRONMENT if name in os.environ}},
    }
    if address == "local":
        # A laptop has fewer CPUs than a pipeline has actors; these are logical, threads are bounded elsewhere.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": max(4, os.cpu_count() or 1)}
    else:
        options["address"] = address
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a job has its code already
            options["runtime_env"] |= code()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _on_loopback() if address == "local" else contextlib.nullcontext():
            ray.init(**options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ConfigError(
            f"ray_address: no Ray cluster at {address!r}, or it wants a token; start one with `ray start --head`, use "
            "local, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread() and on_sigterm is not None:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray took it over; Prefect ends and cancels runs by it
    return ray


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """What Ray starts in here listens on loopback alone, as it always does on macOS; elsewhere on every interface."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _say(message: dict[str, Any], ignore_prefix: bool) -> None:
    """In place of Ray's own way to show what a cluster reports to a driver: pages of advice, on standard output."""
    for line in message["lines"]:
        if died := _DIED.search(line):
            words = f"process {died['pid']} on {died['host']} ended; what it had in hand goes to a fresh one"
        elif _RETRIED.match(line):
            continue
        else:
            words = f"ray: {line.splitlines()[0][:_SHOWN]}"
        print(words, file=sys.stderr, flush=True)


def code() -> dict[str, Any]:
    """What a runtime environment says of the code: a source tree's packages travel along.

    They are 0.8 MB, uploaded once per content and unpacked once per node: a tenth of a second when a cluster is joined.
    Empty for an installed prefsieve, which is expected on the cluster as well.
    """
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        return {}
    return {"py_modules": [str(root / "flows"), str(root / "tasks")], "excludes": ["__pycache__/"]}


@contextlib.contextmanager
def disconnecting() -> Iterator[None]:
    """Leave Ray after a block, if the block was what started or joined it. Of nested blocks, the outermost does."""
    global _blocks
    had = _has_ray()
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if _has_ray() and not had and not _blocks:
            sys.modules["ray"].shutdown()


def _has_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@dataclass(frozen=True)
class Pool:
    """Actors that hold one engine each, and the items they are to work through for a stage.

    `worker(*arguments, run)` is called in each of the actors; `worker.work(item) -> dict` is awaited there, IN_FLIGHT
    items at a time; `on_done` gets each item's answer, here, as it comes.
    """

    stage: str
    worker: type
    arguments: tuple[Any, ...]
    items: list[dict[str, Any]]
    config: ModelConfig
    on_done: Callable[[dict[str, Any]], None]


def run_pools(pools: Sequence[Pool], address: str = "local") -> Work:
    """Work through all pools, side by side as far as the cluster has room. Returns what the engines had to do."""
    if not pools:
        return Work()
    ray = connect(address)
    for pool in pools:
        check_room(ray, pool.config)
    answers: queue.SimpleQueue[tuple[Pool, Any]] = queue.SimpleQueue()
    run = uuid.uuid4().hex
    _executors[run] = []
    drivers = [
        threading.Thread(target=_drive, args=(ray, pool, _dataset(ray, pool, run), answers), name="pool", daemon=True)
        for pool in pools
    ]
    ready, last, running = float("inf"), 0.0, len(pools)
    spent: Counter[str] = Counter()
    series = {id(pool): PoolSeries(pool.stage, getattr(pool.config, "name", ""), len(pool.items)) for pool in pools}
    try:
        for driver in drivers:
            driver.start()
        while running:
            pool, answer = answers.get()
            if answer is None:
                running -= 1
            elif isinstance(answer, BaseException):
                raise answer
            elif answer["error"]:
                raise (Unreachable if answer["unreachable"] else RunError)(answer["error"])
            else:
                last = time.monotonic()  # here: clocks of machines differ, and may be set
                ready = min(ready, last - answer["since_ready"])
                counted = {key: answer.get(key, 0) for key in COUNTED}
                spent.update(counted)
                series[id(pool)].add(counted, answer.get("generator", ""))
                pool.on_done(answer)
    finally:
        _end(drivers, run)
    return Work(**spent, engine_seconds=last - ready)


def _end(drivers: list[threading.Thread], run: str) -> None:
    """Wait until nothing of a run goes on: what outlived an error would work beside the next try."""
    running = [driver for driver in drivers if driver.ident is not None]
    while running:
        for executor in _executors[run]:  # again and again, since one that is just starting takes no notice
            executor.shutdown(force=True)
        running[0].join(timeout=1)
        running = [driver for driver in running if driver.is_alive()]
    del _executors[run]


def _dataset(ray: Any, pool: Pool, run: str) -> Any:
    """A pool as Ray Data sees it; nothing runs before it is iterated over."""
    importlib.import_module("ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # max_concurrency has no named parameter in 2.60
        items = ray.data.from_items(pool.items, override_num_blocks=len(pool.items))
        items.context.custom_execution_callback_classes = [_remembering(run)]
        items.context.enable_progress_bars = False
        items.context.print_on_execution_start = False
        # A pool grows when all its actors are full; Ray Data's own threshold is above what IN_FLIGHT lets be reached.
        items.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        return items.map_batches(
            _Actor,
            fn_constructor_args=(pool.worker, (*pool.arguments, run), pool.config.gpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(pool.config.workers, len(pool.items)),
                max_size=min(max(pool.config.workers, pool.config.max_workers), len(pool.items)),
                max_tasks_in_flight_per_actor=IN_FLIGHT,
            ),
            num_cpus=pool.config.cpus,
            num_gpus=pool.config.gpus or None,
            resources=pool.config.resources or None,
            max_concurrency=IN_FLIGHT,
        )


def _remembering(run: str) -> type:
    """A class that Ray Data calls with the executor of a pool: nobody else hands it out before the first answer."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Remembering(ExecutionCallback):
        def before_execution_starts(self, executor: Any) -> None:
            from tasks import cluster  # this class is sent to the workers, what it remembers must not be

            cluster._executors[run].append(executor)

    return Remembering


def _drive(ray: Any, pool: Pool, done: Any, answers: Any) -> None:
    """Pass on each item's answer, then None, or the error that ended it."""
    try:
        with reraise(ray):
            for row in done.iter_rows():
                answers.put((pool, row))
    except BaseException as error:  # of a thread: whoever reads the answers raises it
        answers.put((pool, error))
    else:
        answers.put((pool, None))


class _Actor:
    """The shape Ray Data wants: an async generator over batches of one item.

    An error is an item's answer, not an exception: Ray Data would try the item again on a fresh engine, and wrap the
    message until nobody finds it. A process that dies is another matter; that item does go to a fresh actor.
    """

    def __init__(self, worker: type, arguments: tuple[Any, ...], gpus: float) -> None:
        self.error, self.unreachable = "", False
        self.fresh = 1  # the first item reports that an engine was started
        self.gpus, self.told = gpus, time.monotonic()  # the seconds since then are still to be reported
        try:
            self.worker = worker(*arguments)
        except Exception as error:
            self.error, self.unreachable = f"an engine did not start: {_said(error)}", is_network_fault(error)
            if not isinstance(error, ConfigError | RunError) and (log := log_of_this_process()):
                self.error += f" (its log: {log})"
        self.ready_at = time.monotonic()
        self.start_seconds = self.ready_at - self.told

    async def __call__(self, batch: dict[str, Any]) -> Any:
        item = {key: values[0].item() if hasattr(values[0], "item") else values[0] for key, values in batch.items()}
        counts, error, unreachable = {}, self.error, self.unreachable
        if not error:
            try:
                counts = await self.worker.work(item)
            except EngineDied as died:
                print(f"engine died: {died}", file=sys.stderr, flush=True)
                await asyncio.sleep(_LAST_WORDS)
                os._exit(1)  # Ray starts a fresh process, and gives it what this one had in hand
            except Exception as raised:
                unreachable = is_network_fault(raised)
                error = f"{'a server could not be reached' if unreachable else 'an engine failed'}: {_said(raised)}"
        (starts, self.fresh), (start_seconds, self.start_seconds) = (self.fresh, 0), (self.start_seconds, 0.0)
        now = time.monotonic()
        held, self.told = now - self.told, now
        about = {
            "error": error,
            "unreachable": unreachable,
            "engine_starts": starts,
            "engine_restarts": starts and _restarted(),
            "start_seconds": start_seconds,
            "busy_seconds": held - start_seconds,
            "gpu_seconds": self.gpus * held,
            "since_ready": now - self.ready_at,
        }
        yield {key: [value] for key, value in {**counts, **about}.items()}


def _restarted() -> int:
    """1 in an actor whose process took the place of one that died."""
    import ray

    return int(bool(ray.get_runtime_context().was_current_actor_reconstructed))


def check_room(ray: Any, config: ModelConfig | PolicyConfig) -> None:
    """A request that no node of the cluster can ever fulfil would wait for ever."""
    nodes = nodes_of(ray)
    room = sum(fitting(config, node) for node in nodes) if isinstance(config, PolicyConfig) else 0
    if isinstance(config, PolicyConfig) and config.workers > max(1, room):
        raise ConfigError(
            f"policy.workers: the Ray cluster has room for {room} of {config.workers} workers with {config.cpus:g} "
            f"CPUs and {config.gpus:g} GPUs each; lower workers, or join a larger cluster with ray_address"
        )
    custom = config.resources if isinstance(config, ModelConfig) else {}
    wanted = {"CPU": config.cpus, "GPU": config.gpus, **custom}
    if custom and not any(all(node.get(kind, 0) >= need for kind, need in wanted.items()) for node in nodes):
        asked, *there = (", ".join(f"{node.get(kind, 0):g} {kind}" for kind in wanted) for node in (wanted, *nodes))
        raise ConfigError(f"resources: no node of the Ray cluster has {asked}; its nodes have {'; '.join(there)}")
    if not any(node.get("GPU", 0) >= config.gpus and node.get("CPU", 0) >= config.cpus for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ConfigError(
            f"cpus: {config.cpus:g}, gpus: {config.gpus:g}: no node of the Ray cluster has both ({have}); lower them, "
            "or join a larger cluster with ray_address"
        )


def nodes_of(ray: Any) -> list[dict[str, float]]:
    """Resources of each node of the cluster, as Ray names them.

    Ray does not tell which nodes its autoscaler could add. Where one runs, PREFSIEVE_NODES says what the cluster may
    grow to: [{"nodes": 8, "CPU": 8, "GPU": 1}, ...]. Raises ConfigError when that is something else.
    """
    said = os.environ.get("PREFSIEVE_NODES")
    if not said:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    try:
        groups = [{kind: float(amount) for kind, amount in group.items()} for group in json.loads(said)]
        return [group for group in groups for _ in range(int(group.pop("nodes")))]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(
            f'PREFSIEVE_NODES: {said!r} is no list of nodes; write [{{"nodes": 8, "CPU": 8, "GPU": 1}}], or leave it '
            "out where the cluster does not grow by itself"
        ) from error


def fitting(policy: PolicyConfig, node: dict[str, float]) -> int:
    """How many trainings, or workers of one, a node has room for. node: its resources, as Ray names them."""
    limits = [node.get(kind, 0) / need for kind, need in (("CPU", policy.cpus), ("GPU", policy.gpus)) if need]
    return int(min(limits, default=1))


@contextlib.contextmanager
def reraise(ray: Any) -> Iterator[None]:
    """Turn what Ray raises for a job of ours into what really happened, in one line."""
    try:
        yield
    except ray.exceptions.RayError as error:
        inner = getattr(error, "cause", None) or error
        if isinstance(inner, ConfigError | RunError):
            raise inner from error
        raise (Unreachable if is_network_fault(inner) else RunError)(_said(inner)) from error


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """In a worker: say that a server could not be reached while that can be told. Pickling drops an error's cause."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Unreachable) and is_network_fault(error):
            raise Unreachable(_said(error)) from error
        raise


def _said(error: BaseException) -> str:
    """An error in one line; our own errors need no class name."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, ConfigError | RunError) else f"{type(error).__name__}: {lines[-1]}"
