"""LeNet-5; LeCun et al. 1998. As a Module, as a Sequential, and as a Sequential of named layers."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ._common import Network, NormLayer, plain_norm, run_layers, variants

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "tanh": nn.Tanh}
POOLINGS = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def layers(
    *, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, activation: str = "sigmoid",
    pooling: str = "avg", norm_layer: NormLayer | None = None, norm_layer_1d: NormLayer | None = None,
) -> OrderedDict[str, torch.nn.Module]:  # fmt: skip
    """The layers in their order; a norm ends with the activation, in one call, where it is fastnorm's."""
    for what, value, known in (
        ("image_size", image_size, (28, 32)), ("activation", activation, ACTIVATIONS), ("pooling", pooling, POOLINGS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"LeNet: {what} must be one of {', '.join(map(str, known))}, got {value!r}")
    found: OrderedDict[str, torch.nn.Module] = OrderedDict()

    def end(number: int, norm: NormLayer | None, channels: int) -> None:
        fused = False
        if norm is not None:
            made = found[f"norm{number}"] = plain_norm(norm, channels)
            fused = hasattr(made, "activation")
            if fused:
                made.activation = activation
        if not fused:
            found[f"act{number}"] = ACTIVATIONS[activation]()

    for number, (inputs, outputs, padding) in enumerate(((in_channels, 6, 2 * (image_size == 28)), (6, 16, 0)), 1):
        found[f"conv{number}"] = nn.Conv2d(inputs, outputs, 5, padding=padding)
        end(number, norm_layer, outputs)
        found[f"pool{number}"] = POOLINGS[pooling](2, 2)
    found["flatten"] = nn.Flatten()
    for number, (inputs, outputs) in enumerate(((400, 120), (120, 84)), 1):
        found[f"fc{number}"] = nn.Linear(inputs, outputs)
        end(number + 2, norm_layer_1d, outputs)
    found["fc3"] = nn.Linear(84, num_classes)
    return found


class LeNet(Network):
    """Two convolutions, each with pooling, and three linear layers, for images of 28x28 or 32x32.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        image_size: 28 or 32.
        activation: "sigmoid", "relu" or "tanh".
        pooling: "avg" or "max".
        norm_layer, norm_layer_1d: channels -> module, after the convolutions and the linear layers; None is without.

    Shape:
        (N, in_channels, image_size, image_size) -> (N, num_classes)

    Raises:
        ValueError: for an argument that is not one of those, or, when called, another shape.

    Example:
        >>> LeNet(in_channels=3, image_size=32, activation="relu")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, **arguments: Any) -> None:
        super().__init__(num_classes, in_channels, image_size)
        self.image_size = image_size
        made = layers(num_classes=num_classes, in_channels=in_channels, image_size=image_size, **arguments)
        for name, layer in made.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return run_layers(self.children(), x)


def lenet_sequential(**arguments: Any) -> nn.Sequential:
    """LeNet as a Sequential, whose layers are numbers. Its arguments are keywords of :class:`LeNet`."""
    return nn.Sequential(*layers(**arguments).values())


def lenet_named(**arguments: Any) -> nn.Sequential:
    """LeNet as a Sequential of named layers: LeNet's own state_dict. Its arguments are keywords of :class:`LeNet`."""
    return nn.Sequential(layers(**arguments))


_NORMS = {"norm_layer": nn.BatchNorm2d, "norm_layer_1d": nn.BatchNorm1d}
VARIANTS: dict[str, dict[str, Any]] = {"lenet": {}, "lenet_bn": _NORMS}
__all__ = [*VARIANTS, "lenet_named", "lenet_sequential"]
globals().update({f.__name__: f for f in variants(LeNet, VARIANTS, "two convolutions, three linear layers.")})
