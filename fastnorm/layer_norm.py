"""Layer norm and RMS norm: functions, transforms, modules.

z = (x - mean) / sqrt(var + eps) * weight + bias + residual,  y = activation(z);  RMS norm: x / sqrt(mean(x^2) + eps)
"""

from collections.abc import Sequence
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
from .module import MODULE_DOC, FusedNorm
from .transforms import Norm, NormFunction, autocast_to_float32, define_recorded, finish, unpack_bits, vmap_composite

_forward = ops.layer_norm_forward.default
_backward = ops.layer_norm_backward.default


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""Layer normalisation over the last dimensions, then an optional addition and activation, in one kernel.

    .. math:: y = \mathrm{activation}\left(
        \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b + \mathrm{residual}\right)

    with the mean and the biased variance over the dimensions of ``normalized_shape``.

    Args:
        input: (..., *normalized_shape), float64, float32, float16 or bfloat16, of any strides. channels_last is kept.
        normalized_shape: the sizes of the last dimensions, one or more.
        weight: of normalized_shape and the input's dtype, or float32 beside a 16-bit input. None is 1.
        bias: likewise. None is 0.
        eps: added to the variance.
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".
        residual: of the input's shape and dtype, added before the activation.
        negative_slope: leaky_relu's.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        RuntimeError: for a normalized_shape that the input does not end with, or another wrong shape, dtype or device.
        ValueError: for an unknown activation.

    Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450; :func:`torch.nn.functional.layer_norm`.

    Example:
        >>> x = torch.randn(8, 16)
        >>> y = layer_norm(x, (16,), activation="gelu")
        >>> torch.allclose(y, torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (16,))), atol=1e-5)
        True
    """
    overloadable = (input, weight, bias, residual)
    if has_torch_function(overloadable):
        return handle_torch_function(
            layer_norm, overloadable, input, normalized_shape, weight, bias, eps, activation=activation,
            residual=residual, negative_slope=negative_slope,
        )  # fmt: skip
    return _layer_norm(
        input, None, residual, weight, bias, normalized_shape, -len(normalized_shape), False, eps, activation,
        negative_slope,
    )[0]  # fmt: skip


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    r"""RMS normalisation over the last dimensions, then an optional addition and activation, in one kernel.

    .. math:: y = \mathrm{activation}\left(
        \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w + \mathrm{residual}\right)

    Args:
        input: (..., *normalized_shape), float64, float32, float16 or bfloat16, of any strides.
        normalized_shape: the sizes of the last dimensions, one or more.
        weight: of normalized_shape and the input's dtype, or float32 beside a 16-bit input. None is 1.
        eps: added to the mean of squares. None is the machine epsilon of float64 for float64, else of float32.
        activation: as :func:`layer_norm`'s.
        residual: of the input's shape and dtype, added before the activation.
        negative_slope: leaky_relu's.

    Returns:
        Tensor of the input's shape and dtype.

    Raises:
        RuntimeError: for a normalized_shape that the input does not end with, or another wrong shape, dtype or device.
        ValueError: for an unknown activation.

    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; :func:`torch.nn.functional.rms_norm`.

    Example:
        >>> x = torch.randn(8, 16)
        >>> torch.allclose(rms_norm(x, (16,)), torch.nn.functional.rms_norm(x, (16,)), atol=1e-5)
        True
    """
    overloadable = (input, weight, residual)
    if has_torch_function(overloadable):
        return handle_torch_function(
            rms_norm, overloadable, input, normalized_shape, weight, eps, activation=activation, residual=residual,
            negative_slope=negative_slope,
        )  # fmt: skip
    return _layer_norm(
        input, None, residual, weight, None, normalized_shape, -len(normalized_shape), True, eps, activation,
        negative_slope,
    )[0]  # fmt: skip


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    r"""A pre-norm residual step in one kernel: the sum of two branches, and its layer norm.

    .. math:: h = x + \mathrm{residual}, \quad y = \mathrm{activation}(\mathrm{layer\_norm}(h))

    Args:
        input: (..., *normalized_shape), the branch that is added.
        residual: of the input's shape and dtype.
        normalized_shape, weight, bias, eps, activation, negative_slope: as :func:`layer_norm`'s.

    Returns:
        (y, h), each of the input's shape and dtype; h is rounded to the dtype before it is normalised.

    Raises:
        As :func:`layer_norm`.

    Source: the pre-norm transformer, Xiong et al. 2020, https://arxiv.org/abs/2002.04745.

    Example:
        >>> x, residual = torch.randn(8, 16), torch.randn(8, 16)
        >>> y, h = add_layer_norm(x, residual, (16,))
        >>> torch.equal(h, x + residual) and torch.allclose(y, torch.nn.functional.layer_norm(h, (16,)), atol=1e-5)
        True
    """
    overloadable = (input, residual, weight, bias)
    if has_torch_function(overloadable):
        return handle_torch_function(
            add_layer_norm, overloadable, input, residual, normalized_shape, weight, bias, eps, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
    return _layer_norm(
        input, residual, None, weight, bias, normalized_shape, -len(normalized_shape), False, eps, activation,
        negative_slope,
    )  # fmt: skip


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    r"""A pre-norm residual step in one kernel: the sum of two branches, and its RMS norm.

    .. math:: h = x + \mathrm{residual}, \quad y = \mathrm{activation}(\mathrm{rms\_norm}(h))

    Args:
        input: (..., *normalized_shape), the branch that is added.
        residual: of the input's shape and dtype.
        normalized_shape, weight, eps, activation, negative_slope: as :func:`rms_norm`'s.

    Returns:
        (y, h), each of the input's shape and dtype; h is rounded to the dtype before it is normalised.

    Raises:
        As :func:`rms_norm`.

    Source: as :func:`add_layer_norm`, with :func:`rms_norm`.

    Example:
        >>> x, residual = torch.randn(8, 16), torch.randn(8, 16)
        >>> y, h = add_rms_norm(x, residual, (16,))
        >>> torch.equal(h, x + residual) and torch.allclose(y, torch.nn.functional.rms_norm(h, (16,)), atol=1e-5)
        True
    """
    overloadable = (input, residual, weight)
    if has_torch_function(overloadable):
        return handle_torch_function(
            add_rms_norm, overloadable, input, residual, normalized_shape, weight, eps, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
    return _layer_norm(
        input, residual, None, weight, None, normalized_shape, -len(normalized_shape), True, eps, activation,
        negative_slope,
    )  # fmt: skip


def _layer_norm(
    x: Tensor,
    addend: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: Sequence[int],
    dim: int,
    rms: bool,
    eps: float | None,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """y, and x + addend; over the normalized_shape's dimensions from `dim` on."""
    if torch._C._is_any_autocast_enabled():
        operator = "rms_norm" if rms else "layer_norm"
        x, addend, residual, weight, bias = autocast_to_float32(operator, x, addend, residual, weight, bias)
    if eps is None:
        eps = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).eps
    args = (normalized_shape, dim, rms, eps, activation or "none", negative_slope)
    if torch.compiler.is_compiling():
        if not torch._C._are_functorch_transforms_active():
            return _forward(x, addend, residual, weight, bias, *args, False)[:2]
        h = x if addend is None else x + addend
        return _in_torch_operators(h, residual, weight, bias, *args), h
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        h = x if addend is None else x + addend
        return NormFunction.apply(_norm, h, residual, weight, bias, *args)[0], h
    y, h = extension.layer_norm(x, addend, residual, weight, bias, *args)
    if (memory := recorder()) is not None:
        memory.remember(y, partial(_again, args), x if addend is None else h, residual, weight, bias)
    return y, h


def _again(config: tuple, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """y, bit for bit: the same kernel; x is the sum where there was one."""
    return extension.layer_norm(x, None, *tensors, *config)[0]


def _in_torch_operators(x, residual, weight, bias, shape, dim, rms, eps, activation, negative_slope) -> Tensor:
    """For torch.func's transforms inside torch.compile, which differentiate and batch only what they know."""
    z = x if dim < 0 else x.movedim(1, -1)
    z = F.rms_norm(z, shape, weight, eps) if rms else F.layer_norm(z, shape, weight, bias, eps)
    z = z if dim < 0 else z.movedim(-1, 1)
    return activate(z if residual is None else z + residual, activation, negative_slope)


class _LayerNorm(Norm):
    def forward(self, x, residual, weight, bias, *config):
        y, _, stats, _ = _forward(x, None, residual, weight, bias, *config, False)
        return y, stats

    def backward(self, dy, x, residual, weight, bias, stats, mask, *config_and_needs):
        return _backward(dy, x, residual, weight, bias, stats, mask, None, *config_and_needs)

    def config(self, *config):
        return config

    def composite(
        self, x, residual, weight, bias, stats, normalized_shape, dim, rms, eps, activation, negative_slope
    ):  # fmt: skip
        first, last = _normalized_dims(x, normalized_shape, dim)
        dims = list(range(first, last))
        z = x.to(stats.dtype)
        if not rms:
            rows = x.shape[:first] + (1,) * len(dims) + x.shape[last:]
            z = z - stats[0].view(rows) - stats[1].view(rows)
            z = z - z.mean(dims, keepdim=True)
        z = z * (z.square().mean(dims, keepdim=True) + eps).rsqrt()
        parameters = tuple(normalized_shape) + (1,) * (x.dim() - last)
        return finish(z, residual, weight, bias, parameters, activation, negative_slope).to(x.dtype)

    def unpack_mask(self, mask, x, normalized_shape, dim, *config):
        first, last = _normalized_dims(x, normalized_shape, dim)
        inner = x.shape[last:].numel()
        if inner > 1 and torch._prims_common.suggest_memory_format(x) != torch.contiguous_format:
            pixels = x.movedim(1, -1)
            return unpack_bits(mask, pixels.shape[:-1].numel(), x.shape[1]).view(pixels.shape).movedim(-1, 1)
        if inner > 1:
            return unpack_bits(mask, x.shape[:last].numel(), inner).reshape(x.shape)
        return unpack_bits(mask, x.shape[:first].numel(), x.shape[first:].numel()).reshape(x.shape)

    def vmap(self, batch, in_dims, x, residual, weight, bias, *config):
        # Batched data are more rows; batched parameters are for torch's operators, with the statistics of the kernel.
        plain = in_dims[2] is None and in_dims[3] is None

        def rows(argument: int, t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            dim = in_dims[argument]
            t = t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
            return t if config[1] < 0 else t.flatten(0, 1)

        inputs = (rows(1, residual), weight, bias) if plain else (None, None, None)
        ends = config[-2:] if plain else ("none", 0.0)
        y, stats = NormFunction.apply(self, rows(0, x), *inputs, *config[:-2], *ends)
        stats = stats.unflatten(1, (batch, -1))
        if not plain:
            tensors = (x, residual, weight, bias, stats)
            return ((vmap_composite(
                lambda *t: (self.composite(*t, *config),), (*in_dims[:4], 1), tensors, 1
            )[0][0], stats), (0, 1))  # fmt: skip
        return (y if config[1] < 0 else y.unflatten(0, (batch, -1)), stats), (0, 1)


def _normalized_dims(x: Tensor, normalized_shape: Sequence[int], dim: int) -> tuple[int, int]:
    first = dim % x.dim()
    return first, first + len(normalized_shape)


_norm = _LayerNorm()
define_recorded(_norm, _backward)


class _FusedLayerNorm(FusedNorm):
    """fused() of the modules; what they normalise over begins at dimension `_dim`, None: is the end of the shape."""

    _rms = False
    _dim: int | None = None

    def fused(self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float) -> Tensor:
        try:  # not by attribute: nn.Module looks those up slowly, and a tiny batch notices
            weight, bias = self._parameters["weight"], self._parameters.get("bias")
        except KeyError:  # replaced by a parametrization, or by hand
            weight, bias = self.weight, getattr(self, "bias", None)
        shape = self.normalized_shape
        dim = -len(shape) if self._dim is None else self._dim
        return _layer_norm(
            input, None, residual, weight, bias, shape, dim, self._rms, self.eps, activation, negative_slope
        )[0]


class LayerNorm(_FusedLayerNorm, nn.LayerNorm):
    __doc__ = MODULE_DOC.format(
        title="Layer norm over the last dimensions", function="layer_norm", parent="LayerNorm",
        shape="(..., *normalized_shape)", example="LayerNorm(16", input="4, 16",
        error="RuntimeError: for an input whose shape does not end with normalized_shape.",
    )  # fmt: skip

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip


class LayerNorm2d(_FusedLayerNorm, nn.LayerNorm):
    """Layer norm over the channels of every pixel, with an optional addition and activation in the same kernel.

    ``forward(x, residual=None)`` is ``activation(norm(x) + residual)``. It is :class:`torch.nn.LayerNorm` of
    ``x.permute(0, 2, 3, 1)``, permuted back, without the copies, for NCHW and channels_last: parameters and state_dict
    are those of ``torch.nn.LayerNorm(num_channels)``, which this class is a subclass of.

    Args:
        num_channels: C.
        eps: added to the variance.
        elementwise_affine: whether there are parameters, of shape (C,).
        bias: whether there is a bias among them.
        activation: as :class:`LayerNorm`'s.
        negative_slope: leaky_relu's.

    Shape:
        input, residual and output: (N, C, H, W), or (N, C, ...) with any number of dimensions.

    Raises:
        RuntimeError: for an input without num_channels channels.

    Example:
        >>> norm = LayerNorm2d(6)
        >>> x = torch.randn(4, 6, 8, 8)
        >>> y = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)
        >>> torch.allclose(norm(x), y, atol=1e-5)
        True
    """

    _dim = 1

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_channels, eps, elementwise_affine, bias, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip


class RMSNorm(_FusedLayerNorm, nn.RMSNorm):
    __doc__ = MODULE_DOC.format(
        title="RMS norm over the last dimensions", function="rms_norm", parent="RMSNorm",
        shape="(..., *normalized_shape)", example="RMSNorm(16", input="4, 16",
        error="RuntimeError: for an input whose shape does not end with normalized_shape.",
    )  # fmt: skip

    _rms = True

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
