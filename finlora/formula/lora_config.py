"""Settings of the section `lora`: the update of a new adapter, and how its training begins."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from finlora.errors import ConfigError
from finlora.formula.low_rank import MAX_RANK, LoraSettings, list_faults

_STARTS = re.compile(r"olora|pissa(_niter_[1-9][0-9]?)?")
"""Values of `init` beside default; their names are PEFT's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    rank: int = 4
    """Rank of the update B A (LoRA, arXiv:2106.09685). The paper pairs 4 bit with rank 4, 8 bit with rank 8."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.1
    """Dropout on the adapter's input during training, at least 0 and less than 1."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Projections of each layer that get an adapter: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead, so that its size does not shrink as the rank grows (arXiv:2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single projections, the others have lora.rank: `{down_proj: 16}`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of single projections, the others have lora.alpha: `{down_proj: 64}`."""
    dora: bool = False
    """Scale each row of the base's weight and the update to a learnt length (DoRA, arXiv:2402.09353). It trains on padded rows,
    where each pass also computes the lengths of all rows."""
    init: str = "default"
    """First values of A and B. `default`: A random, B zero. `pissa` (arXiv:2404.02948), `pissa_niter_16` (its fast form) and
    `olora` (arXiv:2406.01775): a part of the base's weights, which training goes on from; for model.bits=16 only. The adapter is
    saved with twice the rank, as plain LoRA on the unchanged base."""

    def __post_init__(self) -> None:
        faults = list(list_faults(self.settings))
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout={self.dropout}: expected 0 <= dropout < 1")
        if self.changes_base and _STARTS.fullmatch(self.init) is None:
            faults.append(
                f"init={self.init}: expected default, pissa, pissa_niter_N (such as pissa_niter_16) or olora; FinLoRA has no "
                "other start of PEFT (LoftQ, EVA, CorDA)"
            )
        if self.changes_base and self.dora:
            faults.append(
                f"dora=true with init={self.init}: expected one of them, since the lengths would be those of the rest"
            )
        most = max([self.rank, *self.rank_pattern.values()])
        if self.changes_base and 2 * most > MAX_RANK:
            faults.append(
                f"rank={most} with init={self.init}: expected at most {MAX_RANK // 2:,}, since the adapter is saved with twice "
                "the rank"
            )
        if faults:
            raise ConfigError([f"lora.{fault}" for fault in faults])

    @property
    def settings(self) -> LoraSettings:
        """The record that training, forecasts and adapter files share."""
        return LoraSettings(**{each.name: getattr(self, each.name) for each in fields(LoraSettings)})

    @property
    def changes_base(self) -> bool:
        """Whether A and B begin with a part of the base's weights, which the base then lacks in training."""
        return self.init != "default"

    @property
    def saved(self) -> LoraSettings:
        """The record of the adapter file, which fits the unchanged base."""
        return self.settings.widen() if self.changes_base else self.settings

    @property
    def variant(self) -> str:
        """What differs from plain LoRA, such as `rsLoRA; PiSSA start of rank 4`; empty: nothing."""
        name = {"o": "OLoRA", "p": "PiSSA"}.get(self.init[0], "")
        start = f"{name} start of rank {self.rank}" if self.changes_base else ""
        return "; ".join(filter(None, (self.saved.variant, start)))
