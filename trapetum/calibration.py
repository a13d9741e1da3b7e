"""Calibration: which tokens a model is shown before it is quantized, and what is then known of each layer's inputs.

The tokens are random windows of a text, chosen by a seed. `trapetum.hessians` turns them into `Statistics`.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trapetum import text as texts

#: Sequences, their length and the groups of output rows that published calibrations use.
SEQUENCES, LENGTH, GROUPS = 128, 2048, 4
_CHARACTERS_A_TOKEN = 8
_NO_SPLIT = re.compile(r"([\w.-]+/[\w.-]+(?<!\.txt)(?<!\.md))(?::([^:/]*))?")
_TEXT_TIMES = 4  # windows are drawn from a text of about so many times their length


class CalibrationError(ValueError):
    """Calibration cannot be done; the message says why and what to do."""


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of the inputs x_t [in] of one linear layer, t over all tokens.

    Attributes:
        hessian: float32 [groups, in, in], the mean over tokens of s_gt * x_t x_t^T, without a ridge. Output rows are
            split into `groups` contiguous parts: row r belongs to group r * groups // out_features. Plain: groups = 1
            and s = 1. None where only the moments are known.
        mean_square: float32 [in], the mean of x_t^2 (the diagonal of the plain hessian).
        tokens: how many tokens the means are over.
    """

    hessian: Tensor | None
    mean_square: Tensor
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """The tokens that a model is calibrated on.

    Attributes:
        rows: token ids, int64 [length] each, on the CPU.
        text: the text they are from, in words, for records and the saved config.
        sha256: of the token ids, as `rows_sha256` makes it.
        seed: which windows of the text were taken, and the seed of whatever else is random in quantizing.
    """

    rows: tuple[Tensor, ...]
    text: str
    sha256: str
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)


def rows_sha256(rows: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of token ids: of the text that has one row a line, ids in decimal, one blank between two."""
    lines = "\n".join(" ".join(map(str, row.flatten().tolist())) for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def made_of(rows: Iterable[Tensor], text: str = "given token ids", seed: int = 0) -> Calibration:
    """A calibration of token ids that are at hand, e.g. random ones for timing.

    Args:
        rows: token ids, of any shape, one tensor a sequence.
        text: where they are from, in words.
        seed: of whatever else is random in quantizing.

    Raises:
        CalibrationError: there are none, or one has fewer than 2 tokens.
    """
    found = tuple(torch.as_tensor(row).detach().cpu().to(torch.int64).flatten() for row in rows)
    shortest = min(map(len, found), default=0)
    if shortest < 2:
        raise CalibrationError(
            f"calibration got {len(found)} sequences, the shortest of {shortest} tokens; give at least one, and at least "
            "2 tokens in each."
        )
    return Calibration(found, text, rows_sha256(found), seed)


@functools.lru_cache(maxsize=4)  # several seeds read it again
def _builtin(max_chars: int) -> str:
    """The side of the standard library's text that the built-in model was trained on, its kinds in equal parts."""
    train, heldout = texts.split(texts.stdlib_documents())
    found, _ = texts.training_corpus(train, heldout, max_chars // len(texts.KINDS))
    return "\n\n".join(text for kind in texts.KINDS for text in found[kind])


def read(text: str, max_chars: int) -> tuple[str, str]:
    """A text to calibrate on by name: never the part of it that perplexities are measured on.

    Args:
        text: as for `trapetum.text.load_text`; `builtin`, the names of `trapetum.text.DATASETS` and hub datasets without
            a split give their training part, where `load_text` gives what is held out.
        max_chars: at most about this many characters, from the start.

    Returns:
        the text, and its name with the part.

    Raises:
        TextError: neither a file nor a dataset that can be reached.
    """
    if text == "builtin":
        return _builtin(max_chars), "builtin:train"
    if text in texts.DATASETS:
        name, config, _, column = texts.DATASETS[text]
        return texts.load_text(f"{name}:{config}:train:{column}", max_chars), f"{text}:train"
    if not Path(text).is_file() and (found := _NO_SPLIT.fullmatch(text)):
        name, config = found[1], found[2] or ""
        return texts.load_text(f"{name}:{config}:train", max_chars), f"{name}:{config}:train"
    return texts.load_text(text, max_chars), text


def _windows(ids: Tensor, sequences: int, length: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (sequences,), generator=generator).tolist()
    return tuple(ids[start : start + length].clone() for start in starts)


def _require_sizes(sequences: int, length: int) -> None:
    if sequences < 1 or length < 2:
        raise CalibrationError(
            f"calibration on {sequences} sequences of {length} tokens is nothing; give at least 1 sequence of 2 tokens."
        )


def _token_ids(tokenizer, content: str, name: str, length: int, vocab: int) -> Tensor:
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < length:
        raise CalibrationError(
            f"the text {name!r} has {len(ids)} tokens, and a calibration sequence takes {length}; give a longer text or "
            "shorter sequences (--length)."
        )
    if not 0 <= min(ids) <= max(ids) < vocab:
        raise CalibrationError(
            f"the tokenizer makes ids from {min(ids)} to {max(ids)} of {name!r}, and the model knows 0 to {vocab - 1}; use "
            "the model's own tokenizer."
        )
    return torch.tensor(ids)


def take(
    tokenizer, text: str, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0, vocab: int = 2**31
) -> Calibration:
    """Random windows of a text.

    Windows start anywhere and may overlap. Where the text has fewer than `sequences * length` tokens, only as many windows
    are taken as would fit into it side by side. A longer text is read up to about 4 times what the windows hold.

    Args:
        tokenizer: the model's.
        text: as for `read`.
        sequences: how many windows, at most.
        length: tokens of a window; at most the model's context.
        seed: of the starts.
        vocab: tokens that the model knows.

    Raises:
        CalibrationError: no tokenizer, a text shorter than one window, or ids that the model does not know.
        TextError: no such text.
    """
    _require_sizes(sequences, length)
    if tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer, so it cannot be calibrated on a text; make a Calibration of token ids in Python."
        )
    content, name = read(text, _TEXT_TIMES * _CHARACTERS_A_TOKEN * sequences * length)
    ids = _token_ids(tokenizer, content, name, length, vocab)
    rows = _windows(ids, min(sequences, len(ids) // length), length, seed)
    return Calibration(rows, name, rows_sha256(rows), seed)
