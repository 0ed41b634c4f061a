"""One thread a process: the ranks of the two-process tests share two cores, and so do the tests."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def fake_group():
    """A process group of two ranks of which only this one exists."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()
