"""One compute stream, one link a process group: simulate an order of items, search for a better one, bound the best.

Contract: numbers only, no graphs. Everything is deterministic: ties go to the smaller item. Time is close to linear in
the number of items, but for ``lower_bound``, which is quadratic in the number of collectives (a matrix product).

Terms
  item            runs on the compute stream for ``seconds``; a launch starts its collective, a wait idles for it
  order           a permutation of the items in which each comes after the items it needs
  link            collectives of one group, first in, first out: each starts at max(link free, now), and ends its seconds later; one
                  that stands behind another may be done sooner (``queued``), but not sooner than its seconds after its launch
  launches' order is fixed: each launch needs the one before it
  tail            longest path from an item to the end, over compute and links
  mirror          the same problem from the end: edges turned round; a wait starts the collective, a launch needs it

Steps of the search, for the links as they are given and for slower ones
  1. List schedules: always run the ready item with the longest tail. A rule says how long to idle for a wait that is
     more urgent, rather than start something that would overrun it (*patience*), and whether something shorter may fill
     the gap first.
  2. Backward-forward improvement (Li and Willis 1992; Tormos and Lova 2001): schedule the mirror by decreasing finish
     times, then forward again by increasing start times; repeat while it gets better.
Orders are judged by what they take with both. Costs are predictions, and ranks are late now and then: many orders end within a percent
of the best one, and some of them only because each collective is awaited just when it should arrive.
"""
from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

COMPUTE, LAUNCH, WAIT = range(3)
_PATIENCE = (0.0, 0.15, 0.4, 1.0, float("inf"))
_ROUNDS = 4
_FILLERS = 32          # shorter items looked at for one gap
_EPSILON = 1e-9
_SLOWER = 1.5          # a link that an order should bear; measured: predictions are off by a third, ranks late by milliseconds


@dataclass(kw_only=True)
class Problem:
    """Items and collectives. ``link[i]`` is the collective that item i launches or waits for, else -1."""
    seconds: list[float]
    role: list[int]
    link: list[int]
    before: list[list[int]]
    link_seconds: list[float]       # by collective, in launch order
    link_group: list[int]
    share: float = 0.0              # of the compute stream that a busy link takes
    queued: float = 1.0             # of its seconds, that a collective needs once the one in front of it is done
    after: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.after = [[] for _ in self.seconds]
        for item, sources in enumerate(self.before):
            for source in sources:
                self.after[source].append(item)

    def slower(self) -> Problem:
        """With links that take longer than predicted."""
        return replace(self, link_seconds=[_SLOWER * seconds for seconds in self.link_seconds])

    def mirror(self) -> Problem:
        """The problem that a reversed order solves. A collective with several waits is started by one of them."""
        last = {}
        for item, role in enumerate(self.role):
            if role == WAIT:
                last[self.link[item]] = item
        role = [WAIT if r == LAUNCH and self.link[i] in last else
                LAUNCH if r == WAIT and last[self.link[i]] == i else COMPUTE for i, r in enumerate(self.role)]
        count = len(self.link_seconds)
        return Problem(seconds=self.seconds, role=role, link=[count - 1 - l if l >= 0 else -1 for l in self.link],
                       before=self.after, link_seconds=self.link_seconds[::-1], link_group=self.link_group[::-1],
                       share=self.share, queued=self.queued)


@dataclass(kw_only=True)
class Run:
    """A simulated order. ``idle_at`` is what the compute stream lost at each wait."""
    end: float
    idle: float
    start: list[float]
    finish: list[float]
    link_start: list[float]
    link_finish: list[float]
    idle_at: dict[int, float]


class _Links:
    """Where each collective stands; starts them in their fixed order, each in its group's queue."""

    def __init__(self, p: Problem) -> None:
        count = len(p.link_seconds)
        self.start = [float("nan")] * count
        self.finish = [float("inf")] * count
        self.busy_until = 0.0
        self._p = p
        self._issued: list[float | None] = [None] * count
        self._queue: dict[int, list[int]] = {}
        for link in sorted((p.link[i] for i, r in enumerate(p.role) if r == LAUNCH), reverse=True):
            self._queue.setdefault(p.link_group[link], []).append(link)
        self._free = dict.fromkeys(self._queue, 0.0)

    def issue(self, link: int, now: float) -> list[int]:
        """Start ``link``, and those that stood in the queue behind it; returns all that have a finish time now."""
        group = self._p.link_group[link]
        self._issued[link] = now
        queue, begun = self._queue[group], []
        while queue and self._issued[queue[-1]] is not None:
            head, free = queue.pop(), self._free[group]
            begun_at, seconds = max(self._issued[head], now if head != link else 0.0), self._p.link_seconds[head]
            self.start[head] = max(free, begun_at)
            self.finish[head] = self._free[group] = max(free + self._p.queued * seconds, begun_at + seconds)
            self.busy_until = max(self.busy_until, self._free[group])
            begun.append(head)
        return begun

    def after_compute(self, now: float, seconds: float) -> float:
        """When a computation ends that starts now, slowed down while a link is busy."""
        share = self._p.share
        shared = self.busy_until - now
        if not share or shared <= 0:
            return now + seconds
        if seconds <= shared * (1 - share):
            return now + seconds / (1 - share)
        return now + seconds + shared * share


def run(p: Problem, order: Sequence[int]) -> Run:
    """Simulate ``order``, a valid one."""
    links, now, idle = _Links(p), 0.0, {}
    start, finish = [0.0] * len(order), [0.0] * len(order)
    for item in order:
        if p.role[item] == WAIT and links.finish[p.link[item]] > now:
            idle[item] = links.finish[p.link[item]] - now
            now = links.finish[p.link[item]]
        start[item] = now
        now = links.after_compute(now, p.seconds[item])
        finish[item] = now
        if p.role[item] == LAUNCH:
            links.issue(p.link[item], now)
    unawaited = [f for f in links.finish if f != float("inf")]
    return Run(end=max([now, *unawaited]), idle=sum(idle.values()) + max(0.0, max(unawaited, default=0.0) - now),
               start=start, finish=finish, link_start=links.start, link_finish=links.finish, idle_at=idle)


# --- list schedules ----------------------------------------------------------------------------------------------
def topological(p: Problem, key: Callable[[int], float] = float) -> list[int]:
    """A valid order; smaller keys first where dependencies leave a choice."""
    missing = [len(sources) for sources in p.before]
    heap = [(key(i), i) for i, m in enumerate(missing) if not m]
    heapq.heapify(heap)
    order = []
    while heap:
        _, item = heapq.heappop(heap)
        order.append(item)
        for user in p.after[item]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(heap, (key(user), user))
    return order


def tails(p: Problem) -> list[float]:
    """Longest path from each item to the end, itself included."""
    tail = [0.0] * len(p.seconds)
    landing = [0.0] * len(p.link_seconds)       # of each collective: the longest tail of its waits
    for item in reversed(topological(p)):
        rest = max((tail[u] for u in p.after[item]), default=0.0)
        if p.role[item] == LAUNCH:
            rest = max(rest, p.link_seconds[p.link[item]] + landing[p.link[item]])
        tail[item] = p.seconds[item] + rest
        if p.role[item] == WAIT:
            landing[p.link[item]] = max(landing[p.link[item]], tail[item])
    return tail


def list_schedule(p: Problem, priority: Sequence[float], *, patience: float, fill: bool) -> list[int]:
    """Run what is ready in order of ``priority``, larger first.

    Args:
        patience: idle for a more urgent wait if that costs at most this share of the item that would overrun it.
        fill: put shorter ready items into the gap first.
    """
    missing = [len(sources) for sources in p.before]
    links, now = _Links(p), 0.0
    ready: list[tuple[bool, float, int]] = []   # a launch costs no compute and its turn is fixed: it goes at once
    flying: list[int] = []                      # waits whose turn it is but for their collective
    order: list[int] = []

    def entry_of(item: int) -> tuple[bool, float, int]:
        return p.role[item] != LAUNCH, -priority[item], item

    def offer(item: int) -> None:
        if p.role[item] == WAIT:
            flying.append(item)
        else:
            heapq.heappush(ready, entry_of(item))

    for item, count in enumerate(missing):
        if not count:
            offer(item)
    while ready or flying:
        for wait in [w for w in flying if links.finish[p.link[w]] <= now]:
            flying.remove(wait)
            heapq.heappush(ready, entry_of(wait))
        if ready:
            item = heapq.heappop(ready)[-1]
            if p.role[item] == COMPUTE and flying:
                item = _or_wait(p, item, links, now, ready, flying, priority, patience, fill)
        else:
            item = min(flying, key=lambda w: (links.finish[p.link[w]], -priority[w], w))
            flying.remove(item)
        if p.role[item] == WAIT:
            now = max(now, links.finish[p.link[item]])
        now = links.after_compute(now, p.seconds[item])
        if p.role[item] == LAUNCH:
            links.issue(p.link[item], now)
        order.append(item)
        for user in p.after[item]:
            missing[user] -= 1
            if not missing[user]:
                offer(user)
    return order


def _or_wait(p: Problem, item: int, links: _Links, now: float, ready: list, flying: list[int],
             priority: Sequence[float], patience: float, fill: bool) -> int:
    """``item``, or what should run instead because a more urgent wait ends while ``item`` would run."""
    end = links.after_compute(now, p.seconds[item])
    urgent = [w for w in flying if links.finish[p.link[w]] < end and priority[w] > priority[item]]
    if not urgent:
        return item
    wait = max(urgent, key=lambda w: (priority[w], -w))
    done = links.finish[p.link[wait]]
    if fill:
        for entry in heapq.nsmallest(_FILLERS, ready):
            if links.after_compute(now, p.seconds[entry[-1]]) <= done:
                ready.remove(entry)
                heapq.heapify(ready)
                heapq.heappush(ready, (True, -priority[item], item))
                return entry[-1]
    if done - now <= patience * p.seconds[item]:
        heapq.heappush(ready, (True, -priority[item], item))
        flying.remove(wait)
        return wait
    return item


# --- search ------------------------------------------------------------------------------------------------------
def search(p: Problem, incoming: Sequence[int]) -> list[list[int]]:
    """Good orders, best first by ``judged``; the incoming one is among them."""
    slower = p.slower()
    found: dict[tuple[int, ...], None] = {tuple(incoming): None}        # in the order in which they were found
    for problem in (p, slower):
        mirror, tail = problem.mirror(), tails(problem)
        for patience in _PATIENCE:
            for fill in (False, True):
                order = list_schedule(problem, tail, patience=patience, fill=fill)
                _improve(problem, mirror, order, found, patience=patience, fill=fill)
    return sorted(map(list, found), key=lambda order: judged(p, slower, order))


def judged(p: Problem, slower: Problem, order: Sequence[int]) -> float:
    """Smaller is better: seconds with the links as given, plus those with slower ones."""
    return run(p, order).end + run(slower, order).end


def _improve(p: Problem, mirror: Problem, order: list[int], found: dict, *, patience: float, fill: bool) -> None:
    """Backward-forward improvement, for as long as it helps; everything tried goes into ``found``."""
    best = float("inf")
    for _ in range(_ROUNDS):
        result = run(p, order)
        found[tuple(order)] = None
        if result.end > best * (1 - _EPSILON):
            return
        best = result.end
        backward = list_schedule(mirror, result.finish, patience=patience, fill=fill)
        right = run(mirror, backward)
        found[tuple(backward[::-1])] = None
        # Right-justified start times: the mirror's finish, seen from the other end.
        order = list_schedule(p, right.finish, patience=patience, fill=fill)


# --- bound -------------------------------------------------------------------------------------------------------
def lower_bound(p: Problem) -> float:
    """No order with these launches can end earlier.

    The largest of: all compute and what links take from it; the longest path; over every collective c, the earliest end
    of c plus the least time after it (after each collective b that c needs, all that lies between the two runs on one
    compute stream: so what a chain of exchanges leaves serial, and what its ends expose, counts); and all compute plus
    what a chain of collectives exposes at least (``_hidden``).
    """
    compute = sum(p.seconds)
    if not p.link_seconds:
        return compute
    groups: dict[int, float] = {}       # busy at least so long
    for group, seconds in zip(p.link_group, p.link_seconds):
        groups[group] = groups[group] + p.queued * seconds if group in groups else seconds
    between, needed = _between(p)
    mirror = p.mirror()
    back, needed_back = _between(mirror)
    earliest = _earliest_ends(p, between, needed)
    latest = _earliest_ends(mirror, back, needed_back)[::-1]
    through = max(e + l - s for e, l, s in zip(earliest, latest, p.link_seconds))
    chain = _heaviest_chain(p, between, needed)
    chained = compute + sum(p.link_seconds[c] for c in chain) - _hidden(p, chain, between)
    busy = max(groups.values())
    return max(compute + p.share * p.queued * busy, max(tails(p)), busy, through, chained)


def free_seconds(p: Problem) -> list[float]:
    """Of each collective: seconds of the items that its launch does not need and that do not need a wait of it."""
    launch, waits = _ends_of_links(p)
    seconds = np.asarray(p.seconds)
    return (seconds.sum() - _needs(p, launch) @ seconds - _follows(p, waits) @ seconds).tolist() if p.link_seconds else []


def _ends_of_links(p: Problem) -> tuple[list[int], list[list[int]]]:
    """The launch (or -1) and the waits of each collective."""
    launch = [-1] * len(p.link_seconds)
    waits: list[list[int]] = [[] for _ in p.link_seconds]
    for item, role in enumerate(p.role):
        if role == LAUNCH:
            launch[p.link[item]] = item
        elif role == WAIT:
            waits[p.link[item]].append(item)
    return launch, waits


def _between(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """[b, c]: compute seconds after b's wait that c's launch needs; and whether c's launch needs b's wait at all.

    The diagonal of the first has the compute that c's launch needs in all.
    """
    launch, waits = _ends_of_links(p)
    needs, follows = _needs(p, launch), _follows(p, waits)
    seconds = np.asarray(p.seconds)
    between = (follows * seconds) @ needs.T
    np.fill_diagonal(between, needs @ seconds)
    needed = np.zeros(between.shape, dtype=bool)
    for b, items in enumerate(waits):
        for wait in items:
            needed[b] |= needs[:, wait].astype(bool)
    return between, needed


def _heaviest_chain(p: Problem, between: np.ndarray, needed: np.ndarray) -> list[int]:
    """Collectives of which each needs the one before, with the largest sum of seconds."""
    count = len(p.link_seconds)
    best, previous = list(p.link_seconds), [-1] * count
    for c in range(count):
        for b in np.flatnonzero(needed[:c, c]):
            if best[b] + p.link_seconds[c] > best[c]:
                best[c], previous[c] = best[b] + p.link_seconds[c], int(b)
    chain, at = [], max(range(count), key=lambda c: (best[c], -c))
    while at >= 0:
        chain.append(at)
        at = previous[at]
    return chain[::-1]


def _hidden(p: Problem, chain: Sequence[int], between: np.ndarray) -> float:
    """At most so much compute runs while a collective of ``chain`` is in flight.

    Flights of a chain do not overlap, and an item cannot run into two of them if something must run in between: items
    are not divided. So each item counts for no more than the longest flight that it may run in. Which those are is an
    interval of the chain; so taking, flight by flight, the items whose interval ends first is the best there is.
    """
    flights: list[list[int]] = []
    for b, c in zip([-1, *chain], chain):
        if b >= 0 and between[b, c] <= 0:
            flights[-1].append(c)           # nothing need run in between: an item may run into both
        else:
            flights.append([c])
    launch, waits = _ends_of_links(p)
    room = [(1 - p.share) * sum(p.link_seconds[c] for c in flight) for flight in flights]
    feeds = _needs(p, [launch[flight[0]] for flight in flights]).astype(bool)
    after = _follows(p, [waits[flight[-1]] for flight in flights]).astype(bool)
    first = after.sum(axis=0)                               # flights that are over before the item can begin
    last = len(flights) - feeds.sum(axis=0) - 1             # the item must be over before any later one begins
    entering: list[list[int]] = [[] for _ in flights]
    for item, seconds in enumerate(p.seconds):
        if seconds and first[item] <= last[item]:
            entering[first[item]].append(item)
    hidden, heap = 0.0, []
    for at, items in enumerate(entering):
        for item in items:
            cap = max(room[at:last[item] + 1])
            heapq.heappush(heap, (last[item], item, min(p.seconds[item], cap)))
        left = room[at]
        while heap and left > 0:
            until, item, seconds = heapq.heappop(heap)
            if until < at:
                continue
            used = min(left, seconds)
            hidden, left = hidden + used, left - used
            if seconds > used:
                heapq.heappush(heap, (until, item, seconds - used))
    return hidden


def _earliest_ends(p: Problem, between: np.ndarray, needed: np.ndarray) -> list[float]:
    """When each collective can have ended at the earliest, counted from the start of the program."""
    launch, _ = _ends_of_links(p)
    path = _path_starts(p)
    ends = np.zeros(len(p.link_seconds))
    last: dict[int, int] = {}
    for c, item in enumerate(launch):
        begin = max(between[c, c], path[item] if item >= 0 else 0.0)
        if needed[:c, c].any():
            begin = max(begin, (ends[:c] + between[:c, c])[needed[:c, c]].max())
        ends[c] = begin + p.link_seconds[c]
        if (front := last.get(p.link_group[c], -1)) >= 0:
            # Of the mirror it is the other one that stands behind: the larger one is safe for both.
            saved = (1 - p.queued) * max(p.link_seconds[c], p.link_seconds[front])
            ends[c] = max(ends[c], ends[front] + p.link_seconds[c] - saved)
        last[p.link_group[c]] = c
    return ends.tolist()


def _path_starts(p: Problem) -> list[float]:
    """Longest path to each item's end."""
    path = [0.0] * len(p.seconds)
    landing = [0.0] * len(p.link_seconds)
    for item in topological(p):
        begin = max((path[s] for s in p.before[item]), default=0.0)
        if p.role[item] == WAIT:
            begin = max(begin, landing[p.link[item]])
        path[item] = begin + p.seconds[item]
        if p.role[item] == LAUNCH:
            landing[p.link[item]] = path[item] + p.link_seconds[p.link[item]]
    return path


def _needs(p: Problem, launches: Sequence[int]) -> np.ndarray:
    """[collective, item]: the launch needs the item, itself included."""
    return _reach(p.before, topological(p), [[i] if i >= 0 else [] for i in launches])


def _follows(p: Problem, waits: Sequence[Iterable[int]]) -> np.ndarray:
    """[collective, item]: the item needs one of the collective's waits."""
    return _reach(p.after, topological(p)[::-1], [list(w) for w in waits])


def _reach(edges: Sequence[Sequence[int]], order: Sequence[int], seeds: Sequence[Sequence[int]]) -> np.ndarray:
    """[seed set, item]: the item is reached along ``edges``; ``order`` has every edge's end before its beginning."""
    carried = [0] * len(edges)
    for row, items in enumerate(seeds):
        for item in items:
            carried[item] |= 1 << row
    for item in reversed(order):
        if carried[item]:
            for end in edges[item]:
                carried[end] |= carried[item]
    width = (len(seeds) + 7) // 8
    packed = np.frombuffer(b"".join(c.to_bytes(width, "little") for c in carried), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(len(edges), width), axis=1, bitorder="little")[:, :len(seeds)]
    return bits.T.astype(np.float64)
