"""oneDNN, which computes torch's products on the CPU."""

from __future__ import annotations

import os


def bound_kernel_cache() -> None:
    """Have oneDNN keep few kernels; must come before torch computes. A value that the user has set stays.

    It keeps one for each shape that it meets, and packs and micro-batches are of all sizes: its default of 1,024 cost a training
    a gigabyte and, past 100 steps of the demo, half the speed; a stage on the CPU grew for hours.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
