"""The text that trains and judges the built-in model, and any other text for a perplexity.

Documents of the standard library (`trapetum.stdlib`) are held out by a hash of their group's name, so the same
modules and topics are held out on every machine and Python version.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from trapetum.stdlib import Document, TextError, docstrings, stdlib_documents

__all__ = [
    "DATASETS",
    "KINDS",
    "Document",
    "TextError",
    "corpus",
    "docstrings",
    "heldout_text",
    "limited",
    "load_text",
    "split",
    "stdlib_documents",
    "text_sha256",
    "training_corpus",
    "without_shared",
]

HELDOUT_SHARE = 0.06
# Chosen before any training, because it holds out 5 to 6 % of the characters of each kind (Python 3.11).
HELDOUT_SALT = "split 116"
KINDS = ("topics", "docstrings", "sources")
DATASETS = {
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test", "text"),
}

_MIN_SHARED_LINE = 50


def _share(name: str) -> float:
    """A fixed number in [0, 1) for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def split(
    documents: Sequence[Document], share: float = HELDOUT_SHARE, salt: str = HELDOUT_SALT
) -> tuple[list[Document], list[Document]]:
    """Divide documents into training and held-out ones by a hash of their group's name.

    Args:
        documents: what `stdlib_documents` returned, or a part of it.
        share: the fraction of groups to hold out, 0 to 1.
        salt: another salt gives another, independent division.

    Returns:
        training documents, held-out documents; a group is never in both.
    """
    train, heldout = [], []
    for document in documents:
        (heldout if _share(f"{salt}:{document.group}") < share else train).append(document)
    return train, heldout


def corpus(documents: Iterable[Document]) -> dict[str, list[str]]:
    """The texts of documents by kind: `topics`, `docstrings`, `sources` and `tests`, in a fixed, mixed order."""
    texts: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "tests")}
    for document in sorted(documents, key=lambda d: _share(d.name)):
        match document.kind:
            case "topic":
                texts["topics"].append(document.text)
            case "compiled":
                texts["docstrings"].append(document.text)
            case "test":
                texts["tests"].append(document.text)
            case _:
                texts["sources"].append(document.text)
                texts["docstrings"].append(docstrings(document.text))
    return {kind: [text for text in found if text.strip()] for kind, found in texts.items()}


def _long_lines(text: str) -> set[str]:
    return {key for line in text.split("\n") if len(key := " ".join(line.split())) >= _MIN_SHARED_LINE}


def without_shared(texts: Sequence[str], heldout: Iterable[str]) -> list[str]:
    """Drop every paragraph that shares a line with a held-out text.

    The language reference repeats whole sections under several topics, and modules copy from each other, so a split
    by name alone would leak. A line counts from 50 characters on, white space aside.

    Args:
        texts: training texts.
        heldout: texts that must stay unseen.

    Returns:
        the training texts with those paragraphs gone.
    """
    unseen: set[str] = set().union(*map(_long_lines, heldout))
    kept = []
    for text in texts:
        paragraphs = re.split(r"\n\s*\n(?=\S)|(?<=\n)\n", text) if _long_lines(text) & unseen else [text]
        kept.append("\n\n".join(p for p in paragraphs if not _long_lines(p) & unseen))
    return kept


def training_corpus(
    train: Iterable[Document], heldout: Iterable[Document], limit: int | None = None
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Both sides of a split as texts by kind, with what they share taken out of the training side.

    Args:
        train, heldout: the two sides.
        limit: at most this many characters of each kind for training, for trials.
    """
    unseen = corpus(heldout)
    flat = [text for texts in unseen.values() for text in texts]
    seen = corpus(train)
    return {kind: without_shared(limited(texts, limit), flat) for kind, texts in seen.items()}, unseen


def limited(texts: Sequence[str], max_chars: int | None) -> list[str]:
    """The texts from the start up to a number of characters in all, the last one cut."""
    if max_chars is None:
        return list(texts)
    kept, room = [], max_chars
    for one in texts:
        kept.append(one[:room])
        room -= len(kept[-1])
        if room <= 0:
            break
    return kept


def heldout_text(max_chars: int | None = None, documents: Sequence[Document] | None = None) -> str:
    """Held-out text: language reference, docstrings and sources in that order, in equal parts as far as they last.

    Args:
        max_chars: at most this many characters; None for all.
        documents: by default the running interpreter's.

    Returns:
        one text. The parts' ends are cut to fit; on another Python version the wording differs a little.
    """
    _, heldout = split(documents or stdlib_documents())
    found = {kind: "\n\n".join(texts) for kind, texts in corpus(heldout).items() if kind in KINDS}
    if max_chars is None:
        return "\n\n".join(found.values())
    room = max_chars - 2 * (len(KINDS) - 1)
    kept = {}
    for left, kind in zip((3, 2, 1), sorted(KINDS, key=lambda k: len(found[k])), strict=True):
        kept[kind] = found[kind][: max(0, room // left)]
        room -= len(kept[kind])
    return "\n\n".join(kept[kind] for kind in KINDS)


def text_sha256(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8: two perplexities compare only where this agrees."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached; asked first, because `datasets` retries for 24 s before it gives up."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=10)
    except HfHubHTTPError as error:
        raise TextError(f"the Hugging Face hub refused dataset {name!r}: {_first_line(error)}.") from error
    except Exception:  # no connection, in whichever of its forms
        return False
    return True


@contextlib.contextmanager
def _offline():
    """Keep `datasets` and the hub's library to what is in their cache."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _dataset_text(name: str, config: str | None, part: str, column: str) -> str:
    import datasets

    online = _hub_answers(name)
    try:
        with contextlib.nullcontext() if online else _offline():
            rows = datasets.load_dataset(name, config, split=part)
    except Exception as error:
        why = (
            _first_line(error)
            if online
            else "the Hugging Face hub cannot be reached and it is not in the cache"
        )
        raise TextError(f"dataset {name!r} could not be loaded: {why}; name a text file instead.") from error
    if column not in rows.column_names:
        raise TextError(f"dataset {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}.")
    return "\n\n".join(rows[column])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def load_text(spec: str, max_chars: int | None = None) -> str:
    """Read a text by name.

    Args:
        spec: `builtin` for the held-out standard library text, a name in `DATASETS`, a path of a UTF-8 file, or a
            hub dataset as `ID`, `ID:CONFIG`, `ID:CONFIG:SPLIT` or `ID:CONFIG:SPLIT:COLUMN` (test split and column
            `text` unless given). Rows are joined by blank lines, as is usual for WikiText perplexities.
        max_chars: at most this many characters from the start (of each kind for `builtin`).

    Raises:
        TextError: neither a file nor a dataset that can be reached.
    """
    if spec == "builtin":
        return heldout_text(max_chars)
    if spec in DATASETS:
        return _dataset_text(*DATASETS[spec])[:max_chars]
    if Path(spec).is_file():
        return Path(spec).read_text(encoding="utf-8")[:max_chars]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/]*)?", spec) or Path(spec).suffix in (".txt", ".md"):
        raise TextError(
            f"there is no text file {spec!r}, and it is not the name of a dataset ({', '.join(DATASETS)}, or a hub id)."
        )
    parts = (spec.split(":") + [""] * 3)[:4]
    return _dataset_text(parts[0], parts[1] or None, parts[2] or "test", parts[3] or "text")[:max_chars]
