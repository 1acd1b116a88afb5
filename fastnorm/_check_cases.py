"""What there is to check of each operator: a further one adds itself to CHECKS by one :class:`OpCheck`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._library import ops
from .activation import ACTIVATIONS, activate
from .avg_pool2d import avg_pool2d
from .batch_norm import batch_norm
from .conv2d import conv2d
from .group_norm import group_norm
from .layer_norm import LayerNorm2d, add_layer_norm, layer_norm, rms_norm
from .max_pool2d import max_pool2d, max_unpool2d
from .nms import batched_nms

FORMATS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One way to call an operator: the same inputs for fastnorm's function and for torch's."""

    name: str
    inputs: tuple[Tensor, ...]
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    small: tuple[slice, ...] = (slice(2), slice(None), slice(2), slice(2))  # of the inputs, for numerical gradients


@dataclass(frozen=True)
class OpCheck:
    """What there is to check of an operator.

    Attributes:
        cases: (device, dtype) -> Cases whose inputs are differentiable.
        operators: (device, dtype) -> (operator, arguments) for torch.library.opcheck.
        exact: (device, dtype) -> functions that raise where a result is not the one there is: what has no gradients.
    """

    cases: Callable[[str, torch.dtype], Iterable[Case]]
    operators: Callable[[str, torch.dtype], Iterable[tuple[object, tuple]]]
    exact: Callable[[str, torch.dtype], Iterable[Callable[[], None]]] = lambda device, dtype: ()


def _random(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function that makes tensors, which are the same numbers in every dtype."""

    def tensor(*shape: int, format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).contiguous(memory_format=format)

    return tensor


def _batch_norm_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    c = 5
    for activation, residual, training, layout in itertools.product(
        (None, *ACTIVATIONS), (False, True), (True, False), FORMATS
    ):
        tensor, format = _random(device, dtype), FORMATS[layout]

        inputs = (tensor(4, c, 3, 5, format=format), tensor(c), tensor(c))
        if residual:
            inputs += (tensor(4, c, 3, 5, format=format),)
        running = (tensor(c), tensor(c).square() + 0.5)

        # Copies, as functional and double differentiation call this many times.
        def function(x, weight, bias, residual=None, training=training, activation=activation, running=running):
            mean, var = (t.clone() for t in running)
            return batch_norm(x, mean, var, weight, bias, training, activation=activation, residual=residual)

        def reference(x, weight, bias, residual=None, training=training, activation=activation, running=running):
            mean, var = (t.to(x.dtype, copy=True) for t in running)
            z = F.batch_norm(x, mean, var, weight, bias, training)
            return activate(z if residual is None else z + residual, activation, 0.01)

        mode = "training" if training else "evaluation"
        name = f"{mode} {layout} {activation}{' residual' if residual else ''}"
        yield Case(name, inputs, function, reference)


def _batch_norm_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    x, residual, dy = (torch.randn(4, 5, 3, 3, device=device, dtype=dtype) for _ in range(3))
    weight, bias, mean = (torch.randn(5, device=device, dtype=dtype) for _ in range(3))
    var, count = mean.square() + 0.5, torch.zeros((), dtype=torch.long, device=device)
    for training in (True, False):
        forward = (x, residual, weight, bias, mean, var, count, training, 0.1, 1e-5, "silu", 0.01, False)
        operator = ops.batch_norm_forward.default if training else ops.batch_norm_forward.frozen
        _, stats, mask = operator(*forward)
        yield operator, forward
        backward = (dy, x, residual, weight, bias, stats, mask, training, 1e-5, "silu", 0.01, [True] * 4)
        yield ops.batch_norm_backward.default, backward
        yield ops.batch_norm_backward_.default, (dy.clone(), *backward[1:])
    yield ops.batch_norm_statistics.default, (x,)
    means = torch.randn(2, 5, device=device, dtype=torch.float64)
    yield ops.batch_norm_backward_elementwise.default, (dy, x, weight, stats, means)


def _conv2d_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    windows = {  # of 4 channels: weight's shape, stride, padding, dilation, groups
        "3x3": ((6, 4, 3, 3), 1, 1, 1, 1),
        "3x3 s2": ((6, 4, 3, 3), 2, 1, 1, 1),
        "1x1": ((5, 4, 1, 1), 1, 0, 1, 1),
        "dilated groups": ((6, 2, 3, 2), 1, (2, 1), 2, 2),
        "depthwise": ((4, 1, 3, 3), 1, 1, 1, 4),
    }
    algorithms = ("auto", "im2col")
    for (name, (shape, *window)), algorithm, layout in itertools.product(windows.items(), algorithms, FORMATS):
        tensor = _random(device, dtype)
        for activation in (None, *ACTIVATIONS) if name == "3x3" else (None,):

            def function(x, weight, bias, window=window, activation=activation, algorithm=algorithm):
                return conv2d(x, weight, bias, *window, activation=activation, algorithm=algorithm)

            def reference(x, weight, bias, window=window, activation=activation):
                return activate(F.conv2d(x, weight, bias, *window), activation, 0.01)

            inputs = (tensor(2, 4, 6, 7, format=FORMATS[layout]), tensor(*shape), tensor(shape[0]))
            yield Case(f"{name} {layout} {algorithm} {activation}", inputs, function, reference, (slice(None),))


def _conv2d_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    x, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((2, 4, 6, 7), (6, 2, 3, 3), (6,)))
    for algorithm in ("auto", "im2col"):
        config = ([2, 1], [1, 1], [1, 1], 2)
        y = ops.conv2d_forward.default(x, weight, bias, *config, "relu", 0.01, algorithm)
        yield ops.conv2d_forward.default, (x, weight, bias, *config, "relu", 0.01, algorithm)
        yield ops.conv2d_backward.default, (y, x, weight, *config, algorithm, [True] * 3)


def _group_norm_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    c = 6
    for activation, residual, groups, layout in itertools.product((None, *ACTIVATIONS), (False, True), (2, c), FORMATS):
        tensor, format = _random(device, dtype), FORMATS[layout]

        inputs = (tensor(4, c, 3, 5, format=format), tensor(c), tensor(c))
        if residual:
            inputs += (tensor(4, c, 3, 5, format=format),)

        def function(x, weight, bias, residual=None, groups=groups, activation=activation):
            return group_norm(x, groups, weight, bias, activation=activation, residual=residual)

        def reference(x, weight, bias, residual=None, groups=groups, activation=activation):
            z = F.group_norm(x, groups, weight, bias)
            return activate(z if residual is None else z + residual, activation, 0.01)

        name = f"{groups} groups {layout} {activation}{' residual' if residual else ''}"
        yield Case(name, inputs, function, reference)


def _group_norm_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    x, residual, dy = (torch.randn(4, 6, 3, 3, device=device, dtype=dtype) for _ in range(3))
    weight, bias = (torch.randn(6, device=device, dtype=dtype) for _ in range(2))
    config = (2, 1e-5, "silu", 0.01)
    forward = (x, residual, weight, bias, *config, False)
    _, stats, mask = ops.group_norm_forward.default(*forward)
    yield ops.group_norm_forward.default, forward
    yield ops.group_norm_backward.default, (dy, x, residual, weight, bias, stats, mask, *config, [True] * 4)


def _layer_norm_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    tensor, columns = _random(device, dtype), 37
    for norm, activation, residual in itertools.product(
        ("layer norm", "rms norm", "sum"), (None, *ACTIVATIONS), (False, True)
    ):
        if norm == "sum" and not residual:
            continue
        inputs = (tensor(4, 3, columns), tensor(columns), tensor(columns))
        if residual:
            inputs += (tensor(4, 3, columns),)

        def function(x, weight, bias, residual=None, norm=norm, activation=activation):
            if norm == "sum":
                y, h = add_layer_norm(x, residual, weight.shape, weight, bias, activation=activation)
                return y + h
            if norm == "rms norm":
                return rms_norm(x, weight.shape, weight + bias, 1e-5, activation=activation, residual=residual)
            return layer_norm(x, weight.shape, weight, bias, activation=activation, residual=residual)

        def reference(x, weight, bias, residual=None, norm=norm, activation=activation):
            if norm == "sum":
                h = x + residual
                return activate(F.layer_norm(h, weight.shape, weight, bias), activation, 0.01) + h
            if norm == "rms norm":
                z = F.rms_norm(x, weight.shape, weight + bias, 1e-5)
            else:
                z = F.layer_norm(x, weight.shape, weight, bias)
            return activate(z if residual is None else z + residual, activation, 0.01)

        name = f"{norm} {activation}{' residual' if residual else ''}"
        yield Case(name, inputs, function, reference, (slice(2), slice(2), slice(None)))
    for layout, activation in itertools.product(FORMATS, (None, *ACTIVATIONS)):
        norm = LayerNorm2d(5, activation=activation, device=device)
        inputs = (tensor(4, 5, 3, 5, format=FORMATS[layout]), tensor(5), tensor(5))

        def function(x, weight, bias, norm=norm):
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

        def reference(x, weight, bias, activation=activation):
            z = F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias).movedim(-1, 1)
            return activate(z, activation, 0.01)

        yield Case(f"channels {layout} {activation}", inputs, function, reference)


def _layer_norm_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    for shape, dim, columns in (((4, 3, 5), -1, 5), ((4, 5, 3, 3), 1, 5)):
        x, addend, residual, dy, dsum = (torch.randn(shape, device=device, dtype=dtype) for _ in range(5))
        weight, bias = (torch.randn(columns, device=device, dtype=dtype) for _ in range(2))
        for rms in (False, True):
            config = ([columns], dim, rms, 1e-5, "silu", 0.01)
            forward = (x, addend, residual, weight, bias, *config, False)
            _, h, stats, mask = ops.layer_norm_forward.default(*forward)
            yield ops.layer_norm_forward.default, forward
            backward = (dy, h, residual, weight, bias, stats, mask, dsum, *config, [True] * 4)
            yield ops.layer_norm_backward.default, backward


def _avg_pool2d_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    windows = {"2x2 s2": (2,), "3x3 s1": (3, 1, 1), "3x3 s2": ((3, 2), 2, 1, True, False), "whole": (8,)}
    for (name, window), layout in itertools.product(windows.items(), FORMATS):
        inputs = (_random(device, dtype)(2, 8, 8, 8, format=FORMATS[layout]),)

        def function(x, window=window):
            return avg_pool2d(x, *window)

        def reference(x, window=window):
            return F.avg_pool2d(x, *window)

        yield Case(f"{name} {layout}", inputs, function, reference, (slice(2), slice(2)))


def _avg_pool2d_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    x, window = torch.randn(2, 4, 6, 8, device=device, dtype=dtype), ([3], [2], [1], True, False, None)
    yield ops.avg_pool2d_forward.default, (x, *window)
    yield ops.avg_pool2d_backward.default, (F.avg_pool2d(x, *window), 6, 8, *window, False)


def _max_pool2d_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    windows = {"3x3 s2": (3, 2, 1), "2x2 s2": (2,), "3x3 s1": (3, 1, 1), "dilated": ((3, 2), 1, 1, 2, True)}
    for (name, window), layout in itertools.product(windows.items(), FORMATS):
        values = torch.randperm(2 * 8 * 8 * 8, dtype=torch.float64).view(2, 8, 8, 8) / 1024 - 0.5  # none are close
        inputs = (values.to(device, dtype).contiguous(memory_format=FORMATS[layout]),)

        def function(x, window=window):
            return max_pool2d(x, *window)

        def reference(x, window=window):
            return F.max_pool2d(x, *window)

        yield Case(f"{name} {layout}", inputs, function, reference, (slice(2), slice(2)))


def _max_pool2d_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    x, window = torch.randn(2, 4, 6, 8, device=device, dtype=dtype), ([3], [2], [1], [1])
    yield ops.max_pool2d_forward.default, (x, *window, False, False, True)
    y, offset, _ = ops.max_pool2d_forward.default(x, *window, False, True, False)
    yield ops.max_pool2d_backward.default, (y, offset, 6, 8, *window, False)


def _max_unpool2d_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for layout in FORMATS:
        format = FORMATS[layout]
        pooled, indices = F.max_pool2d(_random(device, dtype)(2, 4, 8, 8, format=format), 2, return_indices=True)

        def function(x, indices=indices):
            return max_unpool2d(x, indices[: x.shape[0], : x.shape[1]], 2)

        def reference(x, indices=indices):
            return F.max_unpool2d(x, indices[: x.shape[0], : x.shape[1]], 2)

        yield Case(layout, (pooled,), function, reference, (slice(2), slice(2)))


def _max_unpool2d_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    y, indices = F.max_pool2d(torch.randn(2, 4, 8, 8, device=device, dtype=dtype), 2, return_indices=True)
    yield ops.max_unpool2d.default, (y, indices, [8, 8])


def _boxes(n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes; about half of the boxes overlap one with a higher score."""
    corner, size = torch.rand(n, 2) * 6 * n**0.5, torch.rand(n, 2) * 20 + 5
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(n)
    return boxes.to(device, dtype), scores.to(device, dtype), torch.randint(3, (n,), device=device)


def _nms_results(device: str, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    for n in (1, 70, 1100):

        def compare(n=n):
            boxes, scores, idxs = _boxes(n, device, dtype)
            keep, expected = batched_nms(boxes, scores, idxs, 0.4).tolist(), []
            boxes = boxes.cpu() if dtype == torch.float64 else boxes.cpu().float()
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            left = scores.cpu().sort(descending=True, stable=True)[1]
            while left.numel():
                best, left = left[0], left[1:]
                expected.append(best.item())
                low, high = boxes[left, :2].maximum(boxes[best, :2]), boxes[left, 2:].minimum(boxes[best, 2:])
                both = (high - low).clamp(min=0).prod(1)
                iou = both / (areas[best] + areas[left] - both)
                left = left[~((iou.double() > 0.4) & (idxs[left] == idxs[best]).cpu())]
            if keep != expected:
                raise AssertionError(f"of {n} boxes others are kept than by comparing them one by one")

        yield compare


def _nms_operators(device: str, dtype: torch.dtype) -> Iterator[tuple[object, tuple]]:
    boxes, scores, idxs = _boxes(40, device, dtype)
    for segments, score_threshold, max_output in ((None, None, None), (idxs, 0.2, 10)):
        yield ops.nms.default, (boxes, scores, segments, 0.4, score_threshold, max_output)
        rows = (boxes.view(2, 20, 4), scores.view(2, 20), None if segments is None else segments.view(2, 20))
        yield ops.nms_padded.default, (*rows, 0.4, score_threshold, 7)
        yield ops.soft_nms.default, (boxes, scores, segments, segments is None, 0.4, 0.5, 0.1, max_output)


def _no_cases(device: str, dtype: torch.dtype) -> tuple[Case, ...]:
    return ()


CHECKS: dict[str, OpCheck] = {
    "avg_pool2d": OpCheck(_avg_pool2d_cases, _avg_pool2d_operators),
    "batch_norm": OpCheck(_batch_norm_cases, _batch_norm_operators),
    "conv2d": OpCheck(_conv2d_cases, _conv2d_operators),
    "group_norm": OpCheck(_group_norm_cases, _group_norm_operators),
    "layer_norm": OpCheck(_layer_norm_cases, _layer_norm_operators),
    "max_pool2d": OpCheck(_max_pool2d_cases, _max_pool2d_operators),
    "max_unpool2d": OpCheck(_max_unpool2d_cases, _max_unpool2d_operators),
    "nms": OpCheck(_no_cases, _nms_operators, _nms_results),
}
