"""GoogLeNet; Szegedy et al. 2014, https://arxiv.org/abs/1409.4842. torchvision's key names.

As torchvision's: batch norm after every convolution, and 3x3 where the paper has 5x5.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nn
from ._common import Network, NormLayer, conv_norm_relu, initialise_truncated, relu_norm, variants


class GoogLeNetOutputs(NamedTuple):
    """What a GoogLeNet with auxiliary heads returns in training."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class BasicConv2d(nn.Module):
    """relu(norm(convolution))"""

    def __init__(self, inputs: int, outputs: int, norm_layer: NormLayer, **arguments: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **arguments)
        self.bn = relu_norm(norm_layer, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_relu(self.conv, self.bn, x)


class Inception(nn.Module):
    """Four paths, concatenated: 1x1; 1x1 and 3x3; 1x1 and 3x3; pooling and 1x1."""

    def __init__(
        self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        super().__init__()
        convolution = partial(BasicConv2d, norm_layer=norm_layer)
        self.branch1 = convolution(inputs, one, kernel_size=1)
        self.branch2 = nn.Sequential(
            convolution(inputs, reduce3, kernel_size=1), convolution(reduce3, three, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            convolution(inputs, reduce5, kernel_size=1), convolution(reduce5, five, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), convolution(inputs, pool, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """A head for a layer in the middle."""

    def __init__(self, inputs: int, num_classes: int, norm_layer: NormLayer, dropout: float) -> None:
        super().__init__()
        self.conv = BasicConv2d(inputs, 128, norm_layer, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(nn.functional.adaptive_avg_pool2d(x, (4, 4)))
        return self.fc2(self.dropout(nn.functional.relu(self.fc1(torch.flatten(x, 1)), inplace=True)))


# Channels: input; 1x1; 3x3 reduced, 3x3; the other 3x3 reduced, it; after pooling. A row of None is max-pooling.
INCEPTIONS: dict[str, tuple[int, ...] | None] = {
    "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64), "maxpool3": None,
    "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128), "maxpool4": None,
    "5a": (832, 256, 160, 320, 32, 128, 128), "5b": (832, 384, 192, 384, 48, 128, 128),
}  # fmt: skip


class GoogLeNet(Network):
    """Nine Inception blocks, global average pooling, one linear layer.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        norm_layer: channels -> module; batch norm with eps=1e-3 unless given.
        small_images: a 3x3 convolution first, without pooling, for images of 32x32 or so.
        aux_logits: with two auxiliary heads, whose outputs training returns too.
        transform_input: for images normalised with ImageNet's means, as torchvision's published weights want it.
        dropout, dropout_aux: before the linear layers.
        init_weights: a normal distribution; False leaves torch's own.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes); in training with auxiliary heads, GoogLeNetOutputs of three of these

    Raises:
        ValueError: for numbers that are not positive, or, when called, another shape.

    Example:
        >>> GoogLeNet(num_classes=10, aux_logits=False, init_weights=False)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, norm_layer: NormLayer | None = None,
        small_images: bool = False, aux_logits: bool = True, transform_input: bool = False, dropout: float = 0.2,
        dropout_aux: float = 0.7, init_weights: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, in_channels, 8 if small_images else 15)
        if transform_input and in_channels != 3:
            raise ValueError(f"GoogLeNet: transform_input needs in_channels=3, got {in_channels}")
        norm_layer = norm_layer or partial(nn.BatchNorm2d, eps=0.001)
        self.aux_logits, self.transform_input = aux_logits, transform_input
        first = {"kernel_size": 3, "padding": 1} if small_images else {"kernel_size": 7, "stride": 2, "padding": 3}
        self.conv1 = BasicConv2d(in_channels, 64, norm_layer, **first)
        self.maxpool1 = nn.Identity() if small_images else nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, norm_layer, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, norm_layer, kernel_size=3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        for name, channels in INCEPTIONS.items():
            if channels:
                setattr(self, f"inception{name}", Inception(*channels, norm_layer))
            else:
                kernel = 3 if name == "maxpool3" else 2
                setattr(self, name, nn.MaxPool2d(kernel, 2, ceil_mode=True))
        self.aux1 = InceptionAux(512, num_classes, norm_layer, dropout_aux) if aux_logits else None
        self.aux2 = InceptionAux(528, num_classes, norm_layer, dropout_aux) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes)
        if init_weights:
            initialise_truncated(self)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        self.check_input(x)
        if self.transform_input:
            scale = x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1) / 0.5
            shift = (x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1) - 0.5) / 0.5
            x = x * scale + shift
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.inception4a(self.maxpool3(self.inception3b(self.inception3a(x))))
        heads = self.aux_logits and self.training
        aux1 = self.aux1(x) if heads else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if heads else None
        x = self.inception5b(self.inception5a(self.maxpool4(self.inception4e(x))))
        x = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return GoogLeNetOutputs(x, aux2, aux1) if heads else x


VARIANTS: dict[str, dict[str, Any]] = {"googlenet": {}}
__all__ = list(VARIANTS)
globals().update({f.__name__: f for f in variants(GoogLeNet, VARIANTS, "nine Inception blocks.")})
