"""Networks of images on fastnorm's layers, one family per file. Keys of state_dicts are torchvision's.

>>> model = resnet18(num_classes=10, in_channels=1, small_images=True)
"""

import difflib
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import alexnet as _alexnet
from . import densenet as _densenet
from . import googlenet as _googlenet
from . import lenet as _lenet
from . import nin as _nin
from . import resnet as _resnet
from . import vgg as _vgg

_FUNCTIONS: dict[str, Callable[..., torch.nn.Module]] = {
    name: getattr(family, name)
    for family in (_lenet, _alexnet, _vgg, _nin, _googlenet, _resnet, _densenet)
    for name in family.__all__
}
globals().update(_FUNCTIONS)

__all__ = [*_FUNCTIONS, "create", "names"]


def names() -> list[str]:
    """The networks that there are.

    Example:
        >>> "vgg16_bn" in names()
        True
    """
    return list(_FUNCTIONS)


def create(name: str, **arguments: Any) -> torch.nn.Module:
    """A network by its name.

    Args:
        name: one of :func:`names`.
        **arguments: num_classes, in_channels, norm_layer and whatever else its class takes.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> create("lenet", num_classes=4)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 4])
    """
    if name not in _FUNCTIONS:
        raise ValueError(_unknown(name))
    return _FUNCTIONS[name](**arguments)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _FUNCTIONS, 3)
    known = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_FUNCTIONS)}"
    return f"fastnorm.models has no {name!r}: {known}"


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(_unknown(name))
