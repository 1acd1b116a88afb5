"""Fused, accurate normalisation layers for PyTorch: torch.nn's names, on CPU and CUDA."""

from . import functional, nn, ops
from ._info import __version__, info
from .layers import *  # noqa: F403
from .layers import __all__ as _layers

__all__ = [*_layers, "__version__", "check", "functional", "info", "nn", "ops"]  # noqa: F405


def __getattr__(name: str):
    if name == "check":  # what it needs of torch.testing is slow to import
        from ._check import check

        return check
    raise AttributeError(f"module 'fastnorm' has no attribute {name!r}")
