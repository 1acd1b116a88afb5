"""What the fused modules share: their extra keywords, their repr, and being leaves of a trace."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import handle_torch_function, has_torch_function

from .activation import check_activation


class FusedNorm(nn.Module):
    """Before torch.nn's class among the bases: adds activation and negative_slope to its keywords and its repr."""

    activation: str | None = None
    negative_slope: float = 0.01

    def __init__(self, *args: Any, activation: str | None = None, negative_slope: float = 0.01, **kwargs: Any) -> None:
        check_activation(type(self).__name__, activation)
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(norm(input) + residual)"""
        if intercepted(input, residual):
            return intercept(self, input, residual)
        return self.fused(input, residual, self.activation, self.negative_slope)

    def fused(self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float) -> Tensor:
        """forward() with another activation than the module's own: what fastnorm.fuse calls."""
        raise NotImplementedError

    def fused_in_place(
        self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float
    ) -> Tensor:
        """fused() of an input that nobody else has, in whose memory the result may be."""
        return self.fused(input, residual, activation, negative_slope)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
            if self.activation == "leaky_relu":
                text += f", negative_slope={self.negative_slope}"
        return text


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its class's forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_plain_inference(x: Tensor) -> bool:
    """Whether nothing differentiates, batches or compiles what is done with x, on the CPU: then results may take the
    place of what is not needed any more. On CUDA memory that has just been freed costs nothing."""
    return x.is_cpu and not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def norm_of_own(norm: FusedNorm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """norm(x, residual) of an x that was made for the norm alone: perhaps in its memory."""
    if type(x) is Tensor and is_plain(norm):
        return norm.fused_in_place(x, residual, norm.activation, norm.negative_slope)
    return norm(x) if residual is None else norm(x, residual)


def intercepted(input: Any, residual: Any) -> bool:
    """Whether a module is called with other than plain tensors: traced by torch.fx, or what overrides functions."""
    if type(input) is Tensor and (residual is None or type(residual) is Tensor):
        return False
    return isinstance(input, fx.Proxy) or has_torch_function((input, residual))


def intercept(module: nn.Module, input: Any, *others: Any) -> Any:
    """What such a call returns. fastnorm's modules are leaves of a trace, as torch.nn's are."""
    while others and others[-1] is None:
        others = others[:-1]
    if isinstance(input, fx.Proxy):
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input, *others), {})
    return handle_torch_function(type(module).forward, (input, *others), module, input, *others)


MODULE_DOC = """{title} with an optional addition and activation in the same kernel.

    ``forward(x, residual=None)`` is ``activation(norm(x) + residual)``; see :func:`fastnorm.functional.{function}` for
    the formula, dtypes and layouts. Everything else is :class:`torch.nn.{parent}`'s, which this class is a subclass of:
    arguments, parameters, buffers, state_dict, errors.

    Args:
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".
        negative_slope: leaky_relu's.

    Shape:
        input, residual and output: {shape}.

    Raises:
        {error}

    Example:
        >>> norm = {example}, activation="relu")
        >>> norm(torch.randn({input})).min() >= 0
        tensor(True)
    """
