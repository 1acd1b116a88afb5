"""Convolution of images: function, torch.func, module.

y[n, o] = activation(bias[o] + sum over c of weight[o, c] * x[n, c]),  * the cross-correlation
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import handle_torch_function, has_torch_function

from ._library import extension, ops
from .activation import activate, check_activation
from .module import intercept, intercepted, is_plain

_forward = ops.conv2d_forward.default
_backward = ops.conv2d_backward.default
_SLOPE = 0.01  # of leaky_relu in the kernels
_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

Size2d = int | Sequence[int]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2d = 1,
    padding: Size2d | str = 0,
    dilation: Size2d = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    algorithm: str = "auto",
) -> Tensor:
    r"""Two-dimensional convolution (cross-correlation), then an optional activation.

    .. math:: y_{n,o,p,q} = \mathrm{activation}\Big(b_o + \sum_{c,k,l} w_{o,c,k,l} \;
        x_{n,\;c,\;p \cdot s_h - p_h + k \cdot d_h,\;q \cdot s_w - p_w + l \cdot d_w}\Big)

    with zeros outside of x, and c over the channels of o's group. The columns of im2col are never in memory.

    Args:
        input: (N, C, H, W) or (C, H, W), of any strides. If it or the weight is channels_last, so is the result.
            float64, float32, float16 or bfloat16; what else torch's own takes that one does.
        weight: (O, C / groups, kH, kW), of the input's dtype.
        bias: (O,), likewise. None is 0.
        stride: between windows, of height and width, or one number for both; so are the following two.
        padding: of zeros on both sides; or "valid" for none, or "same" for as much as keeps the size (stride 1).
        dilation: between the taps of a window.
        groups: channels are split into as many groups, each of which is convolved for itself.
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "elu", "sigmoid", "tanh", "silu", "gelu",
            "gelu_tanh" or "hardswish".
        algorithm: "auto" takes what measured fastest, torch's own convolution among it. "im2col" (any convolution),
            "direct" (meant for few channels), "depthwise" (one input channel per group), "winograd" and "winograd_2x2"
            (F(4x4, 3x3) and F(2x2, 3x3): 3x3, stride and dilation 1, padding up to 2) ask for one of fastnorm's,
            "torch" for torch's; in the backward pass too.

    Returns:
        Tensor of shape (N, O, H', W') or (O, H', W') with H' = floor((H + 2 padding - dilation (kH - 1) - 1) / stride)
        + 1, of the input's dtype.

    Accuracy:
        Sums are in float32 (float64 for float64) and rounded once. On the CPU, 3x3 windows with stride 1 take, but for
        few channels, Winograd's F(2x2, 3x3), which adds up a ninth of the terms and only adds, subtracts and halves
        beside it: 0.1 to 0.5 of torch's own largest error in the result, up to twice that of its gradients (of the
        largest number in them). A number's error goes with the largest pixel and weight that it sees. Where
        :func:`torch.set_float32_matmul_precision` is set to "high" or "medium", F(4x4, 3x3) is allowed too: within 3e-5
        of the largest result. If any of their sums is not finite, plain sums take their place: NaN and infinities are
        where torch has them.

    Memory:
        On the CPU, the third call that sees a weight which was not written to keeps it in the form in which the kernel
        multiplies, for later calls: 1 to 4 times its size, until it changes or dies, at most 512 MB for all weights.
        Every call compares a fingerprint of all its bits, so that it does not matter how it was written to. Training,
        which changes weights in every step, keeps nothing.

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not go together, or a window that is not possible.
        ValueError: for an unknown activation or algorithm, or one that does not compute this convolution.
        TypeError: for a stride, padding or dilation that is no int.

    Source: :func:`torch.nn.functional.conv2d`; Lavin and Gray, Fast Algorithms for Convolutional Neural Networks
    (CVPR 2016), for Winograd's.

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
        >>> y = conv2d(x, weight, padding=1, activation="relu")
        >>> torch.allclose(y, torch.conv2d(x, weight, padding=1).relu(), atol=1e-5)
        True
    """
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups,
            activation=activation, algorithm=algorithm,
        )  # fmt: skip
    check_activation("conv2d", activation)
    return _conv2d(input, weight, bias, stride, padding, dilation, groups, activation, algorithm)


def _conv2d(x, weight, bias, stride, padding, dilation, groups, activation, algorithm="auto"):
    if x.dtype not in _DTYPES:
        return activate(F.conv2d(x, weight, bias, stride, padding, dilation, groups), activation, _SLOPE)
    if isinstance(padding, str):
        x, padding = _pad(x, weight, stride, padding, dilation)
    if torch.compiler.is_compiling():
        y = _forward(
            x if x.dim() != 3 else x.unsqueeze(0), weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups,
            activation or "none", _SLOPE, algorithm,
        )  # fmt: skip
        return y if x.dim() != 3 else y.squeeze(0)
    return extension.conv2d(x, weight, bias, stride, padding, dilation, groups, activation or "none", algorithm)


def _pad(x: Tensor, weight: Tensor, stride: Size2d, padding: str, dilation: Size2d) -> tuple[Tensor, list[int]]:
    """The input and the padding on both sides that padding by name comes to."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise RuntimeError(f"conv2d: Invalid padding string: '{padding}'; it must be 'same' or 'valid'")
    if any(s != 1 for s in _pair(stride)):
        raise RuntimeError("conv2d: padding='same' is not supported for strided convolutions")
    total = [d * (k - 1) for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
    if total[0] % 2 or total[1] % 2:  # what is odd is one more below and to the right
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [t // 2 for t in total]


# ---- torch.func.vmap ------------------------------------------------------------------------------------------------


def _into_channels(batch: int, dim: int | None, t: Tensor) -> Tensor:
    """Images whose batch dimension is made part of the channels: a group, or groups, for each."""
    t = t.unsqueeze(1).expand(-1, batch, -1, -1, -1) if dim is None else t.movedim(dim, 1)
    return t.flatten(1, 2)


def _into_outputs(batch: int, dim: int | None, t: Tensor) -> Tensor:
    """Likewise of a weight or bias."""
    t = t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


@torch.library.register_vmap(_forward._schema.name)
def _vmap_forward(info, in_dims, x, weight, bias, stride, padding, dilation, groups, *rest):
    size, (x_dim, weight_dim, bias_dim, *_) = info.batch_size, in_dims
    if weight_dim is None and bias_dim is None:
        y = _forward(x.movedim(x_dim, 0).flatten(0, 1), weight, bias, stride, padding, dilation, groups, *rest)
        return y.unflatten(0, (size, -1)), 0
    x, weight = _into_channels(size, x_dim, x), _into_outputs(size, weight_dim, weight)
    bias = None if bias is None else _into_outputs(size, bias_dim, bias)
    return _forward(x, weight, bias, stride, padding, dilation, groups * size, *rest).unflatten(1, (size, -1)), 1


@torch.library.register_vmap(_backward._schema.name)
def _vmap_backward(info, in_dims, dy, x, weight, stride, padding, dilation, groups, algorithm, output_mask):
    size = info.batch_size
    dy, x = (_into_channels(size, dim, t) for dim, t in zip(in_dims[:2], (dy, x), strict=True))
    weight = _into_outputs(size, in_dims[2], weight)
    results = _backward(dy, x, weight, stride, padding, dilation, groups * size, algorithm, output_mask)
    dims = [dim if wanted else None for dim, wanted in zip((1, 0, 0), output_mask, strict=True)]
    return tuple(
        t if dim is None else t.unflatten(dim, (size, -1)) for t, dim in zip(results, dims, strict=True)
    ), tuple(dims)


# ---- Module ---------------------------------------------------------------------------------------------------------


class Conv2d(nn.Conv2d):
    """Convolution with an optional activation.

    See :func:`fastnorm.functional.conv2d` for the formula, dtypes, accuracy and errors. Everything else is
    :class:`torch.nn.Conv2d`'s, which this class is a subclass of: arguments, the four padding modes, parameters,
    initialisation, state_dict.

    Args:
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".

    Shape:
        input: (N, C, H, W) or (C, H, W); output: (N, O, H', W') or (O, H', W').

    Example:
        >>> Conv2d(3, 16, 3, padding=1, activation="relu")(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    activation: str | None = None

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if intercepted(input, None):
            return intercept(self, input)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(input, weight, bias, self.activation)

    def fused(self, input: Tensor, residual: None, activation: str | None, negative_slope: float) -> Tensor:
        """forward() with another activation than the module's own: what fastnorm.fuse calls."""
        if negative_slope != _SLOPE:
            return activate(self._convolve(input, self.weight, self.bias, None), activation, negative_slope)
        return self._convolve(input, self.weight, self.bias, activation)

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return _conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, activation)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


_FORWARDS = {cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2d)}


def makes_its_result(module: nn.Module) -> bool:
    """Whether a call of the module returns a tensor that nobody else has: a convolution, and nothing that looks on."""
    return type(module).forward in _FORWARDS and is_plain(module)
