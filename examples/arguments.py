"""What the command lines of the examples share."""

import argparse
import math
from collections.abc import Callable

INTERRUPTED = 130  # exit status, the shell's for a program that Ctrl-C ended
IMPLS = ("cce", "cce_exact", "cce_threshold", "torch_compile", "baseline")


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `smallest` up."""

    def whole_number(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, not {text}")
        return int(text)

    return whole_number


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
    return float(text)
