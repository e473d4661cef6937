"""The divergence of two heads' softmaxes and its gradient, by blocks of tokens and vocabulary, in plain torch.

With z, y the logits of student and teacher, p and q their softmaxes, r = beta q + (1 - beta) p, and sums over the
vocabulary, a token's divergence and its gradient are

    forward   KL(q | p) = sum q (log q - log p)               dz = p - q
    reverse   KL(p | q) = sum p (log p - log q)               dz = p (log p - log q - KL(p | q))
    jsd       beta KL(q | r) + (1 - beta) KL(p | r)           dz = (1 - beta) p (log p - log r - KL(p | r)).

Where the weight in front is 0, a term is 0. The first two take one pass (_Online); r needs both log-sum-exps first.
docs/kl.md counts the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._ops import ops
from .classifier import BLOCK_ROWS, accumulate_dtype
from .sampling import TILE_COLUMNS

KINDS = ("forward", "reverse", "jsd")

# Logits of a head that are held at a time, beside as many of the other head and of what is computed of both.
_BLOCK_LOGITS = {"cpu": 1 << 19}
_BLOCK_LOGITS_DEFAULT = 1 << 23


@dataclass(frozen=True)
class Head:
    """Logits factor * softcap * tanh((e @ c.T + bias) / softcap). e: [N, D] of tokens that count, and are finite."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    softcap: float | None
    factor: float

    @property
    def dtype(self) -> torch.dtype:
        """Of its logits."""
        return accumulate_dtype(self.e)

    def logits(self, rows: slice, columns: slice, buffer: Tensor) -> Tensor:
        """[R, W], in buffer."""
        e, c = self.e[rows], self.c[columns]
        z = multiply(e, c.T, buffer[: len(e) * len(c)].view(len(e), len(c)))
        if self.bias is not None:
            z += self.bias[columns]
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap * self.factor)
        elif self.factor != 1.0:
            z *= self.factor
        return z

    def slope(self, z: Tensor) -> Tensor | None:
        """What logits z grow by with e @ c.T, over factor; None for 1."""
        return None if self.softcap is None else 1.0 - (z / (self.softcap * self.factor)).square_()

    def lse(self) -> Tensor:
        """[N], by a forward of its own."""
        n, device = len(self.e), self.e.device
        targets = torch.zeros(n, dtype=torch.int64, device=device)
        scale = None
        if self.factor != 1.0:
            scale = torch.full((n,), self.factor, dtype=self.dtype, device=device)
        given = {"softcap": self.softcap, "scale": scale, "method": "exact", "need_map": False}
        lse: Tensor = ops.lce_forward(self.e, self.c, self.bias, targets, None, **given)[1]
        return lse


class Divergence(NamedTuple):
    """Of tokens, [N] each. mean: what is subtracted in dz, 0 for forward KL."""

    value: Tensor
    lse: Tensor
    teacher_lse: Tensor
    mean: Tensor


class Gradients(NamedTuple):
    """Of the student's head, in the dtype of sums but for c, whose rows are rounded once; None where not needed."""

    e: Tensor | None
    c: Tensor | None
    bias: Tensor | None


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into out, which has the dtype of sums. On CUDA the tensor cores' sums are not rounded to 16 bits."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _Blocks:
    """Blocks of both heads' logits, in buffers that are used again."""

    def __init__(self, student: Head, teacher: Head) -> None:
        self.student, self.teacher = student, teacher
        self.n, self.v = len(student.e), len(student.c)
        self.dtype = torch.promote_types(student.dtype, teacher.dtype)
        self.has_bias = student.bias is not None or teacher.bias is not None
        most = _BLOCK_LOGITS.get(student.e.device.type, _BLOCK_LOGITS_DEFAULT)
        self.step = max(1, min(self.n, BLOCK_ROWS, most // TILE_COLUMNS))
        self.width = min(self.v, max(1, most // self.step // TILE_COLUMNS) * TILE_COLUMNS)
        size = self.step * self.width
        self._buffers = [torch.empty(size, dtype=x.dtype, device=x.e.device) for x in (student, teacher)]

    def rows(self) -> Iterator[slice]:
        for i in range(0, self.n, self.step):
            yield slice(i, min(i + self.step, self.n))

    def columns(self) -> Iterator[slice]:
        for v in range(0, self.v, self.width):
            yield slice(v, min(v + self.width, self.v))

    def logits(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's, which may be written to."""
        z, y = (x.logits(rows, columns, b) for x, b in zip((self.student, self.teacher), self._buffers, strict=True))
        return z.to(self.dtype), y.to(self.dtype)

    def weighed(self, p: Tensor, x: Tensor) -> Tensor:
        """x *= p, 0 where p is, whatever x is there: a bias of -inf makes it infinite or NaN."""
        x *= p
        return x.masked_fill_(p == 0, 0.0) if self.has_bias else x


def divergence(kind: str, beta: float, student: Head, teacher: Head) -> Divergence:
    """Of all tokens. Never negative but for rounding."""
    blocks = _Blocks(student, teacher)
    if kind == "jsd":
        return _jsd(blocks, beta)
    of, against = (1, 0) if kind == "forward" else (0, 1)
    sums = [student.e.new_empty(blocks.n, dtype=blocks.dtype) for _ in range(3)]
    for rows in blocks.rows():
        online = _Online(blocks, rows)
        for columns in blocks.columns():
            pair = blocks.logits(rows, columns)
            online.add(pair[of], pair[against])
        for into, x in zip(sums, online.results(), strict=True):
            into[rows] = x
    value, *lses = sums
    return Divergence(value, lses[of], lses[against], value if kind == "reverse" else torch.zeros_like(value))


class _Online:
    """KL(p | q) of rows in one pass, by sums relative to the largest logits that have been seen.

    With a and b the maxima of x and y, log p = x - a - log sum exp(x - a), so that
    KL(p | q) = sum p ((x - a) - (y - b)) - log sum exp(x - a) + log sum exp(y - b): numbers near 0 where it matters.
    """

    def __init__(self, blocks: _Blocks, rows: slice) -> None:
        self.blocks = blocks
        shape, like = (rows.stop - rows.start, 1), blocks.student.e
        self.sum_p, self.sum_q, self.dot = (like.new_zeros(shape, dtype=blocks.dtype) for _ in range(3))
        # Low, but finite: a row may begin with columns that are masked, and differences of maxima must be numbers.
        lowest = torch.finfo(blocks.dtype).min / 4
        self.max_p, self.max_q = (like.new_full(shape, lowest, dtype=blocks.dtype) for _ in range(2))

    def add(self, x: Tensor, y: Tensor) -> None:
        """x and y: logits of p and of q [R, W], which are written to."""
        max_p = torch.maximum(self.max_p, x.amax(1, keepdim=True))
        max_q = torch.maximum(self.max_q, y.amax(1, keepdim=True))
        shift_p, shift_q = self.max_p - max_p, self.max_q - max_q
        fade = shift_p.exp()
        # An infinite dot of terms that have faded to 0 counts for as much.
        dot = fade * (self.dot + self.sum_p * (shift_p - shift_q))
        self.dot = dot.masked_fill_(fade == 0, 0.0)
        self.sum_p, self.sum_q = self.sum_p * fade, self.sum_q * shift_q.exp_()
        self.max_p, self.max_q = max_p, max_q

        x -= max_p
        y -= max_q
        difference = x - y
        p, q = x.exp_(), y.exp_()
        self.sum_p += p.sum(1, keepdim=True)
        self.sum_q += q.sum(1, keepdim=True)
        self.dot += self.blocks.weighed(p, difference).sum(1, keepdim=True)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """KL(p | q), and the log-sum-exps of p's and of q's logits, [R]."""
        log_p, log_q = self.sum_p.log(), self.sum_q.log()
        value = self.dot / self.sum_p - log_p + log_q
        return value[:, 0], (self.max_p + log_p)[:, 0], (self.max_q + log_q)[:, 0]


def _jsd(blocks: _Blocks, beta: float) -> Divergence:
    lse, teacher_lse = blocks.student.lse().to(blocks.dtype), blocks.teacher.lse().to(blocks.dtype)
    of_student, of_teacher, mass = (torch.zeros_like(lse) for _ in range(3))
    for rows in blocks.rows():
        for columns in blocks.columns():
            log_p, log_q = blocks.logits(rows, columns)
            log_p -= lse[rows, None]
            log_q -= teacher_lse[rows, None]
            above_larger, distance = _mixture(log_p, log_q, beta)
            above_p = distance.clamp(min=0).add_(above_larger)
            above_q = distance.neg_().clamp_(min=0).add_(above_larger)
            of_teacher[rows] -= blocks.weighed(log_q.exp_(), above_q).sum(1)
            p = log_p.exp_()
            mass[rows] += p.sum(1)
            of_student[rows] -= blocks.weighed(p, above_p).sum(1)
    # A rounded lse has p add up to 1 + d. Far from the teacher log p - log r is nearly the same wherever p is, and the
    # gradient what it is less its mean: d of it would be most of that.
    of_student /= mass
    return Divergence(beta * of_teacher + (1 - beta) * of_student, lse, teacher_lse, of_student)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log r less the larger one of log p and log q, and log q - log p. Near 0 both keep their digits."""
    distance = log_q - log_p
    # The smaller one's weight in r: never so near 1 that the larger one has none where the smaller one is 0.
    most = 1 - torch.finfo(distance.dtype).eps
    of_p, of_q = (distance.new_full((), min(x, most)) for x in (1 - beta, beta))
    smaller = torch.where(distance > 0, of_p, of_q)
    return distance.abs().neg_().expm1_().mul_(smaller).log1p_(), distance


def gradients(
    kind: str,
    beta: float,
    g: Tensor,
    student: Head,
    teacher: Head,
    found: Divergence,
    *,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
) -> Gradients:
    """Of the sum of g [N] times the divergence. dz has the dtype of e in its products on CUDA, that of sums elsewhere.

    Each block of logits is computed again, in an order that repeats: vocabulary by vocabulary, tokens by tokens.
    """
    blocks = _Blocks(student, teacher)
    acc, e, c, bias = student.dtype, student.e, student.c, student.bias
    product_dtype = e.dtype if e.is_cuda else acc
    d_e = torch.zeros_like(e, dtype=acc, memory_format=torch.contiguous_format) if need_e else None
    d_c = torch.zeros_like(c, memory_format=torch.contiguous_format) if need_c else None
    d_bias = torch.zeros_like(bias, dtype=acc) if need_bias and bias is not None else None
    # A mean's 1/N must not take dz below what fp16 has: the products are of dz over the largest of g.
    g = g.to(blocks.dtype)
    largest = g.abs().amax() if len(g) else g.new_ones(())
    largest = largest.masked_fill(largest == 0, 1.0)
    weight = g / largest
    unit = (largest * student.factor).to(acc)
    for columns in blocks.columns():
        d_cols = None if d_c is None else torch.zeros_like(c[columns], dtype=acc)
        for rows in blocks.rows():
            dz = _dz(blocks, kind, beta, weight, found, rows, columns).to(acc)
            if d_bias is not None:
                d_bias[columns] += dz.sum(0)
            dz = dz.to(product_dtype)
            if d_e is not None:
                _accumulate(d_e[rows], dz, c[columns])
            if d_cols is not None:
                _accumulate(d_cols, dz.T, e[rows])
        if d_c is not None and d_cols is not None:
            d_c[columns] = d_cols.mul_(unit)
    for x in (d_e, d_bias):
        if x is not None:
            x *= unit
    return Gradients(d_e, d_c, d_bias)


def _accumulate(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b."""
    if a.dtype == into.dtype:
        into.addmm_(a, b.to(a.dtype))
    else:
        into += multiply(a, b, torch.empty_like(into))


def _dz(
    blocks: _Blocks, kind: str, beta: float, weight: Tensor, found: Divergence, rows: slice, columns: slice
) -> Tensor:
    """[R, W]: what comes back of the student's e @ c.T, over the factor of its logits."""
    log_p, log_q = blocks.logits(rows, columns)
    slope = blocks.student.slope(log_p)
    log_p -= found.lse[rows, None]
    log_q -= found.teacher_lse[rows, None]
    weight = weight[rows, None]
    if kind == "forward":
        dz = log_p.exp_().sub_(log_q.exp_()).mul_(weight)
    else:
        if kind == "reverse":
            score = log_p - log_q
        else:
            above_larger, distance = _mixture(log_p, log_q, beta)
            score, weight = distance.clamp_(min=0).add_(above_larger).neg_(), weight * (1 - beta)
        dz = blocks.weighed(log_p.exp_(), score.sub_(found.mean[rows, None])).mul_(weight)
    return dz if slope is None else dz.mul_(slope)
