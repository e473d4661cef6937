"""What the command lines share."""

from __future__ import annotations

import argparse
import math


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m module`, whose help begins with its docstring as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def doubling(text: str) -> list[int]:
    """A number, or A..B: A and its doubles up to B."""
    first, dots, last = text.partition("..")
    if not dots:
        return [positive(text)]
    value, most = positive(first), positive(last)
    if value > most:
        raise argparse.ArgumentTypeError(f"expected A..B with A <= B, got {text!r}")
    return [value << k for k in range((most // value).bit_length())]


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0 and below 1, got {text!r}")
    return value


def positive_real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
