"""Cases of layer norm and RMS norm: rows of transformers, channels of images, fused and plain, both directions."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastnorm
from fastnorm.functional import add_layer_norm, layer_norm, rms_norm

from .common import Case
from .norms import Bench, call_cases

# (op, shape): layer_norm_2d normalises the channels of [n, c, h, w], the others the last dimension; add_layer_norm
# returns the sum too, and both are used.
SHAPES = {
    ("layer_norm", (8192, 1024)): "BERT large, 16 sequences of 512",
    ("layer_norm", (32, 197, 768)): "ViT-B/16",
    ("layer_norm", (4096, 768)): "GPT-2, 4 sequences of 1024",
    ("layer_norm", (50176, 96)): "Swin-T, first stage",
    ("layer_norm", (64, 128)): "a small network: what a call costs",
    ("rms_norm", (8192, 1024)): "a small Llama",
    ("add_layer_norm", (32, 197, 768)): "ViT-B/16, with the shortcut",
    ("layer_norm_2d", (32, 96, 56, 56)): "ConvNeXt-T, first stage",
    ("layer_norm_2d", (32, 384, 14, 14)): "the same, third stage",
}
QUICK = (("layer_norm", (32, 197, 768)), ("rms_norm", (8192, 1024)), ("layer_norm_2d", (32, 96, 56, 56)))
FORWARD = (
    ("forward", "forward", None, False),
    ("forward + gelu", "forward", "gelu", False),
    ("forward + residual + relu", "forward", "relu", True),
)
BACKWARD = (
    ("backward", "backward", None, False),
    ("backward + residual + relu", "backward", "relu", True),
    ("both + gelu", "both", "gelu", False),
)
ADD = (("forward", "forward", None, True), ("backward", "backward", None, True), ("both", "both", None, True))


def _eager(x, weight, bias, activation, residual, *, op):
    if op == "add_layer_norm":
        h = x + residual
        return F.layer_norm(h, weight.shape, weight, bias) + h
    if op == "layer_norm_2d":
        y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
    elif op == "rms_norm":
        y = F.rms_norm(x, weight.shape, weight, 1e-5)
    else:
        y = F.layer_norm(x, weight.shape, weight, bias)
    y = y if residual is None else y + residual
    return getattr(F, activation)(y) if activation else y


def _ours(x, weight, bias, activation, residual, *, op, modules):
    if op == "add_layer_norm":
        y, h = add_layer_norm(x, residual, weight.shape, weight, bias)
        return y + h
    if op == "layer_norm_2d":
        return torch.func.functional_call(modules[activation], {"weight": weight, "bias": bias}, (x, residual))
    if op == "rms_norm":
        return rms_norm(x, weight.shape, weight, 1e-5, activation=activation, residual=residual)
    return layer_norm(x, weight.shape, weight, bias, activation=activation, residual=residual)


def cases(device: str, dtype: str, layout: str, against: list[str], quick: bool = False) -> Iterator[Case]:
    """Every case of a device, dtype and layout ("nchw" or "nhwc"); quick: what the demo shows."""
    for op, shape in QUICK if quick else SHAPES:
        if layout == "nhwc" and len(shape) < 4:
            continue
        columns = shape[1] if op == "layer_norm_2d" else shape[-1]
        modules = {a: fastnorm.LayerNorm2d(columns, activation=a) for a in (None, "relu", "gelu")}
        bench = Bench(op, shape, (columns,), device, dtype, layout, against, bias=op != "rms_norm")

        def ours(*args, op=op, modules=modules):
            return _ours(*args, op=op, modules=modules)

        def eager(*args, op=op):
            return _eager(*args, op=op)

        yield from bench.cases(ours, eager, ADD if op == "add_layer_norm" else FORWARD if quick else FORWARD + BACKWARD)
    if layout == "nchw" and not quick:
        for name in ("LayerNorm", "RMSNorm"):
            modules = (getattr(package, name)(8) for package in (fastnorm, torch.nn))
            yield from call_cases(name, (4, 8), *modules, device, dtype, against)
