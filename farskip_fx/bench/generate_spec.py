"""What one run of ``bench.generate`` is asked to do: a frozen dataclass that travels to the ranks as JSON."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .spec import Shape, SpecError


@dataclass(frozen=True)
class GenerateSpec:
    shape: Shape = Shape()                  # ``tokens``: of all prompts of a batch together
    batches: tuple[int, ...] = (1, 16)
    new_tokens: int = 8
    ratio: float = 0.5                      # all-reduces of a prefill alone over the prefill alone
    inner: str = "inductor"
    rounds: int = 6
    budget_s: float = 40.0
    seed: int = 0
    silence_s: float = 900.0

    def check(self) -> None:
        self.shape.check()
        if not self.batches or min(self.batches) < 1 or self.shape.tokens // max(self.batches) < 2:
            raise SpecError(f"--batch must be at least 1 and leave 2 of {self.shape.tokens} --tokens to every prompt, not "
                            f"{' '.join(map(str, self.batches))}")
        if self.new_tokens < 4:
            raise SpecError("--new-tokens must be at least 4: the first ones of a shape compile")
        if self.ratio <= 0 or self.rounds < 1:
            raise SpecError("--comm-ratio must be above 0 and --rounds at least 1")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> GenerateSpec:
        data = json.loads(path.read_text())
        return replace(GenerateSpec(**data), shape=Shape(**data["shape"]), batches=tuple(data["batches"]))
