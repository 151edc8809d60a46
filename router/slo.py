"""What users of a model are promised."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Slo(BaseModel):
    """What users of a model expect: the first token within `ttft_s`, or of a long prompt within `ttft_times`
    what its prefill takes on an idle engine without cache; then a token every `tpot_s` on average."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_s: Annotated[float, Field(gt=0)] = 2.0
    ttft_times: Annotated[float, Field(ge=1)] = 5.0
    tpot_s: Annotated[float, Field(gt=0)] = 0.05

    def first_token_s(self, unloaded_s: float) -> float:
        """Within how many seconds the first token is due of a prompt whose prefill takes so many, idle."""
        return max(self.ttft_s, self.ttft_times * unloaded_s)
