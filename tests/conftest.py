import os
import shutil

import pytest
import torch
from support import host_module

import cce_ext

# The extra `test` brings Ninja. CMake asks for make unless it is told, and not every machine has one.
if shutil.which("ninja"):
    os.environ.setdefault("CMAKE_GENERATOR", "Ninja")


def why_no_gpu() -> str | None:
    """Why the gpu tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not cce_ext.HAS_CUDA:
        return "cce_ext was built without its CUDA kernels"
    return None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test of the common contract runs: on the CPU, and on a GPU where there is one."""
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws is not to depend on those that ran before it, which `pytest -n 2` has others of each time."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    reason = why_no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of `pytest -n 2`: a function's cases stay together, and all of tests/ranks, so that only one starts ranks.

    A --dist of the command line is what is asked for.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFunction(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "ranks" if nodeid.startswith("tests/ranks/") else nodeid.partition("[")[0]

    # As collected: ordered by their number of cases, the few that take longest would come last.
    config.option.loadscopereorder = False
    return ByFunction(config, log)


@pytest.fixture(scope="session")
def host():
    """cce_host_tests: C++ that runs without a GPU, built on first use."""
    return host_module.load()


@pytest.fixture
def accelerate():
    """accelerate, whose state outlives an Accelerator or a Trainer otherwise."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
