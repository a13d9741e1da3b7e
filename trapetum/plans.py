"""Launch shapes that were tuned on this machine, kept on disk beside the compiled kernels. No torch.

A plan is a few small integers (or truths) by name, such as {"warps": 16, "ahead": 2}; what they mean is the kernel's
business. One JSON file a device holds the plans of all its shapes. A file that cannot be used is said once and then as
good as empty: the kernel's default launch shapes are used.
"""

import fcntl
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, TypeVar

from trapetum.kernel_cache import write_atomically
from trapetum.paths import cache_dir

Kind = TypeVar("Kind")
_VERSION = 1
_LARGEST = 1 << 16  # a launch shape has no larger number
_DEFAULTS = "the default launch shapes are used until `trapetum tune` stores others"
_read: set[str] = set()  # devices whose file has been read
_known: dict["Key", dict[str, int] | None] = {}
_made: dict[tuple[type, "Key"], object] = {}
_said: set[str] = set()


class Key(NamedTuple):
    """What a plan was tuned for.

    Attributes:
        device: from `device_name`.
        source_sha256: of the kernel's source; an edited kernel has no plans.
        in_features, out_features, bits, rows: the product.
    """

    device: str
    source_sha256: str
    in_features: int
    out_features: int
    bits: int
    rows: int


def device_name(name: str, sms: int, capability: tuple[int, int]) -> str:
    """A device as a key names it: the card, its multiprocessors (parts of one card differ) and its architecture.

    Args:
        name: e.g. `NVIDIA H100 80GB HBM3`.
        sms: multiprocessors.
        capability: compute capability.
    """
    return f"{name}, {sms} SMs, sm_{capability[0]}{capability[1]}"


def path_for(device: str) -> Path:
    """The file that holds the plans of `device`."""
    return cache_dir() / "plans" / (re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() + ".json")


def load(key: Key) -> dict[str, int] | None:
    """The plan stored for `key`, or None. Only the first look-up of a device reads its file."""
    if key.device not in _read:
        _read.add(key.device)
        _known.update({k: plan for k, plan in _entries(key.device).items() if k not in _known})
    return _known.get(key)


def load_as(kind: type[Kind], key: Key) -> Kind | None:
    """The plan stored for `key` as a dataclass of integers, or None.

    A plan that names other fields than `kind` has is said and left out: it is another program's.

    Args:
        kind: a dataclass; fields with defaults may be missing in the plan.
    """
    try:
        return _made[kind, key]
    except KeyError:
        return _made.setdefault((kind, key), _make(kind, key))


def _make(kind: type[Kind], key: Key) -> Kind | None:
    plan = load(key)
    if plan is None:
        return None
    unknown = sorted(plan.keys() - {field.name for field in fields(kind)})
    try:
        if not unknown:
            return kind(**plan)
        reason = f"{kind.__name__} has no {', '.join(unknown)}"
    except (TypeError, ValueError) as error:
        reason = str(error)
    _say(f"{path_for(key.device)} holds the launch shape {plan}, which does not fit ({reason}); {_DEFAULTS}.")
    return None


def store(key: Key, plan: dict[str, int] | None) -> bool:
    """Keep `plan` for `key`, in this process and on disk, beside what other processes stored meanwhile.

    Args:
        key: what it was tuned for.
        plan: integers by name, or None to go back to the default.

    Returns:
        whether it is on disk; if not, a warning says why.

    Raises:
        ValueError: a plan must map names to integers from 0 to 65536.
    """
    if plan is not None:
        _require_plan(plan)
    _known[key] = dict(plan) if plan is not None else None
    for made in [made for made in _made if made[1] == key]:
        del _made[made]
    path = path_for(key.device)
    try:
        with _locked(path):
            entries = {k: v for k, v in (_entries(key.device) | {key: plan}).items() if v is not None}
            write_atomically(path, _as_json(key.device, entries).encode())
    except OSError as error:
        _say(
            f"{path} cannot be written ({error.strerror or error}), so tuned launch shapes end with this process; "
            "set TRAPETUM_CACHE to a folder that can."
        )
        return False
    return True


def forget() -> None:
    """Read the files anew at the next look-up, as after another process has tuned."""
    for memory in (_read, _known, _made, _said):
        memory.clear()


def _require_plan(plan: object) -> None:
    fits = isinstance(plan, dict) and plan and all(isinstance(name, str) for name in plan)
    if not fits or not all(isinstance(value, int) and 0 <= value <= _LARGEST for value in plan.values()):
        raise ValueError(f"a launch shape maps names to integers from 0 to {_LARGEST}; this one is {plan!r}.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two processes that store at once keep both plans."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".lock", "a") as lock:
        with suppress(OSError):  # a file system without locks: the last one to write wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(sentence: str) -> None:
    """Warn, once a process."""
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def _as_json(device: str, entries: dict[Key, dict[str, int]]) -> str:
    rows = [key._asdict() | {"plan": plan} for key, plan in entries.items()]
    for row in rows:
        del row["device"]
    return json.dumps({"version": _VERSION, "device": device, "plans": rows}, indent=1) + "\n"


def _entries(device: str) -> dict[Key, dict[str, int]]:
    """What the file of `device` holds; nothing where there is no file, or none that can be used."""
    path = path_for(device)
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"its version is {content['version']!r}, this program's {_VERSION}")
        if content["device"] != device:
            raise ValueError(f"it is of the device {content['device']!r}, not of {device!r}")
        return dict(_entry(device, row) for row in content["plans"])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        _say(f"{path} cannot be used ({type(error).__name__}: {error}); {_DEFAULTS}.")
        return {}


def _entry(device: str, row: dict) -> tuple[Key, dict[str, int]]:
    row = dict(row)
    plan = row.pop("plan")
    _require_plan(plan)
    key = Key(device=device, **row)
    if type(key.source_sha256) is not str or not all(type(size) is int for size in key[2:]):
        raise ValueError(f"{row} is no key of a plan")
    return key, plan
