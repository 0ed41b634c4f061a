"""When a rank dies, stalls, fails or disagrees: the others end with an error that names it, and never hang.

Real processes end here. Two gloo ranks train a tiny model; rank 1 misbehaves in step 2. Collectives time out after 6 s.
"""
import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

import farskip_fx as fs
from farskip_fx.agreement import Collective, _difference
from farskip_fx.expert_parallel import _exchange_groups
from ranks import run_each_rank
from test_checkpoint import small

STEPS, BAD_STEP = 4, 2
TOKENS = torch.arange(12)[None]


def trains(rank, how, converted):
    model = small("farskip" if converted else None)
    fs.expert_parallel(model)
    with fs.guarded(timeout=3) as guard:
        for guard.step in range(STEPS):
            if rank == 1 and guard.step == BAD_STEP:
                how = misbehaves(how, model)
            model(input_ids=TOKENS).logits.sum().backward()


def misbehaves(how, model):
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stalls":
        time.sleep(60)
    if how == "runs out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if how == "leaves out an exchange":
        dist.all_reduce(torch.ones(64), group=_exchange_groups[dist.group.WORLD])


@pytest.mark.parametrize("how, converted, other, message", [
    ("dies", True, "died", r"(?s)rank 0 got no result from all_to_all_single in step 2 \(.*collective \d+ of group "
     r"'farskip_expert_parallel'\):.  rank 1 does not answer: it is dead, or"),
    ("stalls", False, "unfinished", r"(?s)rank 0 got no result from all_to_all_single in step 2 \(Timed out.*  rank 1 "
     r"has not come to all_to_all of \[4\], collective \d+ of group 'farskip_expert_parallel'. It is at "
     r"test_faults.py:\d+ in misbehaves: time.sleep\(60\) in step 2"),
    ("runs out of memory", False, "raised", r"(?s)rank 0 got no result from .* in step 2 .*  rank 1 failed in step 2: "
     "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    ("leaves out an exchange", False, "raised", r"(?s)rank 0 got no result from .* in step 2 .*  rank 1 disagrees: "
     r"collective \d+ of group 'farskip_expert_parallel' is all_reduce of \[64\] there and all_to_all of \[4\] here"),
])
def test_the_others_end_with_the_name(how, converted, other, message):
    first, second = run_each_rank(trains, how=how, converted=converted, grace=1.0 if how == "stalls" else 15.0)
    assert first.status == "raised" and "farskip_fx.errors.CollectiveError: " in first.value
    assert re.search(message, first.value), first.value
    assert second.status == other


# ---------------------------------------------------------------------------------------------------------------------
# Agreement, before anything breaks
# ---------------------------------------------------------------------------------------------------------------------


def compiles(rank):
    """What check_agreement says where rank 1 differs in something; the models do not run together."""
    said = {}
    for how in ("equal", "more tokens", "connectivity", "a layer fewer", "wider"):
        odd = how if rank == 1 else "equal"
        model = small()
        if odd == "a layer fewer":
            model.config.num_hidden_layers = 1
            model.model.layers.append(model.model.layers[1])        # two layers for apply, and one that runs
        if odd == "wider":
            model = small(hidden_size=48)
        fs.expert_parallel(model, dist.new_group([rank], use_local_synchronization=True))
        fs.apply(model, connectivity="ladder" if odd == "connectivity" else "farskip", inner="eager")
        with torch.no_grad():
            model(input_ids=torch.arange(20 if odd == "more tokens" else 12)[None])
        try:
            fs.check_agreement(fs.last_reports()[-1])
            said[how] = ""
        except fs.CollectiveError as error:
            said[how] = str(error)
    return said


def test_agreement():
    outcomes = run_each_rank(compiles, collective_timeout=60)
    assert [o.status for o in outcomes] == ["returned"] * 2, outcomes
    said = outcomes[0].value
    assert outcomes[1].value == said        # every rank raises the same
    assert said["equal"] == said["more tokens"] == ""
    for how, expected in {
        "connectivity": "graph 0: connectivity is ladder on rank 1, and farskip on rank 0; their collectives are the",
        "a layer fewer": "layers rewired is [0] on rank 1, and [0, 1] on rank 0; collective 3 is missing on rank 1, "
                         "and all_to_all_single of int64 [2] over ranks [0] on rank 0",
        "wider": "collective 1 is all_to_all_single of float32 [?, 52] over ranks [1] on rank 1, and all_to_all_single "
                 "of float32 [?, 36]",
    }.items():
        assert expected in said[how], said[how]


def test_agreement_on_a_grid():
    """dp 2 x ep 2: ranks 0 and 1 exchange, and 2 and 3; whoever shares a collective must have it, too."""
    def program(ep, rows, dense=(0, 1, 2, 3)):
        return [({"name": "forward"}, [Collective("all_to_all_single", ep, "float32", (None, 32)),
                                       Collective("all_reduce of gradients", dense, "float32", (rows,))])]

    good = {rank: program((0, 1) if rank < 2 else (2, 3), 10) for rank in range(4)}
    assert [_difference(rank, 0, good) for rank in good] == [None] * 4
    sizes = {**good, 3: program((2, 3), 11)}
    assert _difference(3, 0, sizes) == (
        "graph 0: collective 1 is all_reduce of gradients of float32 [11] over ranks [0, 1, 2, 3] on rank 3, and "
        "all_reduce of gradients of float32 [10] over ranks [0, 1, 2, 3] on rank 0")
    groups = {**good, 3: program((1, 3), 10)}
    assert _difference(2, 0, groups) == (
        "collective 0 is all_to_all_single of float32 [?, 32] over ranks [2, 3] on rank 2, and all_to_all_single of "
        "float32 [?, 32] over ranks [1, 3] on rank 3")
    assert _difference(1, 0, {**good, 1: []}).startswith("rank 1 has no graph 0; collective 0 is missing on rank 1")
