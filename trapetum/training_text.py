"""The built-in model's training text: parts, tokenizer and token streams."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from trapetum import text

END = "<|endoftext|>"


def prepare_texts(stdlib: Path | None = None, limit: int | None = None) -> dict[str, dict[str, list[str]]]:
    """The texts of a run: `train`, `validation` and `heldout`, each by kind.

    Validation texts choose when to stop; held-out ones are only looked at. Neither shares a line with training.

    Args:
        stdlib: folder of the sources; by default the running interpreter's.
        limit: at most this many characters of each kind, for trials.
    """
    train, heldout = text.split(text.stdlib_documents(stdlib))
    train, validation = text.split(train, share=0.04, salt="validation 6")
    training, _ = text.training_corpus(train, [*heldout, *validation], limit)
    parts = {"train": training}
    for name, documents in (("validation", validation), ("heldout", heldout)):
        texts = text.corpus(documents)
        parts[name] = {kind: text.limited(texts[kind], limit) for kind in text.KINDS}
    return parts


def tokenizer_texts(train: Mapping[str, list[str]]) -> list[str]:
    """Documentation counts several times, so that the vocabulary is made of its words; tests not at all."""
    return train["topics"] * 4 + train["docstrings"] * 2 + train["sources"]


def make_tokenizer(texts: Sequence[str], vocabulary: int):
    """Train a byte-level BPE tokenizer.

    Args:
        texts: what it is trained on.
        vocabulary: tokens, the 256 bytes and the end marker (id 0) included.

    Returns:
        a `transformers.PreTrainedTokenizerFast`; it puts no marker before or after a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def encode(tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """The token ids of texts in one stream, int32 [tokens], the end marker after each."""
    end = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts)) if texts else []
    arrays = [np.array([*one.ids, end], dtype=np.int32) for one in encoded]
    return torch.from_numpy(np.concatenate(arrays or [np.zeros(0, np.int32)]))


def encode_parts(
    tokenizer, texts: Mapping[str, Mapping[str, list[str]]]
) -> dict[str, dict[str, torch.Tensor]]:
    """`encode` for each kind of each part of what `prepare_texts` returned."""
    return {
        part: {kind: encode(tokenizer, found) for kind, found in kinds.items()}
        for part, kinds in texts.items()
    }
