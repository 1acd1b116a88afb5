"""AlexNet; Krizhevsky 2014, https://arxiv.org/abs/1404.5997. torchvision's key names."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ._common import Layers, Network, NormLayer, conv_relu, variants


class AlexNet(Network):
    """Five convolutions and three linear layers.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        norm_layer: channels -> module, after every convolution; None is without.
        small_images: a 5x5 convolution first instead of 11x11 with stride 4, and one feature per channel instead of
            6x6, for images of 32x32 or so.
        dropout: of the linear layers.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes), H and W at least 63 (15 for small_images)

    Raises:
        ValueError: for numbers that are not positive, or, when called, another shape.

    Example:
        >>> AlexNet(num_classes=10, small_images=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, norm_layer: NormLayer | None = None,
        small_images: bool = False, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, in_channels, 15 if small_images else 63)
        block = partial(conv_relu, norm_layer)
        self.features = Layers(
            *block(in_channels, 64, *((5, 1, 2) if small_images else (11, 4, 2))), nn.MaxPool2d(3, 2),
            *block(64, 192, 5, 1, 2), nn.MaxPool2d(3, 2),
            *block(192, 384, 3, 1, 1), *block(384, 256, 3, 1, 1), *block(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        side, hidden = (1, 512) if small_images else (6, 4096)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * side**2, hidden), nn.ReLU(inplace=True),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


VARIANTS: dict[str, dict[str, Any]] = {"alexnet": {}}
__all__ = list(VARIANTS)
globals().update({f.__name__: f for f in variants(AlexNet, VARIANTS, "five convolutions, three linear layers.")})
