"""Group norm and instance norm: functions, transforms, modules.

z = (x - mean) / sqrt(var + eps) * weight + bias + residual,  y = activation(z), mean and var of a group of one sample
"""

import math
import warnings
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
from .batch_norm import _batch_norm
from .module import MODULE_DOC, FusedNorm
from .transforms import (
    ChannelFold,
    Norm,
    NormBackwardFunction,
    NormFunction,
    autocast_to_float32,
    define_recorded,
    finish,
    unpack_bits,
)

_forward = ops.group_norm_forward.default
_backward = ops.group_norm_backward.default


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Normalisation of groups of channels of each sample, then an optional addition and activation, in one kernel.

    .. math:: y = \mathrm{activation}\left(
        \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b + \mathrm{residual}\right)

    with the mean and the biased variance over C / num_groups neighbouring channels and all of the other dimensions.

    Args:
        input: (N, C) or (N, C, ...), float64, float32, float16 or bfloat16, of any strides. channels_last (2d and 3d)
            is kept.
        num_groups: divides C.
        weight: (C,), of the input's dtype, or float32 beside a 16-bit input. None is 1.
        bias: (C,), likewise. None is 0.
        eps: added to the variance.
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".
        residual: of the input's shape and dtype, added before the activation.
        negative_slope: leaky_relu's.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: for one value per group, or an unknown activation.
        RuntimeError: for a num_groups that does not divide C, or a wrong shape, dtype or device.

    Source: Wu and He 2018, https://arxiv.org/abs/1803.08494; :func:`torch.nn.functional.group_norm`.

    Example:
        >>> x = torch.randn(8, 6, 4, 4)
        >>> y = group_norm(x, 3, activation="silu")
        >>> torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 3)), atol=1e-5)
        True
    """
    overloadable = (input, weight, bias, residual)
    if has_torch_function(overloadable):
        return handle_torch_function(
            group_norm, overloadable, input, num_groups, weight, bias, eps, activation=activation, residual=residual,
            negative_slope=negative_slope,
        )  # fmt: skip
    return _checked_group_norm(input, residual, weight, bias, num_groups, eps, activation, negative_slope)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Normalisation of each channel of each sample, then an optional addition and activation, in one kernel.

    .. math:: y = \mathrm{activation}\left(
        \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b + \mathrm{residual}\right)

    With ``use_input_stats`` the statistics are the channel's own in the sample (biased variance), and the running ones,
    where given, become ``(1 - momentum) * running + momentum * mean over the samples`` (unbiased variance); otherwise
    they are the running ones.

    Args:
        input: (N, C, ...), float64, float32, float16 or bfloat16, of any strides. channels_last (2d and 3d) is kept.
        running_mean: (C,), updated in place with use_input_stats; None where no average is kept.
        running_var: (C,), likewise.
        weight: (C,), of the input's dtype, or float32 beside a 16-bit input. None is 1.
        bias: (C,), likewise. None is 0.
        use_input_stats: whether to use the statistics of this input.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
        activation: as :func:`group_norm`'s.
        residual: of the input's shape and dtype, added before the activation.
        negative_slope: leaky_relu's.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: for one value per channel and sample with use_input_stats, or an unknown activation.
        RuntimeError: for a wrong shape, dtype or device, or no running statistics without use_input_stats.

    Source: Ulyanov, Vedaldi and Lempitsky 2016, https://arxiv.org/abs/1607.08022;
    :func:`torch.nn.functional.instance_norm`.

    Example:
        >>> x = torch.randn(8, 6, 4, 4)
        >>> y = instance_norm(x, activation="relu")
        >>> torch.allclose(y, torch.nn.functional.instance_norm(x).relu(), atol=1e-5)
        True
    """
    overloadable = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(overloadable):
        return handle_torch_function(
            instance_norm, overloadable, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps,
            activation=activation, residual=residual, negative_slope=negative_slope,
        )  # fmt: skip
    return _instance_norm(
        input, residual, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, activation,
        negative_slope,
    )  # fmt: skip


def _checked_group_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    if torch._C._is_any_autocast_enabled():
        x, residual, weight, bias = autocast_to_float32("group_norm", x, residual, weight, bias)
    # As torch, which counts the samples too; what has fewer dimensions or no groups the operator refuses.
    if x.dim() >= 2 and groups > 0 and x.numel() == groups:
        raise ValueError(
            "group_norm: Expected more than 1 value per channel when training, got input size "
            f"{x.shape if torch.compiler.is_compiling() else tuple(x.shape)} in {groups} groups"
        )
    return _group_norm(x, residual, weight, bias, groups, eps, activation, negative_slope)[0]


def _group_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y, and the statistics: mean, its low word, rstd, variance of every group."""
    args = (x, residual, weight, bias, groups, eps, activation or "none", negative_slope)
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return _in_torch_operators(*args)
        return _forward(*args, False)[:2]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return NormFunction.apply(_norm, *args)
    y, stats = extension.group_norm(*args)
    if (memory := recorder()) is not None:
        memory.remember(y, partial(_again, args[4:]), *args[:4])
    return y, stats


def _again(config: tuple, *tensors: Tensor | None) -> Tensor:
    """y, bit for bit: the same kernel."""
    return extension.group_norm(*tensors, *config)[0]


def _instance_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "instance_norm: running_mean and running_var must be given where use_input_stats is False, got None"
            )
        return _batch_norm(
            x, residual, weight, bias, running_mean, running_var, None, False, momentum, eps, activation, negative_slope
        )
    values = 1
    for size in x.shape[2:]:
        values *= size
    if values == 1:
        raise ValueError(
            "instance_norm: Expected more than 1 spatial element when training, got input size "
            f"{x.shape if torch.compiler.is_compiling() else tuple(x.shape)}"
        )
    for name, t in (("running_mean", running_mean), ("running_var", running_var)):
        if t is not None and t.shape != (x.shape[1],):
            raise RuntimeError(f"instance_norm: {name} must have shape ({x.shape[1]},), got {tuple(t.shape)}")
    channels = x.shape[1] if x.dim() > 1 else 1
    y, stats = _group_norm(x, residual, weight, bias, max(channels, 1), eps, activation, negative_slope)
    # Inside a backward pass this is activation checkpointing running forward again: the first run has counted.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if (running_mean is not None or running_var is not None) and x.numel() and not again:
        with torch.no_grad():
            mean, mean_low, _, var = stats.view(4, x.shape[0], channels)
            for running, batch in ((running_mean, mean + mean_low), (running_var, var * (values / (values - 1)))):
                if running is not None:
                    running.copy_(torch.lerp(running.to(batch.dtype), batch.mean(0), momentum))
    return y


def _rows(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0] * groups, math.prod(x.shape[1:]) // groups)  # of no elements, -1 could be anything


def _in_torch_operators(x, residual, weight, bias, groups, eps, activation, negative_slope) -> tuple[Tensor, Tensor]:
    """For torch.func's transforms inside torch.compile, which differentiate and batch only what they know."""
    z = F.group_norm(x, groups, weight, bias, eps)
    with torch.no_grad():
        var, mean = torch.var_mean(_rows(x.detach(), groups), -1, correction=0)
        stats = torch.stack((mean, torch.zeros_like(mean), (var + eps).rsqrt(), var))
    return activate(z if residual is None else z + residual, activation, negative_slope), stats


class _GroupNorm(Norm):
    def forward(self, x, residual, weight, bias, *config):
        return _forward(x, residual, weight, bias, *config, False)[:2]

    def backward(self, *args):
        return _backward(*args)

    def config(self, *config):
        return config

    def composite(self, x, residual, weight, bias, stats, groups, eps, activation, negative_slope):
        grouped = (x.shape[0] * groups, 1)
        z = _rows(x.to(stats.dtype), groups) - stats[0].view(grouped) - stats[1].view(grouped)
        z = z - z.mean(-1, keepdim=True)
        z = (z * (z.square().mean(-1, keepdim=True) + eps).rsqrt()).view(x.shape)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return finish(z, residual, weight, bias, shape, activation, negative_slope).to(x.dtype)

    def unpack_mask(self, mask, x, *config):
        n, c, *spatial = x.shape
        hw = math.prod(spatial)
        if hw == 1 or torch._prims_common.suggest_memory_format(x) != torch.contiguous_format:
            return unpack_bits(mask, n, hw * c).view(n, *spatial, c).movedim(-1, 1)
        return unpack_bits(mask, n * c, hw).reshape(x.shape)

    def vmap(self, batch, in_dims, x, residual, weight, bias, groups, *config):
        fold = ChannelFold(batch, in_dims)
        y, stats = NormFunction.apply(
            self, fold.data(0, x), fold.data(1, residual), fold.channels(2, weight), fold.channels(3, bias),
            batch * groups, *config,
        )  # fmt: skip
        y, y_dim = fold.unfold(y, 1)
        return (y, stats.unflatten(1, (-1, batch, groups)).movedim(2, 0).flatten(2)), (y_dim, 0)

    def vmap_backward(self, batch, in_dims, tensors, config, needs):
        fold = ChannelFold(batch, in_dims)
        dy, x, residual, weight, bias, stats = tensors
        groups, *rest = config
        stats = stats.expand(batch, *stats.shape) if in_dims[5] is None else stats.movedim(in_dims[5], 0)
        stats = stats.unflatten(2, (-1, groups)).movedim(0, 2).flatten(1)
        grads = NormBackwardFunction.apply(
            self, fold.data(0, dy), fold.data(1, x), fold.data(2, residual), fold.channels(3, weight),
            fold.channels(4, bias), stats, None, (batch * groups, *rest), needs,
        )  # fmt: skip
        return fold.gradients(grads, needs)


_norm = _GroupNorm()
define_recorded(_norm, _backward)


class GroupNorm(FusedNorm, nn.GroupNorm):
    __doc__ = MODULE_DOC.format(
        title="Group norm", function="group_norm", parent="GroupNorm", shape="(N, C, ...)", example="GroupNorm(3, 6",
        input="4, 6, 8, 8", error="RuntimeError: for an input with another number of channels.",
    )  # fmt: skip

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_groups, num_channels, eps, affine, device, dtype, activation=activation, negative_slope=negative_slope,
            **kwargs,
        )  # fmt: skip

    def fused(self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float) -> Tensor:
        try:  # not by attribute: nn.Module looks those up slowly, and a tiny batch notices
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # replaced by a parametrization, or by hand
            weight, bias = self.weight, self.bias
        return _checked_group_norm(input, residual, weight, bias, self.num_groups, self.eps, activation, negative_slope)


class _FusedInstanceNorm(FusedNorm):
    """What the three modules share."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
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
        unbatched = input.dim() == self._get_no_batch_dim()
        self._check_channels(input, 0 if unbatched else 1)
        if unbatched:
            residual = None if residual is None else residual.unsqueeze(0)
            return self.fused(input.unsqueeze(0), residual, activation, negative_slope).squeeze(0)
        return _instance_norm(
            input, residual, self.weight, self.bias, self.running_mean, self.running_var,
            self.training or not self.track_running_stats, 0.0 if self.momentum is None else self.momentum, self.eps,
            activation, negative_slope,
        )  # fmt: skip

    def _check_channels(self, input: Tensor, dim: int) -> None:
        if input.size(dim) == self.num_features:
            return
        if self.affine:
            raise ValueError(
                f"{type(self).__name__}: the input must have num_features ({self.num_features}) channels in dimension "
                f"{dim}, got {input.size(dim)}"
            )
        warnings.warn(
            f"{type(self).__name__}: the input has {input.size(dim)} channels, and num_features is "
            f"{self.num_features}, which is not used as affine is False",
            stacklevel=4,
        )


def _doc(name: str, shape: str, input: str) -> str:
    return MODULE_DOC.format(
        title=f"Instance norm of {shape}", function="instance_norm", parent=name, shape=shape, example=f"{name}(6",
        input=input, error="ValueError: for an input of another number of dimensions or channels, an unknown "
        "activation, or one value per channel.",
    )  # fmt: skip


class InstanceNorm1d(_FusedInstanceNorm, nn.InstanceNorm1d):
    __doc__ = _doc("InstanceNorm1d", "(N, C, L) or (C, L)", "4, 6, 8")


class InstanceNorm2d(_FusedInstanceNorm, nn.InstanceNorm2d):
    __doc__ = _doc("InstanceNorm2d", "(N, C, H, W) or (C, H, W)", "4, 6, 8, 8")


class InstanceNorm3d(_FusedInstanceNorm, nn.InstanceNorm3d):
    __doc__ = _doc("InstanceNorm3d", "(N, C, D, H, W) or (C, D, H, W)", "4, 6, 2, 8, 8")
