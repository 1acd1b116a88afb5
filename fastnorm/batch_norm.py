"""Batch norm: function, transforms, modules.

z = (x - mean) / sqrt(var + eps) * weight + bias + residual,  y = activation(z)
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ._library import extension, ops
from ._recipes import recorder
from .activation import activate
from .module import MODULE_DOC, FusedNorm, is_plain_inference
from .transforms import ChannelFold, Norm, NormBackwardFunction, NormFunction, define_recorded, finish, unpack_bits

_forward = ops.batch_norm_forward.default
_forward_frozen = ops.batch_norm_forward.frozen  # the same where training is False; its schema writes nothing
_backward = ops.batch_norm_backward.default


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Batch normalisation of every channel, then an optional addition and activation, in one kernel.

    .. math:: y = \mathrm{activation}\left(
        \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b + \mathrm{residual}\right)

    With ``training`` the statistics are the batch's (biased variance), and the running ones become
    ``(1 - momentum) * running + momentum * batch`` (unbiased variance); otherwise they are the running ones.

    Args:
        input: (N, C) or (N, C, ...), float64, float32, float16 or bfloat16, of any strides. channels_last (2d and 3d)
            is kept.
        running_mean: (C,), updated in place when training; None where no average is kept.
        running_var: (C,), likewise.
        weight: (C,), of the input's dtype, or float32 beside a 16-bit input. None is 1.
        bias: (C,), likewise. None is 0.
        training: whether to use the statistics of this batch.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".
        residual: of the input's shape and dtype, added before the activation.
        negative_slope: leaky_relu's.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: for one value per channel when training, an eps that is not positive (when training), or an unknown
            activation.
        RuntimeError: for a wrong shape, dtype or device; nothing is written before.

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167; :func:`torch.nn.functional.batch_norm`.

    Example:
        >>> x = torch.randn(8, 3, 4, 4)
        >>> y = batch_norm(x, None, None, training=True, activation="relu")
        >>> torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True).relu(), atol=1e-5)
        True
    """
    overloadable = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(overloadable):
        return handle_torch_function(
            batch_norm, overloadable, input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation=activation, residual=residual, negative_slope=negative_slope,
        )  # fmt: skip
    if momentum is None:
        raise TypeError("batch_norm: momentum must be a float, got None")
    return _batch_norm(
        input, residual, weight, bias, running_mean, running_var, None, training, momentum, eps, activation,
        negative_slope,
    )  # fmt: skip


def _check_values(x: Tensor, training: bool, eps: float) -> None:
    if not training:
        if eps < 0:
            raise ValueError(f"batch_norm: eps must not be negative, got {eps}")
        return
    if eps <= 0:
        raise ValueError(f"batch_norm: eps must be positive when training, got {eps}")
    values = x.shape[0] if x.dim() else 1
    for size in x.shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(
            "batch_norm: Expected more than 1 value per channel when training, got input size "
            f"{x.shape if torch.compiler.is_compiling() else tuple(x.shape)}"
        )


def _batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    _check_values(x, training, eps)
    transforming = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():
        if transforming:
            return _in_torch_operators(
                x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                activation, negative_slope,
            )  # fmt: skip
    else:
        # Inside a backward pass this is activation checkpointing running forward again: the first run has counted.
        if training and running_mean is not None and torch._C._current_graph_task_id() != -1:
            running_mean = running_var = num_batches_tracked = None
            momentum = 0.0
        if transforming or forward_ad._current_level >= 0:
            return NormFunction.apply(
                _norm, x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
                eps, activation or "none", negative_slope,
            )[0]  # fmt: skip
        y = extension.batch_norm(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
            activation or "none", negative_slope,
        )  # fmt: skip
        if (memory := recorder()) is not None:
            running = (None, None) if training else (running_mean.clone(), running_var.clone())
            again = partial(_again, running, training, eps, activation or "none", negative_slope)
            memory.remember(y, again, x, residual, weight, bias)
        return y
    return (_forward if training else _forward_frozen)(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
        activation or "none", negative_slope, False,
    )[0]  # fmt: skip


def _again(running, training, eps, activation, negative_slope, x, residual, weight, bias) -> Tensor:
    """y, bit for bit: the same kernel, without counting the batch."""
    return extension.batch_norm(
        x, residual, weight, bias, *running, None, training, 0.0, eps, activation, negative_slope
    )  # fmt: skip


def _in_torch_operators(
    x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, activation,
    negative_slope,
):  # fmt: skip
    """For torch.func's transforms inside torch.compile, which differentiate and batch only what they know."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is None:
        momentum = 1.0 / float(num_batches_tracked) if training and running_mean is not None else 0.0
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate(z if residual is None else z + residual, activation, negative_slope)


class _BatchNorm(Norm):
    def forward(
        self, x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
        activation, negative_slope,
    ):  # fmt: skip
        return (_forward if training else _forward_frozen)(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
            activation, negative_slope, False,
        )[:2]  # fmt: skip

    def backward(self, *args):
        return _backward(*args)

    def config(self, running_mean, running_var, num_batches_tracked, training, momentum, eps, activation, slope):
        return training, eps, activation, slope

    def composite(self, x, residual, weight, bias, stats, training, eps, activation, negative_slope):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        mean, mean_low, rstd = (stats[i].view(shape) for i in range(3))
        z = (x.to(stats.dtype) - mean) - mean_low
        if training:
            dims = [d for d in range(x.dim()) if d != 1]
            z = z - z.mean(dims, keepdim=True)
            rstd = (z.square().mean(dims, keepdim=True) + eps).rsqrt()
        return finish(z * rstd, residual, weight, bias, shape, activation, negative_slope).to(x.dtype)

    def unpack_mask(self, mask, x, *config):
        n, c, *spatial = x.shape
        hw = math.prod(spatial)
        if hw == 1 or torch._prims_common.suggest_memory_format(x) != torch.contiguous_format:
            return unpack_bits(mask, 1, x.numel()).view(n, *spatial, c).movedim(-1, 1)
        return unpack_bits(mask, n * c, hw).reshape(x.shape)

    def vmap(
        self, batch, in_dims, x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training,
        *config,
    ):  # fmt: skip
        fold = ChannelFold(batch, in_dims)
        if training and running_mean is not None and (in_dims[4] is None or in_dims[5] is None):
            raise RuntimeError(
                "batch_norm: running_mean and running_var must be vmapped over too when training, since each of the "
                "batch's functions updates its own; got unbatched ones. See torch.func.replace_all_batch_norm_modules_"
            )
        if in_dims[6] is not None:  # all have counted the same batches
            counts, num_batches_tracked = num_batches_tracked, num_batches_tracked.select(in_dims[6], 0).clone()
        running = [fold.channels(4, running_mean), fold.channels(5, running_var)]
        y, stats = NormFunction.apply(
            self, fold.data(0, x), fold.data(1, residual), fold.channels(2, weight), fold.channels(3, bias), *running,
            num_batches_tracked, training, *config,
        )  # fmt: skip
        if training and running_mean is not None:
            fold.write_back(4, running_mean, running[0])
            fold.write_back(5, running_var, running[1])
        if in_dims[6] is not None:
            counts.copy_(num_batches_tracked.expand_as(counts))
        (y, y_dim), (stats, stats_dim) = fold.unfold(y, 1), fold.unfold(stats, 1)
        return (y, stats), (y_dim, stats_dim)

    def vmap_backward(self, batch, in_dims, tensors, config, needs):
        fold = ChannelFold(batch, in_dims)
        dy, x, residual, weight, bias, stats = tensors
        grads = NormBackwardFunction.apply(
            self, fold.data(0, dy), fold.data(1, x), fold.data(2, residual), fold.channels(3, weight),
            fold.channels(4, bias), fold.data(5, stats), None, config, needs,
        )  # fmt: skip
        return fold.gradients(grads, needs)


_norm = _BatchNorm()
define_recorded(_norm, _backward)


class FusedBatchNorm(FusedNorm):
    """What the three modules share."""

    activation: str | None = None
    negative_slope: float = 0.01

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, activation=activation,
            negative_slope=negative_slope, **kwargs,
        )  # fmt: skip

    def fused(self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float) -> Tensor:
        self._check_input_dim(input)
        try:  # not by attribute: nn.Module looks those up slowly, and a tiny batch notices
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            running_mean, running_var = self._buffers["running_mean"], self._buffers["running_var"]
        except KeyError:  # replaced by a parametrization, or by hand
            weight, bias, running_mean, running_var = self.weight, self.bias, self.running_mean, self.running_var
        training, num_batches_tracked = self.training, None
        if training:
            if self.track_running_stats:
                num_batches_tracked = self.num_batches_tracked
            else:
                running_mean = running_var = None
        elif running_mean is None and running_var is None:
            training = True
        return _batch_norm(
            input, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, self.momentum,
            self.eps, activation, negative_slope,
        )  # fmt: skip

    def fused_in_place(
        self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float
    ) -> Tensor:
        running_mean, running_var = self.running_mean, self.running_var
        if self.training or running_mean is None or running_var is None or not is_plain_inference(input):
            return self.fused(input, residual, activation, negative_slope)
        self._check_input_dim(input)
        extension.batch_norm_inference_(
            input, residual, self.weight, self.bias, running_mean, running_var, self.eps, activation or "none",
            negative_slope,
        )  # fmt: skip
        return input


def _doc(name: str, shape: str, input: str) -> str:
    return MODULE_DOC.format(
        title=f"Batch norm of {shape}", function="batch_norm", parent=name, shape=shape, example=f"{name}(6",
        input=input, error="ValueError: for an input of another number of dimensions, an unknown activation, or one "
        "value per channel when training.",
    )  # fmt: skip


class BatchNorm1d(FusedBatchNorm, nn.BatchNorm1d):
    __doc__ = _doc("BatchNorm1d", "(N, C) or (N, C, L)", "4, 6, 8")


class BatchNorm2d(FusedBatchNorm, nn.BatchNorm2d):
    __doc__ = _doc("BatchNorm2d", "(N, C, H, W)", "4, 6, 8, 8")


class BatchNorm3d(FusedBatchNorm, nn.BatchNorm3d):
    __doc__ = _doc("BatchNorm3d", "(N, C, D, H, W)", "4, 6, 2, 8, 8")
