"""Random configurations of the loss, each held against fp64, until the time is up: what no list of shapes thinks of.

    python -m bench.checks.fuzz --seconds 600
    python -m bench.checks.fuzz --device cuda --case '{"n": 129, "d": 64, "v": 1548}'

Case k is a function of --seed and k alone. A case that fails is printed as one line, the command that repeats it and
what was wrong, and the run goes on. The exit status is 1 if a case failed and 2 where the device is not there.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from cce_ext import HAS_CUDA, linear_cross_entropy
from cce_ext.options import Options, resolve_method
from cce_ext.sampling import (
    TILE_COLUMNS,
    draw_visits,
    even_share,
    log2_visit_rate,
    tile_masses,
    tile_shares,
    visit_probabilities,
)

from ..arguments import parser as parser_of
from .fuzz_cases import NAN, Case, Problem, draw_case
from .fuzz_dense import Dense, Expected, by_tile, half_ulp, per_unit

# The mean of some draws is suspect at so many standard deviations, and wrong if that of four times as many others is.
SUSPECT, WRONG = 3.5, 6.0


# ---- the checks ----


class Trial:
    """One case on one device, and what was found wrong."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.failures: list[str] = []
        self.draws = 0

    def run(self) -> None:
        """Fills failures; whatever is raised is one as well."""
        try:
            self.p = Problem(self.case, self.device)
            self.dense = Dense(self.case, self.p)
            self.method = resolve_method(Options(impl=self.case.impl, filter_eps=self.case.filter_eps), self.p.e.dtype)
            self.check_forward()
            if self.method.draws:
                self.check_visits()
            self.check_gradients()
            if self.method.draws and not self.failures:
                self.check_means()
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            self.failures.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])

    def expect(self, ok: bool | Tensor, otherwise: str) -> bool:
        if not ok:
            self.failures.append(otherwise)
        return bool(ok)

    def poison(self) -> None:
        """Fill what the allocator hands out next with NaN, so that what a kernel does not write shows.

        Of a CPU's memory we do not know what comes next, and torch fills new tensors in its deterministic mode alone.
        """
        if self.device == "cuda":
            n, d, v = self.case.n, self.case.d, self.case.v
            largest = 4 * (max(n, v) * (d + 8) + n * (v // 64 + 1024))
            # Two NaN of bf16 are one of fp32, and one is one of fp16.
            options = dict(dtype=torch.bfloat16, device="cuda")
            blocks = [torch.full((2**k,), NAN, **options) for k in range(8, largest.bit_length()) for _ in range(6)]
            del blocks

    def forward(self, need_map: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        self.poison()
        inputs = self.p.e, self.p.c, self.p.bias, self.p.labels
        return torch.ops.cce.lce_forward(*inputs, None, softcap=self.case.softcap, need_map=need_map)[:3]

    def backward(self, seed: Tensor, needs: str, in_fp64: bool = False) -> dict[str, Tensor]:
        """The operator's. in_fp64: the portable one's, from copies of the inputs."""
        self.poison()
        self.draws += self.method.draws
        p, op, inputs = self.p, torch.ops.cce.lce_backward, (self.p.e, self.p.c, self.p.bias)
        if in_fp64:
            op, inputs = torch.ops.cce.lce_backward_portable, (x if x is None else x.double() for x in inputs)
        grads = op(
            *(p.g_nll, p.g_lse, None, *inputs, p.labels, self.nll, self.lse, self.tile_map, None, seed),
            softcap=self.case.softcap,
            method=self.method.name,
            eps=self.method.eps or 0.5,
            **{name: side in needs for side, name in zip("ecb", ("need_e", "need_c", "need_bias"), strict=True)},
        )
        return {side: g for side, g in zip("ecb", grads, strict=True) if side in needs}

    def function(self) -> tuple[Tensor, Tensor | None, dict[str, Tensor], Tensor]:
        """Loss, lse and gradients as users get them, and the seed that is drawn on the way."""
        self.poison()
        case, p = self.case, self.p
        torch.manual_seed(case.seed)
        seed = torch.randint(2**63 - 1, (1,), device=self.device)
        torch.manual_seed(case.seed)
        tensors = zip("ecb", (p.e, p.c, p.bias), strict=True)
        leaf = {k: None if x is None else x.detach().requires_grad_(k in case.needs) for k, x in tensors}
        out = linear_cross_entropy(
            leaf["e"].unflatten(0, (case.batch, -1)),
            leaf["c"],
            p.targets.unflatten(0, (case.batch, -1)),
            leaf["b"],
            return_lse=case.lse,
            **{name: getattr(case, name) for name in ("softcap", "reduction", "shift", "filter_eps", "impl")},
        )
        loss, lse = out if case.lse else (out, None)
        objective = (loss * (self.returned(p.loss_weight) if case.reduction == "none" else p.loss_weight)).sum()
        if lse is not None:
            objective = objective + (lse * self.returned(p.g_lse)).sum()
        self.poison()
        self.draws += self.method.draws
        grads = torch.autograd.grad(objective, [leaf[side] for side in case.needs])
        return loss, lse, dict(zip(case.needs, grads, strict=True)), seed

    def returned(self, x: Tensor) -> Tensor:
        """[N] in the shape that the function returns."""
        x = x.unflatten(0, (self.case.batch, -1))
        return x[:, : x.shape[1] - self.case.shift]

    def check_forward(self) -> None:
        self.nll, self.lse, self.tile_map = self.forward()
        dense, counts = self.dense, self.dense.counts
        for name, x, exact in (("nll", self.nll, dense.nll), ("lse", self.lse, dense.lse)):
            off = (x.double() - exact).abs()
            self.expect((off <= dense.noise * counts).all(), f"{name} is off by {off.max():.2g}")
        for name, right in dense.map_is_right(self.tile_map, self.nll).items():
            self.expect((right | ~counts).all(), f"the tile map has not the tiles' {name}")
        first = self.nll, self.lse, self.tile_map, self.nll, self.lse
        again = *self.forward(), *self.forward(need_map=False)[:2]
        same = all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
        self.expect(same, "the forward is not the same twice")

    def check_visits(self) -> None:
        """Finds q [tiles, N]: a token expects 1/eps visits at most. And what the control variate makes of the map."""
        eps, share = self.method.eps, tile_shares(self.tile_map, self.nll)
        self.q = visit_probabilities(share, log2_visit_rate(eps), even_share(eps, len(self.tile_map))).double()
        self.variate = self.dense.control_variate(tile_masses(share).double(), share.log2_norm.double())
        self.q.scatter_(0, self.dense.label.T // TILE_COLUMNS, 1.0)
        visits = self.q.sum(0)[self.dense.live]
        self.expect((visits <= 1.001 / self.method.eps).all(), "a token expects more than 1/eps visits")

    def expected(self, seed: Tensor) -> dict[str, Expected]:
        """The gradients of the method with this seed."""
        if self.method.name == "exact":
            return self.dense.expected()
        if self.method.name == "threshold":
            return self.dense.expected(*self.dense.passes_filter(self.method.eps))
        # Another implementation's exponential may be the next number, and a chain's sum wrap at the next pair.
        factors = (1.0, 1.0 - 2.0**-20, 1.0 + 2.0**-20)
        visited, *others = (draw_visits(seed, 0, (self.q * x).float(), self.dense.live) for x in factors)
        unsure = (visited ^ others[0]) | (visited ^ others[1])
        return self.dense.expected(visited / self.q, unsure / self.q, self.variate)

    def check_gradients(self) -> None:
        """The function's; the operator's with the same seed, and each side's alone; the portable way's in fp64."""
        loss, lse, grads, seed = self.function()
        self.check_loss(loss.detach(), lse)
        want = self.expected(seed)
        for side, g in grads.items():
            self.compare(f"d{side}", g, want[side], self.p.e.dtype)
        if "e" in grads:
            self.expect((grads["e"][~self.dense.live] == 0).all(), "de of a token that does not count is not 0")
        cpu, needs = self.device == "cpu", self.case.needs
        for side, g in self.backward(seed, needs).items():
            self.compare_runs(f"d{side} again", g, grads[side], want[side], bitwise=cpu or side != "e")
        for side in needs if len(needs) > 1 else "":
            bitwise = cpu or (side == "c" and self.method.draws)
            self.compare_runs(f"d{side} alone", self.backward(seed, side)[side], grads[side], want[side], bitwise)
        for side, g in self.backward(seed, needs, in_fp64=True).items():
            self.compare(f"d{side} of the portable way in fp64", g, want[side], torch.float64)

    def check_loss(self, loss: Tensor, lse: Tensor | None) -> None:
        exact, slack = self.returned(self.dense.nll), self.returned(self.dense.noise * self.dense.counts)
        if self.case.reduction != "none":
            count = self.dense.counts.sum() if self.case.reduction == "mean" else 1
            exact, slack = exact.sum() / count, slack.sum() / count  # a mean of nothing is NaN
        right = ((loss - exact).abs() <= slack) | (loss.isnan() & exact.isnan())
        self.expect(right.all(), "the loss is off")
        if lse is not None:
            self.expect(torch.equal(lse, self.returned(self.lse)), "lse is not the operator's")

    def compare(self, name: str, got: Tensor, want: Expected, dtype: torch.dtype) -> None:
        """The rule of tests/problems.py, with dense torch at its best: at most twice the error of rounding dz.

        On top of one rounding of the result, and of what fp32 may do to logits and sums.
        """
        good = got.dtype == dtype and got.shape == want.exact.shape and bool(got.isfinite().all())
        if not self.expect(good, f"{name} is not finite, or not {dtype} {list(want.exact.shape)}"):
            return
        ours = ((got.double() - want.exact).abs() - want.slack - half_ulp(want.exact, dtype)).clamp(min=0)
        theirs = (want.rounded - want.exact).abs() * (dtype == self.p.e.dtype)
        ok = ours.norm() <= 2 * theirs.norm() and ours.max() <= 2 * theirs.max()
        self.expect(ok, f"{name} is off by {(got - want.exact).norm() / want.exact.norm():.2g}")

    def compare_runs(self, name: str, got: Tensor, other: Tensor, want: Expected, bitwise: bool) -> None:
        """Two runs: the same bits, or sums in another order, which may round an element the other way."""
        if bitwise:
            self.expect(torch.equal(got, other), f"{name} has other bits")
            return
        allowed = 2e-3 * other.double().norm() + 2 * half_ulp(other.double(), other.dtype).max() + want.slack.norm()
        self.expect((got.double() - other).norm() <= allowed, f"{name} is another")

    def check_means(self) -> None:
        """The mean over consecutive seeds is the gradient. Chance makes suspects: other, more draws decide on them."""
        if ((self.q == 1) | ~self.dense.live).all():
            return
        draws = 16 if self.case.v * self.case.d < 2e6 else 8
        first = self.case.seed * 128
        suspects = self.far_means(range(first, first + draws), SUSPECT)
        if suspects:
            suspects &= self.far_means(range(first + draws, first + 5 * draws), WRONG)
        self.failures += [f"{name} is biased" for name in sorted(suspects)]

    def far_means(self, seeds: range, sigmas: float) -> set[str]:
        """Names of the means, of the gradients and of parts of them, that are further off than chance explains.

        They are means along a direction u: that of what is sampled, along which a wrong weight shows, and a random one.
        Of pairs drawn one by one, each adding h/q or nothing, a mean of K draws is off by more than z s + z^2/3 b with
        probability 2 exp(-z^2/2), s^2 = sum h^2 (1/q - 1) / K, b = max h/q / K (Bernstein's inequality). Pairs are
        drawn in chains: the draws' own variance counts where it is larger.
        """
        dense, q = self.dense, self.dense.by_column(self.q)
        sampled, variate = dense.dz * (q < 1), self.variate.dz * (q < 1)
        # Rounding is the same in each draw that visits, and in each that does not: a mean keeps it.
        kept = dense.products(
            dense.rounded(dense.dz / q) * q
            + dense.rounded(variate - variate / q) * q
            + dense.rounded(variate) * (1 - q)
        )
        main, want = dense.products(sampled), dense.expected()
        draws = [self.backward(torch.tensor([k], device=self.device), dense.sides) for k in seeds]
        far = set()
        for side, (exact, _, slack) in want.items():
            error = 2 * (kept[side] - exact).abs() + slack + half_ulp(exact, self.p.e.dtype)
            parts = parts_of(len(per_unit(side, exact)), self.device)
            error = (parts @ per_unit(side, error.square())).sqrt()
            signs = torch.where(self.p.uniform(*exact.shape) < 0.5, 1.0, -1.0).double()
            # What rounding may add along u: all of it (Cauchy and Schwarz), or along a random one its share.
            most = error * (parts @ per_unit(side, main[side].square())).sqrt()
            for name, u, tolerance in ((f"d{side}", main[side], most), (f"d{side} at random", signs, WRONG * error)):
                along = u @ dense.c.T if side == "e" else dense.e @ u.T if side == "c" else u
                pairs = by_tile((sampled - variate) * along).sum(2).T
                others = 0 if side == "e" else 1
                variance = parts @ (pairs.square() * (1 / self.q - 1)).sum(others)
                jump = (parts * (pairs.abs() / self.q).amax(others)).amax(1) / len(seeds)
                off = torch.stack([per_unit(side, (draw[side] - exact) * u) for draw in draws]) @ parts.T
                spread = (torch.maximum(variance, off.var(0)) / len(seeds)).sqrt()
                too_far = off.mean(0).abs() > sigmas * spread + sigmas**2 / 3 * jump + tolerance
                far |= {f"{name}, part {k}," for k in too_far.nonzero()[:, 0].tolist()}
        return far


def parts_of(count: int, device: str) -> Tensor:
    """[11, count], which units make a part: all, the first, the last, and eight runs of neighbours."""
    unit = torch.arange(count, device=device)
    eighths = [unit * 8 // count == k for k in range(8)]
    return torch.stack([unit >= 0, unit == 0, unit == count - 1, *eighths]).double()


# ---- the run ----


def device_is_lost(device: str) -> bool:
    """After a bad access every call of CUDA fails."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def fuzz(cases: Iterable[Case], device: str, seconds: float, total: int | None) -> int:
    """Runs cases until the time is up and prints what fails, and a table. Returns how many failed."""
    tally: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    start = time.monotonic()
    with tqdm(total=total, unit="case") as bar:
        for case in cases:
            begin = time.monotonic()
            trial = Trial(case, device)
            trial.run()
            now = time.monotonic()
            counts = dict(cases=1, draws=trial.draws, failures=bool(trial.failures), seconds=now - begin)
            tally[case.impl, case.dtype].update(counts)
            bar.update()
            if trial.failures:
                tqdm.write(f"{case.command(device)}  # {'; '.join(trial.failures)}")
                if device_is_lost(device):
                    tqdm.write("the device is lost: the run ends")
                    break
            if now - start >= seconds:
                break
    total_row: Counter[str] = sum(tally.values(), Counter())
    print(f"{'impl':<15}{'dtype':<10}{'cases':>8}{'draws':>10}{'failures':>10}{'seconds':>9}")
    for (impl, dtype), row in [*sorted(tally.items()), (("all", ""), total_row)]:
        counts = f"{row['cases']:>8}{row['draws']:>10}{row['failures']:>10}{row['seconds']:>9.0f}"
        print(f"{impl:<15}{dtype:<10}{counts}")
    return total_row["failures"]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("bench.checks.fuzz", __doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=600.0, help="no case begins after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--case", type=lambda text: Case(**json.loads(text)), metavar="JSON", help="this one alone")
    args = parser.parse_args(arguments)
    there = HAS_CUDA and torch.cuda.is_available()
    device = args.device if args.device != "auto" else "cuda" if there else "cpu"
    if device == "cuda" and not there:
        print("no CUDA device, or cce_ext was built without its CUDA kernels", file=sys.stderr)
        return 2
    if device == "cpu":
        torch.set_num_threads(1)  # for cases so small threads would wait for each other
    numbers = itertools.count() if args.cases is None else range(args.cases)
    cases = (draw_case(args.seed, k, device) for k in numbers) if args.case is None else [args.case]
    return int(fuzz(cases, device, args.seconds, args.cases if args.case is None else 1) > 0)


if __name__ == "__main__":
    sys.exit(main())
