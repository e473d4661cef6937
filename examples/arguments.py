"""What the command lines of the examples share."""

import argparse
import math
from collections.abc import Callable

INTERRUPTED = 130  # exit status, the shell's for a program that Ctrl-C ended
IMPLS = ("cce", "cce_exact", "cce_threshold", "torch_compile", "baseline")


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `smallest` up."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, not {text}")
        return number

    return whole_number


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, not {text}")
    return number
