"""Loads the compiled operators, or says in one line why it cannot and what mends that."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps fastnorm (in its source folder: `.`)"


def read_build() -> dict[str, Any]:
    """What setup.py wrote beside the extension: torch, isas, cuda_archs, cuda, compiler."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.partition("+")[0].split(".")[:2])


def load() -> Any:
    """Imports fastnorm._C, which registers torch.ops.fastnorm.*"""
    build = read_build()
    built_for = build.get("torch", "an unknown torch")
    if build and _release(built_for) != _release(torch.__version__):
        raise ImportError(
            f"fastnorm was built for torch {built_for}, but torch {torch.__version__} is installed. "
            f"Rebuild it: {REBUILD}"
        )
    try:
        return importlib.import_module("fastnorm._C")
    except ImportError as error:
        if not build:
            raise ImportError(
                f"fastnorm's extension is not built (for torch {torch.__version__}). Build it: {REBUILD}"
            ) from error
        raise ImportError(
            f"fastnorm's extension, built for torch {built_for}, does not load with torch {torch.__version__}: "
            f"{error}. "
            f"Rebuild it: {REBUILD}"
        ) from error


extension = load()
ops = torch.ops.fastnorm
