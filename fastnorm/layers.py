"""The layers, in one list for ``fastnorm`` and ``fastnorm.nn``."""

from .avg_pool2d import AvgPool2d
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .conv2d import Conv2d
from .group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layer_norm import LayerNorm, LayerNorm2d, RMSNorm
from .max_pool2d import MaxPool2d, MaxUnpool2d
from .sync_batch_norm import SyncBatchNorm

__all__ = [
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "MaxPool2d",
    "MaxUnpool2d",
    "RMSNorm",
    "SyncBatchNorm",
]
