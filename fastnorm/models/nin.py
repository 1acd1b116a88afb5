"""Network in network; Lin, Chen and Yan 2013, https://arxiv.org/abs/1312.4400."""

from typing import Any

import torch
from torch import Tensor

from .. import nn
from ._common import Layers, Network, NormLayer, conv_relu, variants


class NiN(Network):
    """Convolutions of 11x11, 5x5 and 3x3, two 1x1 after each; the last block has a channel for each class, averaged.

    Args:
        num_classes: outputs.
        in_channels: of the images.
        norm_layer: channels -> module, after every convolution; None is without.
        small_images: a 5x5 convolution first instead of 11x11 with stride 4, for images of 32x32 or so.
        dropout: before the last block.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes), H and W at least 67 (15 for small_images)

    Raises:
        ValueError: for numbers that are not positive, or, when called, another shape.

    Example:
        >>> NiN(num_classes=10, small_images=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, norm_layer: NormLayer | None = None,
        small_images: bool = False, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, in_channels, 15 if small_images else 67)

        def block(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[torch.nn.Module]:
            layers = conv_relu(norm_layer, inputs, outputs, kernel, stride, padding)
            for _ in range(2):
                layers += conv_relu(norm_layer, outputs, outputs, 1)
            return layers

        self.features = Layers(
            *block(in_channels, 96, *((5, 1, 2) if small_images else (11, 4, 0))), nn.MaxPool2d(3, 2),
            *block(96, 256, 5, 1, 2), nn.MaxPool2d(3, 2),
            *block(256, 384, 3, 1, 1), nn.MaxPool2d(3, 2), nn.Dropout(dropout),
            *block(384, num_classes, 3, 1, 1),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return torch.flatten(self.avgpool(self.features(x)), 1)


VARIANTS: dict[str, dict[str, Any]] = {"nin": {}}
__all__ = list(VARIANTS)
globals().update({f.__name__: f for f in variants(NiN, VARIANTS, "network in network.")})
