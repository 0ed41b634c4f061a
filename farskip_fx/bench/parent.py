"""A rank's side of the conversation with the process that launched it (see launch.py)."""
from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


class Parent:
    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self.sharing = int(os.environ["FARSKIP_BENCH_SHARING"])     # ranks on this one's core
        self._events = os.fdopen(int(os.environ["FARSKIP_BENCH_EVENTS"]), "w", buffering=1)

    def tell(self, event: str, **data: object) -> None:
        self._events.write(json.dumps({"event": event, **data}) + "\n")

    def say(self, text: str) -> None:
        """A line of progress. Only rank 0 speaks."""
        if self.rank == 0:
            self.tell("say", text=text)

    def set_rate(self, bits: int | None) -> None:
        """Have the link shaped and wait until it is. The caller sees to it that one rank asks and the others wait."""
        self.tell("rate", bits=bits)
        if sys.stdin.readline().strip() != "ok":
            raise RuntimeError("the process that launched this rank is gone; nothing can shape the link")


def settle() -> None:
    """Take this rank's core, and die with the parent: a rank left behind would disturb every later measurement."""
    os.sched_setaffinity(0, {int(os.environ["FARSKIP_BENCH_CORE"])})
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C reaches us too; ending us is the parent's work
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
