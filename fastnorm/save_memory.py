"""Training with less memory: outputs of norms are made again in backward instead of being kept."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ._recipes import Hooks, Recorder, set_recorder

_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}


@contextlib.contextmanager
def save_memory(*, concatenations: bool = True) -> Iterator[None]:
    """While it is open, whatever needs a norm's output for backward keeps how to make it again instead.

    A convolution after norm and activation keeps its input for backward, and the norm keeps its own: two tensors where
    one is enough. Here the convolution, torch's or any other operator, keeps the norm's input (which the norm keeps
    anyway) and its parameters; in backward the norm's kernel runs once more. Values, gradients and running statistics
    are the same, bit for bit, and the statistics are updated once. Only the forward pass need run in here.

    The output of a residual block is made again from the block's before it. In backward the first that is asked for
    makes all of its chain, each once; they stay until they are needed, which is when what came after is gone.

    Args:
        concatenations: whether results of torch.cat are made again from their parts too.

    Raises:
        RuntimeError: in backward, where a tensor that is needed was changed in place, as without it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fastnorm.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 8, 3))
        >>> with save_memory():
        ...     loss = model(torch.randn(2, 3, 16, 16)).square().mean()
        >>> loss.backward()
    """
    if torch.compiler.is_compiling():  # whose graphs decide by themselves what to keep
        yield
        return
    recorder = Recorder(_hooks_around())
    with (
        saved_tensors_hooks(recorder.pack, recorder.unpack),
        _Concatenations(recorder) if concatenations else _nothing(),
    ):
        before = set_recorder(recorder)
        try:
            yield
        finally:
            set_recorder(before)
            recorder.known.clear()


def saved_bytes(model: nn.Module, *inputs: Any, **arguments: Any) -> int:
    """Bytes that a call of a model keeps for its backward pass.

    Counted are the memories of all tensors that autograd saves, each once, without the model's parameters and buffers
    and without the inputs.

    Args:
        model: any module.
        *inputs: what it is called with.
        **arguments: likewise.

    Returns:
        int

    Example:
        >>> saved_bytes(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(8, 4))
        128
    """
    given = [t for t in (*inputs, *arguments.values()) if isinstance(t, Tensor)]
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *given)}
    seen: dict[int, Tensor] = {}  # the tensors too, so that no memory is used again

    def pack(t: Tensor) -> Tensor:
        key = t.untyped_storage()._cdata
        if key not in own:
            seen[key] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(*inputs, **arguments)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def _hooks_around() -> Hooks | None:
    """The hooks for saved tensors that are active, which get what is kept."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Concatenations(TorchFunctionMode):
    """Sees every call of torch.cat."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in _CONCATENATIONS and "out" not in kwargs and type(result) is Tensor:
            parts = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if all(type(t) is Tensor for t in parts):
                self.recorder.remember(result, lambda *tensors: torch.cat(tensors, dim), *parts)
        return result
