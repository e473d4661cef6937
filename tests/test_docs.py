"""The site of docs/: its pages' snippets, executed as they stand there, its navigation, and what the pages take in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import packaging_script

import cce_ext
import cce_ext.distributed
import cce_ext.measure

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
REPOSITORY = "https://example.org/repository"
hooks = packaging_script("docs_hooks")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def site_page(name: str, repository: str | None = REPOSITORY) -> str:
    """As MkDocs gets it."""
    return hooks.assembled(page(name), name, repository)


# ---- snippets ----


def soft_targets_are_right(x: dict[str, Any]) -> bool:
    """The two losses that were differentiated, and their gradients, by dense torch; the others' values."""
    nll = -(x["hidden"] @ x["weight"].T).log_softmax(-1)
    of_top, p = nll.gather(-1, x["top"].indices), x["probabilities"]
    student_tail = torch.log1p(-(-of_top).exp().sum(-1))
    plain = (x["normalised"] * of_top).sum(-1).mean()
    tail = ((p * of_top).sum(-1) - x["tail"] * student_tail).mean()
    for got, expected in ((x["loss"], plain), (x["with_tail"], tail)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    inputs = (x["hidden"], x["weight"])
    of_tail = torch.autograd.grad(tail, inputs, retain_graph=True)
    d_hidden, d_weight = torch.autograd.grad(plain + tail, inputs)
    found = zip((*x["gradients"], x["hidden"].grad, x["weight"].grad), (*of_tail, d_hidden, d_weight), strict=True)
    for got, expected in found:
        assert (got - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(x["in_one_pass"], tail, rtol=1e-4, atol=1e-4)
    answers = torch.stack([nll[0, [3, 17]].mean(), nll[1, 8], nll[2, 5:8].mean()]).mean()
    torch.testing.assert_close(x["mean_of_answers"], answers, rtol=1e-4, atol=1e-4)
    rows, tokens = nll.view(4, 16, -1), x["tokens"]
    parts = [
        0.5**j * rows[:, : 15 - j].gather(-1, tokens[:, j + 1 :, None]).sum() / (4 * 15) for j in range(x["ahead"])
    ]
    torch.testing.assert_close(x["multi_token"], sum(parts), rtol=1e-4, atol=1e-4)
    teacher = (x["teacher_logits"].softmax(-1) * nll).sum(-1).mean()
    return abs(x["sampled"] - teacher) < 0.1 * teacher


# Pages whose snippets run as they are, with what their names must hold afterwards. Those of the others run elsewhere.
RUN: dict[str, Callable[[dict[str, Any]], bool]] = {
    "index.md": lambda x: bool(x["classifier"].weight.grad.norm() > 0 and x["hidden"].grad.norm() > 0),
    "start.md": lambda x: x["losses"][0] > 8 > x["losses"][-1] > 0,  # log 5000 is 8.5
    "gradient.md": lambda x: bool(x["error_of_one"] > 0.01 and x["error_of_the_mean"] < 0.5 * x["error_of_one"]),
    "logprobs.md": lambda x: bool(
        (x["entropy"] > 0).all() and x["hidden"].grad.norm() > 0 and x["weight"].grad.isfinite().all()
    ),
    "soft_targets.md": soft_targets_are_right,
    "kl.md": lambda x: bool(0 < x["after"] < x["before"] and x["weight"].grad is not None and x["head"].grad is None),
    "transformers.md": lambda x: (
        x["patched"].logits is None and math.isclose(x["before"].loss.item(), x["patched"].loss.item(), rel_tol=1e-5)
    ),
    "faq.md": lambda x: isinstance(x["total"], torch.Tensor),
}
ELSEWHERE = {
    "distributed.md",  # tests/ranks/test_docs_on_ranks.py
    "integrations.md",  # the tests of each project: test_trl, test_verl, test_torchtitan, test_hub
}


@pytest.mark.parametrize("name", RUN)
def test_snippets(name, capsys):
    """In one namespace, but for those marked as not run. An answer that names an error must have met it."""
    if name == "transformers.md":
        pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "snippet"}
    code = re.findall(r"(?<!<!-- not run -->\n)^```python\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)
    for snippet in code:
        exec(compile(snippet, name, "exec"), names)
    assert RUN[name](names)
    printed = capsys.readouterr().out
    errors = re.findall(r"^    print\(error\)\n    # (?:\.\. )?(.*?)(?: \.\.\)?)?$", "".join(code), re.MULTILINE)
    assert all(words in printed for words in errors), printed
    assert len(errors) == "".join(code).count("print(error)") == (2 if name == "faq.md" else 0)


def test_every_page_with_snippets_is_known():
    with_snippets = {name for name in PAGES if "```python" in page(name)}
    assert with_snippets == {*RUN, *ELSEWHERE}


def test_the_two_commands_are_the_readmes():
    """Those that .ci/run executes."""
    command = re.compile(r'^pip install "\.\[\w+\]" && .+$', re.MULTILINE)
    found = command.findall(page("index.md"))
    assert len(found) == 2
    assert set(found) <= set(command.findall((ROOT / "README.md").read_text(encoding="utf-8")))


# ---- the navigation and the reference ----


def test_the_navigation_names_every_page():
    """Once, and nothing else."""
    _, _, rest = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    navigation, _, _ = rest.partition("\n\n")
    assert sorted(re.findall(r"^ +- [^:]+: (\S+)$", navigation, re.MULTILINE)) == PAGES


@pytest.mark.parametrize("module", ["cce_ext", "cce_ext.transformers", "cce_ext.distributed", "cce_ext.measure"])
def test_the_reference_has_all_that_is_public(module):
    if module == "cce_ext.transformers":
        public = pytest.importorskip(module, reason="transformers is not installed").__all__
    elif module == "cce_ext.measure":  # it has no __all__
        public = [name for name, x in vars(cce_ext.measure).items() if getattr(x, "__module__", "") == module]
        public = [name for name in public if not name.startswith("_")]
    else:
        public = {"cce_ext": cce_ext, "cce_ext.distributed": cce_ext.distributed}[module].__all__
    entries = set(re.findall(r"^::: (\S+)$", page("api.md"), re.MULTILINE))
    entries |= set(re.findall(r"^\| `([\w.]+)` \|", page("api.md"), re.MULTILINE))
    missing = {name for name in public if f"{module}.{name}" not in entries and f"cce_ext.{name}" not in entries}
    assert public and not missing


# ---- what the pages take in, and where links lead ----


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole(name):
    """Everything is taken in, and every relative link leads to a page or an image of the site."""
    text = site_page(name)
    assert "<!-- include" not in text
    folder = (ROOT / "docs" / name).parent
    for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (folder / path).is_file(), f"{name} links to {target}"
            assert (folder / path).resolve().is_relative_to(ROOT / "docs")


def test_sections():
    text = "# A\nof a\n\n## B: b\nof b\n\n```sh\n## no heading\n```\n\n### C\nof c\n## D\nof d\n"
    assert hooks.section(text, "B: b", "x.md") == "of b\n\n```sh\n## no heading\n```\n\n### C\nof c"
    assert hooks.section(text, "D", "x.md") == "of d"
    assert hooks.section(text, None, "x.md").startswith("of a\n\n## B: b")
    with pytest.raises(hooks.DocsError, match="x.md has no section 'E'"):
        hooks.section(text, "E", "x.md")


def test_links():
    links = "[a](docs/faq.md#trl), [`b`](bench/README.md), [c](#d), [e](https://e.org/f), ![g [h]](docs/bench_h200.png)"
    assert hooks.moved_links(links, "README.md", "index.md", REPOSITORY) == (
        f"[a](faq.md#trl), [`b`]({REPOSITORY}/blob/main/bench/README.md), [c](#d), [e](https://e.org/f), "
        "![g [h]](bench_h200.png)"
    )
    assert hooks.moved_links("[`b`](../bench/README.md)", "docs/a.md", "a.md", None) == "`b`"
    code = "```python\nx[0](y)\n```"
    assert hooks.moved_links(code, "README.md", "index.md", None) == code
    with pytest.raises(hooks.DocsError, match=r"README.md links to docs/none.md, which is not there"):
        hooks.moved_links("[a](docs/none.md)", "README.md", "index.md", None)


@pytest.mark.parametrize(
    "line, message",
    [
        ("<!-- include none.md -->", "docs/a.md includes none.md, which is not there"),
        ("<!-- include README.md: None of it -->", "README.md has no section 'None of it'"),
    ],
)
def test_what_is_not_there_is_named(line, message):
    with pytest.raises(hooks.DocsError, match=re.escape(message)):
        hooks.assembled(line, "a.md", None)
