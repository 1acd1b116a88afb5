"""torch.nn.functional with fastnorm's functions in place of their namesakes."""

from typing import Any

import torch.nn.functional as _torch_functional

from ..functional import *  # noqa: F403
from ..functional import __all__ as _ours

__all__ = sorted({name for name in dir(_torch_functional) if not name.startswith("_")} | set(_ours))


def __getattr__(name: str) -> Any:
    try:
        return getattr(_torch_functional, name)
    except AttributeError:
        raise AttributeError(
            f"module 'fastnorm.nn.functional' has no attribute {name!r}, nor has torch.nn.functional"
        ) from None


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
