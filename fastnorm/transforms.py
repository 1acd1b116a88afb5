"""What the operators share to work under torch.func: forward-mode derivatives and vmap over channels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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

    def write_back(self, argument: int, t: Tensor, folded: Tensor) -> None:
        """Copies what the operator wrote into a folded copy."""
        moved = t.movedim(self.in_dims[argument], 0)
        if moved.data_ptr() != folded.data_ptr():
            moved.copy_(folded.view(moved.shape))
