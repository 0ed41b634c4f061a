"""A rank that dies, stalls or fails ends the others with an error that names it, within their group's timeout.

Contract
    A collective that gets no answer raises after the timeout given to `init_process_group` (gloo at once, if a
    connection breaks), but does not say who is missing. `guarded` turns that into a `CollectiveError` with the rank,
    its collective and its reason. Any other exception goes on as it is, and is told to the other ranks.

        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        with farskip_fx.guarded() as guard:
            for guard.step, batch in enumerate(batches):        # errors name the step
                ...

Terms
    alarm     a key in the store of the default group, set by the first rank that meets a broken collective
    answer    what a rank writes then: what it does, by a thread that looks for the alarm once a second. The thread
              runs while the main thread is inside of `guarded`, also if that sleeps or waits; a rank without an answer
              is dead, has left `guarded`, or holds Python's lock.

Nothing else is communicated: no collective, and on the way of success no write. After a CollectiveError the process
groups are in an unknown state: end the process (torchrun starts the job again, from `farskip_fx.latest_checkpoint`).

With NCCL a stalled collective ends the process itself by default (TORCH_NCCL_ASYNC_ERROR_HANDLING), after the same
timeout; TORCH_NCCL_BLOCKING_WAIT=1 makes it an exception, which is what this module needs.
"""
from __future__ import annotations

import json
import linecache
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import CollectiveError
from .passes._torch import default_store, flight_records

__all__ = ["guarded"]

_ALARM = "farskip_guard/alarm"
_LOOKS = 1.0            # seconds between two looks for the alarm
_RECORDS = 64           # collectives in an answer
_SIGNS = re.compile(r"gloo|nccl|c10d|ProcessGroup|Connection (closed|reset|refused)|Socket|Timed out waiting",
                    re.IGNORECASE)


class Guard:
    """What `guarded` yields. Set `step`: errors name it."""

    step: int | None = None


@contextmanager
def guarded(group: dist.ProcessGroup | None = None, *, timeout: float = 10.0) -> Iterator[Guard]:
    """Around a training step, or the whole loop. Does nothing without torch.distributed.

    Args:
        group: the ranks to ask when a collective breaks; None for all.
        timeout: seconds to wait for their answers. Not the time that a collective may take, which is
            `init_process_group(timeout=...)`.

    Raises:
        CollectiveError: instead of an error of torch.distributed; names the ranks that are the cause.
    """
    guard = Guard()
    if not dist.is_initialized():
        yield guard
        return
    watch = _Watch(guard, dist.get_process_group_ranks(group or dist.group.WORLD))
    watch.start()
    try:
        yield guard
    except CollectiveError:
        raise
    except BaseException as error:      # told to the others and raised on
        if not _is_distributed(error):
            watch.tell("failed", f"{type(error).__name__}: {_first_line(error)}")
            raise
        raise CollectiveError(watch.ask(error, timeout)) from error
    finally:
        watch.stop()


class _Watch(threading.Thread):
    def __init__(self, guard: Guard, ranks: list[int]) -> None:
        super().__init__(name="farskip_guard", daemon=True)
        self._guard, self._ranks, self._rank = guard, ranks, dist.get_rank()
        self._store, self._main, self._ended = default_store(), threading.get_ident(), threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.wait(_LOOKS):
                if self._store.check([_ALARM]):
                    return self.tell("runs", _place(sys._current_frames().get(self._main)))
        except RuntimeError:    # the store is gone with its host: the main thread will notice what is wrong
            return

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def tell(self, state: str, text: str) -> None:
        answer = {"state": state, "text": text, "step": self._guard.step, "records": flight_records(_RECORDS)}
        try:
            self._store.set(_key(self._rank), json.dumps(answer))
        except RuntimeError:    # gone with its host; the own error is what counts
            return

    def ask(self, error: BaseException, timeout: float) -> str:
        """What the other ranks say, as a message."""
        self.stop()
        self.tell("stopped", _first_line(error))
        answers: dict[int, dict] = {}
        waiting = [rank for rank in self._ranks if rank != self._rank]
        own = flight_records(_RECORDS)
        last = f"; the last one it launched is {_text(own[-1])}, {_where(own[-1])}" if own else ""
        first = (f"rank {self._rank} got no result from {_collective_of(error)}{_in_step(self._guard.step)} "
                 f"({_first_line(error)}{last})")
        deadline = time.monotonic() + timeout
        try:
            self._store.set(_ALARM, "")
            while waiting and time.monotonic() < deadline and not any(a["state"] == "failed" for a in answers.values()):
                for rank in [rank for rank in waiting if self._store.check([_key(rank)])]:
                    answers[rank] = json.loads(self._store.get(_key(rank)))
                    waiting.remove(rank)
                time.sleep(_LOOKS / 10)
        except RuntimeError:
            return (f"{first}; the store of the process group is gone, too, so rank 0 or the launcher, which holds it, "
                    "has ended")
        return "\n  ".join([f"{first}:", *_verdict(own, answers, waiting)])


def _verdict(own: list[dict], answers: dict[int, dict], silent: list[int]) -> list[str]:
    """A line for each other rank, causes first."""
    failed = [f"rank {rank} failed{_in_step(answer['step'])}: {answer['text']}"
              for rank, answer in answers.items() if answer["state"] == "failed"]
    if failed:
        return failed
    causes = [f"rank {rank} does not answer: it is dead, or not in farskip_fx.guarded any more" for rank in silent]
    others = []
    for rank, answer in answers.items():
        theirs = {(r["group"], r["number"]): r for r in answer["records"]}
        shared = {group for group, _ in theirs}
        at = f" It is at {answer['text']}{_in_step(answer['step'])}." if answer["state"] == "runs" else ""
        odd = next((r for r in own if (other := theirs.get(_number(r))) is not None and not _same(r, other)), None)
        missing = next((r for r in own if r["group"] in shared and _number(r) not in theirs
                        and r["number"] > max(n for group, n in theirs if group == r["group"])), None)
        if odd is not None:
            causes.append(f"rank {rank} disagrees: {_where(odd)} is {_text(theirs[_number(odd)])} there and "
                          f"{_text(odd)} here. The ranks run different graphs (see farskip_fx.check_agreement).{at}")
        elif missing is not None:
            causes.append(f"rank {rank} has not come to {_text(missing)}, {_where(missing)}."
                          f"{at or ' It got no result from an earlier one.'}")
        else:
            others.append(f"rank {rank} has come as far as this one.{at}")
    return causes + others


def _number(record: dict) -> tuple[str, int]:
    return record["group"], record["number"]


def _same(a: dict, b: dict) -> bool:
    """Rows of an all_to_all may differ."""
    return a["op"] == b["op"] and (re.search("all_?to_?all", a["op"]) is not None or a["sizes"] == b["sizes"])


def _text(record: dict) -> str:
    return f"{record['op']} of {' and '.join(map(str, record['sizes']))}"


def _where(record: dict) -> str:
    return f"collective {record['number']} of group {record['description'] or record['group']!r}"


def _in_step(step: int | None) -> str:
    return "" if step is None else f" in step {step}"


def _key(rank: int) -> str:
    return f"farskip_guard/{rank}"


def _is_distributed(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(_SIGNS.search(str(error)))


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[\S+\] ", "", text).split(". This is typically caused by")[0][:300]    # gloo's file and advice


def _place(frame) -> str:
    """The innermost line of the user's, or else of anybody's."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    installed = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    own = [line for line in stack if not line.filename.startswith(installed)]
    if not stack:
        return "an unknown line"
    line = (own or stack)[-1]
    return f"{Path(line.filename).name}:{line.lineno} in {line.name}: {line.line}"


_WAIT = re.compile(r"wait_tensor(?:\.default)?\((\w+)")
_OP = re.compile(r"_c10d_functional\.(\w+)")


def _collective_of(error: BaseException) -> str:
    """The op whose result was waited for: a compiled graph, generated code and our own eager code all read
    `name = torch.ops._c10d_functional.OP(...)`, and further down `wait_tensor(name)`."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        waited = _WAIT.search(frame.line or "")
        if waited:
            for number in range(frame.lineno - 1, 0, -1):
                line = linecache.getline(frame.filename, number).strip()
                if line.startswith(f"{waited[1]} = ") and (op := _OP.search(line)):
                    return op[1]
            return "a collective"
        if frame.filename == dist.distributed_c10d.__file__:
            first = next(f for f in frames if f.filename == dist.distributed_c10d.__file__)
            return first.name
    return "a collective"
