"""What the command lines of the examples share."""

import argparse
import math
from collections.abc import Callable, Sequence

INTERRUPTED = 130  # exit status, the shell's for a program that Ctrl-C ended
IMPLS = ("cce", "cce_exact", "cce_threshold", "torch_compile", "baseline")
SCANS = ("fp8",)
SCAN_HELP = "scan the logits in 8 bits, for --impl cce on a Hopper GPU"


def check_scan(parser: argparse.ArgumentParser, scan: str | None, impls: Sequence[str], device: str) -> None:
    """Ends the program where the loss could not have this scan: before any text is read."""
    if scan is None:
        return
    if set(impls) != {"cce"}:
        parser.error(f"--scan {scan}: for --impl cce, whose gradient is sampled, not {', '.join(impls)}")
    if device != "cuda":
        parser.error(f"--scan {scan}: takes a Hopper GPU, not --device {device}")


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
