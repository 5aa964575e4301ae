"""How a question is put to experts, each loaded once, and what they say is added up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.core.features import Features
from perdure.core.weights import Weights
from perdure.data.files import Pixels
from perdure.data.task import Query
from perdure.models.clip import CLIP

Reason = tuple[str, float]  # what decided, in words, and what it contributed


@dataclass(frozen=True)
class Expert:
    """Weights that answer, and their say. ``weights`` None: those that the model holds after the last task. ``name`` is what
    tells weights apart: other weights need another name, for as long as the model lives, or those it holds already answer.

    ``gate``: one for all images, or one an image (N,); where it is 0 the expert is not asked. ``features``: of the images
    by these weights, where they are known already.
    """

    name: str
    weights: Weights | None = None
    gate: float | Tensor = 1.0
    features: Features | None = None


class Answering(ABC):
    """What every method does with a question; the hooks that it asks are a ``Method``'s."""

    clip: CLIP

    @abstractmethod
    def experts(self, query: Query) -> Sequence[Expert]:
        """As ``Method`` has it."""

    @abstractmethod
    def head_expert(self) -> Expert:
        """As ``Method`` has it."""

    @abstractmethod
    def look(self, images: Pixels) -> Features:
        """As ``Method`` has it."""

    @abstractmethod
    def logits(self, query: Query) -> Tensor:
        """As ``Method`` has it."""

    @abstractmethod
    def finalizes(self) -> bool:
        """As ``Method`` has it."""

    @abstractmethod
    def finalize(self, query: Query, logits: Tensor) -> Tensor:
        """As ``Method`` has it."""

    def predict(self, query: Query) -> Tensor:
        """(N, C): Σ gate × logits over the experts, concluded by the answer role."""
        return self.answer([query])[0]

    def answer(self, queries: Sequence[Query]) -> list[Tensor]:
        """``predict`` for many queries: an expert's weights are loaded once for all, and it sees only the images that
        need it, ``evaluation_batch`` at a time. The model is left as it was found."""
        return [answer for answer, _ in self.answered(queries)]

    @torch.no_grad()
    def answered(self, queries: Sequence[Query]) -> list[tuple[Tensor, Sequence[Expert]]]:
        """``answer``, and the experts that gave each answer with their gates."""
        with self.clip.preserved():
            base, looked = self.head_expert(), ""
            if self.finalizes():
                self.load_expert(base)
                looked = self.clip.holds
                queries = [replace(query, features=self.look(query.images)) for query in queries]
            plans = [self.experts(query) for query in queries]
            totals = [torch.zeros(len(q.images), len(q.classes), device=self.clip.device) for q in queries]
            for name in dict.fromkeys(expert.name for plan in plans for expert in plan):
                for query, plan, total in zip(queries, plans, totals, strict=True):
                    for expert in (e for e in plan if e.name == name):
                        self.add(expert, query, total, looked)
            answers = [self.finalize(query, total) for query, total in zip(queries, totals, strict=True)]
            return list(zip(answers, plans, strict=True))

    def load_expert(self, expert: Expert) -> None:
        """Put an expert's weights on; without weights, those that the model held before any other was loaded."""
        if expert.weights is None:
            self.clip.load_last()
        else:
            self.clip.load_weights(expert.name, expert.weights)

    def add(self, expert: Expert, query: Query, total: Tensor, looked: str) -> None:
        """Add gate × logits of one expert to ``total`` (N, C), for the images that need it. ``looked``: the weights that the
        query's features are by."""
        gate = torch.as_tensor(expert.gate, dtype=torch.float32).cpu().expand(len(total))
        rows = gate.nonzero().squeeze(1)
        if not len(rows):
            return
        self.load_expert(expert)
        if expert.features is not None or self.clip.holds != looked:
            query = replace(query, features=expert.features)
        size = self.clip.evaluation_batch
        for some, part in zip(rows.split(size), query.parts(rows, size), strict=True):
            total[some] += gate[some].unsqueeze(1).to(total.device) * self.logits(part)

    def embed(self, query: Query) -> Tensor:
        """The query's images as unit embeddings (N, D), by the weights the model holds now."""
        if query.features is not None:
            return query.features.embedded
        if query.whole is not None and self.clip.remembers:
            images, rows = query.whole
            return self.clip.embeddings(images)[rows.to(self.clip.device)]
        return self.clip.encode_image(query.images)

    # ---- why

    def explains(self) -> bool:
        """Whether ``explain`` has more to say than the answer itself."""
        return type(self).explain is not Answering.explain

    def explain(self, query: Query, chosen: Sequence[int]) -> list[list[Reason]]:
        """Of each image, what contributed most to the class numbered ``chosen`` (N,), from ``query.features``; nothing where
        that class was never learned."""
        raise PerdureError(
            f"{type(self).__name__} answers without concepts, so there is nothing to tell of an answer but its score. A "
            "method that has them is clg_cbm."
        )

    def heaviest(self) -> dict[str, list[Reason]]:
        """Of each class learned, what weighs most in its answer, where ``explains``."""
        return {}

    @torch.no_grad()
    def explained(self, query: Query, chosen: Sequence[int]) -> list[list[Reason]]:
        """``explain`` for images that were not seen yet. The model is left as it was found."""
        with self.clip.preserved():
            self.load_expert(self.head_expert())
            return self.explain(replace(query, features=self.look(query.images)), chosen)
