"""What is going on and how long it still takes, as plain lines: they read the same on a terminal and in a log."""
from __future__ import annotations

import time

from rich.console import Console

EVERY_S = 10.0                              # a long task repeats itself this often


class Progress:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = time.monotonic()
        self.task: str | None = None
        self.expected_s = 0.0

    def say(self, text: str) -> None:
        self._line(text)
        self.task = None

    def start(self, task: str, expected_s: float) -> None:
        self._line(f"{task}, about {expected_s:.0f} s")
        self.task, self.expected_s = task, expected_s
        self.task_began = self.spoke = time.monotonic()

    def idle(self) -> None:
        """Called every few seconds while nothing happens."""
        now = time.monotonic()
        if self.task is None or now - self.spoke < EVERY_S:
            return
        self.spoke = now
        took = now - self.task_began
        left = self.expected_s - took
        still = f"about {left:.0f} s left" if left > 1 else f"longer than the expected {self.expected_s:.0f} s"
        self._line(f"  still {self.task}: {took:.0f} s, {still}")

    def _line(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:5.0f} s[/]  {text}", highlight=False)
