"""Each case in this folder runs on all ranks of a group of 2 processes, and of one of 4.

The group is gloo's. With CCE_RANKS_DEVICE=cuda each rank has a GPU, and the group is NCCL's: cases of more ranks than
there are GPUs are skipped.

pytest runs a case by telling its name to the ranks (support/pool.py), which are processes that run pytest as well: they
call the functions of this folder, with the fixtures below. A case fails where it fails on any rank.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from support.pool import Failed, Pool
from support.sharded import DEVICE
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

FOLDER = Path(__file__).parent


class OnRanks(pytest.Item):
    """A case of this folder where pytest runs, which is on no rank."""

    def __init__(self, *, original: pytest.Function, pool: Pool, **more) -> None:
        super().__init__(**more)
        self.original, self.pool = original, pool
        self.own_markers = list(original.own_markers)
        self.keywords.update(original.keywords)

    def runtest(self) -> None:
        ranks = self.original.callspec.params["ranks"]
        if DEVICE == "cuda" and torch.cuda.device_count() < ranks:
            pytest.skip(f"{ranks} ranks take as many GPUs, and there are {torch.cuda.device_count()}")
        self.pool.run(ranks, self.nodeid)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, Failed) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.original.reportinfo()


pools = pytest.StashKey[Pool]()


@pytest.hookimpl(trylast=True)  # after -k and -m, and after pytest has brought the cases of 2 ranks together
def pytest_collection_modifyitems(config, items):
    if dist.is_initialized():  # this is a rank
        return
    config.stash[pools] = pool = Pool(FOLDER, config.rootpath)
    items[:] = [
        OnRanks.from_parent(item.parent, name=item.name, original=item, pool=pool)
        if FOLDER in item.path.parents
        else item
        for item in items
    ]


def pytest_sessionfinish(session):
    if pools in session.config.stash:
        session.config.stash[pools].close()


@pytest.fixture(scope="session", autouse=True, params=[2, 4], ids=["2_ranks", "4_ranks"])
def ranks(request):
    """How many there are."""
    assert dist.get_world_size() == request.param
    return request.param


@pytest.fixture(autouse=True)
def seeded_alike():
    """As users of tensor parallelism do."""
    torch.manual_seed(0)


@pytest.fixture
def compiles():
    torch._dynamo.reset()


# Groups last as long as their processes.
init_once = cache(init_device_mesh)


@pytest.fixture
def mesh(ranks) -> DeviceMesh:
    return init_once(DEVICE, (ranks,), mesh_dim_names=("tp",))


@pytest.fixture
def mesh_2d(ranks) -> DeviceMesh:
    return init_once(DEVICE, (2, ranks // 2), mesh_dim_names=("dp", "tp"))
