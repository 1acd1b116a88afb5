"""Norm, pooling and box kernels for PyTorch: torch.nn's and torchvision's names, on CPU and CUDA."""

from . import functional, models, nn, ops
from ._info import __version__, info
from .convert import ConvertReport, convert, revert
from .fuse import fuse
from .layers import *  # noqa: F403
from .layers import __all__ as _layers
from .save_memory import save_memory, saved_bytes

__all__ = [  # noqa: F405
    *_layers,
    "ConvertReport",
    "__version__",
    "check",
    "convert",
    "functional",
    "fuse",
    "info",
    "models",
    "nn",
    "ops",
    "revert",
    "save_memory",
    "saved_bytes",
]


def __getattr__(name: str):
    if name == "check":  # what it needs of torch.testing is slow to import
        from ._check import check

        return check
    raise AttributeError(f"module 'fastnorm' has no attribute {name!r}")
