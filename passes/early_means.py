"""Step 3c: means of gradients get their place among the launches: as soon as they are complete, behind the next exchange.

Contract: a post-grad ATen graph in; the same nodes in another order out. What moves is decided by the graph alone, never by
sizes or costs, so the launches of all ranks stay in one order.

AOTAutograd puts the means where autograd would run them: at the end of the backward, the first parameters' first. In that
order of launches, which ``schedule`` keeps, no mean could leave before the last exchange has. Here the mean of a bucket is
launched after the exchange that follows the last one it needs: behind it and not in front of it, because the next layer waits
for that exchange, and nothing in this graph waits for the mean.

Terms
  mean   an all-reduce or reduce-scatter that no other launch needs
  chain  all other launches, in their order
"""
from __future__ import annotations

from torch.fx import Graph, Node

from .costs import is_launch, op_name
from .moving import moved_with, written_memory


def launch_means_early(graph: Graph) -> int:
    """Move the launches of means, with what they need; how many were moved."""
    nodes = list(graph.nodes)
    feeds: dict[Node, bool] = {}            # whether another launch needs it
    for node in reversed(nodes):
        feeds[node] = any(is_launch(user) or feeds[user] for user in node.users)
    launches = [node for node in nodes if is_launch(node)]
    means = {n: None for n in launches if not feeds[n] and ("all_reduce" in op_name(n) or "reduce_scatter" in op_name(n))}
    if not means:
        return 0
    chain = [n for n in launches if n not in means]
    needed, written = _last_needed(nodes, chain), written_memory(graph)
    behind = {mean: min(needed[mean] + 1, len(chain) - 1) for mean in means}
    moved, place = 0, {}                    # place: what the next mean behind the same exchange goes behind
    # Of several behind one exchange, the one that needs least goes first: the embedding's gradient is the last of all.
    for mean in sorted(means, key=lambda m: (behind[m], _ancestors(m))):
        number = behind[mean]
        last = place.get(number) or (chain[number] if chain else max(mean.all_input_nodes))
        made = moved_with(mean, written, stays=lambda n: n <= last)
        for node in made or ():
            last.append(node)
            last = node
        if made:
            place[number] = last
            moved += 1
    if moved:
        graph.lint()
    return moved


def _last_needed(nodes: list[Node], chain: list[Node]) -> dict[Node, int]:
    """For each node the position in ``chain`` of the last launch that it needs; -1: none."""
    number = {launch: i for i, launch in enumerate(chain)}
    needed: dict[Node, int] = {}
    for node in nodes:
        needed[node] = max((max(needed[s], number.get(s, -1)) for s in node.all_input_nodes), default=-1)
    return needed


def _ancestors(node: Node) -> int:
    seen, todo = set(), [node]
    while todo:
        new = [s for s in todo.pop().all_input_nodes if s not in seen]
        seen.update(new)
        todo += new
    return len(seen)
