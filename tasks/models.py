"""Which model is meant, where its files are, and what it is by content.

A model is named by a folder, a hub name, or `policy:NAME[@VERSION]` for one that prefsieve trained. Its identity goes
into fingerprints: the digest of a folder's files, the commit of a hub model, the version of a policy.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks import rubric
from tasks.config import is_local_path
from tasks.errors import ConfigError
from tasks.records import SCHEMA_VERSION, digest
from tasks.sections import GeneratorConfig, ScorerConfig
from tasks.store import Store
from tasks.versions import fetch_version, find_version

POLICY = "policy:"
_WEIGHTS = {".safetensors", ".bin"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_TEXTS = {".json", ".jinja", ".model", ".txt", ".py"}


def pinned(field: str, config: Any, store: Store) -> Any:
    """The same generator, scorer or policy with nothing left to resolve: what a worker loads later, and elsewhere, is
    what the fingerprint was taken of."""
    if getattr(config, "type", "") == "function":
        file, _, name = config.function.rpartition(":")
        return config.model_copy(update={"function": f"{Path(file).absolute()}:{name}"} if file.endswith(".py") else {})
    if not config.model or getattr(config, "engine", "") in ("fake", "openai"):
        return config
    if config.model.startswith(POLICY):
        return config.model_copy(update={"model": f"{POLICY}{identity(field, config, store)}"})
    if is_local_path(config.model):
        return config.model_copy(update={"model": str(Path(os.path.expanduser(config.model)).absolute())})
    return config.model_copy(update={"revision": identity(field, config, store).rpartition("@")[2]})


def generator_facts(config: GeneratorConfig, store: Store) -> dict[str, Any]:
    """All that decides a generator's samples; workers, batch size and how many samples are not part."""
    return {
        "schema": SCHEMA_VERSION,
        "stage": "generate",
        "engine": config.engine,
        "model": config.name if config.engine == "fake" else identity("generate", config, store),
        "system_prompt": config.system_prompt,
        "sampling": config.sampling.model_dump(),
        "seed": config.seed,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "engine_args": config.engine_args,
    }


def scorer_facts(config: ScorerConfig, store: Store) -> dict[str, Any]:
    """All that decides a scorer's rewards. Of a function: its name and its own file, not what that imports."""
    about: dict[str, Any] = {"schema": SCHEMA_VERSION, "stage": "score", "type": config.type}
    if config.type == "function":
        code = hashlib.sha256(function_source(config).read_bytes()).hexdigest()
        return {**about, "function": config.function.rpartition(":")[2], "code": code}
    if config.type == "judge":
        about["judge"] = rubric.facts(config.judge)
    if config.engine == "openai":  # what stands behind the name is the endpoint's affair; see rubric.facts
        return {
            **about,
            "engine": config.engine,
            "model": config.model,
            "revision": config.revision,
            "engine_args": config.engine_args,
        }
    return {
        **about,
        "engine": config.engine,
        "model": config.name if config.engine == "fake" else identity("score", config, store),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "engine_args": config.engine_args,
    }


def check_distinct(field: str, fingerprints: dict[str, str]) -> None:
    """ConfigError when two names stand for the same thing."""
    names: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        if fingerprint in names:
            raise ConfigError(
                f"{field}: {names[fingerprint]!r} and {name!r} are the same model or function with the same settings; "
                "remove one, or change what it does"
            )
        names[fingerprint] = name


def generator_fingerprint(config: GeneratorConfig, store: Store) -> str:
    return digest(generator_facts(config, store))


def scorer_fingerprint(config: ScorerConfig, store: Store) -> str:
    return digest(scorer_facts(config, store))


def remember_facts(facts: dict[str, Any], called: str, store: Store) -> str:
    """Keep what a fingerprint stands for, under the name it was first called by; returns the fingerprint."""
    fingerprint = digest(facts)
    store.create_json(_facts_path(fingerprint), {"called": called, **facts})
    return fingerprint


def facts_of(fingerprint: str, store: Store) -> dict[str, Any]:
    """What a fingerprint stands for, without the name that somebody called it by."""
    facts = store.read_object(_facts_path(fingerprint), "called")
    del facts["called"]
    return facts


def _facts_path(fingerprint: str) -> str:
    return f"fingerprints/{fingerprint}.json"


def identity(field: str, config: Any, store: Store) -> str:
    """What a model is by content. ConfigError, naming the configuration's field, when there is no such model."""
    name = config.model
    if name.startswith(POLICY):
        return str(find_version(store, name.removeprefix(POLICY), kind="policies"))
    if is_local_path(name):
        folder = Path(os.path.expanduser(name))
        if not os.path.isfile(folder / "config.json"):
            raise ConfigError(f"{field}: model folder {name!r} does not exist or holds no config.json; check the path")
        if not _takes_pickles(config):
            _check_weights(field, name, [file.name for file in folder.iterdir()])
        return folder_digest(folder)
    return hub_commit(field, name, config.revision, pickles=_takes_pickles(config))


def _takes_pickles(config: Any) -> bool:
    """Whether somebody has asked for weights that are no safetensors."""
    arguments = getattr(config, "engine_args", {})
    return "load_format" in arguments or arguments.get("use_safetensors", True) is not True


def _check_weights(field: str, name: str, files: Sequence[str]) -> None:
    """A pickle of weights runs whatever code its writer put there; safetensors hold numbers alone."""
    pickles = [file for file in files if Path(file).suffix in _PICKLES and file != "training_args.bin"]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise ConfigError(
            f"{field}: model {name!r} has its weights as pickles ({pickles[0]}), which may run code; take a revision "
            "with safetensors, or, if you trust it, load it once with transformers and save_pretrained it to a folder"
        )


def local(name: str, store: Store) -> str:
    """A name that from_pretrained takes; a policy's files are fetched from the store first."""
    if name.startswith(POLICY):
        return str(fetch_policy(store, name.removeprefix(POLICY)))
    return os.path.expanduser(name) if is_local_path(name) else name


def fetch_policy(store: Store, wanted: str) -> Path:
    """Local folder with the model of a trained policy, fetched and checked once per machine."""
    version = find_version(store, wanted, kind="policies")
    target = cache_folder() / "policies" / digest([store.url, version.place])
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        fetch_version(store, version, "model/", partial)
        try:
            partial.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return target


def folder_digest(folder: Path) -> str:
    """Digest of a model folder's weights, configuration and tokenizer, remembered while size and time stand."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _WEIGHTS | _TEXTS)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    memo = cache_folder() / "digests" / f"{digest([str(folder.absolute()), stats])}.json"
    if memo.is_file():
        return json.loads(memo.read_text())
    result = digest([(file.name, _sha256(file)) for file in files])
    memo.parent.mkdir(parents=True, exist_ok=True)
    temporary = memo.with_suffix(f".{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(result))
    temporary.replace(memo)
    return result


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prefsieve"


# --- functions as scorers


def function_source(config: ScorerConfig) -> Path:
    """The file that a function scorer's code is in."""
    module = config.function.rpartition(":")[0]
    if module.endswith(".py"):
        source = Path(module)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        source = Path(spec.origin) if spec and spec.origin else Path(module)
    if not os.path.isfile(source):
        raise ConfigError(f"score: function {config.function!r}: no module or file {module!r}; check the path")
    return source


def load_function(config: ScorerConfig) -> Callable[..., float]:
    """The callable that `function` names."""
    module, _, name = config.function.rpartition(":")
    source = function_source(config)
    try:
        loaded = _load_file(source) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # somebody else's code, run for the first time
        raise ConfigError(
            f"score: function {config.function!r}: {source} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(loaded, name, None)
    if not callable(found):
        raise ConfigError(f"score: function {config.function!r}: {module} has no function {name!r}")
    return found


def _load_file(source: Path) -> ModuleType:
    name = f"prefsieve_scorer_{source.stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # dataclasses look their module up here
    spec.loader.exec_module(loaded)
    return loaded


# --- how


@lru_cache(maxsize=256)
def hub_commit(field: str, name: str, revision: str = "", pickles: bool = True) -> str:
    """NAME@COMMIT of a model on the hub. pickles: whether it will do when its weights are no safetensors."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        found = HfApi().model_info(name, revision=revision or None, timeout=20)
        if not pickles:
            _check_weights(field, name, [file.rfilename for file in found.siblings or []])
        return f"{name}@{found.sha}"
    except HFValidationError as error:
        raise ConfigError(f"{field}: model {name!r} is neither a folder here nor a hub name; check the path") from error
    except (
        HTTPError,
        OSError,
        OfflineModeIsEnabled,
    ):  # not found, gated, or no network: what was downloaded before may serve
        pass
    try:
        return f"{name}@{Path(snapshot_download(name, revision=revision or None, local_files_only=True)).name}"
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: model {name!r} is no folder here, and the hub cannot be reached or does not have it; "
            "check the name, or the network and HF_TOKEN"
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
