"""The 8-bit scan without a GPU: its options on their way, of which the portable implementation then takes no notice."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from torch import Tensor

from cce_ext import ops as kernels
from cce_ext import scan as rules


class Forward(NamedTuple):
    """What a call of cce::lce_forward was given."""

    scan: str | None
    e: Tensor
    seed: Tensor | None
    method: str
    need_map: bool


def taken(monkeypatch: pytest.MonkeyPatch) -> list[Forward]:
    """A list of the calls that follow, none of which is refused for its device or dtype."""
    calls: list[Forward] = []
    check = kernels.check_scan_kernel

    def recorded(scan: Any, e: Any, seed: Any, options: Any, need_map: Any, *rest: Any) -> None:
        check(scan, e, seed, options, need_map, *rest)
        calls.append(Forward(scan, e, seed, options.method, need_map))

    monkeypatch.setattr(rules, "_check_tensor", lambda *_: None)
    monkeypatch.setattr(kernels, "check_scan_kernel", recorded)
    monkeypatch.setattr(kernels, "refuse_scan", lambda *_: None)
    return calls
