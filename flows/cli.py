"""The `prefsieve` command.

Exit status 0; 1 when the run failed; 2 when the configuration or the arguments are wrong. `--json` prints one JSON
document on standard output and nothing else; logs go to standard error. Prefect, Ray and torch are imported by the
commands that need them, so that the others answer at once.
"""

from __future__ import annotations

import contextlib
import json
import keyword
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from flows.values import load_values, shortened
from tasks.config import CurateConfig, EvaluateConfig, RunConfig, TrainConfig, is_dashboard
from tasks.errors import ConfigError, RunError, is_network_fault
from tasks.experiments import ExperimentConfig
from tasks.urls import shown, without_secrets

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns prompts into the preference data worth training on, and shows that it was.",
)

FLOWS: dict[str, type[RunConfig]] = {
    "curate": CurateConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "experiment": ExperimentConfig,
}

_MOST_ERRORS = 20  # shown of a configuration
_LONGEST_VALUE = 2000  # characters; what is longer is no value to look at

Config = Annotated[Path, typer.Argument(help="Configuration file (YAML).", show_default=False)]
Set = Annotated[list[str], typer.Option("--set", help="Change a value: --set generate.samples=16", show_default=False)]
StoreUrl = Annotated[str, typer.Option("--store", help="Folder or s3:// URL.", show_default="PREFSIEVE_STORE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, do nothing.")]
Flow = Annotated[
    str, typer.Argument(help=f"{', '.join(FLOWS)}.", show_default=False, autocompletion=lambda: list(FLOWS))
]
Wanted = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A published subset.", show_default=False)]

Row = Annotated[
    str, typer.Option(metavar="PROMPT_ID", help="Why its pair is in or out; 8 characters will do.", show_default=False)
]


def _recipes() -> list[str]:
    from flows.init import RECIPES

    return list(RECIPES)


@app.command()
def demo(as_json: AsJson = False) -> None:
    """The whole way on TinyWorld, on this machine (from a clone)."""
    from flows.demo import run_demo

    with _flow_environment():
        result = run_demo()
    _print(as_json, result, "demo_markdown")


@app.command()
def init(
    recipe: Annotated[
        str,
        typer.Argument(help="Without one, what there is.", show_default=False, autocompletion=_recipes),
    ] = "",
    file: Annotated[Path | None, typer.Argument(help="To write; by default RECIPE.yaml.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """A commented configuration to start from."""
    from flows.init import list_recipes, write_recipe

    if recipe:
        _print(as_json, write_recipe(recipe, file, force), "written_markdown")
    else:
        _print(as_json, list_recipes(), "recipes_markdown")


@app.command()
def curate(
    config: Config, set_: Set = [], store: StoreUrl = "", dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Prompts in, published subsets out."""
    _run("curate", config, set_, store, dry_run, as_json)


@app.command("import")
def import_(
    config: Config, set_: Set = [], store: StoreUrl = "", dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Rated completions or pairs that already exist, into the store; --dry-run shows how they are understood."""
    from flows.shelf import import_source, preview_source

    values = parse("curate", load_values(config, set_, store), config)
    if values.import_ is None:
        raise ConfigError(f"{config}: there is no section `import:` that says what to import")
    if dry_run:
        _print(as_json, preview_source(values.import_), "preview_markdown")
    else:
        _print(as_json, import_source(values), "import_markdown")


@app.command()
def train(
    config: Config, set_: Set = [], store: StoreUrl = "", dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """A published subset in, a trained policy out."""
    _run("train", config, set_, store, dry_run, as_json)


@app.command()
def evaluate(
    config: Config, set_: Set = [], store: StoreUrl = "", dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """A policy against a reference on held-out prompts."""
    _run("evaluate", config, set_, store, dry_run, as_json)


@app.command()
def experiment(
    config: Config, set_: Set = [], store: StoreUrl = "", dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Subsets x objectives x seeds, trained alike and compared on held-out prompts."""
    _run("experiment", config, set_, store, dry_run, as_json)


@app.command()
def submit(
    flow: Flow,
    config: Config,
    address: Annotated[str, typer.Option(help="Ray dashboard, http://HEAD:8265", show_default=False)],
    set_: Set = [],
    store: StoreUrl = "",
    as_json: AsJson = False,
) -> None:
    """Run a flow as a job of a Ray cluster, and follow it."""
    from flows.submit import submit_flow

    parsed = parse(flow, load_values(config, set_, store), config)
    _print(as_json, submit_flow(flow, parsed, address), f"{flow}_markdown")


@app.command()
def cancel(
    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB|FLOW",
            help="The job's id; or a flow.",
            show_default=False,
            autocompletion=lambda: list(FLOWS),
        ),
    ],
    address: Annotated[str, typer.Option(help="Ray dashboard, http://HEAD:8265", show_default=False)],
    config: Annotated[Path | None, typer.Argument(help="With a flow: its configuration.", show_default=False)] = None,
    set_: Set = [],
    store: StoreUrl = "",
    as_json: AsJson = False,
) -> None:
    """Stop a job of a Ray cluster, and wait until it has ended; what it finished is kept."""
    from flows.submit import cancel_flow, cancel_job

    if config:
        stopped = cancel_flow(job, parse(job, load_values(config, set_, store), config), address)
    else:
        stopped = cancel_job(job, address)
    _print(as_json, stopped, "cancel_markdown")


@app.command()
def subsets(store: StoreUrl = "", as_json: AsJson = False) -> None:
    """List the published subsets."""
    from flows.shelf import list_subsets, manifests_of

    shelf = _store(store)
    with manifests_of(shelf):
        _print(as_json, list_subsets(shelf), "subsets_markdown")


@app.command()
def show(wanted: Wanted, row: Row = "", store: StoreUrl = "", as_json: AsJson = False) -> None:
    """What a subset holds, how it was made, and its first rows; --row tells why a prompt's pair is in or out."""
    from flows.shelf import manifests_of, show_subset

    shelf = _store(store)
    with manifests_of(shelf):
        if row:
            from flows.why import why

            _print(as_json, why(shelf, wanted, row), "why_markdown")
        else:
            _print(as_json, show_subset(shelf, wanted), "show_markdown")


@app.command()
def verify(wanted: Wanted, store: StoreUrl = "", as_json: AsJson = False) -> None:
    """Recompute every digest of a subset; fails when something was changed."""
    from flows.shelf import verify_subset

    result = verify_subset(_store(store), wanted)
    _print(as_json, result, "verify_markdown")
    if result["problems"]:
        raise typer.Exit(1)


@app.command()
def deploy(
    file: Annotated[Path, typer.Option(help="Deployments to register.")] = Path("deployments/prefect.yaml"),
    pool: Annotated[str, typer.Option(help="Work pool for all of them; empty: those that the file says.")] = "",
    set_: Annotated[
        list[str],
        typer.Option("--set", help="Change a parameter of all: --set ray_address=http://HEAD:8265", show_default=False),
    ] = [],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the file; needs no server.")] = False,
) -> None:
    """Register work pool, deployments and automations on the configured Prefect server."""
    from flows.deploy import deploy_all

    deploy_all(file, pool, set_, dry_run)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="Also check what this configuration names.")] = None,
    set_: Set = [],
    store: StoreUrl = "",
    load: Annotated[bool, typer.Option("--load", help="Also load each model where a run would, and ask it.")] = False,
    as_json: AsJson = False,
) -> None:
    """What would fail, before a GPU is paid for."""
    from flows.doctor import examine
    from tasks.cluster import disconnecting

    values = load_values(config, set_, store) if config else {"store": without_secrets(store, "store: ")}
    with _stdout_for_results(), disconnecting():
        result = examine(parse(flow_of(values), values, config) if config else RunConfig.model_validate(values), load)
    _print(as_json, result, "doctor_markdown")
    if not all(row["ok"] for row in result["checks"]):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; turn the two kinds of errors into one message and an exit status."""
    try:
        app()
    except ConfigError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept, run again to go on", 130)
    except Exception as error:
        if not isinstance(error, OSError) and not is_network_fault(error):
            raise  # a fault of ours: whoever mends it needs the traceback
        asked = getattr(error, "_request", None)  # of httpx: Prefect's server
        told = f"{type(error).__name__}{f' at {asked.url}' if asked else ''}: {error}"
        _fail(f"{shown(told)}; what was finished is kept, run again to go on", 1)


# --- configuration


def parse(flow: str, values: dict[str, Any], path: Path) -> Any:
    """The flow's configuration model; ConfigError names field, value and what to do."""
    if flow not in FLOWS:
        raise ConfigError(f"no flow {flow!r}; there are: {', '.join(FLOWS)}")
    try:
        return FLOWS[flow].model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_errors(error.errors())}") from error


def describe_errors(errors: Sequence[ErrorDetails]) -> str:
    """pydantic's findings, one a line: field, what is wrong, value."""
    lines = []
    for found in errors[:_MOST_ERRORS]:
        field = ".".join(str(part)[:64] for part in found["loc"])
        message = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            message = "no such field; check the spelling, or remove it"
        elif found["type"] == "missing":
            message = "this field is required"
        value = found.get("input") if found["type"] != "extra_forbidden" else None  # `api_key` may hold one
        if isinstance(value, str) and (len(value) > _LONGEST_VALUE or shown(value) != value):
            value = None  # it may hold a password
        got = f" (got {shortened(value)})" if field and isinstance(value, str | int | float | bool) else ""
        lines.append(f"{field}: {message}{got}" if field else message)
    more = len(errors) - len(lines)
    return "\n  ".join([*lines, *([f"... and {more:,} more"] if more else [])])


def flow_of(values: dict[str, Any]) -> str:
    """Whose configuration this is, told by the sections it has."""
    signs = {"subsets": "experiment", "policy": "train", "evaluate": "evaluate"}
    return next((flow for section, flow in signs.items() if section in values), "curate")


# --- running and printing


def _run(flow: str, path: Path, changes: list[str], store: str, dry_run: bool, as_json: bool) -> None:
    values = load_values(path, changes, store)
    config = parse(flow, values, path)
    if dry_run:
        from flows.doctor import plan

        _print(as_json, plan(config), "plan_markdown")
        return
    from tasks.check import check

    if not is_dashboard(config.ray_address):
        check(config)  # what is wrong is said at once, before a server is started for the run
    with _flow_environment():
        import importlib

        from prefect.exceptions import CancelledRun, CrashedRun

        arguments = {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in values.items()}
        try:
            result = getattr(importlib.import_module(f"flows.{flow}"), flow)(**arguments)
        except (CancelledRun, CrashedRun) as error:
            how = "cancelled" if isinstance(error, CancelledRun) else "told to end"
            raise RunError(f"the run was {how}; what was finished is kept, run again to go on") from error
    _print(as_json, result, f"{flow}_markdown")


@contextlib.contextmanager
def _flow_environment() -> Iterator[None]:
    """Prefect's own local server when none is configured; quiet, patient and private."""
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "ERROR")
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_without_traceback)
    with _stdout_for_results():
        yield


@contextlib.contextmanager
def _stdout_for_results() -> Iterator[None]:
    """What libraries print goes to standard error: Ray prints what becomes of its actors."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Errors that `main` prints as one clear message need no traceback in the log."""
    if record.exc_info and isinstance(record.exc_info[1], ConfigError | RunError):
        record.exc_info = None
    return True


def _store(url: str) -> Any:
    from tasks.store import Store

    store = Store(url or RunConfig().store_url)
    store.reach()
    return store


def _print(as_json: bool, result: Any, markdown: str) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    import flows.markdown

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(Markdown(_printable(getattr(flows.markdown, markdown)(result))))


def _fail(message: str, status: int) -> None:
    print(f"prefsieve: {_printable(message)}", file=sys.stderr)
    sys.exit(status)


def _printable(text: str) -> str:
    """Without what would command a terminal: names and texts come from strangers."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


if __name__ == "__main__":
    main()
