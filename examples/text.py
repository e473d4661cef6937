"""Real text for the example: which files, a byte-level BPE vocabulary, and the token streams to train on."""

import hashlib
import os
import sys
import sysconfig
import time
import tokenize
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_DOCUMENT = "<|endofdocument|>"
SPECIAL_TOKENS = [END_OF_DOCUMENT]
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)  # every byte has an entry, so that any text can be encoded
HELD_OUT_SHARE = 20  # one part in so many is held out
# Left out of the standard library: other people's packages, tests (most of all bytes), generated tables.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
}

Split = tuple[list[str], list[str]]  # the documents to train on and the held-out ones


@dataclass
class Corpus:
    """Token ids (int32) of both parts: the documents one after the other, the end of each one marked."""

    train: np.ndarray
    held_out: np.ndarray
    vocab: int  # entries of the vocabulary: fewer than were asked for where the text is too small
    tokenizer: Path  # the file that tokenizers.Tokenizer.from_file reads

    def unigram_loss(self) -> float:
        """Held-out loss (nats a token) of a model that knows how frequent each token is and no context."""
        counts = np.bincount(self.train, minlength=self.vocab) + 1  # + 1: an unseen token is not impossible
        return -float(np.log(counts / counts.sum())[self.held_out].mean())


def standard_library() -> Split:
    """The running Python's own sources, always in one order; a hash of its path puts a file in a part."""
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)  # where the walk goes on
        for path in sorted(Path(folder, file) for file in files if file.endswith(".py")):
            with tokenize.open(path) as source:  # obeys the file's coding line
                text = source.read()
            (held_out if is_held_out(path.relative_to(root)) else train).append(text)
    if not train or not held_out:
        sys.exit(f"error: too few Python sources under {root}: pass --text FILE")
    return train, held_out


def path_hash(path: Path) -> int:
    """A random number that is the same on every machine, of a path within what is searched for text."""
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:4], "big")


def is_held_out(path: Path) -> bool:
    return path_hash(path) % HELD_OUT_SHARE == 0


def read_file(path: Path) -> str:
    """A UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        sys.exit(f"error: {path} is not UTF-8 text: {error.reason} at byte {error.start}")


def text_files(paths: list[Path]) -> Split:
    """UTF-8 files; the end of each is held out."""
    train: list[str] = []
    held_out: list[str] = []
    for path in paths:
        text = read_file(path)
        cut = len(text) - len(text) // HELD_OUT_SHARE
        train.append(text[:cut])
        held_out.append(text[cut:])
    return train, held_out


def read_text(paths: list[Path]) -> Split:
    """These files, or the standard library."""
    return text_files(paths) if paths else standard_library()


def pieces(document: str, lines: int = 1000) -> list[str]:
    """A document cut at line ends: the tokenizer takes many short texts in parallel, a long one alone."""
    kept = document.splitlines(keepends=True)
    return ["".join(kept[i : i + lines]) for i in range(0, len(kept), lines)]


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE; a merge must occur twice, so that a small text gives fewer than `vocab` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for document in documents for piece in pieces(document)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], end: int) -> np.ndarray:
    """The documents' tokens one after the other, `end` behind each."""
    ids = array("i")  # a list of Python's integers would take ten times the memory
    for document in documents:
        for encoding in tokenizer.encode_batch(pieces(document), add_special_tokens=False):
            ids.extend(encoding.ids)
        ids.append(end)
    return np.array(ids, dtype=np.int32)


def load_corpus(paths: list[Path], vocab: int, cache: Path) -> Corpus:
    """Read the text (of these files, or the standard library) and give its tokens.

    The vocabulary is trained on the train part alone. Vocabulary and tokens are kept in `cache` under a hash
    of all that they depend on, so that the next run on the same text starts at once.
    """
    train, held_out = read_text(paths)
    depends_on = repr((tokenizers.__version__, SPECIAL_TOKENS, vocab, train, held_out))
    key = hashlib.sha256(depends_on.encode()).hexdigest()[:16]
    cached, vocabulary = cache / f"{key}.npz", cache / f"{key}.tokenizer.json"
    if not cached.exists():
        started = time.perf_counter()
        tokenizer = train_tokenizer(train, vocab)
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(vocabulary))
        end = tokenizer.token_to_id(END_OF_DOCUMENT)
        partial = cache / f"{key}.{os.getpid()}.partial.npz"
        np.savez(
            partial,
            train=encode(tokenizer, train, end),
            held_out=encode(tokenizer, held_out, end),
            vocab=tokenizer.get_vocab_size(),
        )
        partial.replace(cached)  # in one step: a run that is interrupted here leaves nothing half-written to load
        print(f"vocabulary trained in {time.perf_counter() - started:.0f} s, kept in {cache}")
    with np.load(cached) as arrays:
        return Corpus(arrays["train"], arrays["held_out"], int(arrays["vocab"]), vocabulary)


def windows(tokens: np.ndarray, context: int) -> Tensor:
    """The stream cut into [n, context] rows of int64; what remains at its end is left out."""
    n = len(tokens) // context
    return torch.from_numpy(tokens[: n * context].reshape(n, context)).long()


def spread_windows(tokens: np.ndarray, context: int, wanted_tokens: int) -> Tensor:
    """About `wanted_tokens` of the stream: [n, context] windows at even distances, the same in every run."""
    cut = windows(tokens, context)
    n = min(len(cut), max(1, wanted_tokens // context))
    return cut[torch.linspace(0, len(cut) - 1, n).long()]


def batches(tokens: np.ndarray, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless [batch, context] batches: all windows of the stream, in a random order that `seed` alone gives."""
    cut = windows(tokens, context)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(cut), generator=generator)])
        yield cut[order[:batch]]
        order = order[batch:]
