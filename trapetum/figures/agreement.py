"""Which stages make transformers' tokens: the records of a comparison as rows of a table."""

from collections.abc import Iterable

from trapetum.figures.style import device_name, label_of
from trapetum.records import Record, latest, select

AGREEMENT_HEADINGS = (
    "device", "model", "weights", "stage", "prompts", "equal tokens", "largest logit difference"
)  # fmt: skip


def agreement_rows(records: Iterable[Record]) -> list[list]:
    """One row a stage under `AGREEMENT_HEADINGS`, the newest comparison of each.

    Args:
        records: any; `token_agreement` and `logit_error` against transformers are used.
    """
    pool = latest(select(records, baseline="transformers"))
    errors = {_what(r): r for r in select(pool, quantity="logit_error", variant="absolute")}
    rows = []
    for r in select(pool, quantity="token_agreement", variant="tokens"):
        error = errors.get(_what(r))
        config = r.config
        named = [device_name(r), config["model"], label_of(r), _stage(r), str(config.get("prompts", ""))]
        rows.append([*named, f"{r.value:.2%}", f"{error.value:.2g}" if error else "not recorded"])
    return rows


def _stage(record: Record) -> str:
    kv = record.config.get("kv")
    return f"{record.config['stage']}, {kv} cache" if kv else str(record.config["stage"])


def _what(record: Record) -> tuple:
    keys = ("model", "stage", "bits", "lm_head", "kv", "dtype")
    return record.device.get("name"), record.method, *(record.config.get(key) for key in keys)
