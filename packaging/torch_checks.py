"""Whether the cce_ext of this environment works with its torch, on the CPU. try_torches.py runs it once per torch.

    python packaging/torch_checks.py

Prints a line of JSON for each check as it ends, the versions first. Needs torch and cce_ext, nothing else.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, D, V = 24, 16, 300
METHODS: list[dict[str, Any]] = [
    {"method": "sampled"},
    {"method": "exact", "need_map": False},
    {"method": "threshold", "eps": 1e-3, "softcap": 3.0, "filter_e": False},
]


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e, c, bias and targets; the first target is ignored."""
    g = torch.Generator().manual_seed(0)
    e, c, bias = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g), torch.randn(V, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[0] = -100
    return e.requires_grad_(), c.requires_grad_(), bias.requires_grad_(), targets


def imported() -> None:
    import cce_ext

    where = Path(cce_ext.__file__).resolve()
    if Path(sys.prefix).resolve() not in where.parents:
        raise AssertionError(f"cce_ext is {where}, not the one installed in {sys.prefix}")
    json.loads(torch.ops.cce.build_info())


def opcheck() -> None:
    e, c, bias, targets = problem()
    seed = torch.tensor([3])
    check, ops = torch.library.opcheck, torch.ops.cce
    for options in METHODS:
        check(ops.lce_forward.default, (e, c, bias, targets, seed), options)
        with torch.no_grad():
            nll, lse, tile_map, _, _ = ops.lce_forward(e, c, bias, targets, seed, **options)
        rest = {name: value for name, value in options.items() if name != "need_map"}
        saved = (e.detach(), c.detach(), bias.detach(), targets, nll, lse, tile_map)
        inputs = (torch.rand_like(nll), None, None, *saved, None, seed)
        for needs in ({}, {"need_e": False, "need_bias": True}, {"need_c": False}):
            check(ops.lce_backward.default, inputs, rest | needs)
    check(ops.label_logits.default, (e.detach(), c.detach(), bias.detach(), targets), {"softcap": 2.0})
    pairs = torch.stack([targets, targets.flip(0)], 1)
    check(ops.pair_logits.default, (e, c, bias, pairs), {"softcap": 2.0})
    check(ops.linear_cross_entropy.default, (e, c, targets, bias), {"impl": "cce_exact", "shift": 1})


def compiled() -> None:
    """A compiled loss and its gradients are the dense ones; the default's loss is, and its gradients are finite."""
    import cce_ext

    e, c, bias, targets = problem()
    dense = torch.autograd.grad(F.cross_entropy(F.linear(e, c, bias), targets), (e, c, bias))
    for impl in ("cce_exact", "cce"):

        def loss_of(e: Tensor, c: Tensor, bias: Tensor, impl: str = impl) -> Tensor:
            return cce_ext.linear_cross_entropy(torch.tanh(e).atanh(), c, targets, bias, impl=impl)

        loss = torch.compile(loss_of, fullgraph=True)(e, c, bias)
        torch.testing.assert_close(loss, F.cross_entropy(F.linear(e, c, bias), targets), rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(loss, (e, c, bias))
        if impl == "cce_exact":
            torch.testing.assert_close(gradients, dense, rtol=1e-3, atol=1e-4)
        elif not all(x.isfinite().all() for x in gradients):
            raise AssertionError("a gradient of impl='cce' is not finite")


class Model(nn.Module):
    """Predicts each token's successor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V)

    def forward(self, tokens: Tensor, loss: Callable[[Tensor, nn.Linear, Tensor], Tensor]) -> Tensor:
        return loss(torch.tanh(self.body(self.embedding(tokens))), self.head, tokens)


def training_step() -> None:
    """After one step of AdamW the model has the dense loss's weights; the default impl has the same loss."""
    import cce_ext

    def dense(hidden: Tensor, head: nn.Linear, tokens: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def cut(impl: str) -> Callable[[Tensor, nn.Linear, Tensor], Tensor]:
        return lambda hidden, head, tokens: cce_ext.linear_cross_entropy(
            hidden, head.weight, tokens, head.bias, shift=1, impl=impl
        )

    tokens = torch.randint(0, V, (2, N), generator=torch.Generator().manual_seed(1))
    results = {}
    for name, loss_of in {"dense": dense, "cce_exact": cut("cce_exact"), "cce": cut("cce")}.items():
        model = Model()
        # eps: where a gradient is next to nothing, Adam's step is its sign, which a rounding may turn.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        loss = model(tokens, loss_of)
        loss.backward()
        optimizer.step()
        results[name] = loss.detach(), [x.detach() for x in model.parameters()]
    for impl in ("cce_exact", "cce"):
        torch.testing.assert_close(results[impl][0], results["dense"][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results["cce_exact"][1], results["dense"][1], rtol=1e-4, atol=1e-5)
    before = [x.detach() for x in Model().parameters()]
    for old, new in zip(before, results["cce"][1], strict=True):
        if not new.isfinite().all() or torch.equal(old, new):
            raise AssertionError("a step with impl='cce' left a weight as it was, or not finite")


CHECKS: dict[str, Callable[[], None]] = {
    "import": imported,
    "opcheck": opcheck,
    "compile": compiled,
    "step": training_step,
}


def main() -> None:
    print(json.dumps({"torch": torch.__version__, "python": platform.python_version()}), flush=True)
    failed = False
    for name, check in CHECKS.items():
        if failed and name != "import" and "cce_ext" not in sys.modules:
            print(json.dumps({"check": name, "result": "not run: cce_ext cannot be imported"}), flush=True)
            continue
        started = time.perf_counter()
        try:
            check()
            result = "ok"
        except Exception as error:  # whatever it is, it is this check's result
            traceback.print_exc()
            result, failed = f"{type(error).__name__}: {error}".strip(), True
        print(
            json.dumps({"check": name, "result": result, "seconds": round(time.perf_counter() - started, 1)}),
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
