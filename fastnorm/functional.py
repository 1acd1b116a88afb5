"""torch.nn.functional's signatures, then keyword-only ``activation``, ``residual`` and ``negative_slope``."""

from .avg_pool2d import avg_pool2d
from .batch_norm import batch_norm
from .conv2d import conv2d
from .group_norm import group_norm, instance_norm
from .layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .max_pool2d import max_pool2d, max_pool2d_with_indices, max_unpool2d

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_unpool2d",
    "rms_norm",
]
