"""What the families share: norms with their activation, checks of arguments and inputs, functions from tables."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from .. import nn
from ..conv2d import makes_its_result
from ..module import FusedNorm, norm_of_own

NormLayer = Callable[[int], torch.nn.Module]


def relu_norm(norm_layer: NormLayer, channels: int) -> torch.nn.Module:
    """A norm that ends with relu if it is fastnorm's; norm_relu() is how it is called."""
    norm = plain_norm(norm_layer, channels)
    if isinstance(norm, FusedNorm):
        norm.activation = "relu"
    return norm


def plain_norm(norm_layer: NormLayer, channels: int) -> torch.nn.Module:
    norm = norm_layer(channels)
    if not isinstance(norm, torch.nn.Module):
        raise TypeError(f"norm_layer must return a module for a number of channels, got {type(norm).__name__}")
    if getattr(norm, "activation", None) is not None:
        raise ValueError(f"norm_layer must return a norm without an activation, got {norm.activation!r}")
    return norm


def norm_relu(norm: torch.nn.Module, x: Tensor, residual: Tensor | None = None, *, own: bool = False) -> Tensor:
    """relu(norm(x) + residual), one call if the norm is fastnorm's; own: whether x was made for the norm alone."""
    if isinstance(norm, FusedNorm) and norm.activation == "relu":
        if own:
            return norm_of_own(norm, x, residual)
        return norm(x) if residual is None else norm(x, residual)
    y = norm(x)
    return nn.functional.relu(y if residual is None else y + residual)


def conv_norm_relu(conv: torch.nn.Module, norm: torch.nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(conv(x)) + residual)"""
    return norm_relu(norm, conv(x), residual, own=makes_its_result(conv))


def run_layers(layers: Iterable[torch.nn.Module], x: Tensor) -> Tensor:
    """One layer after the other; a norm may take the place of the result of the convolution before it."""
    before = None
    for layer in layers:
        own = before is not None and isinstance(layer, FusedNorm) and makes_its_result(before)
        x = norm_of_own(layer, x) if own else layer(x)
        before = layer
    return x


class Layers(nn.Sequential):
    """A Sequential whose norms may take the place of the results of the convolutions before them."""

    def forward(self, input: Tensor) -> Tensor:
        return run_layers(self, input)


def relu_after(norm: torch.nn.Module) -> torch.nn.Module:
    """What stands where torchvision's Sequential has the ReLU after a norm, so that what follows keeps its number."""
    fused = isinstance(norm, FusedNorm) and norm.activation == "relu"
    return nn.Identity() if fused else nn.ReLU(inplace=True)


def conv_relu(
    norm_layer: NormLayer | None, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0
) -> list[torch.nn.Module]:
    """Convolution, norm if there is one, relu; as the layers of a Sequential."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    if norm_layer is None:
        convolution.activation = "relu"
        return [convolution, nn.Identity()]
    norm = relu_norm(norm_layer, outputs)
    return [convolution, norm, relu_after(norm)]


class Network(nn.Module):
    """Checks the input, so that a wrong one is named rather than found by a layer far inside."""

    def __init__(self, num_classes: int, in_channels: int, smallest: int) -> None:
        super().__init__()
        name = type(self).__name__
        for what, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {what} must be a positive int, got {value!r}")
        self.num_classes, self.in_channels, self.smallest_image = num_classes, in_channels, smallest

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x is (N, in_channels, H, W) with H and W large enough."""
        if isinstance(x, fx.Proxy):
            return
        least = self.smallest_image
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] < least or x.shape[3] < least:
            raise ValueError(
                f"{type(self).__name__}: the input must be (N, {self.in_channels}, H, W) with H and W at least "
                f"{least}, got {tuple(x.shape)}"
            )


def initialise(model: nn.Module, linear_std: float | None = None) -> None:
    """torchvision's of VGG, ResNet and DenseNet: Kaiming normal, norms at identity; linear_std of linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, 0, linear_std)
            nn.init.zeros_(module.bias)


def initialise_truncated(model: nn.Module, std: float = 0.01) -> None:
    """torchvision's of GoogLeNet: a normal distribution cut off at two, which is far outside."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2, b=2)


def variants(build: Callable[..., torch.nn.Module], table: dict[str, dict[str, Any]], about: str) -> Iterable[Callable]:
    """A function for each row of a family's table: build(**row, **what its caller gives)."""
    for name, row in table.items():

        def make(*, _row: dict[str, Any] = row, **arguments: Any) -> torch.nn.Module:
            return build(**(_row | arguments))

        make.__name__ = make.__qualname__ = name
        make.__module__ = build.__module__
        make.__doc__ = f"{name}: {about} Its arguments are keywords of :class:`{build.__name__}`."
        yield make
