"""Each example runs as written."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_quickstart():
    out = run(sys.executable, str(EXAMPLES / "quickstart.py"))
    assert "4 of 4 layers rewired" in out
    assert "layer 2 attention: reads layer 1 output without the routed experts of layer 1" in out
    assert "original ones again: True" in out


def test_own_model():
    out = run(sys.executable, str(EXAMPLES / "own_model.py"))
    assert "4 of 4 layers rewired" in out and "layer 3 moe" in out
    assert "the plain loop with this connectivity differs by" in out


@pytest.mark.slow
def test_two_ranks(tmp_path):
    out = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
              str(EXAMPLES / "two_ranks.py"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "2 of 2 layers rewired" in out and "backward:" in out and "loss" in out


@pytest.mark.slow       # with restarts, over two nodes: test_multi_node.py
def test_train_ep():
    out = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
              str(EXAMPLES / "train_ep.py"), "--steps", "20", "--accumulate", "2", "--inner", "eager", "--ep", "2")
    losses = [float(line.split()[3]) for line in out.splitlines() if line.startswith("step")]
    assert len(losses) == 3 and losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_distill_tiny(tmp_path):
    run(sys.executable, str(EXAMPLES / "distill_tiny.py"), "--train-teacher", str(tmp_path), "--steps", "1")
    out = run(sys.executable, str(EXAMPLES / "distill_tiny.py"), "--teacher", str(tmp_path), "--batches", "1")
    assert "refitted" in out and "KL on 20%" in out and "of the loss that the conversion added" in out
