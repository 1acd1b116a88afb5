"""The norms under torch.func's transforms, in forward mode, and differentiated twice.

Plain reverse mode is csrc/norm_autograd.h's, which a tiny batch notices. What is here calls the same operators and, for
every derivative beyond the first, a norm written in torch's operators.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .activation import activate

# y, stats; and a batch dimension for each
Batched = tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]


class Norm:
    """What is special about one norm.

    Its config is what the backward operator takes between the tensors and output_mask; it ends with activation and
    negative_slope.
    """

    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> Any:
        """The forward operator's y and stats."""
        raise NotImplementedError

    def backward(self, *args: Any) -> Sequence[Tensor]:
        """The backward operator: (dy, x, residual, weight, bias, stats, mask, *config, output_mask)."""
        raise NotImplementedError

    def config(self, *rest: Any) -> tuple:
        """The config of a forward call."""
        raise NotImplementedError

    def composite(self, x: Tensor, residual: Any, weight: Any, bias: Any, stats: Tensor, *config: Any) -> Tensor:
        """y in torch's operators, as exact on offset inputs as the kernels."""
        raise NotImplementedError

    def unpack_mask(self, mask: Tensor, x: Tensor, *config: Any) -> Tensor:
        """The mask's bits as a bool tensor of x's shape."""
        raise NotImplementedError

    def vmap(self, batch: int, in_dims: Sequence[int | None], *args: Any) -> Batched:
        """forward() where the arguments have batch dimensions."""
        raise NotImplementedError

    def vmap_backward(
        self, batch: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None], config: tuple, needs: list
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The gradients that are needed where dy, x, residual, weight, bias and stats have batch dimensions."""
        return vmap_composite(
            lambda *t: tuple(_gradients(self, t, None, config, needs)), in_dims[:6], tensors[:6], sum(needs)
        )


def vmap_composite(
    function: Callable[..., tuple[Tensor, ...]], in_dims: Sequence[int | None], tensors: Sequence[Any], outputs: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A function written in torch's operators, of tensors that may be None, over their batch dimensions."""
    given = [i for i, t in enumerate(tensors) if t is not None]

    def of_given(*values: Tensor) -> tuple[Tensor, ...]:
        at = dict(zip(given, values, strict=True))
        return function(*(at.get(i) for i in range(len(tensors))))

    dims = tuple(in_dims[i] for i in given)
    return torch.func.vmap(of_given, dims)(*(tensors[i] for i in given)), (0,) * outputs


def push_forward(
    function: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The Jacobian-vector product of a function written in torch's operators.

    As the pull-back of the pull-back, which is linear: it needs reverse mode only, and so works inside a forward-mode
    level as well.
    """
    outputs, pull_back = torch.func.vjp(function, *primals)
    zeros = tuple(torch.zeros_like(o) for o in outputs)
    _, push = torch.func.vjp(lambda *cotangents: pull_back(cotangents), *zeros)
    return push(tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)))


def _gradients(
    norm: Norm, tensors: Sequence[Tensor | None], mask: Tensor | None, config: tuple, needs: Sequence[bool]
) -> list[Tensor]:
    """What the backward operator computes for dy, x, residual, weight, bias, stats; in torch's operators."""
    dy, *inputs, stats = tensors
    dz = dy
    if mask is not None:  # which stands for the residual: the slopes are known, and constant
        *head, activation, negative_slope = config
        low = negative_slope if activation == "leaky_relu" else 0.0
        dz = torch.where(norm.unpack_mask(mask, inputs[0], *config), dz, dz * low)
        config = (*head, "none", negative_slope)
    wanted = [i for i, need in enumerate(needs) if need]
    given = [i for i in wanted if inputs[i] is not None]

    def forward(*values: Tensor) -> Tensor:
        now = dict(enumerate(inputs)) | dict(zip(given, values, strict=True))
        return norm.composite(*(now[i] for i in range(4)), stats, *config)

    grads = dict(zip(given, torch.func.vjp(forward, *(inputs[i] for i in given))[1](dz), strict=True))
    return [grads.get(i, dz) for i in wanted]  # a residual that the mask stands for: dz


# (operator, device type) where autocast runs torch's norms in float32: which it is depends on torch's version.
_FLOAT32_UNDER_AUTOCAST = frozenset(
    (operator, device)
    for operator in ("layer_norm", "group_norm", "rms_norm")
    for device in ("cpu", "cuda", "mps", "xpu")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", f"Autocast{device.upper()}")
)


def autocast_to_float32(operator: str, x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Casts where autocast runs torch's operator of that name in float32."""
    device = x.device.type
    if (operator, device) not in _FLOAT32_UNDER_AUTOCAST or not torch.is_autocast_enabled(device):
        return x, *others
    return tuple(
        t.float() if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


class NormFunction(torch.autograd.Function):
    """(norm, x, residual, weight, bias, *rest) -> y, stats"""

    @staticmethod
    def forward(norm: Norm, *args):
        return norm.forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        norm, x, residual, weight, bias, *rest = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.config, ctx.count = norm, norm.config(*rest), len(inputs)
        saved = (x, residual, weight, bias, output[1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, dy, _stats):
        if dy is None:
            return (None,) * ctx.count
        needs = list(ctx.needs_input_grad[1:5])
        grads = iter(NormBackwardFunction.apply(ctx.norm, dy, *ctx.saved_tensors, None, ctx.config, needs))
        return None, *(next(grads) if need else None for need in needs), *(None,) * (ctx.count - 5)

    @staticmethod
    def jvp(ctx, _norm, *tangents):
        *tensors, stats = ctx.saved_tensors
        given = {i: t for i, t in enumerate(tensors) if t is not None}

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(given, values, strict=True))
            return (ctx.norm.composite(*(at.get(i) for i in range(4)), stats, *ctx.config),)

        return push_forward(function, tuple(given.values()), [tangents[i] for i in given])[0], None

    @staticmethod
    def vmap(info, in_dims, norm, *args):
        return norm.vmap(info.batch_size, in_dims[1:], *args)


class NormBackwardFunction(torch.autograd.Function):
    """The backward operator with a gradient of its own: that of the norm written in torch's operators.

    (norm, dy, x, residual, weight, bias, stats, mask, config, needs) -> those gradients of x, residual, weight and bias
    that `needs` asks for.
    """

    @staticmethod
    def forward(norm: Norm, dy, x, residual, weight, bias, stats, mask, config, needs):
        grads = norm.backward(dy, x, residual, weight, bias, stats, mask, *config, needs)
        return tuple(g for g, need in zip(grads, needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.norm, *tensors, ctx.config, ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _as_function(ctx) -> tuple[Callable[..., tuple[Tensor, ...]], dict[int, Tensor]]:
        """What forward computes, from those of dy, x, residual, weight, bias that are given."""
        *tensors, stats, mask = ctx.saved_tensors
        given = {i: t for i, t in enumerate(tensors) if t is not None}

        def gradients(*values: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(given, values, strict=True))
            return tuple(_gradients(ctx.norm, [*(at.get(i) for i in range(5)), stats], mask, ctx.config, ctx.needs))

        return gradients, given

    @staticmethod
    def backward(ctx, *grads):
        gradients, given = NormBackwardFunction._as_function(ctx)
        outputs, pull_back = torch.func.vjp(gradients, *given.values())
        cotangents = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
        result = dict(zip(given, pull_back(cotangents), strict=True))
        return None, *(result.get(i) for i in range(9))

    @staticmethod
    def jvp(ctx, _norm, *tangents):
        gradients, given = NormBackwardFunction._as_function(ctx)
        return push_forward(gradients, tuple(given.values()), [tangents[i] for i in given])

    @staticmethod
    def vmap(info, in_dims, norm, *args):
        *tensors, _mask, config, needs = args  # no mask: under a transform the forward operator leaves none
        return norm.vmap_backward(info.batch_size, in_dims[1:7], tensors, config, needs)


_library = torch.library.Library("fastnorm", "FRAGMENT")


def define_recorded(norm: Norm, operator: Any) -> None:
    """Defines what the backward operator calls where its own gradient is wanted (csrc/norm_autograd.h)."""
    names = [argument.name for argument in operator._schema.arguments]
    dsum_at = names.index("dsum") if "dsum" in names else None

    def recorded(*args: Any) -> tuple[Tensor, ...]:
        args = list(args)
        dsum = args.pop(dsum_at) if dsum_at is not None else None
        dy, needs = args[0], args[-1]
        grads = iter(NormBackwardFunction.apply(norm, *args[:7], tuple(args[7:-1]), list(needs)))
        result = [next(grads) if need else dy.new_empty(0) for need in needs]
        if dsum is not None and needs[0]:
            result[0] = result[0] + dsum
        return tuple(result)

    name = operator._schema.name.partition("::")[2]
    _library.define(f"{name}_recorded{str(operator._schema).partition(name)[2]}")
    _library.impl(f"{name}_recorded", recorded, "CompositeImplicitAutograd")


def finish(
    z: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str,
    negative_slope: float,
) -> Tensor:
    """activation(z * weight + bias + residual), the parameters seen in `shape`."""
    if weight is not None:
        z = z * weight.view(shape)
    if bias is not None:
        z = z + bias.view(shape)
    if residual is not None:
        z = z + residual
    return activate(z, activation, negative_slope)


def unpack_bits(mask: Tensor, spans: int, length: int) -> Tensor:
    """(spans, length) bools of a mask whose spans each begin with a byte."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(spans, -1)[:, :length].bool()


class ChannelFold:
    """vmap for operators that treat channels apart: the batch dimension becomes part of the channel dimension."""

    def __init__(self, batch: int, in_dims: Sequence[int | None]) -> None:
        self.batch, self.in_dims = batch, in_dims

    def _fold(self, argument: int, t: Tensor | None, channel_dim: int) -> Tensor | None:
        if t is None:
            return None
        dim = self.in_dims[argument]
        if dim is None:
            t = t.unsqueeze(channel_dim).expand(*t.shape[:channel_dim], self.batch, *t.shape[channel_dim:])
        else:
            t = t.movedim(dim, channel_dim)
        return t.flatten(channel_dim, channel_dim + 1)

    def data(self, argument: int, t: Tensor | None) -> Tensor | None:
        """(N, C, ...) -> (N, batch * C, ...)"""
        return self._fold(argument, t, 1)

    def channels(self, argument: int, t: Tensor | None) -> Tensor | None:
        """(C,) -> (batch * C,)"""
        return self._fold(argument, t, 0)

    def unfold(self, t: Tensor, channel_dim: int) -> tuple[Tensor, int]:
        """A folded result with the batch dimension apart again, and where that is."""
        return t.unflatten(channel_dim, (self.batch, -1)), channel_dim

    def gradients(self, grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Folded gradients of x, residual, weight and bias, those that are needed, unfolded."""
        channel_dims = [dim for dim, need in zip((1, 1, 0, 0), needs, strict=True) if need]
        pairs = [self.unfold(g, dim) for g, dim in zip(grads, channel_dims, strict=True)]
        return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)

    def write_back(self, argument: int, t: Tensor, folded: Tensor) -> None:
        """Copies what the operator wrote into a folded copy."""
        moved = t.movedim(self.in_dims[argument], 0)
        if moved.data_ptr() != folded.data_ptr():
            moved.copy_(folded.view(moved.shape))
