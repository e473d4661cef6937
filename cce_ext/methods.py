"""impl names and filter_eps: which method they stand for."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

DEFAULT_SAMPLING_EPS = 2.0**-9

DENSE = ("torch_compile", "reference")

# impl: (method, dE filtered, dC and dbias filtered). The kahan names are Apple's: here, sums are always fp32.
_METHODS = {
    "cce": ("sampled", True, True),
    "cce_kahan": ("sampled", True, True),
    "cce_kahan_full_c": ("sampled", True, False),
    "cce_kahan_full_e": ("sampled", False, True),
    "cce_exact": ("exact", False, False),
    "cce_threshold": ("threshold", True, True),
}
IMPLS = (*_METHODS, *DENSE)


class Method(NamedTuple):
    """How the backward chooses its visits. name: sampled, exact or threshold; eps: that method's own."""

    name: str
    eps: float
    filter_e: bool
    filter_c: bool

    @property
    def draws(self) -> bool:
        return self.name == "sampled"

    @property
    def needs_map(self) -> bool:
        return self.name != "exact"


def choose(
    impl: str,
    filter_eps: float | Literal["auto"] | None,
    filter_e_grad: bool,
    filter_c_grad: bool,
    dtype: torch.dtype,
) -> Method:
    """The method of a (not dense) impl. filter_eps None, or no side to filter, is exact.

    Raises ValueError for an unknown impl or an eps out of the method's range.
    """
    if impl not in _METHODS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    name, filter_e, filter_c = _METHODS[impl]
    filter_e, filter_c = filter_e and filter_e_grad, filter_c and filter_c_grad
    if isinstance(filter_eps, str):
        if filter_eps != "auto":
            raise ValueError(f"filter_eps: expected a number, 'auto' or None, got {filter_eps!r}")
        eps = DEFAULT_SAMPLING_EPS if name == "sampled" else torch.finfo(dtype).eps / 32
    elif filter_eps is None:
        eps, name = 0.0, "exact"
    else:
        eps = float(filter_eps)
        check_eps(name, eps, "filter_eps")
    if name == "exact" or not (filter_e or filter_c):
        return Method("exact", 0.0, False, False)
    return Method(name, eps, filter_e, filter_c)


def check_eps(method: str, eps: float, argument: str) -> None:
    """eps of an operator or of the function, called argument there. Raises ValueError."""
    if method not in ("sampled", "exact", "threshold"):
        raise ValueError(f"method: expected sampled, exact or threshold, got {method!r}")
    if method == "sampled" and not 0 < eps <= 0.5:
        raise ValueError(f"{argument}: the sampling eps must be in (0, 0.5], got {eps!r}")
    if method == "threshold" and not 0 < eps < 1:
        raise ValueError(f"{argument}: the threshold must be in (0, 1), got {eps!r}")
