"""Batch norm: function, autograd Functions, modules.

z = (x - mean) / sqrt(var + eps) * weight + bias + residual,  y = activation(z)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from ._library import ops
from .activation import activate, check_activation
from .transforms import ChannelFold, push_forward

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
            return BatchNormFunction.apply(
                x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                activation or "none", negative_slope,
            )[0]  # fmt: skip
        return (_forward._op if training else _forward_frozen._op)(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
            activation or "none", negative_slope, False,
        )[0]  # fmt: skip
    return (_forward if training else _forward_frozen)(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
        activation or "none", negative_slope, False,
    )[0]  # fmt: skip


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


class BatchNormFunction(torch.autograd.Function):
    """The forward operator under torch.func's transforms and in forward mode; returns y and stats.

    Plain reverse mode is csrc/batch_norm_autograd.cpp's, which a tiny batch notices.
    """

    @staticmethod
    def forward(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, activation,
        negative_slope,
    ):  # fmt: skip
        return (_forward if training else _forward_frozen)(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
            activation, negative_slope, False,
        )[:2]  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, _, _, _, training, _, eps, activation, negative_slope = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.config = (training, eps, activation, negative_slope)
        saved = (x, residual, weight, bias, output[1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, dy, _stats):
        if dy is None:
            return (None,) * 12
        needs = list(ctx.needs_input_grad[:4])
        grads = iter(BatchNormBackwardFunction.apply(dy, *ctx.saved_tensors, None, *ctx.config, needs))
        return *(next(grads) if need else None for need in needs), *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, stats = ctx.saved_tensors
        given = {i: t for i, t in enumerate(tensors) if t is not None}

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(given, values, strict=True))
            return (_composite(*(at.get(i) for i in range(4)), stats, *ctx.config),)

        return push_forward(function, tuple(given.values()), [tangents[i] for i in given])[0], None

    @staticmethod
    def vmap(
        info, in_dims, x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, *config
    ):  # fmt: skip
        fold = ChannelFold(info.batch_size, in_dims)
        if training and running_mean is not None and (in_dims[4] is None or in_dims[5] is None):
            raise RuntimeError(
                "batch_norm: running_mean and running_var must be vmapped over too when training, since each of the "
                "batch's functions updates its own; got unbatched ones. See torch.func.replace_all_batch_norm_modules_"
            )
        if in_dims[6] is not None:  # all have counted the same batches
            counts, num_batches_tracked = num_batches_tracked, num_batches_tracked.select(in_dims[6], 0).clone()
        running = [fold.channels(4, running_mean), fold.channels(5, running_var)]
        y, stats = BatchNormFunction.apply(
            fold.data(0, x), fold.data(1, residual), fold.channels(2, weight), fold.channels(3, bias), *running,
            num_batches_tracked, training, *config,
        )  # fmt: skip
        if training and running_mean is not None:
            fold.write_back(4, running_mean, running[0])
            fold.write_back(5, running_var, running[1])
        if in_dims[6] is not None:
            counts.copy_(num_batches_tracked.expand_as(counts))
        (y, y_dim), (stats, stats_dim) = fold.unfold(y, 1), fold.unfold(stats, 1)
        return (y, stats), (y_dim, stats_dim)


class BatchNormBackwardFunction(torch.autograd.Function):
    """The backward operator with a gradient of its own: that of batch norm written in torch's operators.

    Returns those gradients of x, residual, weight and bias that `needs` asks for.
    """

    @staticmethod
    def forward(dy, x, residual, weight, bias, stats, mask, training, eps, activation, negative_slope, needs):
        grads = _backward(dy, x, residual, weight, bias, stats, mask, training, eps, activation, negative_slope, needs)
        return tuple(g for g, need in zip(grads, needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.config, ctx.needs = inputs[:7], inputs[7:11], inputs[11]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _as_function(ctx) -> tuple[Callable[..., tuple[Tensor, ...]], dict[int, Tensor]]:
        """What forward computes, in torch's operators: from those of dy, x, residual, weight, bias that are given."""
        *tensors, stats, mask = ctx.saved_tensors
        training, eps, activation, negative_slope = ctx.config
        given = {i: t for i, t in enumerate(tensors) if t is not None}
        wanted = [i for i, need in enumerate(ctx.needs, start=1) if need]

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(given, values, strict=True))
            name, dz = activation, at[0]
            if mask is not None:  # which stands for the residual: the slopes are known, and constant
                low = negative_slope if activation == "leaky_relu" else 0.0
                name, dz = "none", torch.where(_unpack_mask(mask, at[1]), dz, dz * low)
            inputs = [i for i in wanted if i in at]

            def forward(*values: Tensor) -> Tensor:
                now = at | dict(zip(inputs, values, strict=True))
                x, residual, weight, bias = (now.get(i) for i in range(1, 5))
                return _composite(x, residual, weight, bias, stats, training, eps, name, negative_slope)

            grads = dict(zip(inputs, torch.func.vjp(forward, *(at[i] for i in inputs))[1](dz), strict=True))
            return tuple(grads.get(i, dz) for i in wanted)

        return gradients, given

    @staticmethod
    def backward(ctx, *grads):
        gradients, given = BatchNormBackwardFunction._as_function(ctx)
        outputs, pull_back = torch.func.vjp(gradients, *given.values())
        cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
        result = dict(zip(given, pull_back(cotangents), strict=True))
        return tuple(result.get(i) for i in range(12))

    @staticmethod
    def jvp(ctx, *tangents):
        gradients, given = BatchNormBackwardFunction._as_function(ctx)
        return push_forward(gradients, tuple(given.values()), [tangents[i] for i in given])

    @staticmethod
    def vmap(info, in_dims, dy, x, residual, weight, bias, stats, mask, *config):
        fold = ChannelFold(info.batch_size, in_dims)
        grads = BatchNormBackwardFunction.apply(
            fold.data(0, dy), fold.data(1, x), fold.data(2, residual), fold.channels(3, weight), fold.channels(4, bias),
            fold.data(5, stats), mask, *config,
        )  # fmt: skip
        channel_dims = [dim for dim, need in zip((1, 1, 0, 0), config[-1], strict=True) if need]
        pairs = [fold.unfold(g, dim) for g, dim in zip(grads, channel_dims, strict=True)]
        return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _backward_recorded(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = args[-1]
    grads = iter(BatchNormBackwardFunction.apply(dy, *args))
    return tuple(next(grads) if need else dy.new_empty(0) for need in needs)


# The backward operator calls this one where its own gradient is wanted (csrc/batch_norm_autograd.cpp).
_library = torch.library.Library("fastnorm", "FRAGMENT")
_library.define(f"batch_norm_backward_recorded{str(_backward._schema).partition('batch_norm_backward')[2]}")
_library.impl("batch_norm_backward_recorded", _backward_recorded, "CompositeImplicitAutograd")


def _composite(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """Batch norm in torch's operators: for derivatives beyond the first.  As exact on offset inputs as the kernels."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, mean_low, rstd = (stats[i].view(shape) for i in range(3))
    z = (x.to(stats.dtype) - mean) - mean_low
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        z = z - z.mean(dims, keepdim=True)
        rstd = (z.square().mean(dims, keepdim=True) + eps).rsqrt()
    z = z * rstd
    if weight is not None:
        z = z * weight.view(shape)
    if bias is not None:
        z = z + bias.view(shape)
    if residual is not None:
        z = z + residual
    return activate(z, activation, negative_slope).to(x.dtype)


def _unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask's bits as a bool tensor of x's shape (csrc/batch_norm.h says how they lie)."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    n, c, *spatial = x.shape
    hw = math.prod(spatial)
    memory_format = torch._prims_common.suggest_memory_format(x)
    if hw == 1 or memory_format != torch.contiguous_format:
        rows = bits.flatten()[: x.numel()].view(n, *spatial, c)
        return rows.movedim(-1, 1).bool()
    return bits.view(n, c, -1)[:, :, :hw].reshape(x.shape).bool()


class _FusedBatchNorm:
    """forward() and the keywords that the three modules share."""

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
        check_activation(type(self).__name__, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)"""
        if type(input) is not Tensor and isinstance(input, fx.Proxy):  # a leaf of the trace, as torch.nn's modules are
            args = (input,) if residual is None else (input, residual)
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), args, {})
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
            self.eps, self.activation, self.negative_slope,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
            if self.activation == "leaky_relu":
                text += f", negative_slope={self.negative_slope}"
        return text


_MODULE_DOC = """{title} with an optional addition and activation in the same kernel.

    ``forward(x, residual=None)`` is ``activation(norm(x) + residual)``; see :func:`fastnorm.functional.batch_norm` for
    the formula, dtypes and layouts. Everything else is :class:`torch.nn.{name}`'s, which this class is a subclass of:
    arguments, parameters, buffers, state_dict, errors.

    Args:
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".
        negative_slope: leaky_relu's.

    Shape:
        input, residual and output: {shape}.

    Raises:
        ValueError: for an input of another number of dimensions, an unknown activation, or one value per channel when
            training.

    Example:
        >>> norm = {name}(6, activation="relu")
        >>> norm(torch.randn({example})).min() >= 0
        tensor(True)
    """


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    __doc__ = _MODULE_DOC.format(
        title="Batch norm of (N, C) or (N, C, L)", name="BatchNorm1d", shape="(N, C) or (N, C, L)", example="4, 6, 8"
    )


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    __doc__ = _MODULE_DOC.format(
        title="Batch norm of (N, C, H, W)", name="BatchNorm2d", shape="(N, C, H, W)", example="4, 6, 8, 8"
    )


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    __doc__ = _MODULE_DOC.format(
        title="Batch norm of (N, C, D, H, W)", name="BatchNorm3d", shape="(N, C, D, H, W)", example="4, 6, 2, 8, 8"
    )
