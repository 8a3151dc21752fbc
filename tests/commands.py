"""The commands that pages tell: found, and run one after the other in one process.

Apart from the tests, whose conftest.py clears the environment that such a process is given.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.services import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "infra" / "README.md",
    ROOT / "examples" / "tinyworld" / "README.md",
]

# What a line of an indented block must begin with to be a command; blocks also hold output, formulas and drawings.
A_COMMAND = re.compile(
    r"(aws|cat|cd|cp|curl|docker|du|export|find|git|grep|kubectl|make|openssl|pip|prefect|prefsieve|pytest|python3?|ray|rm"
    r"|sudo|tar|unset|uv|\.venv/bin/\S+)( |$)"
)
SHELLS = ("bash", "console", "sh", "shell")  # of fenced blocks, in which every line is one


@dataclass(frozen=True)
class Told:
    """A command as a page tells it."""

    page: str
    text: str
    store: str = ""  # PREFSIEVE_STORE, as the page has exported it so far

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands_of(page: Path) -> Iterator[Told]:
    store = ""
    for line in _lines_of(page):
        if exported := re.match(r"export (?:.* )?PREFSIEVE_STORE=(\S+)", line):
            store = exported[1]
        elif line == "unset PREFSIEVE_STORE":
            store = ""
        yield Told(str(page.relative_to(ROOT)), line, store)


def _lines_of(page: Path) -> Iterator[str]:
    """The lines that are commands, without comments, those that go on in the next line joined."""
    fence: str | None = None
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if opened := re.match(r"\s*```(\w*)", line):
            fence = None if fence is not None else opened[1]
        elif fence in SHELLS or (fence is None and re.match(r" {4,}\S", line)):
            text = " ".join(re.sub(r"(^|\s+)# .*$", "", line).split())
            if text and (fence or A_COMMAND.match(text)):
                yield re.sub(r"^\.venv/bin/(?=prefsieve)", "", text)


# --- in a process of its own


def run_all(ray_address: str) -> None:
    """Runs the commands of commands.json, a file of this folder; what each ended with comes into results.json."""
    from tasks.cluster import connect

    connect(ray_address)  # flows find it
    results = {}
    for told, arguments in json.loads(Path("commands.json").read_text()):
        os.environ["PREFSIEVE_STORE"] = told["store"] or ".prefsieve/store"
        started = time.monotonic()
        results[told["text"]] = _run([_filled_in(word, arguments) for word in arguments])
        print(f"{time.monotonic() - started:7.1f} s  {told['text']}", file=sys.stderr)
        Path("results.json").write_text(json.dumps(results))


def _run(words: list[str]) -> tuple[int, str, str]:
    if words[0] == "prefsieve":
        return _prefsieve(words)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def _prefsieve(words: list[str]) -> tuple[int, str, str]:
    """Status, standard output and error, also of what libraries write past Python."""
    from flows.cli import main

    sys.argv = words
    status, kept, files = 0, [os.dup(1), os.dup(2)], [Path("out.txt"), Path("err.txt")]
    for fd, file in enumerate(files, 1):
        with file.open("w") as into:
            os.dup2(into.fileno(), fd)
    try:
        main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in enumerate(kept, 1):
            os.dup2(copy, fd)
            os.close(copy)
    out, err = (file.read_text() for file in files)
    return status, out, err


def _filled_in(word: str, words: list[str]) -> str:
    """Of a prompt, the first of the subset that the command is about."""
    if word != "PROMPT_ID":
        return word
    _, shown, _ = _prefsieve(["prefsieve", "show", words[2], "--json"])
    return str(json.loads(shown)["examples"][0]["prompt_id"][:8])


def as_json(commands: list[tuple[Told, list[str]]]) -> str:
    """For commands.json: each command as it is told, and its words as they are to be run."""
    rows: list[tuple[dict[str, Any], list[str]]] = [(asdict(told), words) for told, words in commands]
    return json.dumps(rows)
