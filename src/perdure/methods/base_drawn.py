"""Answers by several draws from a posterior over adapters, and what of their uncertainty is the draws' disagreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perdure.core.seeding import derive
from perdure.data.task import Context, Query, Task
from perdure.methods.base import Expert, Method
from perdure.models.clip import CLIP
from perdure.models.drawn import Drawn
from perdure.models.lora import multiplied
from perdure.ops import variational


class DrawnAnswers(Method):
    """The option ``samples``, 0: the means answer; else that many draws from the posterior after the last task, each an expert
    whose probabilities are averaged."""

    drawn: Drawn
    logvar: nn.Parameter
    state: Any

    def bind(self, clip: CLIP, context: Context | None = None) -> None:
        super().bind(clip, context)
        self.speakers: tuple[Mapping[str, Tensor] | None, list[Expert]] = (None, [])
        self.doubt = {"answers": 0.0, "entropy": 0.0, "entropy of draws": 0.0}

    def trains_on(self, task: Task) -> bool:
        self.doubt = dict.fromkeys(self.doubt, 0.0)  # of the task before
        return super().trains_on(task)

    def newest(self) -> Mapping[str, Tensor]:
        """The posterior after the last task: mean and logvar, (P,) each."""
        return list(self.state.past.values())[-1]

    @property
    def draws_answer(self) -> bool:
        """Whether several draws answer, not the means."""
        return self.config.samples > 0 and bool(self.state.past)

    def experts(self, query: Query) -> Sequence[Expert]:
        if not self.draws_answer:
            return super().experts(query)
        newest, (spoken, out), count = self.newest(), self.speakers, self.config.samples
        if newest is not spoken:
            draws, out = torch.Generator().manual_seed(derive(self.context.seed, "answers of TD-VCL")), []
            for k in range(count):
                noise = torch.randn(len(self.logvar), generator=draws).to(self.logvar.device)
                found = self.drawn.apart(newest["mean"] + (newest["logvar"] / 2).exp() * noise)
                weights = multiplied(self.clip.backbone, self.clip.pretrained, found)
                out.append(Expert(f"draw {k} after {self.state.learned}", weights, 1 / count))
            self.speakers = newest, out
        return out

    def logits(self, query: Query) -> Tensor:
        """(N, C) logits; where draws answer, one draw's probabilities."""
        logits = super().logits(query)
        if not self.draws_answer:
            return logits
        self.doubt["entropy of draws"] += variational.entropies(logits.softmax(1)).sum().item() / self.config.samples
        return logits.softmax(1)

    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        """Logits as they are; where draws answer, the logarithm of their mean probabilities."""
        if not self.draws_answer:
            return logits
        self.doubt["entropy"] += variational.entropies(logits).sum().item()
        self.doubt["answers"] += len(logits)
        return logits.clamp_min(torch.finfo(logits.dtype).tiny).log()

    def finalizes(self) -> bool:
        return False  # no features are looked at; an export answers by the means

    def remarks(self) -> dict[str, float]:
        """The mean entropy of the answers in nats, and what of it comes from the draws' disagreement: where draws answer."""
        if not (count := self.doubt["answers"]):
            return {}
        whole, within = self.doubt["entropy"] / count, self.doubt["entropy of draws"] / count
        return {"entropy of an answer": whole, "of it, between draws": whole - within}
