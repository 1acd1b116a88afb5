"""Max-pooling of images and its partial inverse: functions, torch.func, modules.

y[o] = max over the taps t of x[o * stride - padding + t * dilation], in both directions
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._library import extension, ops
from .module import intercept, intercepted
from .pool import DTYPES, Size2d, fold, unfold

_forward = ops.max_pool2d_forward.default
_backward = ops.max_pool2d_backward.default
_unpool = ops.max_unpool2d.default


def max_pool2d(
    input: Tensor,
    kernel_size: Size2d,
    stride: Size2d | None = None,
    padding: Size2d = 0,
    dilation: Size2d = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The maximum of every window of an image. For a gradient it keeps one byte per output, and not the input.

    .. math:: y_{o,p} = \max_{k,l} x_{o \cdot s_h - p_h + k \cdot d_h,\; p \cdot s_w - p_w + l \cdot d_w}

    over the taps that are inside of x. As in torch, of equal values the first in the window counts, and of several NaNs
    the last.

    Args:
        input: (N, C, H, W) or (C, H, W), of any strides. channels_last is kept. float64, float32, float16 or bfloat16;
            what else torch's own takes (integers on the CPU) that one does.
        kernel_size: the window's height and width, or one number for both; so are the following three.
        stride: between windows; the kernel_size by default.
        padding: on both sides, of -inf; at most half of the kernel_size.
        dilation: between the taps of a window.
        ceil_mode: whether a window that only begins in the input counts.
        return_indices: whether to return where the maxima were as well.

    Returns:
        Tensor of shape (..., H', W') with H' = (H + 2 padding - dilation (kernel_size - 1) - 1) / stride + 1, rounded
        down, or with ceil_mode up. With return_indices, also an int64 tensor of that shape: positions in a plane of H *
        W, for :func:`max_unpool2d`.

    Raises:
        RuntimeError: for a size, stride, padding or dilation that is not possible, or an input that is too small.
        TypeError: for one that is no int.

    Source: :func:`torch.nn.functional.max_pool2d`.

    Example:
        >>> x = torch.randn(2, 3, 8, 8)
        >>> y, indices = max_pool2d(x, 3, 2, 1, return_indices=True)
        >>> torch.equal(x.flatten(2).gather(2, indices.flatten(2)).view_as(y), y)
        True
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            max_pool2d, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    return _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size2d,
    stride: Size2d | None = None,
    padding: Size2d = 0,
    dilation: Size2d = 1,
    ceil_mode: bool = False,
    return_indices: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`max_pool2d` with the indices, whatever return_indices says, as torch's.

    Example:
        >>> max_pool2d_with_indices(torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]), 2)
        (tensor([[[3.]]]), tensor([[[1]]]))
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            max_pool2d_with_indices, (input,), input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    return _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size2d,
    stride: Size2d | None = None,
    padding: Size2d = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    r"""The partial inverse of :func:`max_pool2d`: maxima go back to where they were, all else is zero.

    .. math:: y_{\mathrm{indices}_i} = x_i

    in each plane. Where windows overlapped and several indices are the same, the last one counts, on every device.

    Args:
        input: (N, C, H, W) or (C, H, W); float64, float32, float16 or bfloat16.
        indices: of the input's shape, int64: positions in a plane of the output.
        kernel_size: that of the pooling; so are stride and padding.
        stride: the kernel_size by default.
        padding: of the pooling.
        output_size: the height and width of the output, or its whole shape, where the pooling leaves a choice;
            (H - 1) stride - 2 padding + kernel_size by default.

    Returns:
        Tensor of the input's dtype and memory format.

    Raises:
        ValueError: for an output_size that the pooling cannot have come from.
        RuntimeError: for other shapes or dtypes, and for an index outside of the output (on CUDA when the device is
            next waited for, as in torch).

    Source: :func:`torch.nn.functional.max_unpool2d`.

    Example:
        >>> y, indices = max_pool2d(torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]), 2, return_indices=True)
        >>> max_unpool2d(y, indices, 2)
        tensor([[[0., 3.],
                 [0., 0.]]])
    """
    if has_torch_function_unary(input):
        return handle_torch_function(max_unpool2d, (input,), input, indices, kernel_size, stride, padding, output_size)
    size = _unpool_size(
        input, _pair(kernel_size), _pair(kernel_size if stride is None else stride), _pair(padding), output_size
    )
    if input.dtype not in DTYPES:
        return torch._C._nn.max_unpool2d(input, indices, size)
    # As torch's autocast on the CPU.
    if torch._C._is_any_autocast_enabled() and input.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        input = input.float() if input.dtype != torch.float64 else input
    return _unpool(input, indices, size)


def _max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    if x.dtype not in DTYPES:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    if torch.compiler.is_compiling():
        stride = kernel_size if stride is None else stride
        y, _, indices = _forward(x, kernel_size, stride, padding, dilation, ceil_mode, False, return_indices)
        return (y, indices) if return_indices else y
    return extension.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _unpool_size(x, kernel, stride, padding, output_size):
    default = [(n - 1) * s + k - 2 * p for n, k, s, p in zip(x.shape[-2:], kernel, stride, padding, strict=True)]
    if output_size is None:
        size = default
    elif len(output_size) in (2, 4):
        size = list(output_size)[-2:]
    else:
        raise ValueError(
            "max_unpool2d: output_size should be a sequence containing 2 or 4 elements, but it has a length of "
            f"'{len(output_size)}'"
        )
    for d in range(2):
        if output_size is not None and not default[d] - stride[d] < size[d] < default[d] + stride[d]:
            raise ValueError(
                f'max_unpool2d: invalid output_size "{output_size}" (dim {d} must be between {default[d] - stride[d]} '
                f"and {default[d] + stride[d]})"
            )
        if size[d] < 0:
            raise ValueError(
                f"max_unpool2d: output_size must contain non-negative spatial dimensions, but got {size[d]}"
            )
    return size


# ---- torch.func.vmap ------------------------------------------------------------------------------------------------


@torch.library.register_vmap(_forward._schema.name)
def _vmap_forward(info, in_dims, x, *args):
    dims, results = x.dim() - 1, _forward(fold(info.batch_size, in_dims[0], x), *args)
    return tuple(unfold(info.batch_size, t, dims) if t.dim() == 4 else t for t in results), tuple(
        0 if t.dim() == 4 else None for t in results
    )


@torch.library.register_vmap(_backward._schema.name)
def _vmap_backward(info, in_dims, dy, offset, *args):
    dims = dy.dim() - (in_dims[0] is not None)
    dx = _backward(fold(info.batch_size, in_dims[0], dy), fold(info.batch_size, in_dims[1], offset), *args)
    return unfold(info.batch_size, dx, dims), 0


@torch.library.register_vmap(_unpool._schema.name)
def _vmap_unpool(info, in_dims, x, indices, output_size):
    dims = x.dim() - (in_dims[0] is not None)
    y = _unpool(fold(info.batch_size, in_dims[0], x), fold(info.batch_size, in_dims[1], indices), output_size)
    return unfold(info.batch_size, y, dims), 0


# ---- Modules --------------------------------------------------------------------------------------------------------


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling that keeps one byte per output for backward, and not the input.

    See :func:`fastnorm.functional.max_pool2d` for the formula, dtypes and errors. Everything else is
    :class:`torch.nn.MaxPool2d`'s, which this class is a subclass of.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as torch's.

    Shape:
        input: (N, C, H, W) or (C, H, W); output: (N, C, H', W') or (C, H', W').

    Example:
        >>> MaxPool2d(3, 2, 1)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if intercepted(input, None):
            return intercept(self, input, None)
        return _max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """The partial inverse of :class:`MaxPool2d`; where indices are the same, the last one counts, on every device.

    See :func:`fastnorm.functional.max_unpool2d`. Everything else is :class:`torch.nn.MaxUnpool2d`'s, which this class
    is a subclass of.

    Args:
        kernel_size, stride, padding: as torch's.

    Shape:
        input, indices: (N, C, H, W) or (C, H, W); output: (N, C, H', W') or (C, H', W').

    Example:
        >>> pool, unpool = MaxPool2d(2, return_indices=True), MaxUnpool2d(2)
        >>> unpool(*pool(torch.randn(2, 4, 8, 8))).shape
        torch.Size([2, 4, 8, 8])
    """

    def forward(self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if intercepted(input, indices):
            return intercept(self, input, indices, output_size)
        return max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
