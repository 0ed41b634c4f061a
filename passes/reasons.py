"""Why a graph or a layer is left alone: a code for programs, a sentence for people."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """``code`` is stable (tests and tools match on it), ``text`` is for the author of the model."""
    code: str
    text: str
    node: str | None = None

    def __str__(self) -> str:
        return self.text
