"""DenseNet; Huang et al. 2016, https://arxiv.org/abs/1608.06993. torchvision's key names."""

import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..module import is_plain_inference
from ._common import Layers, Network, NormLayer, conv_norm_relu, initialise, norm_relu, relu_after, relu_norm, variants


class DenseLayer(nn.Module):
    """What a layer adds to the features before it: norm, relu, 1x1 and norm, relu, 3x3 of their concatenation."""

    def __init__(self, inputs: int, growth: int, bottleneck: int, dropout: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm1 = relu_norm(norm_layer, inputs)
        self.conv1 = nn.Conv2d(inputs, bottleneck * growth, 1, bias=False)
        self.norm2 = relu_norm(norm_layer, bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: list[Tensor] | Tensor) -> Tensor:
        if isinstance(features, Tensor):
            x = norm_relu(self.norm1, features)
        else:
            x = norm_relu(self.norm1, torch.cat(features, 1), own=True)
        return self.dropout(self.conv2(conv_norm_relu(self.conv1, self.norm2, x)))


class DenseBlock(nn.ModuleDict):
    """Every layer sees the features of all before it."""

    def __init__(
        self, depth: int, inputs: int, growth: int, bottleneck: int, dropout: float, norm_layer: NormLayer
    ) -> None:  # fmt: skip
        super().__init__(
            {
                f"denselayer{i + 1}": DenseLayer(inputs + i * growth, growth, bottleneck, dropout, norm_layer)
                for i in range(depth)
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and is_plain_inference(x) and not torch.is_autocast_enabled("cpu"):
            return self.infer(x)
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def infer(self, x: Tensor) -> Tensor:
        """The same with all features in one place, which nothing else needs: norms read them there."""
        n, seen, *size = x.shape
        channels = seen + sum(layer.conv2.out_channels for layer in self.values())
        features = torch.empty(
            (n, channels, *size), dtype=x.dtype, memory_format=torch._prims_common.suggest_memory_format(x)
        )
        features[:, :seen] = x
        for layer in self.values():
            new = layer(features[:, :seen])
            features[:, seen : seen + new.shape[1]] = new
            seen += new.shape[1]
        return features


def transition(inputs: int, outputs: int, norm_layer: NormLayer) -> nn.Sequential:
    """Fewer channels, and half the size."""
    norm = relu_norm(norm_layer, inputs)
    return nn.Sequential(OrderedDict(
        norm=norm, relu=relu_after(norm), conv=nn.Conv2d(inputs, outputs, 1, bias=False), pool=nn.AvgPool2d(2, 2)
    ))  # fmt: skip


class DenseNet(Network):
    """Four dense blocks with transitions between them, global average pooling, one linear layer.

    Args:
        growth: channels that each layer adds.
        depths: layers of each block.
        first: channels of the first convolution.
        num_classes: outputs.
        in_channels: of the images.
        norm_layer: channels -> module; batch norm unless given.
        small_images: a 3x3 convolution first instead of 7x7 with stride 2 and max-pooling, for images of 32x32 or so.
        bottleneck: channels of the 1x1 convolutions, in multiples of growth.
        drop_rate: of what a layer adds.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes), H and W at least 29 (8 for small_images)

    Raises:
        ValueError: for numbers that are not positive, or, when called, another shape.

    Example:
        >>> DenseNet(8, (1, 1, 1, 1), 16, num_classes=10)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, growth: int, depths: tuple[int, ...], first: int, *, num_classes: int = 1000, in_channels: int = 3,
        norm_layer: NormLayer = nn.BatchNorm2d, small_images: bool = False, bottleneck: int = 4, drop_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(num_classes, in_channels, 2 ** (len(depths) - 1) if small_images else 29)
        kernel = {"kernel_size": 3, "padding": 1} if small_images else {"kernel_size": 7, "stride": 2, "padding": 3}
        norm = relu_norm(norm_layer, first)
        layers: OrderedDict[str, torch.nn.Module] = OrderedDict(
            conv0=nn.Conv2d(in_channels, first, bias=False, **kernel), norm0=norm, relu0=relu_after(norm),
            pool0=nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        channels = first
        for i, depth in enumerate(depths):
            layers[f"denseblock{i + 1}"] = DenseBlock(depth, channels, growth, bottleneck, drop_rate, norm_layer)
            channels += depth * growth
            if i + 1 < len(depths):
                layers[f"transition{i + 1}"] = transition(channels, channels // 2, norm_layer)
                channels //= 2
        norm = relu_norm(norm_layer, channels)
        layers["norm5"], layers["relu5"] = norm, relu_after(norm)
        self.features = Layers(layers)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)
        nn.init.zeros_(self.classifier.bias)
        self.register_load_state_dict_pre_hook(_rename_published_keys)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        x = nn.functional.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


def _rename_published_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """torchvision's published files write norm.1 and conv.1 of a dense layer where its class says norm1 and conv1."""
    pattern = re.compile(re.escape(prefix) + r".*denselayer\d+\.(?:norm|conv)\.[12]\.")
    for key in [k for k in state_dict if pattern.match(k)]:
        state_dict[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = state_dict.pop(key)


VARIANTS: dict[str, dict[str, Any]] = {
    "densenet121": {"growth": 32, "depths": (6, 12, 24, 16), "first": 64},
    "densenet161": {"growth": 48, "depths": (6, 12, 36, 24), "first": 96},
    "densenet169": {"growth": 32, "depths": (6, 12, 32, 32), "first": 64},
    "densenet201": {"growth": 32, "depths": (6, 12, 48, 32), "first": 64},
}
__all__ = list(VARIANTS)
globals().update({f.__name__: f for f in variants(DenseNet, VARIANTS, "a densely connected network.")})
