"""How many tokens a step makes when it also verifies drafts looked up in the text so far: counted, no model needed."""

from collections.abc import Iterable, Sequence

from trapetum.cuda_token import NGRAM, draft
from trapetum.records import Record, latest

HEADINGS = ("model", "weights", "rows", "tokens a step", "tok/s", "over 1 row")


def accepted(prompt: Sequence[int], tokens: Sequence[int], rows: int, ngram: int = NGRAM) -> list[int]:
    """The tokens that each step makes until `tokens` are made, if `tokens` is what greedy decoding says.

    A step feeds the last certain token and `rows - 1` drafts; drafts count up to the first that is wrong, and one token more
    is always made. Verification never changes the tokens, so their number is all that drafts can change.

    Args:
        prompt: token ids, at least one.
        tokens: what follows it, at least one; the first comes from the prefill.
        rows: tokens fed at once, 1 or more.
        ngram: tokens that a draft is looked up by, at most.

    Returns:
        tokens a step, each 1 to `rows`; they sum to `len(tokens) - 1`.

    Raises:
        ValueError: an empty prompt or text, or no row.
    """
    if not prompt or not tokens or rows < 1:
        raise ValueError(
            f"{len(prompt)} prompt tokens, {len(tokens)} new ones and {rows} rows: give at least 1 of each."
        )
    history, made, steps = [*prompt, tokens[0]], 1, []
    while made < len(tokens):
        coming = tokens[made : made + rows]
        right = _agreeing(draft(history, rows - 1, ngram), coming)
        step = coming[: right + 1]
        history += step
        made += len(step)
        steps.append(len(step))
    return steps


def _agreeing(drafts: Sequence[int], coming: Sequence[int]) -> int:
    """How many drafts are right before the first that is wrong."""
    for count, (guess, truth) in enumerate(zip(drafts, coming, strict=False)):
        if guess != truth:
            return count
    return min(len(drafts), len(coming))


def beside_one_row(records: Iterable[Record]) -> list[list]:
    """One row under `HEADINGS` for each decode with drafts, beside the same decode without.

    Args:
        records: any; `decode_speed` of one device is used.
    """
    plain = latest(r for r in records if r.quantity == "decode_speed" and not r.config.get("interleaved"))
    rows = []
    for r in plain:
        if r.config.get("rows") in (None, 1):
            continue
        alone = [s for s in plain if s.config.get("rows") in (None, 1) and _what(s) == _what(r)]
        gain = f"{r.value / alone[-1].value:.2f}" if alone else "not recorded"
        config = r.config
        made = [config["model"], f"{r.method} {config['bits']}-bit, {config['stage']}", str(config["rows"])]
        rows.append([*made, config.get("accepted", 1.0), r.value, gain])
    return rows


def _what(record: Record) -> tuple:
    return record.method, *(record.config.get(k) for k in ("model", "stage", "bits", "lm_head", "kv"))
