"""Fields of a request that say how tokens are sampled and how many answers there are: OpenAI's, and vLLM's beside them.

Source: https://platform.openai.com/docs/api-reference/chat/create and
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html (sampling parameters).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

_MAX_ANSWERS, _MAX_BIASED = 128, 300
MAX_TOP = 20
"""Most log-probabilities of other tokens, as OpenAI has it."""
_Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(BaseModel):
    """Fields of chat and text completions."""

    top_k: int | None = Field(None, ge=-1, description="Sample among the k most probable tokens. -1 or 0: among all.")
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sample among tokens with at least this share of the most probable one's probability.",
    )
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _Bias] | None = Field(
        None,
        max_length=_MAX_BIASED,
        description="Token id -> number added to its logit, from -100 to 100. `/tokenize` returns ids.",
    )
    presence_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Taken from the logits of the tokens that the answer holds."
    )
    frequency_penalty: float | None = Field(
        0.0, ge=-2, le=2, description="Taken from them once for each time that the answer holds the token."
    )
    min_tokens: int | None = Field(None, ge=0, description="The answer does not end before so many tokens.")
    ignore_eos: bool | None = Field(None, description="true: only max_tokens and `stop` end the answer.")
    n: int | None = Field(
        1,
        ge=1,
        le=_MAX_ANSWERS,
        description="Answers to each prompt, which is computed once. With `seed`, answer i has the seed plus i.",
    )

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, bias)."""
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())


class BestOfField(BaseModel):
    """Field of text completions."""

    best_of: int | None = Field(None, ge=1, description="The same as n: no answer is thrown away.")

    @model_validator(mode="after")
    def _check_best_of(self) -> Any:
        if self.best_of not in (None, 1, getattr(self, "n", 1)):
            raise ValueError("best_of differs from n: send n alone, and choose among the answers by their logprobs")
        return self
