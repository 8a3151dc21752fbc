"""init: a commented configuration to start from, one for each recipe.

The recipes lie in `recipes/` beside this file, as people get them. The first line says what each is for; the lines that
are about somebody's own data, models and machines are marked.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from flows.cli import flow_of
from flows.values import read_yaml
from tasks.errors import ConfigError

RECIPES = ("pvar", "delta", "mixdpo", "adaptive", "import")
MARK = "# CHANGE:"
_FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> dict[str, Any]:
    """Each recipe's name, the flow that runs it, and what it is for."""
    return {"recipes": [_about(name) for name in RECIPES]}


def write_recipe(name: str, file: Path | None, force: bool) -> dict[str, Any]:
    """Write a recipe to a file, by default NAME.yaml here; what was written, and the numbers of its marked lines.

    ConfigError for an unknown recipe, for a file that exists unless force is given, and where none can be written.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; there are: {', '.join(RECIPES)}")
    file = file or Path(f"{name}.yaml")
    text = _text(name)
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise ConfigError(f"{file}: {_advice(file, error)}") from error
    change = [number for number, line in enumerate(text.splitlines(), 1) if MARK in line]
    return {**_about(name), "file": os.fspath(file), "change": change}


def _advice(file: Path, error: OSError) -> str:
    if file.is_dir():
        return "is a folder; name a file in it"
    if isinstance(error, FileExistsError):
        return "exists; name another file, or overwrite it by --force"
    advice = "name another file" if file.parent.is_dir() else f"make the folder {file.parent} first"
    return f"cannot be written: {error.strerror}; {advice}"


def _about(name: str) -> dict[str, Any]:
    found = re.match(rf"# {name}: (.+)\n", _text(name))
    assert found, f"the first line of {name}.yaml says what it is for"
    return {"recipe": name, "flow": flow_of(read_yaml(_path(name))), "what": found[1]}


def _text(name: str) -> str:
    return _path(name).read_text(encoding="utf-8")


def _path(name: str) -> Path:
    return _FOLDER / f"{name}.yaml"
