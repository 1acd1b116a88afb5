"""Networks as users write them, in torch.nn: what convert, fuse and save_memory are tried on."""

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResidualNet(nn.Module):
    """Ends with a norm whose activation is in the parent's forward."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.layers = nn.Sequential(ResidualBlock(8, 8), ResidualBlock(8, 16, 2))
        self.last = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = F.relu(self.last(self.layers(self.stem(x))))
        return self.head(F.dropout(x.mean((2, 3)), 0.0, self.training))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth=4):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, growth, 3, padding=1, bias=False)
        self.drop_rate = 0.0

    def forward(self, input):
        features = [input] if isinstance(input, torch.Tensor) else input
        new = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        new = self.conv2(self.relu2(self.norm2(new)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class DenseNet(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * i) for i in range(3))
        self.norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, classes)

    def forward(self, x):
        features = [self.first(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class UNet(nn.Module):
    """GroupNorm and SiLU, with skip connections that are concatenated."""

    def __init__(self, channels=8, classes=5):
        super().__init__()

        def double(inputs, outputs):
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(),
            )  # fmt: skip

        self.down = nn.ModuleList([double(3, channels), double(channels, 2 * channels)])
        self.bottom = double(2 * channels, 4 * channels)
        self.lift = nn.ModuleList([
            nn.ConvTranspose2d(4 * channels, 2 * channels, 2, 2), nn.ConvTranspose2d(2 * channels, channels, 2, 2),
        ])  # fmt: skip
        self.up = nn.ModuleList([double(4 * channels, 2 * channels), double(2 * channels, channels)])
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, x):
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for lift, stage in zip(self.lift, self.up, strict=True):
            x = stage(torch.cat([lift(x), skips.pop()], 1))
        return self.head(x).mean((2, 3))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.act, self.project = (
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(self.act(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class Transformer(nn.Module):
    """torch's encoder layers over patches; the last norm is followed by an activation."""

    def __init__(self, classes=5):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, classes)

    def forward(self, x):
        x = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(F.gelu(self.norm(x), approximate="tanh").mean(1))


FAMILIES = {c.__name__: c for c in (ResidualNet, DenseNet, UNet, ConvNeXt, Transformer)}


def train(model, steps=3, optimizer=torch.optim.SGD, size=16, batch=4):
    """The losses of a few steps on made-up data; in the model's dtype."""
    optimizer = optimizer(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    dtype, losses = next(model.parameters()).dtype, []
    for _ in range(steps):
        x = torch.randn(batch, 3, size, size, generator=generator, dtype=dtype)
        target = torch.randint(5, (batch,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


_left_groups = []


def leave_process_group():
    """Its destructor waits for gloo's threads with the interpreter lock held, which they may want: so it stays."""
    _left_groups.append(torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()


def losses_in_a_process_group(folder, build, change):
    """Of a model in DistributedDataParallel: unchanged, changed before it is wrapped, and changed inside of it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        losses = []
        for order in ("never", "before", "after"):
            torch.manual_seed(0)
            model = build()
            if order == "before":
                change(model)
            wrapped = nn.parallel.DistributedDataParallel(model)
            if order == "after":
                change(wrapped)
            losses.append(train(wrapped))
        return losses
    finally:
        leave_process_group()
