"""Batch norm over the batches of several processes: autograd Function, module.

Each process takes its own mean and variance; one all-gather makes them everyone's, merged by count; one all-reduce in
backward makes the sums of the gradients everyone's.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from ._library import ops
from .activation import TWO_SLOPES
from .batch_norm import FusedBatchNorm
from .module import FusedNorm


def _merge(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean, sum of squared deviations of all; from every process's means, those sums, and count, in a row."""
    mean, squares = moments[:, :-1].unflatten(1, (2, -1)).unbind(1)
    count = moments[:, -1:]
    total = count.sum()
    mean_of_all = (count * mean).sum(0) / total.clamp(min=1)
    return total, mean_of_all, (squares + count * (mean - mean_of_all).square()).sum(0)


class SyncBatchNormFunction(torch.autograd.Function):
    """(x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, activation,
    negative_slope, group) -> y. Not differentiable twice, as torch's is not."""

    @staticmethod
    def forward(
        ctx, x, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, activation,
        negative_slope, group,
    ):  # fmt: skip
        channels, world = x.shape[1], dist.get_world_size(group)
        count = x.numel() // channels
        moments = ops.batch_norm_statistics(x)
        if count > 1:
            moments[1] *= count - 1
        else:
            moments[1] = 0  # the variance of one value, unbiased, is NaN
        mine = torch.cat((moments.flatten(), moments.new_full((1,), count)))
        everyones = mine.new_empty(world, mine.numel())
        dist.all_gather(list(everyones.unbind()), mine, group=group)
        total, mean, squares = _merge(everyones)
        if running_mean is not None:
            momentum = total.new_full((), momentum) if momentum is not None else 1 / num_batches_tracked.double()
            for running, batch in ((running_mean, mean), (running_var, squares / (total - 1).clamp(min=1))):
                running.copy_(torch.lerp(running.double(), batch, momentum))
        activation = activation or "none"
        y, stats, mask = ops.batch_norm_forward.frozen(
            x, residual, weight, bias, mean, squares / total.clamp(min=1), None, False, 0.0, eps, activation,
            negative_slope, residual is not None and activation in TWO_SLOPES,
        )  # fmt: skip
        if mask.numel() or activation == "none":
            residual = None  # the mask, or nothing, is what backward needs of it
        ctx.save_for_backward(x, residual, weight, bias, stats, mask, total)
        ctx.config = (eps, activation, negative_slope, group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, residual, weight, bias, stats, mask, total = ctx.saved_tensors
        eps, activation, negative_slope, group = ctx.config
        # Sums that are about to be added to others', so not rounded to 16 bits.
        wide = [p.float() if p is not None and p.dtype.itemsize == 2 else p for p in (weight, bias)]
        linear = activation == "none"
        _, dz, sum_product, sum_dz = ops.batch_norm_backward(
            dy, x, residual, *wide, stats, mask, False, eps, activation, negative_slope, [False, not linear, True, True]
        )
        dz, dx = dy if linear else dz, None
        if ctx.needs_input_grad[0]:
            means = torch.stack((sum_dz, sum_product)).double()
            dist.all_reduce(means, group=group)
            dx = ops.batch_norm_backward_elementwise(dz, x, wide[0], stats, means / total.clamp(min=1))
        grads = [
            dx,
            dz,
            None if weight is None else sum_product.to(weight.dtype),
            None if bias is None else sum_dz.to(bias.dtype),
        ]
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *(None,) * 8


class SyncBatchNorm(FusedBatchNorm, nn.SyncBatchNorm):
    """Batch norm over the batches of all processes of a group, with an addition and activation in the same kernel.

    ``forward(x, residual=None)`` is ``activation(norm(x) + residual)``, the mean and variance being those of all the
    processes' inputs, weighted by how many values each has, none included. Gradients are those of one process with the
    whole batch, where DistributedDataParallel averages the parameters'. There is one collective in forward and one in
    backward; results are the same in every process and run. Works on the CPU (gloo) and on CUDA (NCCL), in any memory
    format; DistributedDataParallel, which refuses torch's class on the CPU, takes this one. In evaluation, and without
    a process group, it is batch norm.

    Everything else is :class:`torch.nn.SyncBatchNorm`'s, which this class is a subclass of: arguments, parameters,
    buffers, state_dict.

    Args:
        process_group: whose inputs are normalised together; None is all processes.
        activation: None, "relu", "relu6", "leaky_relu", "elu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh" or
            "hardswish".
        negative_slope: leaky_relu's.

    Shape:
        input, residual and output: (N, C) or (N, C, ...).

    Raises:
        ValueError: for an input of fewer than 2 dimensions or of no channels, or an unknown activation.

    Source: :class:`torch.nn.SyncBatchNorm`; the merge is Chan, Golub and LeVeque 1983.

    Example:
        >>> norm = SyncBatchNorm(6, activation="relu")
        >>> norm(torch.randn(4, 6, 8, 8)).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> None:
        FusedNorm.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype,
            activation=activation, negative_slope=negative_slope, **kwargs,
        )  # fmt: skip

    def fused(self, input: Tensor, residual: Tensor | None, activation: str | None, negative_slope: float) -> Tensor:
        if not self._several_processes():
            return super().fused(input, residual, activation, negative_slope)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running_mean, running_var, num_batches_tracked = None, None, None
        # Inside a backward pass this is activation checkpointing running forward again: the first run has counted.
        if self.track_running_stats and torch._C._current_graph_task_id() == -1:
            running_mean, running_var, num_batches_tracked = (
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
            )
            num_batches_tracked.add_(1)
        return SyncBatchNormFunction.apply(
            input, residual, self.weight, self.bias, running_mean, running_var, num_batches_tracked, self.momentum,
            self.eps, activation, negative_slope, self.process_group or dist.group.WORLD,
        )  # fmt: skip

    def _several_processes(self) -> bool:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group or dist.group.WORLD) > 1

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Replaces every batch norm of a model, torch's or fastnorm's, by one of this class.

        Parameters, buffers, mode and activation are kept. As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`.

        Args:
            module: the model, changed in place.
            process_group: see the class.

        Returns:
            The model, or the new module if it was itself a batch norm.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
            >>> type(SyncBatchNorm.convert_sync_batchnorm(model)[1]).__name__
            'SyncBatchNorm'
        """
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            extra = (
                {"activation": module.activation, "negative_slope": module.negative_slope}
                if isinstance(module, FusedNorm)
                else {}
            )
            converted = cls(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
                process_group, **extra,
            )  # fmt: skip
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.training = module.training
            if hasattr(module, "qconfig"):
                converted.qconfig = module.qconfig
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


def _let_ddp_wrap_it_on_the_cpu() -> None:
    """DistributedDataParallel refuses every torch.nn.SyncBatchNorm on the CPU, where torch's own cannot run."""
    name = "_passing_sync_batchnorm_handle"
    refuse = getattr(DistributedDataParallel, name, None)
    if refuse is None:
        return

    @functools.wraps(refuse)
    def refuse_torchs(self: DistributedDataParallel, module: nn.Module) -> None:
        synchronized = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
        if not synchronized or not all(isinstance(m, SyncBatchNorm) for m in synchronized):
            refuse(self, module)

    setattr(DistributedDataParallel, name, refuse_torchs)


_let_ddp_wrap_it_on_the_cpu()
