"""Boxes: torchvision.ops' names, and what detection needs beside them."""

from .nms import batched_nms, nms, nms_padded, soft_nms

__all__ = ["batched_nms", "nms", "nms_padded", "soft_nms"]
