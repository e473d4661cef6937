"""Hooks of mkdocs.yml: pages take in parts of the repository's own documents, and links may lead out of docs/.

A line

    <!-- include README.md: Two commands -->

in a page stands for that section of the file, without its heading. Without `: Two commands` it stands for the whole
file. So a text is in one place.

Links are relative to the file that they stand in, as GitHub has them. Those that leave docs/ lead to the repository,
whose address is repo_url of mkdocs.yml; where that is not set, their text is left. What is included or linked to and is
not there is an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"

_INCLUDE = re.compile(r"^<!-- include (?P<file>[\w./-]+)(?:: (?P<heading>.+?))? -->$", re.MULTILINE)
_HEADING = re.compile(r"^(#{1,6}) (.+)$")
_FENCE = re.compile(r"^\s*(```|~~~)")
# [text](target) and ![text](target); the text may hold one more pair of brackets, such as a linked `image`.
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")


class DocsError(Exception):
    """A page that cannot be made, and why."""


def section(text: str, heading: str | None, file: str) -> str:
    """What stands below a heading, up to the next one of its rank or higher. None: all but the file's own title."""
    lines = text.splitlines()
    begin, rank, fenced = None, 0, False
    for i, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        found = None if fenced else _HEADING.match(line)
        if found is None:
            continue
        if begin is not None and len(found[1]) <= rank:
            return "\n".join(lines[begin:i]).strip()
        if begin is None and heading in (None, found[2]):
            begin, rank = i + 1, len(found[1])
    if begin is None:
        raise DocsError(f"{file} has no section {heading!r}")
    return "\n".join(lines[begin:]).strip()


def moved_links(text: str, source: str, page: str, repository: str | None) -> str:
    """text of the file source as it has to be in docs/page. Raises DocsError for a link that leads nowhere."""

    def moved(link: re.Match[str]) -> str:
        path, mark, anchor = link["target"].partition("#")
        if not path or ":" in path:  # within the page, or an address
            return link[0]
        target = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if not (ROOT / target).exists():
            raise DocsError(f"{source} links to {path}, which is not there")
        if target.startswith(f"{DOCS}/"):
            here = os.path.relpath(target, os.path.dirname(f"{DOCS}/{page}"))
            return f"{link['image']}[{link['text']}]({here}{mark}{anchor})"
        if repository is None:
            return link["text"]
        return f"{link['image']}[{link['text']}]({repository}/blob/main/{target}{mark}{anchor})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)  # code is left alone
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def assembled(text: str, page: str, repository: str | None) -> str:
    """The Markdown of docs/page with what it includes. Raises DocsError."""

    def included(line: re.Match[str]) -> str:
        file = ROOT / line["file"]
        if not file.is_file():
            raise DocsError(f"docs/{page} includes {line['file']}, which is not there")
        part = section(file.read_text(encoding="utf-8"), line["heading"], line["file"])
        return moved_links(part, line["file"], page, repository)

    # The page's own links first: those of what it includes are relative to other files.
    return _INCLUDE.sub(included, moved_links(text, f"{DOCS}/{page}", page, repository))


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """MkDocs calls it for each page."""
    repository = config["repo_url"]
    try:
        return assembled(markdown, page.file.src_uri, repository.rstrip("/") if repository else None)
    except DocsError as error:
        from mkdocs.exceptions import PluginError

        raise PluginError(str(error)) from error
