"""VGG; Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556. torchvision's key names."""

from typing import Any

import torch
from torch import Tensor

from .. import nn
from ._common import Layers, Network, NormLayer, conv_relu, initialise, variants


class VGG(Network):
    """Five blocks of 3x3 convolutions, each ended by max-pooling, and three linear layers.

    Args:
        depths: convolutions of each block.
        num_classes: outputs.
        in_channels: of the images.
        norm_layer: channels -> module, after every convolution; None is without.
        small_images: one feature per channel instead of 7x7, and linear layers of 512, for images of 32x32 or so.
        dropout: of the linear layers.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes), H and W at least 32

    Raises:
        ValueError: for numbers that are not positive, or, when called, another shape.

    Example:
        >>> VGG((1, 1, 1, 1, 1), num_classes=10, small_images=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depths: tuple[int, ...], *, num_classes: int = 1000, in_channels: int = 3,
        norm_layer: NormLayer | None = None, small_images: bool = False, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, in_channels, 2 ** len(depths))
        layers: list[torch.nn.Module] = []
        channels = in_channels
        for i, depth in enumerate(depths):
            outputs = min(64 * 2**i, 512)
            for _ in range(depth):
                layers += conv_relu(norm_layer, channels, outputs, 3, padding=1)
                channels = outputs
            layers.append(nn.MaxPool2d(2, 2))
        self.features = Layers(*layers)
        side, hidden = (1, 512) if small_images else (7, 4096)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(channels * side**2, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
        initialise(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


_DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
VARIANTS: dict[str, dict[str, Any]] = {
    name + suffix: {"depths": depths, "norm_layer": norm_layer}
    for name, depths in _DEPTHS.items()
    for suffix, norm_layer in (("", None), ("_bn", nn.BatchNorm2d))
}
__all__ = list(VARIANTS)
globals().update({f.__name__: f for f in variants(VGG, VARIANTS, "a network of 3x3 convolutions.")})
