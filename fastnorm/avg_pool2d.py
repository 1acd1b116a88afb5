"""Average pooling of images: function, torch.func, module.

y[o] = the sum of x over window o / the number of its positions
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._library import extension, ops
from .module import intercept, intercepted
from .pool import DTYPES, Size2d, fold, unfold

_forward = ops.avg_pool2d_forward.default
_backward = ops.avg_pool2d_backward.default


def avg_pool2d(
    input: Tensor,
    kernel_size: Size2d,
    stride: Size2d | None = None,
    padding: Size2d = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    r"""The average of every window of an image. For a gradient it keeps nothing.

    .. math:: y_{o,p} = \frac{1}{n_{o,p}} \sum_{k,l} x_{o \cdot s_h - p_h + k,\; p \cdot s_w - p_w + l}

    over the positions that are inside of x. n is the number of positions of the window, of which those in the padding
    count if count_include_pad, and those that ceil_mode lets hang over the padding's end do not.

    Args:
        input: (N, C, H, W) or (C, H, W), of any strides. channels_last is kept. float64, float32, float16 or bfloat16,
            added up in float32 or wider; what else torch's own takes (int64 on the CPU) that one does.
        kernel_size: the window's height and width, or one number for both; so are the following two.
        stride: between windows; the kernel_size by default.
        padding: on both sides, of zeros; at most half of the kernel_size.
        ceil_mode: whether a window that only begins in the input or in the padding before it counts.
        count_include_pad: whether the padding counts in the average.
        divisor_override: what to divide by in place of the number of positions.

    Returns:
        Tensor of shape (..., H', W') with H' = (H + 2 padding - kernel_size) / stride + 1, rounded down, or with
        ceil_mode up.

    Raises:
        RuntimeError: for a size, stride, padding or divisor that is not possible, or an input that is too small.
        TypeError: for one that is no int.

    Source: :func:`torch.nn.functional.avg_pool2d`.

    Example:
        >>> avg_pool2d(torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]), 2)
        tensor([[[1.5000]]])
    """
    arguments = (input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if has_torch_function_unary(input):
        return handle_torch_function(avg_pool2d, (input,), *arguments)
    return _avg_pool2d(*arguments)


def _avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    if x.dtype not in DTYPES:
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if torch.compiler.is_compiling():
        stride = kernel_size if stride is None else stride
        return _forward(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return extension.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


# ---- torch.func.vmap ------------------------------------------------------------------------------------------------


def _register_vmap(operator):
    @torch.library.register_vmap(operator._schema.name)
    def in_batches(info, in_dims, images, *args):
        dims = images.dim() - 1
        result = operator(fold(info.batch_size, in_dims[0], images), *args)
        return unfold(info.batch_size, result, dims), 0


_register_vmap(_forward)
_register_vmap(_backward)


# ---- Module ---------------------------------------------------------------------------------------------------------


class AvgPool2d(nn.AvgPool2d):
    """Average pooling that keeps nothing for backward.

    See :func:`fastnorm.functional.avg_pool2d` for the formula, dtypes and errors. Everything else is
    :class:`torch.nn.AvgPool2d`'s, which this class is a subclass of.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as torch's.

    Shape:
        input: (N, C, H, W) or (C, H, W); output: (N, C, H', W') or (C, H', W').

    Example:
        >>> AvgPool2d(3, 2, 1)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        if intercepted(input, None):
            return intercept(self, input, None)
        return _avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )  # fmt: skip
