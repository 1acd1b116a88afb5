"""torch.nn.functional's signatures, then keyword-only ``activation``, ``residual`` and ``negative_slope``."""

from .batch_norm import batch_norm

__all__ = ["batch_norm"]
