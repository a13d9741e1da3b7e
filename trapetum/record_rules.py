"""What a record may hold: the vocabulary of quantities and kinds, and the rules that `trapetum.records` enforces."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

KINDS = ("measured", "published", "derived")

# Unit of each quantity; "" is a pure number. GB is 1e9 bytes.
QUANTITIES = {
    "read_bandwidth": "GB/s",  # bytes read / time, of a kernel that only reads
    "gemv_time": "us",  # one matrix-vector product
    "linears_time": "us",  # all matrix-vector products of one token
    "dequant_bandwidth": "GB/s",  # bytes read and written / time, codes to dense weights
    "decode_speed": "tok/s",  # batch 1
    "window_speed": "tok/s",  # batch 1, over config.window of the tokens of one decode
    "context_speed": "tok/s",  # batch 1, over a few steps that end at config.context cached tokens
    "token_part": "us",  # of the time of one token: config.part says which
    "decode_memory": "GB",  # highest memory in use during a decode
    "energy_per_token": "J",
    "perplexity": "",
    "quantize_time": "s",
    "weight_error": "",  # ||W - Q||^2 / ||W||^2
    "layer_error": "",  # of what a decoder layer adds to its exact input: ||added - added'|| / ||added||
    "kl_divergence": "nat",  # of next-token distributions from config.baseline's, mean a token
    "top1_agreement": "",  # share of tokens where config.baseline has the same first choice
    "output_error": "",  # relative L2 error of a product against float64
    "gemm_time": "us",  # one matrix-matrix product
    "gemm_throughput": "TFLOP/s",
    "peak_fraction": "",  # of the arithmetic or bandwidth peak named in config, 1 = all of it
    "speedup": "",  # against config.baseline
    "token_floor": "us",  # the reads of one token, config.way says how, without arithmetic
    "launch_time": "us",  # one kernel that does nothing
    "framework_time": "us",  # a decode step without its linears
    "time_to_first_token": "s",
    "model_memory": "GB",  # weights alone
    "model_bandwidth": "GB/s",  # model bytes times tokens a second
    "bits_per_weight": "bit",  # overhead included
    "instructions_per_weight": "",
    "power": "W",
    "carbon_per_1k_tokens": "g",
    "load_time": "s",
    "train_time": "s",
    "peak_throughput": "TFLOP/s",  # of a datasheet; TOP/s for integers
    "peak_bandwidth": "GB/s",  # of a datasheet
    "energy_ratio": "",  # joules a token of config.baseline over this one's
    "memory_ratio": "",  # bytes of config.baseline over this one's
    "perplexity_ratio": "",  # this one's over config.baseline's
    "token_agreement": "",  # share of tokens equal to config.baseline's
    "logit_error": "",  # largest difference of a logit from config.baseline's
    "logit_gap": "",  # by how much config.baseline prefers its token to the one chosen, in its own logits
    "instruction_count": "",  # machine instructions that one operation compiles to
    "call_accepted": "",  # 1: the call ran; 0: it raised config.error
}

# Quantities that may be zero or, as a difference of two readings, below it.
_MAY_BE_ZERO = {
    "weight_error",
    "layer_error",
    "kl_divergence",
    "top1_agreement",
    "output_error",
    "peak_fraction",
    "energy_per_token",
    "power",
    "carbon_per_1k_tokens",
    "token_agreement",
    "token_part",
    "logit_error",
    "logit_gap",
    "call_accepted",
}
_MAY_BE_NEGATIVE = {"energy_per_token", "power", "carbon_per_1k_tokens", "token_part"}


class RecordError(ValueError):
    """A record breaks the rules of this module; the message says which and how."""


def number(name: str, value, optional: bool = False) -> float | None:
    """`value` as a finite float (None stays None if `optional`); RecordError names the field."""
    if value is None and optional:
        return None
    if isinstance(value, (str, bytes, bool)) or value is None:
        raise RecordError(f"{name} must be a number, not {value!r}.")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(f"{name} must be a number, not {value!r}.") from error
    if not math.isfinite(found):
        raise RecordError(f"{name} must be finite, not {found}.")
    return found


def listed(samples) -> Iterable:
    """`samples` if they are a list of some sort, or RecordError."""
    if isinstance(samples, (str, bytes, Mapping)) or not isinstance(samples, Iterable):
        raise RecordError(f"samples must be a list of numbers, not {samples!r}.")
    return samples


def _scalar(value):
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def plain(name: str, mapping) -> dict[str, Any]:
    """A copy of `mapping` in JSON's own types, so that what is stored equals what is loaded."""
    if not isinstance(mapping, Mapping):
        raise RecordError(f"{name} must be an object, not {mapping!r}.")
    wrong = [key for key in mapping if not isinstance(key, str)]
    if wrong:
        raise RecordError(f"{name} has the key {wrong[0]!r}, which is no string.")
    try:
        return json.loads(json.dumps(dict(mapping), default=_scalar, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RecordError(f"{name} holds what JSON cannot: {error}.") from error


def check(record) -> None:
    """Raise RecordError at the first rule that `record`, a `trapetum.records.Record`, breaks."""
    for rules in (_vocabulary_rules, _type_rules, _value_rules, _origin_rules):
        for holds, complaint in rules(record):
            if not holds:
                raise RecordError(complaint)


def _vocabulary_rules(r):
    yield r.kind in KINDS, f"kind must be one of {', '.join(KINDS)}, not {r.kind!r}."
    known = isinstance(r.quantity, str) and r.quantity in QUANTITIES
    yield known, f"quantity {r.quantity!r} is unknown; the quantities are {', '.join(QUANTITIES)}."
    unit = QUANTITIES[r.quantity]
    yield r.unit == unit, f"{r.quantity} is in {unit or 'no unit'}, not {r.unit!r}."
    good = isinstance(r.method, str) and r.method != "" and r.method == r.method.strip()
    yield good, f"method must be a name without surrounding blanks, not {r.method!r}."


def _type_rules(r):
    yield isinstance(r.id, str), f"id must be a string, not {r.id!r}."
    yield isinstance(r.source, str), f"source must be a string, not {r.source!r}."
    yield type(r.n) is int and r.n >= 0, f"n must be a count, not {r.n!r}."
    yield r.commit is None or isinstance(r.commit, str), f"commit must be a string or null, not {r.commit!r}."
    yield r.dirty is None or isinstance(r.dirty, bool), f"dirty must be true, false or null, not {r.dirty!r}."
    sha = r.kernel_sha256
    is_sha = sha is None or (isinstance(sha, str) and re.fullmatch("[0-9a-f]{64}", sha) is not None)
    yield is_sha, f"kernel_sha256 must be 64 hex digits or null, not {sha!r}."
    yield r.utc is None or _is_utc(r.utc), f"utc must be like 2026-01-31T12:00:00Z, not {r.utc!r}."
    yield isinstance(r.suspect, bool), f"suspect must be true or false, not {r.suspect!r}."
    yield isinstance(r.why_suspect, str), f"why_suspect must be a string, not {r.why_suspect!r}."
    yield r.suspect == bool(r.why_suspect), "suspect and why_suspect go together: both, or neither."


def _value_rules(r):
    sign = r.value > 0 or r.quantity in _MAY_BE_NEGATIVE or (r.value == 0 and r.quantity in _MAY_BE_ZERO)
    yield sign, f"{r.quantity} cannot be {r.value:g} {r.unit}".rstrip() + "."
    yield not r.samples or r.n == len(r.samples), f"n is {r.n} but there are {len(r.samples)} samples."
    yield (r.p20 is None) == (r.p80 is None), "p20 and p80 go together: both, or neither."
    yield r.p20 is None or r.p20 <= r.p80, f"p20 ({r.p20}) is above p80 ({r.p80})."


def _origin_rules(r):
    if r.kind == "measured":
        yield len(r.samples) > 0, "a measured record needs its samples."
        yield (
            bool(r.device.get("name")),
            "a measured record needs device.name; use trapetum.machine.describe().",
        )
        yield r.utc is not None, "a measured record needs utc, the time it was taken."
    else:
        what = "the document and the place in it" if r.kind == "published" else "its inputs and its formula"
        yield r.source.strip() != "", f"a {r.kind} record needs a source: {what}."


def _is_utc(text) -> bool:
    if not (isinstance(text, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", text)):
        return False
    try:
        datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return False
    return True
