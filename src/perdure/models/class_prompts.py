"""Prompts of classes that have room for learned vectors before the name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from perdure.core.errors import PerdureError
from perdure.models.clip import CLIP


class Named(Protocol):
    """A class: its name, and the templates it is asked with."""

    @property
    def name(self) -> str: ...

    @property
    def templates(self) -> tuple[str, ...]: ...


class ClassPrompts:
    """[start] … ``count`` vectors, the name … [end]: the class's first template, or (``bare``) the name and a full stop.

    ``ids`` (C, L): the tokens, the start token where a vector stands.
    """

    def __init__(self, clip: CLIP, classes: Sequence[Named], count: int, bare: bool):
        templates = ["{}." if bare else one.templates[0] for one in classes]
        ids = clip.tokens([template.format(one.name) for template, one in zip(templates, classes, strict=True)])
        length = ids.shape[1]
        before = {template: self.before(clip, template) for template in dict.fromkeys(templates)}
        order = []
        for template, one, own in zip(templates, classes, ids, strict=True):
            first = len(before[template])
            if not torch.equal(own[:first], before[template].to(own)):
                raise PerdureError(
                    f"The template '{template}' leaves no room for vectors before '{one.name}': the tokenizer joins the name "
                    "to what stands before it. Put a blank between them, or set prompt=name."
                )
            order.append([*range(first), *range(length, length + count), *range(first, length)])
        self.order = torch.tensor(order, device=ids.device)
        self.clip, self.ids = clip, torch.cat([ids, ids[:, :1].expand(-1, count)], 1).gather(1, self.order)
        with torch.no_grad():
            self.tokens = clip.token_embedding(ids)

    @staticmethod
    def before(clip: CLIP, template: str) -> Tensor:
        """The tokens before the name: the start token, and what the template begins with."""
        return clip.tokens([template.format("\n").split("\n")[0]])[0, :-1]

    def encoded(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Unit text embeddings (n, D) of the classes ``rows`` (n,), with ``vectors`` (n, count, W)."""
        order = self.order[rows][..., None].expand(-1, -1, vectors.shape[2])
        embeddings = torch.cat([self.tokens[rows], vectors], 1).gather(1, order)
        return self.clip.encode_embeddings(embeddings, self.ids[rows])
