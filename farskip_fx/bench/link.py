"""The slow link: a network namespace for each rank, and everything that a rank sends or receives shaped by ``tc tbf``.

Two ranks are joined by a veth pair, shaped at both ends. More are joined by a bridge in a namespace of its own, with a veth
pair for each rank: what the rank sends is shaped at its end, what it receives at the bridge's. So each rank has a network
card of its own and as slow as every other's; exchanges of experts and means of gradients share it, as they do in a cluster
with a card a GPU. No two ranks are nearer to each other than others.

Contract
    ``with open_link() as link:`` gives a link that a process enters by prefixing its command with ``link.enter(rank)``.
    Only the parent changes the rate (``link.set_rate``), so ranks need no rights. Nothing outlives the ``with`` block,
    and nothing outlives this process even if it is killed.

Terms
    anchor  a process that does nothing but hold a namespace. Namespaces are found by the anchor's process id and never
            by a name, so two runs cannot collide. The anchor reads a pipe that only we hold: when we end, however we
            end, it reads end-of-file and goes, and the kernel removes the namespace, the veth pair and the shaping with
            it. There is nothing stale to reap.
    kind    "netns" (we may make network namespaces), "userns" (only inside a user namespace of our own), "loopback"
            (neither: all ranks use 127.0.0.1, nothing is shaped, so slow equals fast).
"""
from __future__ import annotations

import os
import select
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Iterator

KINDS = ("netns", "userns", "loopback")
TOOLS = ("unshare", "nsenter", "ip", "tc")
BRIDGE = "bridge"
BURST_BYTES = 256 * 1024                    # a smaller bucket halves what TCP reaches (measured)
QUEUE_MS = 100
PROBE_RATE = 1_000_000_000                  # any rate: only to learn whether shaping is permitted at all


class LinkRefused(RuntimeError):
    """This machine does not let us make this kind of link."""


@dataclass
class Link:
    kind: str
    refused: dict[str, str] = field(default_factory=dict)   # kinds tried before this one, and why each was refused
    ranks: int = 2
    anchors: tuple[int, ...] = ()                           # process ids: of each rank, then the bridge; empty on loopback
    rate: int | None = None                                 # bits a second; None: not shaped

    @property
    def emulated(self) -> bool:
        return self.kind != "loopback"

    def enter(self, rank: int) -> list[str]:
        """The command prefix that runs a program on rank's side of the link. It execs, so process ids stay."""
        if not self.emulated:
            return []
        return _enter(self.kind, self.anchors[rank])

    def device(self, rank: int) -> str:
        return device_of(rank) if self.emulated else "lo"

    def set_rate(self, rate: int | None) -> None:
        """Shape all ranks to ``rate`` bits a second each way; ``None`` takes the shaping away."""
        if not self.emulated or rate == self.rate:
            return
        for place, device in self._shaped():
            if rate is None:
                shape = ["tc", "qdisc", "del", "dev", device, "root"]
            else:
                shape = ["tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{int(rate)}bit",
                         "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms"]
            _call(self.enter(place) + shape)
        self.rate = rate

    def _shaped(self) -> list[tuple[int, str]]:
        """(whose namespace, device)"""
        ends = [(rank, device_of(rank)) for rank in range(self.ranks)]
        return ends if self.ranks == 2 else ends + [(self.ranks, port_of(rank)) for rank in range(self.ranks)]

    def describe(self) -> str:
        if self.emulated and self.ranks == 2:
            return f"{self.kind}: two network namespaces, one veth pair, tbf on both ends"
        if self.emulated:
            return (f"{self.kind}: a network namespace for each of {self.ranks} ranks, veth pairs to a bridge, tbf on what "
                    "each rank sends and on what it receives")
        why = "; ".join(f"{kind}: {reason}" for kind, reason in self.refused.items()) or "asked for"
        return f"loopback: no slow link is emulated, so the slow figures equal the fast ones ({why})"

    def as_dict(self) -> dict:
        return {"kind": self.kind, "emulated": self.emulated, "refused": dict(self.refused),
                "burst_bytes": BURST_BYTES, "queue_ms": QUEUE_MS}


def device_of(rank: int) -> str:
    return f"far{rank}"                     # the names exist only inside the namespaces


def port_of(rank: int) -> str:
    return f"near{rank}"                    # the bridge's end


def address_of(rank: int) -> str:
    return f"10.213.7.{rank + 1}"


@contextmanager
def open_link(kinds: tuple[str, ...] = KINDS, ranks: int = 2) -> Iterator[Link]:
    """The first of ``kinds`` that this machine permits. Raises LinkRefused when none is."""
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        for kind in kinds:
            attempt = ExitStack()
            try:
                link = _make(kind, attempt, ranks)
            except LinkRefused as error:
                attempt.close()
                refused[kind] = str(error)
                continue
            stack.enter_context(attempt)
            link.refused = refused
            yield link
            return
    raise LinkRefused("no link of the kinds asked for: " + "; ".join(f"{k}: {why}" for k, why in refused.items()))


def _make(kind: str, stack: ExitStack, ranks: int) -> Link:
    if kind == "loopback":
        return Link(kind, ranks=ranks)
    if kind not in KINDS:
        raise ValueError(f"unknown link kind {kind!r}; known: {', '.join(KINDS)}")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LinkRefused(f"{', '.join(missing)} not installed (Debian: apt install iproute2 util-linux)")

    first = ["unshare", "--net"] if kind == "netns" else ["unshare", "--user", "--map-root-user", "--net"]
    anchors = [_anchor(first, stack)]
    # The other namespaces are made from inside the first one's user namespace, which then owns both ends of every pair.
    inside = [] if kind == "netns" else _enter(kind, anchors[0], net=False)
    while len(anchors) < ranks + (ranks > 2):
        anchors.append(_anchor(inside + ["unshare", "--net"], stack))

    link = Link(kind, ranks=ranks, anchors=tuple(anchors))
    if ranks == 2:
        _join(link, device_of(0), anchors[1], device_of(1))
    else:
        _call(link.enter(ranks) + ["ip", "link", "add", BRIDGE, "type", "bridge"])
        _call(link.enter(ranks) + ["ip", "link", "set", BRIDGE, "up"])
        for rank in range(ranks):
            _join(link, port_of(rank), anchors[rank], device_of(rank))
            _call(link.enter(ranks) + ["ip", "link", "set", port_of(rank), "master", BRIDGE, "up"])
    for rank in range(ranks):
        enter = link.enter(rank)
        _call(enter + ["ip", "addr", "add", f"{address_of(rank)}/24", "dev", device_of(rank)])
        _call(enter + ["ip", "link", "set", device_of(rank), "up"])
        _call(enter + ["ip", "link", "set", "lo", "up"])
        # TCP forgets what the link carries while a rank computes, and starts slowly again; a cluster's network does not.
        _call(enter + ["sh", "-c", "echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle"])
    link.set_rate(PROBE_RATE)
    link.set_rate(None)
    return link


def _join(link: Link, near: str, anchor: int, far: str) -> None:
    """A veth pair from the bridge's namespace (of two ranks: the first one's) to the anchor's."""
    _call(link.enter(0 if link.ranks == 2 else link.ranks) +
          ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", str(anchor)])


def _enter(kind: str, anchor: int, net: bool = True) -> list[str]:
    prefix = ["nsenter", "--target", str(anchor)]
    if kind == "userns":
        prefix += ["--user", "--preserve-credentials"]
    return prefix + (["--net"] if net else [])


def _anchor(command: list[str], stack: ExitStack) -> int:
    """Start an anchor and wait until its namespace exists. The commands before it exec, so its pid is the anchor's."""
    process = subprocess.Popen(command + ["sh", "-c", "echo ready; exec cat"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stack.callback(_release, process)
    ready, _, _ = select.select([process.stdout], [], [], 10.0)
    if not ready or process.stdout.readline().strip() != "ready":
        process.kill()
        raise LinkRefused((process.stderr.read().strip() or f"{command[0]} did not answer").splitlines()[-1])
    return process.pid


def _release(process: subprocess.Popen) -> None:
    process.stdin.close()                   # end-of-file is the anchor's order to go
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    process.stderr.close()


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise LinkRefused(f"`{' '.join(command)}` failed: {said[-1] if said else f'exit status {done.returncode}'}")
