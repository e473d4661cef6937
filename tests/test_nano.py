"""docs/nano.md: its changes to models that end as nanoGPT's and nanochat's do change no loss and no gradient."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

PAGE = Path(__file__).parents[1] / "docs" / "nano.md"
# All columns are in one tile of the vocabulary, which is the label's: what is visited always, so that nothing is drawn.
VOCAB, PADDED, WIDTH = 60, 64, 32

# What follows the changed lines, in our words.
ENDS = {
    "nanoGPT": "return logits, loss",
    "nanochat": """
        logits = softcap * torch.tanh(logits[..., :self.config.vocab_size].float() / softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
    """,
}


def change(project: str) -> tuple[str, str]:
    """The lines that the page shows for it, before and after."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {project}\n")[2]
    lines = re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1].splitlines()
    before, after = ("\n".join(x[1:] for x in lines if x[0] in kinds) for kinds in (" -", " +"))
    return before, after


class CastingLinear(nn.Linear):
    """nanochat's way to 16 bits: no autocast, the weight follows the input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Model(nn.Module):
    """Embedding, one layer, a head; its forward ends as `lines` do. dtype: of the head's input."""

    def __init__(self, project: str, lines: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        tied, self.dtype = project == "nanoGPT", dtype
        self.config = SimpleNamespace(vocab_size=PADDED if tied else VOCAB)
        self.wte, self.layer = nn.Embedding(PADDED, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head = (nn.Linear if tied else CastingLinear)(WIDTH, PADDED, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight
        body = textwrap.indent(f"{textwrap.dedent(lines)}\n{textwrap.dedent(ENDS[project])}", "    ")
        names = {"F": F, "torch": torch, "linear_cross_entropy": linear_cross_entropy}
        exec(f"def end(self, x, targets, loss_reduction):\n{body}", names)  # the page's own lines
        self.end = names["end"]

    def forward(self, tokens, targets=None, loss_reduction="mean"):
        x = self.wte(tokens)
        x = F.layer_norm(x + torch.tanh(self.layer(x)), (WIDTH,))
        return self.end(self, x.to(self.dtype), targets, loss_reduction)


@pytest.mark.parametrize(("project", "reduction"), [("nanoGPT", "mean"), ("nanochat", "mean"), ("nanochat", "none")])
@pytest.mark.parametrize("low", [False, True])
def test_the_change(project, reduction, low):
    """low: in bf16, by autocast as nanoGPT has it, or without one as nanochat does."""
    autocast = low and project == "nanoGPT"
    torch.manual_seed(1)
    tokens, targets = torch.randint(VOCAB, (2, 3, 17)).unbind()
    targets[:, :4] = -1
    found = []
    for lines in change(project):
        model = Model(project, lines, torch.bfloat16 if low and not autocast else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = model(tokens, targets, reduction)
        loss = given[1] if project == "nanoGPT" else given
        (
            loss.flatten() * torch.linspace(-1, 2, loss.numel() + 1)[1:]
        ).sum().backward()  # advantages, where of each token
        found.append((loss.detach().flatten(), {name: p.grad for name, p in model.named_parameters()}))
    (before, gradients), (after, ours) = found
    rtol = 0.03 if low else 1e-4
    torch.testing.assert_close(after.float(), before.float(), rtol=rtol, atol=1e-5)
    assert gradients.keys() == ours.keys() and ("lm_head.weight" in ours) == (project == "nanochat")
    for name, expected in gradients.items():
        assert (ours[name] - expected).norm() <= rtol * expected.norm(), name
    if project == "nanochat":
        assert not ours["lm_head.weight"][VOCAB:].any()


def test_the_changed_lines_make_no_logits():
    for project in ENDS:
        before, after = change(project)
        assert "self.lm_head(x)" in before and "linear_cross_entropy(x, " in after
    assert Model("nanoGPT", change("nanoGPT")[1])(torch.zeros(1, 3).long(), torch.ones(1, 3).long())[0] is None
    inference = Model("nanochat", change("nanochat")[1])(torch.zeros(1, 3).long())
    assert inference.shape == (1, 3, VOCAB) and inference.abs().max() <= 15
