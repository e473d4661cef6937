"""The loss and its gradients in fp64, densely: what bench.checks.fuzz holds the operators against."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext.portable import FILTER_COLUMNS, FILTER_ROWS
from cce_ext.sampling import LOG2_E, MASS_STEPS, NORM_CODES, NORM_STEPS, TILE_COLUMNS, decode_tiles

from .fuzz_cases import IGNORE, Case, Problem


def by_tile(x: Tensor, padding: float = 0.0, columns: int = TILE_COLUMNS) -> Tensor:
    """[.., V] as [.., tiles, columns]."""
    return F.pad(x, (0, -x.shape[-1] % columns), value=padding).unflatten(-1, (-1, columns))


def per_unit(side: str, x: Tensor) -> Tensor:
    """Sums of a gradient's elements: of e's by token, of c's and the bias's by vocab tile."""
    x = x.sum(1) if x.dim() == 2 else x
    return x if side == "e" else by_tile(x).sum(1)


class Expected(NamedTuple):
    """A gradient in fp64, the same from a dz that is rounded, and what fp32 may add to an element's error."""

    exact: Tensor
    rounded: Tensor
    slack: Tensor


class ControlVariate(NamedTuple):
    """What stands in for dz [N, V] in the sampled method, and how far off it may be."""

    dz: Tensor
    blur: Tensor


class Dense:
    """nll and lse [N], log2_mass and log2_norm [tiles, N] (the map) and dz [N, V] of a problem in fp64.

    dz is (a p - b onehot) times the softcap's slope (docs/design.md). noise [N]: how far off fp32's logits, and with
    them its log-sum-exp and the logarithm of its p, may be; blur: how far off that makes an element of dz.
    """

    def __init__(self, case: Case, p: Problem) -> None:
        self.dtype, self.sides = p.e.dtype, case.needs
        self.e, self.c = p.e.double(), p.c.double()
        bias = None if p.bias is None else p.bias.double()
        cap = case.softcap or math.inf
        z = F.linear(self.e, self.c, bias)
        if case.softcap is not None:
            z = torch.tanh(z / cap) * cap
        self.counts = p.labels != IGNORE
        self.label = p.labels.long().clamp(min=0)[:, None]
        lse, of_label = z.logsumexp(1), z.gather(1, self.label)[:, 0]
        self.lse, self.nll = lse.masked_fill(~self.counts, 0.0), (lse - of_label).masked_fill(~self.counts, 0.0)
        relative = by_tile(z - of_label[:, None], -math.inf)
        self.log2_mass = (relative.logsumexp(2) * LOG2_E).T
        self.log2_norm = ((2 * relative).logsumexp(2) * LOG2_E / 2).T
        self.p = (z - lse[:, None]).exp_()

        # a is the operators' own sum, in their dtype: its two parts may cancel.
        b = p.g_nll.masked_fill(~self.counts, 0.0)
        a = b if p.g_lse is None else b + p.g_lse.masked_fill(~self.counts, 0.0)
        self.live = (a != 0) | (b != 0)
        unit = torch.finfo(a.dtype).eps
        a, b = a.double()[:, None], b.double()[:, None]
        self.largest = torch.maximum(a.abs(), b.abs()).max().item()
        self.a, self.bias, self.softcap = a, bias, case.softcap
        self.dz = (a * self.p).scatter_add_(1, self.label, -b) * (1.0 - (z / cap).square())
        # A sum over D is off by some units of its terms, and an exponential by its argument's error.
        terms = self.e.norm(dim=1) * self.c.norm(dim=1).max() + (case.softcap or 0.0)
        if bias is not None:
            terms = terms + bias.abs().max()
        self.noise = unit * (16.0 + terms) * (8.0 + case.d / 16.0)
        self.blur = (a.abs() * self.p).scatter_add_(1, self.label, b.abs()) * self.noise[:, None]

    def products(self, dz: Tensor, absolute: bool = False) -> dict[str, Tensor]:
        """The gradients that dz [N, V] makes."""
        e, c = (self.e.abs(), self.c.abs()) if absolute else (self.e, self.c)
        of = {"e": lambda: dz @ c, "c": lambda: dz.T @ e, "b": lambda: dz.sum(0)}
        return {side: of[side]() for side in self.sides}

    def rounded(self, dz: Tensor) -> Tensor:
        """dz as kernels keep it: in the inputs' dtype, in fp16 by a scale that saves small entries."""
        scale = 1.0
        if self.dtype == torch.float16 and self.largest > 0:
            scale = 2.0 ** (12 - math.floor(math.log2(self.largest)))
        return (dz * scale).to(self.dtype).double() / scale

    def by_column(self, x: Tensor) -> Tensor:
        """[tiles, N], or [blocks of the filter's columns, N], as [N, V]."""
        v = self.dz.shape[1]
        width = TILE_COLUMNS if len(x) == -(-v // TILE_COLUMNS) else FILTER_COLUMNS
        return x.double().T.repeat_interleave(width, 1)[:, :v]

    def expected(
        self, weight: Tensor | None = None, unsure: Tensor | None = None, variate: ControlVariate | None = None
    ) -> dict[str, Expected]:
        """Gradients with dz weighed by tile and token, [tiles, N]. unsure: weights that may be there or not."""
        dz, rounded, blur = self.dz, self.rounded(self.dz), self.blur
        if weight is not None and unsure is not None:
            weight, unsure = self.by_column(weight), self.by_column(unsure)
            dz, blur = dz * weight, blur * (weight + unsure) + dz.abs() * unsure
            rounded = self.rounded(dz)
            if variate is not None:
                rest = variate.dz * (1 - weight)
                dz, rounded = dz + rest, rounded + self.rounded(rest)
                blur = blur + variate.blur * ((1 - weight).abs() + unsure) + variate.dz.abs() * unsure
        columns = self.products(dz), self.products(rounded), self.products(blur, absolute=True)
        return {side: Expected(*(column[side] for column in columns)) for side in self.sides}

    def control_variate(self, mass: Tensor, log2_norm: Tensor) -> ControlVariate:
        """From the map's masses and norms [tiles, N], as docs/design.md has it."""
        cap = self.softcap or math.inf
        logit = (self.lse + log2_norm / LOG2_E).clamp(-cap, cap)
        factor = self.a.T * mass * (1 - (logit / cap).square())
        # Its error where fp32 makes the logit, and the mass by exp2.
        doubt = self.a.T.abs() * mass * (2 * self.noise / cap + 1e-5)
        live = self.e[self.live]
        mean = live.sum(0) / max(1, len(live))
        mean = mean.to(self.dtype).double()
        z = F.linear(mean, self.c, self.bias)
        if self.softcap is not None:
            z = torch.tanh(z / cap) * cap
        spread = by_tile(z, -math.inf).softmax(1).nan_to_num(nan=0.0).flatten()[: len(z)]
        # The mean may be rounded the other way, and fp32 has these logits as it has the tokens' own.
        off = self.c.abs() @ mean.abs() * torch.finfo(self.dtype).eps + self.noise.max()
        off = (2 * by_tile(off).amax(1)).expm1().repeat_interleave(TILE_COLUMNS)[: len(z)]
        exact, unsure = (self.by_column(x.masked_fill(~self.live, 0.0)) for x in (factor, doubt))
        return ControlVariate(exact * spread, spread * (unsure * (1 + off) + exact.abs() * off))

    def map_is_right(self, tile_map: Tensor, nll: Tensor) -> dict[str, Tensor]:
        """Whether a map [tiles, N] has the tiles' masses and their norms, as bool [tiles, N] each."""
        noise = self.noise * LOG2_E + 1e-4  # and what fp32 rounds of some hundred bits
        code = decode_tiles(tile_map, torch.zeros_like(nll, dtype=torch.float32))
        mass, norm = code.log2_mass.double(), code.log2_norm.double()
        mass_off, norm_off = mass - self.log2_mass, norm - self.log2_norm
        half = 0.5 / MASS_STEPS + noise
        # Of tiles without weight sums may be 0 in fp32, and those of squares sooner.
        log2_reference = self.nll * LOG2_E
        no_mass, no_norm = self.log2_mass - log2_reference < -64, self.log2_norm - log2_reference < -22
        low = (mass_off >= -half) | code.above | no_mass
        high = (mass_off <= half) | code.none
        # Rounded down by a step of its own, from the rounded mass, below which it cannot be by more than its codes say.
        flat = tile_map & (NORM_CODES - 1) == NORM_CODES - 1
        norm_low = (norm_off >= -1 / NORM_STEPS - half) | no_norm | code.above | code.none
        norm_high = (norm_off <= noise + flat * (1 / NORM_STEPS + 0.5 / MASS_STEPS)) | no_norm | code.none
        return {"mass": low & high, "norm": norm_low & norm_high}

    def passes_filter(self, eps: float) -> tuple[Tensor, Tensor]:
        """What the paper's filter keeps, and where rounding decides: both [blocks of columns, N]."""
        distance = (self.p - torch.zeros_like(self.p).scatter_(1, self.label, 1.0)).abs_()
        error = self.p * self.noise[:, None]

        def kept(x: Tensor) -> Tensor:
            by_token = by_tile(x.masked_fill(~self.live[:, None], 0.0), columns=FILTER_COLUMNS).amax(2).T
            blocks = F.pad(by_token, (0, -len(x) % FILTER_ROWS)).unflatten(1, (-1, FILTER_ROWS)).amax(2)
            return (blocks >= eps).repeat_interleave(FILTER_ROWS, 1)[:, : len(x)]

        return kept(distance), kept(distance + error) & ~kept(distance - error)


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far x is moved at most when it is rounded. Below fp32's smallest numbers exponentials are 0."""
    info = torch.finfo(dtype)
    return info.eps / 2 * x.abs() + max(info.tiny * info.eps / 2, 1e-37)
