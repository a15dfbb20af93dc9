"""Peak memory of a process so far."""

from __future__ import annotations

import torch


def measure_peak_gib(device: torch.device) -> float:
    """Return the peak of torch's allocations on a CUDA device, or of this process on CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
