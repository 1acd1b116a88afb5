"""What the poolings share."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

Size2d = int | Sequence[int]


def fold(batch: int, dim: int | None, t: Tensor) -> Tensor:
    """The batch dimension made part of the samples'; a batch of unbatched images is one of images."""
    t = t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    return t if t.dim() == 4 else t.flatten(0, 1)


def unfold(batch: int, t: Tensor, image_dims: int) -> Tensor:
    return t if image_dims == 3 else t.unflatten(0, (batch, -1))
