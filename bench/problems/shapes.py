"""Shapes N, D, V by name: of the model whose hidden width and vocabulary they have, or of who measures at them."""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Shape(NamedTuple):
    """name: one of NAMED's, or "N,D,V"; n tokens, d hidden width, v vocabulary."""

    name: str
    n: int
    d: int
    v: int


NAMED = {
    shape.name: shape
    for shape in (
        Shape("gemma2", 8192, 2304, 256000),
        Shape("llama3", 8192, 4096, 128256),
        Shape("qwen2.5", 8192, 3584, 152064),
        Shape("mistral-nemo", 8192, 5120, 131072),
        Shape("phi3.5", 8192, 3072, 32064),
        Shape("gpt2", 8192, 768, 50304),
        # Peers' own.
        Shape("trl", 8192, 4096, 151936),
        Shape("trl_large", 16384, 2048, 248320),
        Shape("liger", 4096, 4096, 128256),
    )
}


def parse(text: str) -> Shape:
    """A name of NAMED, or N,D,V. Raises ValueError that says what it was."""
    if text in NAMED:
        return NAMED[text]
    try:
        n, d, v = (int(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"expected N,D,V or one of {', '.join(NAMED)}, got {text!r}") from None
    return of(n, d, v)


def argument(text: str) -> Shape:
    """An argparse type: as parse."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def of(n: int, d: int, v: int) -> Shape:
    """The shape, by its name if it is one of NAMED. Raises ValueError for one that is empty."""
    if min(n, d, v) < 1:
        raise ValueError(f"N, D and V must be 1 or more, got {n},{d},{v}")
    return next((s for s in NAMED.values() if s[1:] == (n, d, v)), Shape(f"{n},{d},{v}", n, d, v))


def sweep(shape: Shape, tokens: list[int] | None, vocab: list[int] | None) -> list[Shape]:
    """The shape with each of these numbers of tokens and each of these vocabularies in place of its own."""
    return [of(n, shape.d, v) for v in vocab or [shape.v] for n in tokens or [shape.n]]
