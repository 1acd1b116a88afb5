"""torchvision's networks written out in torch.nn, with its key names and default initialisation left out."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class Classifier(nn.Module):
    """features, avgpool, classifier: VGG and AlexNet."""

    def __init__(self, features, side, classifier):
        super().__init__()
        self.features, self.avgpool, self.classifier = features, nn.AdaptiveAvgPool2d(side), classifier

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg(depths, norm, small, classes):
    layers, channels = [], 3
    for i, depth in enumerate(depths):
        for _ in range(depth):
            outputs = (64, 128, 256, 512, 512)[i]
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [nn.ReLU()]
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    side, hidden = (1, 512) if small else (7, 4096)
    return Classifier(nn.Sequential(*layers), side, nn.Sequential(
        nn.Linear(512 * side**2, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, classes),
    ))  # fmt: skip


def alexnet(small, classes):
    side, hidden = (1, 512) if small else (6, 4096)
    first = nn.Conv2d(3, 64, 5, padding=2) if small else nn.Conv2d(3, 64, 11, 4, 2)
    return Classifier(
        nn.Sequential(
            first, nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        ), side, nn.Sequential(
            nn.Dropout(), nn.Linear(256 * side**2, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden),
            nn.ReLU(), nn.Linear(hidden, classes),
        ),
    )  # fmt: skip


class Residual(nn.Module):
    """kernels: (3, 3), or (1, 3, 1) with the stride at the 3."""

    def __init__(self, inputs, width, outputs, stride, kernels, groups):
        super().__init__()
        self.count, channels = len(kernels), inputs
        strided = kernels.index(3)
        for i, k in enumerate(kernels):
            out = outputs if i + 1 == self.count else width
            g = groups if k == 3 else 1
            conv = nn.Conv2d(channels, out, k, stride if i == strided else 1, k // 2, groups=g, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(out))
            channels = out
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y) if i < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, kernels, depths, classes, groups=1, base=64, small=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(64), nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels = 64
        for i, depth in enumerate(depths):
            planes = 64 * 2**i
            width, outputs, blocks = planes * base // 64 * groups, planes * (4 if len(kernels) == 3 else 1), []
            for j in range(depth):
                blocks.append(Residual(channels, width, outputs, 2 if i and not j else 1, kernels, groups))
                channels = outputs
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class Unit(nn.Module):
    def __init__(self, inputs, outputs, *args):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, *args, bias=False), nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    def __init__(self, n, a, b, c, d, e, f):
        super().__init__()
        self.branch1 = Unit(n, a, 1)
        self.branch2 = nn.Sequential(Unit(n, b, 1), Unit(b, c, 3, 1, 1))
        self.branch3 = nn.Sequential(Unit(n, d, 1), Unit(d, e, 3, 1, 1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), Unit(n, f, 1))

    def forward(self, x):
        return torch.cat([getattr(self, f"branch{i}")(x) for i in range(1, 5)], 1)


class Head(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.conv, self.fc1, self.fc2 = Unit(inputs, 128, 1), nn.Linear(2048, 1024), nn.Linear(1024, classes)
        self.dropout = nn.Dropout(0.7)

    def forward(self, x):
        x = self.conv(F.adaptive_avg_pool2d(x, 4)).flatten(1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class GoogLeNet(nn.Module):
    def __init__(self, classes, aux=True, small=False):
        super().__init__()
        self.aux, self.small = aux, small
        self.conv1 = Unit(3, 64, 3, 1, 1) if small else Unit(3, 64, 7, 2, 3)
        self.conv2, self.conv3 = Unit(64, 64, 1), Unit(64, 192, 3, 1, 1)
        rows = {
            "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64),
            "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
            "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
            "4e": (528, 256, 160, 320, 32, 128, 128), "5a": (832, 256, 160, 320, 32, 128, 128),
            "5b": (832, 384, 192, 384, 48, 128, 128),
        }  # fmt: skip
        for name, row in rows.items():
            setattr(self, f"inception{name}", Inception(*row))
        if aux:
            self.aux1, self.aux2 = Head(512, classes), Head(528, classes)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(1024, classes)

    def forward(self, x):
        def pool(x, kernel=3):
            return F.max_pool2d(x, kernel, 2, ceil_mode=True)

        x = self.conv1(x)
        x = pool(self.conv3(self.conv2(x if self.small else pool(x))))
        x = self.inception4a(pool(self.inception3b(self.inception3a(x))))
        heads = [self.aux1(x)] if self.aux and self.training else []
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        heads += [self.aux2(x)] if self.aux and self.training else []
        x = self.inception5b(self.inception5a(pool(self.inception4e(x), 2))).mean((2, 3))
        x = self.fc(self.dropout(x))
        return (x, *heads[::-1]) if heads else x


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.Module):
    def __init__(self, depth, inputs, growth):
        super().__init__()
        for i in range(depth):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, x):
        features = [x]
        for layer in self.children():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, growth, depths, channels, classes, small=False):
        super().__init__()
        first = (nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.Identity()) if small else (
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1))  # fmt: skip
        layers = OrderedDict(conv0=first[0], norm0=nn.BatchNorm2d(channels), relu0=nn.ReLU(), pool0=first[1])
        for i, depth in enumerate(depths):
            layers[f"denseblock{i + 1}"] = DenseBlock(depth, channels, growth)
            channels += depth * growth
            if i + 1 < len(depths):
                layers[f"transition{i + 1}"] = nn.Sequential(OrderedDict(
                    norm=nn.BatchNorm2d(channels), relu=nn.ReLU(),
                    conv=nn.Conv2d(channels, channels // 2, 1, bias=False), pool=nn.AvgPool2d(2),
                ))  # fmt: skip
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features, self.classifier = nn.Sequential(layers), nn.Linear(channels, classes)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


_BASIC, _BOTTLENECK = (3, 3), (1, 3, 1)
_VGG = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_RESNET = {
    "resnet18": (_BASIC, (2, 2, 2, 2)), "resnet34": (_BASIC, (3, 4, 6, 3)), "resnet50": (_BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (_BOTTLENECK, (3, 4, 23, 3)), "resnet152": (_BOTTLENECK, (3, 8, 36, 3)),
    "resnext50_32x4d": (_BOTTLENECK, (3, 4, 6, 3), 32, 4), "wide_resnet50_2": (_BOTTLENECK, (3, 4, 6, 3), 1, 128),
}  # fmt: skip
_DENSENET = {
    "densenet121": (32, (6, 12, 24, 16), 64), "densenet161": (48, (6, 12, 36, 24), 96),
    "densenet169": (32, (6, 12, 32, 32), 64), "densenet201": (32, (6, 12, 48, 32), 64),
}  # fmt: skip
NAMES = ["alexnet", "googlenet", *_VGG, *(f"{n}_bn" for n in _VGG), *_RESNET, *_DENSENET]


def twin(name, classes=1000, small=False):
    """torchvision's network of that name."""
    if name == "alexnet":
        return alexnet(small, classes)
    if name == "googlenet":
        return GoogLeNet(classes, small=small)
    if name.startswith("vgg"):
        return vgg(_VGG[name.removesuffix("_bn")], name.endswith("_bn"), small, classes)
    if name in _RESNET:
        kernels, depths, *widths = _RESNET[name]
        return ResNet(kernels, depths, classes, *widths, small=small)
    return DenseNet(*_DENSENET[name], classes, small=small)
