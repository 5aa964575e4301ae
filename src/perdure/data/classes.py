"""What a picture can be called."""

from __future__ import annotations

from dataclasses import dataclass

from perdure.core.errors import PerdureError


@dataclass(frozen=True)
class Class:
    """A class: its name and the prompt templates it is asked with; the first is the one training uses. ``also``: other words
    for it; its text is the mean over all of them and all templates, but what it *is* stays its name."""

    name: str
    templates: tuple[str, ...]
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise PerdureError(f"A class is asked for by its name, which must be a word, not {self.name!r}.")
        if not self.templates or isinstance(self.templates, str):
            raise PerdureError(f"The class '{self.name}' has no templates. Give a tuple, as ('a photo of a {{}}.',).")

    def prompts(self) -> list[str]:
        """Every word in every template, the name in the first template first."""
        return [template.format(word) for word in (self.name, *self.also) for template in self.templates]
