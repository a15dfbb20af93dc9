"""Whether a saved state of 0/1 Adam may be continued: error buffers and local weights belong to one rank of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finlora.errors import CheckpointError

STATE_KEY = "zero_one_adam"
"""Entry of the optimiser's state_dict."""


def take_own_state(state_dict: Mapping[str, Any], expected: Mapping[str, int]) -> dict[str, Any]:
    """Return the entry of 0/1 Adam.

    Args:
        expected: the fingerprint of the optimiser that goes on.

    Raises:
        CheckpointError: the state is another optimiser's or rank's, or of another world size, model or schedule.
    """
    state: dict[str, Any] | None = state_dict.get(STATE_KEY)
    if state is None:
        raise CheckpointError(
            f"found an optimiser state without {STATE_KEY!r}, expected one that 0/1 Adam saved: "
            "set optim.name to the optimiser that wrote the checkpoint, or start a new run"
        )
    saved = state["fingerprint"]
    differences = [f"{k} {saved.get(k)}, expected {v}" for k, v in expected.items() if saved.get(k) != v]
    if differences:
        raise CheckpointError(
            f"found a 0/1 Adam state with {'; '.join(differences)}: error buffers and local weights belong to one rank "
            "of one run; resume with the same workers and settings, or start a new run from the exported adapter"
        )
    return state
