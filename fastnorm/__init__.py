"""Fused, accurate normalisation layers for PyTorch: torch.nn's names, on CPU and CUDA."""

from . import functional, nn
from ._info import __version__, info
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "__version__", "check", "functional", "info", "nn"]


def __getattr__(name: str):
    if name == "check":  # what it needs of torch.testing is slow to import
        from ._check import check

        return check
    raise AttributeError(f"module 'fastnorm' has no attribute {name!r}")
