"""The study's corpus: tokens prepared once, carried as files, and the batches of each phase."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from text import END_OF_DOCUMENT, SKIPPED_FOLDERS, encode, is_held_out, path_hash, spread_windows, train_tokenizer
from torch import Tensor
from training import write_json

SUFFIXES = {".txt", ".md", ".rst", ".py"}
PARTS = ("train", "held_out")
# The end of the train part is kept for fine-tuning: text that the pretrained model has not seen.
FINETUNE_SHARE = 10  # one part in so many
IGNORED = -100


@dataclass(frozen=True)
class Data:
    """Token ids (int32) of the text to pretrain on, to fine-tune on and to judge by; meta as meta.json has it."""

    pretrain: np.ndarray
    finetune: np.ndarray
    held_out: np.ndarray
    meta: dict[str, Any]


def find_texts(roots: list[Path]) -> list[tuple[Path, Path, Path]]:
    """(root, path from root's own name on, file) of all texts, in an order that is random and always the same.

    In a folder these are the files with one of SUFFIXES; a file that is named itself is taken whatever its suffix.
    """
    found = []
    for root in roots:
        if not root.exists():
            sys.exit(f"error: --text {root}: no such file or folder")
        inside = root.rglob("*") if root.is_dir() else [root]
        for file in inside:
            path = file.relative_to(root.parent)
            if root.is_file() or (
                file.suffix in SUFFIXES and not SKIPPED_FOLDERS.intersection(path.parts[1:]) and file.is_file()
            ):
                found.append((root, path, file))
    return sorted(found, key=lambda text: (path_hash(text[1]), text[1]))


def prepare(roots: list[Path], vocab: int, max_bytes: int, note: str, folder: Path) -> dict[str, Any]:
    """Write train.npy, held_out.npy, tokenizer.json and meta.json to `folder`; gives the meta.

    Text is taken a whole file at a time until max_bytes are reached. Files that are not UTF-8 are counted and left out.
    """
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    sources = {root.resolve().name: {"files": 0, "bytes": 0, "not_utf8": 0} for root in roots}
    taken = 0
    for root, path, file in find_texts(roots):
        source = sources[root.resolve().name]
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            source["not_utf8"] += 1
            continue
        size = file.stat().st_size
        if taken + size > max_bytes:
            continue
        taken += size
        source["files"] += 1
        source["bytes"] += size
        parts["held_out" if is_held_out(path) else "train"].append(text)
    for part, texts in parts.items():
        if not texts:
            sys.exit(f"error: too few files ({', '.join(sorted(SUFFIXES))}) in --text to have a {part} part")

    tokenizer = train_tokenizer(parts["train"], vocab)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    meta: dict[str, Any] = {
        "sources": sources,
        "note": note,
        "vocab": tokenizer.get_vocab_size(),
        "tokenizers": tokenizers.__version__,
    }
    for part, texts in parts.items():
        tokens = encode(tokenizer, texts, tokenizer.token_to_id(END_OF_DOCUMENT))
        np.save(folder / f"{part}.npy", tokens)
        meta[f"{part}_tokens"] = len(tokens)
        meta[f"{part}_sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    write_json(meta, folder / "meta.json")
    return meta


def load(folder: Path) -> Data:
    """What prepare left; ends the program where it is missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {part: np.load(folder / f"{part}.npy") for part in PARTS}
    except (OSError, ValueError) as error:
        sys.exit(f"error: --data {folder}: {error}; make it with: python research/study.py prepare")
    for part, tokens in arrays.items():
        if hashlib.sha256(tokens.tobytes()).hexdigest() != meta[f"{part}_sha256"]:
            sys.exit(f"error: {folder / part}.npy is not the one that meta.json was written for")
    cut = len(arrays["train"]) - len(arrays["train"]) // FINETUNE_SHARE
    return Data(arrays["train"][:cut], arrays["train"][cut:], arrays["held_out"], meta)


def mask_prompts(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Labels of tokens [n, context] as in instruction tuning: -100 for a prompt, the tokens after it.

    A prompt is the first quarter of the window at least, three quarters at most.
    """
    context = tokens.shape[1]
    prompt = torch.randint(context // 4, 3 * context // 4 + 1, (len(tokens), 1), generator=generator)
    return tokens.masked_fill(torch.arange(context) < prompt, IGNORED)


@dataclass(frozen=True)
class HeldOut:
    """Windows [n, context] and their labels: the same for every run of a phase."""

    windows: Tensor
    labels: Tensor


def held_out(data: Data, context: int, wanted_tokens: int, masked: bool) -> HeldOut:
    windows = spread_windows(data.held_out, context, wanted_tokens)
    return HeldOut(windows, mask_prompts(windows, torch.Generator().manual_seed(0)) if masked else windows)
