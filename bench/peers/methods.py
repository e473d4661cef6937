"""All methods of each task by name, in the order of the tables, and the versions of their packages."""

from __future__ import annotations

import importlib.metadata

import cce_ext

from . import others, ours, plain
from .method import Method

# The sampling eps that are measured against their cost, as exponents of 2, by the name of the method.
EPS = {f"cce_eps{k}": k for k in range(6, 12)}
# Plain PyTorch, whose logits are rounded to the inputs' dtype.
DENSE = ("baseline", "compiled_baseline", "torch_chunked")
# What --methods may name together.
GROUPS = {"eps": ("baseline", "cce", *EPS, "cce_exact")}

IN_FORWARD = "computes the gradient in its forward; loss-bw only scales it"

# mm comes first: every other row is compared with it.
METHODS = {
    m.name: m
    for m in (
        Method("mm", None, note="products only"),
        Method("cce", ours.impl("cce"), draws=True),
        Method("cce_fp8", ours.fp8, draws=True),
        *(Method(name, ours.impl("cce", 2.0**-k), draws=True, on_request=True) for name, k in EPS.items()),
        Method("cce_exact", ours.impl("cce_exact")),
        Method("cce_compiled", ours.compiled("cce"), compiled=True, draws=True, on_request=True),
        Method("cce_exact_compiled", ours.compiled("cce_exact"), compiled=True, on_request=True),
        Method("cce_threshold", ours.impl("cce_threshold")),
        Method("torch_compile", ours.impl("torch_compile"), compiled=True),
        Method("baseline", plain.baseline),
        Method("compiled_baseline", plain.compiled_baseline, compiled=True),
        Method("torch_chunked", plain.torch_chunked, note=IN_FORWARD),
        Method("apple_cce", others.apple("cce")),
        Method("apple_cce_exact", others.apple("cce_exact")),
        Method("apple_cce_kahan_full_c", others.apple("cce_kahan_full_c")),
        Method("liger", others.liger, note=IN_FORWARD),
        Method("liger_cutedsl", others.liger_cutedsl, note="computes the logits' gradient and dE in its forward"),
        Method("liger_cutedsl_scaled", others.liger_cutedsl_scaled),
        Method("quack", others.quack, note="computes most of the gradient in its forward"),
    )
}

NO_ENTROPY = "it has no entropy: log-probabilities alone"

LOGPROBS = {
    m.name: m
    for m in (
        Method("mm", None, note="products only", task="logprobs"),
        Method("cce", ours.logprobs("cce"), draws=True, task="logprobs"),
        Method("cce_exact", ours.logprobs("cce_exact"), task="logprobs"),
        Method("trl", others.trl_logprobs, task="logprobs"),
        Method("torch", plain.logprobs, task="logprobs"),
        Method("compiled_torch", plain.compiled_logprobs, compiled=True, task="logprobs"),
        Method("fp32_head", plain.logprobs_of_fp32_head, on_request=True, task="logprobs"),
        Method("liger_cutedsl_scaled", others.liger_cutedsl_logprobs, task="logprobs"),
        Method("liger", others.liger_logprobs, task="logprobs", entropy=False, note=NO_ENTROPY),
        Method("apple_cce", others.apple_logprobs, task="logprobs", entropy=False, note=NO_ENTROPY),
    )
}

DISTILL = {
    m.name: m
    for m in (
        Method("mm", None, note="products only", task="distill"),
        Method("cce", ours.soft("cce"), draws=True, task="distill"),
        Method("cce_exact", ours.soft("cce_exact"), task="distill"),
        Method("torch", plain.soft, task="distill"),
        Method("compiled_torch", plain.compiled_soft, compiled=True, task="distill"),
    )
}

# The methods of each of problems.tasks.TASKS.
OF_TASK = {"loss": METHODS, "logprobs": LOGPROBS, "distill": DISTILL}

# Distributions whose versions a results file names.
DISTRIBUTIONS = (
    "triton",
    "cut-cross-entropy",
    "liger_kernel",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "trl",
)


def packages() -> dict[str, str]:
    """name: version of cce_ext and of the peers that are installed."""
    versions = {"cce_ext": cce_ext.__version__}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
