"""Training objectives: one file each, with its formula, source and the scale of its beta; torch and numpy only.

A module has `loss(batch, settings) -> [pairs]`; the mean over the batch is minimised. Where it needs numbers of the
whole training set it also has `columns(data, settings)`, which gives one number per pair for each of them. What each
can be told is in settings.py, which needs no torch. Objectives that TRL has are run by TRL: `settings.trl` names them.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def module(name: str) -> ModuleType:
    """The objective's module, such as `dpo`; takes torch along."""
    return importlib.import_module(f"tasks.objectives.{name}")
