"""torch.nn with fastnorm's layers in place of their namesakes: every other name is torch.nn's own object."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import Any

import torch.nn as _torch_nn

from ..layers import *  # noqa: F403
from ..layers import __all__ as _layers
from . import functional  # noqa: F401

__all__ = sorted({name for name in dir(_torch_nn) if not name.startswith("_")} | {*_layers, "functional"})


def __getattr__(name: str) -> Any:
    try:
        return getattr(_torch_nn, name)
    except AttributeError:
        raise AttributeError(f"module 'fastnorm.nn' has no attribute {name!r}, nor has torch.nn") from None


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})


class _TorchSubmodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes ``import fastnorm.nn.utils.rnn`` give torch.nn.utils.rnn itself, not a second copy of it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith(__name__ + "."):
            return None
        try:
            importlib.import_module("torch.nn." + fullname.removeprefix(__name__ + "."))
        except ModuleNotFoundError:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = sys.modules["torch.nn." + spec.name.removeprefix(__name__ + ".")]
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        module.__spec__ = module.__spec__.loader_state  # the import system has just put ours there


sys.meta_path.insert(0, _TorchSubmodules())
