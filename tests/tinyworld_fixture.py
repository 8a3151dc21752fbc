"""TinyWorld, built once and reused: `from tests.tinyworld_fixture import tinyworld` makes the fixture known to tests.

The folder is that of the variable PREFSIEVE_TINYWORLD, or .prefsieve/tinyworld in the repository, where the demo looks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.tinyworld.build import Recipe, is_complete

REPOSITORY = Path(__file__).resolve().parents[1]


def tinyworld_folder() -> Path:
    return Path(os.environ.get("PREFSIEVE_TINYWORLD") or REPOSITORY / ".prefsieve" / "tinyworld")


@pytest.fixture(scope="session")
def tinyworld() -> Path:
    """The folder of a complete world; the first build takes minutes, in a process of its own (fresh torch threads)."""
    folder = tinyworld_folder()
    if not is_complete(folder, Recipe()):
        command = [sys.executable, "-m", "examples.tinyworld.build", "--out", str(folder)]
        subprocess.run(command, check=True, cwd=REPOSITORY)
    return folder
