"""`python -m cce_ext`: what is installed, whether it is right, and what it saves on this machine."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import HAS_CUDA, IMPLS, __version__, linear_cross_entropy, reference
from ._ops import ops
from .measure import interleaved_times, peak_memory
from .options import DENSE, Options, resolve_method

# N, D, V of the comparison: seconds on two cores, and large enough that a GPU is busy.
SHAPES = {"cpu": (1024, 256, 32768), "cuda": (8192, 2304, 128256)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cce_ext", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    usable = HAS_CUDA and torch.cuda.is_available()
    if args.device == "cuda" and not usable:
        parser.error("--device cuda: " + ("this build has no CUDA kernels" if not HAS_CUDA else "PyTorch finds no GPU"))
    device = args.device if args.device != "auto" else "cuda" if usable else "cpu"

    print_installation()
    right = check(device)
    compare(device)
    print(
        "\nAll is well."
        if right
        else "\nNOT WELL: the lines of the self-check that end in WRONG are beyond their limits."
    )
    return 0 if right else 1


LEGEND = """
  Errors are relative: |x - exact| / |exact|. One draw of a sampled gradient scatters around the exact one by about
  0.01, and its mean over draws is exact; cce_threshold leaves small entries out; the others, with the dC of full_c and
  the dE of full_e, are off by rounding.\
"""


def print_installation() -> None:
    info = json.loads(ops.build_info())
    print(f"cce_ext {__version__}, torch {torch.__version__}, python {platform.python_version()}")
    if info["cuda"]:
        architectures = ", ".join("sm_" + a for a in info["cuda_archs"])
        print(f"  CUDA kernels: yes, by CUDA {info['cuda_version']} for {architectures}")
    else:
        print("  CUDA kernels: no (built with CCE_CUDA=OFF, or without an nvcc)")
    print(f"  built with torch {info['torch_built_with']} for torch >= {info['torch_target']}, {info['compiler']}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            kernels = ""
            if info["cuda"]:
                device = json.loads(ops.device_info(i))
                kernels = ", kernels: " + ("wgmma and mma.sync" if device["sm90_kernels"] else "mma.sync")
            print(f"  cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GB{kernels}")
    else:
        print("  GPU: none that PyTorch can use")
    print(f"  CPU: {platform.machine()}, {torch.get_num_threads()} threads")


def random_problem(
    device: str, dtype: torch.dtype, n: int, d: int, v: int, *, reserved: int = 0, strength: float = 6.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings that point at their targets, as after some training. The last `reserved` rows of c nobody is near."""
    g = torch.Generator(device).manual_seed(0)
    c = torch.randn(v, d, generator=g, device=device) / d**0.5
    t = torch.randint(0, v - reserved, (n,), generator=g, device=device)
    e = strength * c[t] + torch.randn(n, d, generator=g, device=device)
    if reserved:
        e[:, 0], c[:, 0] = 1.0, 0.0
        c[v - reserved :, 0] = -60.0
    return e.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), t


# What the self-check computes, and the problem it does so on: a plain one, and one in which tokens are rather sure of
# their labels and the last rows of the vocabulary are reserved, as large vocabularies have them: 0.1.0 lost gradients
# there.
CHECKS: dict[str, dict[str, Any]] = {
    "plain": dict(n=200, d=64, v=3000),
    "reserved rows": dict(n=64, d=64, v=4096, reserved=256, strength=12.0),
}


def check(device: str) -> bool:
    """Loss and gradients of every impl against the dense reference in fp64. Prints a table; True if all are right."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    all_right = True
    for dtype in dtypes:
        for name, options in CHECKS.items():
            print(f"\nSelf-check on the {device}, {dtype_name(dtype)}, {name}, against the dense loss in fp64:")
            all_right &= check_one(random_problem(device, dtype, **options), dtype)
    print(LEGEND)
    return all_right


def check_one(problem: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> bool:
    e, c, t = problem
    nll, _ = reference.forward(e.double(), c.double(), None, t)
    exact = torch.autograd.grad(nll.mean(), (e, c))
    rounding = 4 * torch.finfo(dtype).eps
    print(f"  {'impl':<18}{'loss':>10}{'dE':>10}{'dC':>10}")
    all_right = True
    for impl in IMPLS:
        if impl == "torch_compile":
            continue  # a compiler's minutes, for the reference once more
        loss = linear_cross_entropy(e, c, t, impl=impl)
        grads = torch.autograd.grad(loss, (e, c))
        errors = [
            ((x.double() - y.double()).norm() / y.double().norm()).item()
            for x, y in zip((loss, *grads), (nll.mean(), *exact), strict=True)
        ]
        limits = [max(1e-5, rounding), *(max(0.1 if filtered else 1e-4, rounding) for filtered in filtered_sides(impl))]
        right = all(x <= limit for x, limit in zip(errors, limits, strict=True))
        all_right &= right
        print(f"  {impl:<18}" + "".join(f"{x:>10.1e}" for x in errors) + ("" if right else "   WRONG"))
    return all_right


def filtered_sides(impl: str) -> tuple[bool, bool]:
    """Whether dE and dC are one draw, which scatters around the exact gradient, or leave a little out."""
    if impl in DENSE:
        return False, False
    method = resolve_method(Options(impl=impl), torch.float32)
    return method.filter_e, method.filter_c


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dense(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(e, c).float(), t)


def compare(device: str) -> None:
    """Forward + backward against dense torch: time and peak memory beyond the inputs."""
    n, d, v = SHAPES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    e, c, t = random_problem(device, dtype, n, d, v)

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), (e, c))

    calls = {
        "dense torch": step(lambda: dense(e, c, t)),
        "cce": step(lambda: linear_cross_entropy(e, c, t, impl="cce")),
        "cce_exact": step(lambda: linear_cross_entropy(e, c, t, impl="cce_exact")),
    }
    print(f"\nForward + backward at N={n}, D={d}, V={v}, {dtype_name(dtype)}, on the {device}:")
    times = {name: statistics.median(ms) for name, ms in interleaved_times(calls, device, repeats=3).items()}
    for name, call in calls.items():
        memory = peak_memory(call, device)
        peak = "" if memory is None else f"{memory:>10.0f} MB over the inputs"
        print(f"  {name:<14}{times[name]:>9.1f} ms{times[name] / times['dense torch']:>7.2f} x{peak}")


if __name__ == "__main__":
    sys.exit(main())
