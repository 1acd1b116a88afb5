"""Boxes: torchvision.ops' names, and what detection needs beside them."""

from .boxes import box_area, box_convert, box_iou, clip_boxes_to_image, generalized_box_iou, remove_small_boxes
from .multibox import multibox_detection, multibox_prior, multibox_target
from .nms import batched_nms, nms, nms_padded, soft_nms

__all__ = [
    "batched_nms",
    "box_area",
    "box_convert",
    "box_iou",
    "clip_boxes_to_image",
    "generalized_box_iou",
    "multibox_detection",
    "multibox_prior",
    "multibox_target",
    "nms",
    "nms_padded",
    "remove_small_boxes",
    "soft_nms",
]
