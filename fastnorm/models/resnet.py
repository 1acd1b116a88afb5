"""ResNet, ResNeXt and wide ResNet; He et al. 2015, https://arxiv.org/abs/1512.03385. torchvision's key names."""

from typing import Any

import torch
from torch import Tensor

from .. import nn
from ._common import Layers, Network, NormLayer, conv_norm_relu, initialise, plain_norm, relu_norm, variants


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    expansion = 1

    def __init__(
        self, inputs: int, planes: int, stride: int, shortcut: nn.Module | None, groups: int, width: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        super().__init__()
        if groups != 1 or width != planes:
            raise ValueError(f"BasicBlock: groups must be 1 and the width the planes, got {groups} and {width}")
        self.conv1, self.bn1 = conv(inputs, planes, 3, stride), relu_norm(norm_layer, planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), relu_norm(norm_layer, planes)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = conv_norm_relu(self.conv1, self.bn1, x)
        return conv_norm_relu(self.conv2, self.bn2, y, shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, and a shortcut."""

    expansion = 4

    def __init__(
        self, inputs: int, planes: int, stride: int, shortcut: nn.Module | None, groups: int, width: int,
        norm_layer: NormLayer,
    ) -> None:  # fmt: skip
        super().__init__()
        outputs = planes * self.expansion
        self.conv1, self.bn1 = conv(inputs, width, 1), relu_norm(norm_layer, width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, groups), relu_norm(norm_layer, width)
        self.conv3, self.bn3 = conv(width, outputs, 1), relu_norm(norm_layer, outputs)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = conv_norm_relu(self.conv1, self.bn1, x)
        y = conv_norm_relu(self.conv2, self.bn2, y)
        return conv_norm_relu(self.conv3, self.bn3, y, shortcut)


class ResNet(Network):
    """Four stages of residual blocks, global average pooling, one linear layer.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage.
        num_classes: outputs.
        in_channels: of the images.
        norm_layer: channels -> module; batch norm unless given, e.g. ``lambda c: fastnorm.GroupNorm(8, c)``.
        small_images: a 3x3 convolution instead of 7x7 with stride 2 and max-pooling, for images of 32x32 or so.
        groups, width_per_group: ResNeXt's and wide ResNet's.
        zero_init_residual: start every block as its shortcut.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes)

    Raises:
        ValueError: for numbers that are not positive, or, when called, another shape.

    Example:
        >>> ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...], *, num_classes: int = 1000,
        in_channels: int = 3, norm_layer: NormLayer = nn.BatchNorm2d, small_images: bool = False, groups: int = 1,
        width_per_group: int = 64, zero_init_residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, in_channels, 1)
        self.conv1 = conv(in_channels, 64, 3) if small_images else conv(in_channels, 64, 7, 2)
        self.bn1 = relu_norm(norm_layer, 64)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for i, depth in enumerate(depths):
            planes, blocks = 64 * 2**i, []
            width, outputs = planes * width_per_group // 64 * groups, planes * block.expansion
            for j in range(depth):
                stride, shortcut = 2 if i and not j else 1, None
                if stride > 1 or inputs != outputs:
                    shortcut = Layers(conv(inputs, outputs, 1, stride), plain_norm(norm_layer, outputs))
                blocks.append(block(inputs, planes, stride, shortcut, groups, width, norm_layer))
                inputs = outputs
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        x = self.maxpool(conv_norm_relu(self.conv1, self.bn1, x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


VARIANTS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "depths": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "depths": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "depths": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "depths": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "depths": (3, 8, 36, 3)},
    "resnext50_32x4d": {"block": Bottleneck, "depths": (3, 4, 6, 3), "groups": 32, "width_per_group": 4},
    "wide_resnet50_2": {"block": Bottleneck, "depths": (3, 4, 6, 3), "width_per_group": 128},
}
__all__ = list(VARIANTS)
globals().update({f.__name__: f for f in variants(ResNet, VARIANTS, "a residual network.")})
