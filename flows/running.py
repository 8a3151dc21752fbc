"""run_on_ray: where a flow runs, and how it ends before its time.

`ray_address` says where. With local, auto and HOST:PORT it is this process, whose engines Ray starts here or on the
cluster that is joined. With http://HEAD:8265, the dashboard of a cluster, the flow is submitted there as a job and
followed from here; the job ends when this run does.

A run that is cancelled in Prefect ends, and its engines with it. Prefect itself ends only what a worker of its started;
of a run that a shell or a Ray job started it merely changes the state, so a run asks for its own every few seconds.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import threading
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Crashed
from pydantic import BeforeValidator, ValidationError

from flows import markdown, reporting
from flows.form import unfolded
from tasks.config import is_dashboard
from tasks.errors import ConfigError

_EVERY = 5.0  # seconds between two questions for the state
_WORKERS_TURN = 20.0  # seconds in which a worker ends a run that it started, if it is still there
_KEPT = "What was finished is kept; run it again to go on."

P = ParamSpec("P")
R = TypeVar("R")


def run_on_ray(flow: Callable[P, R]) -> Callable[P, R]:
    """For the function of a flow. Its name is the flow's, and it has an argument `ray_address`."""
    signature = _as_a_form_fills_it(inspect.signature(flow, eval_str=True))

    @functools.wraps(flow)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        watch = _Watch()
        try:
            with watch:
                if is_dashboard(arguments.arguments["ray_address"]):
                    return cast(R, _as_job(flow.__name__, arguments.arguments))
                return flow(*args, **kwargs)
        except BaseException as error:
            if watch.cancelled:
                return cast(R, Cancelled(message=" ".join([_KEPT, *getattr(error, "__notes__", [])])))
            if isinstance(error, ValidationError) and (wrong := _wrong_parameters(error)):
                raise ConfigError(wrong) from error
            if not isinstance(error, TerminationSignal) or _is_told_by_another():
                raise
            # Raised further, it would make Prefect kill this process before the API is told.
            return cast(R, Crashed(message=f"The process was told to end. {_KEPT}"))

    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def _wrong_parameters(error: ValidationError) -> str:
    """In words, when they do not go together; empty for what else did not fit a model of pydantic's."""
    from flows.cli import FLOWS, describe_errors

    return describe_errors(error.errors()) if error.title in {config.__name__ for config in FLOWS.values()} else ""


def _as_a_form_fills_it(signature: inspect.Signature) -> inspect.Signature:
    """With types in place of their names, which Prefect would look for in this module, and that take sections apart."""
    parameters = [
        parameter.replace(annotation=Annotated[parameter.annotation, BeforeValidator(unfolded)])
        for parameter in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters)


def _is_told_by_another() -> bool:
    """Whether somebody else tells the API what became of this run: its worker, or the run that it is a part of."""
    context = FlowRunContext.get()
    return _has_worker() or bool(context and context.flow_run and context.flow_run.parent_task_run_id)


def _has_worker() -> bool:
    return os.environ.get("PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS") == "false"


def _as_job(flow: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from flows.cli import FLOWS
    from flows.submit import run_flow

    config = FLOWS[flow](**{name: value for name, value in arguments.items() if value is not None})
    report = run_flow(flow, config, config.ray_address)
    made = {row["stage"] for row in report["stages"] if row["shards_made"]}
    for row in report.get("subsets", ()):
        if f"publish {row['name']}" in made:
            reporting.show_published(row["name"], row["version"], row["pairs"], report["store"])
    reporting.show_counts(flow, report["stages"])
    reporting.show_report(flow, getattr(markdown, f"{flow}_markdown")(report))
    return report


class _Watch:
    """While it is entered: ends the flow in the main thread, as a worker would, once its run is cancelled."""

    def __init__(self) -> None:
        self.cancelled = False
        self.over = threading.Event()
        self.lock = threading.Lock()  # once it is over nobody is interrupted

    def __enter__(self) -> None:
        context = FlowRunContext.get()
        if context and context.flow_run and threading.current_thread() is threading.main_thread():
            threading.Thread(target=self._watch, args=(context.flow_run.id,), name="watch", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.over.set()

    def _watch(self, flow_run: Any) -> None:
        with get_client(sync_client=True) as client:
            while not self.over.wait(_EVERY):
                with contextlib.suppress(Exception):  # who cannot be asked has cancelled nothing
                    state = client.read_flow_run(flow_run).state
                    if state and (state.is_cancelling() or state.is_cancelled()):
                        break
        if _has_worker():
            self.over.wait(_WORKERS_TURN)
        with self.lock:
            if not self.over.is_set():
                self.cancelled = True
                signal.pthread_kill(cast(int, threading.main_thread().ident), signal.SIGTERM)
