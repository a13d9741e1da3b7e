"""The compiled kernels on disk: whole, or made again.

A binary lies beside a log of the same name. The log's first line is the SHA-256 of the binary and of the compiler's
report, which follows it; a binary that does not match its log is damaged and counts as missing. Files appear by rename,
so a killed build leaves nothing behind. Where the cache cannot be written, a private temporary folder takes its place
until the process ends.
"""

import functools
import hashlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

_moved: dict[Path, Path] = {}  # what could not be written where it belongs, and where it lies instead


class Entry(NamedTuple):
    """A whole binary and its compiler's report.

    Attributes:
        path: of the binary, which may lie in a private folder.
        report: what the compiler said.
    """

    path: Path
    report: str


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` by way of a temporary name in the same folder.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(handle, 0o644)  # mkstemp makes private files
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _seal(binary: bytes, report: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(binary).digest() + report).hexdigest().encode()


def recall(path: Path) -> Entry | None:
    """The binary kept as `path`, or None where there is none or a damaged one (which is said in a warning)."""
    place = _moved.get(path, path)
    try:
        binary, log = place.read_bytes(), place.with_suffix(".log").read_bytes()
    except OSError:
        return None
    seal, _, report = log.partition(b"\n")
    if seal == _seal(binary, report):
        return Entry(place, report.decode())
    warnings.warn(
        f"{place} ({len(binary)} bytes) is damaged: it does not match its log, so it is compiled again.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def keep(path: Path, binary: bytes, report: str) -> Entry:
    """Write a binary and its report, in a private folder where `path` cannot be written.

    Returns:
        where the binary lies, and the report.

    Raises:
        OSError: the temporary folder cannot be written either.
    """
    try:
        return _write(path, binary, report)
    except OSError as error:
        reason = error.strerror or str(error)
    try:
        entry = _write(_private_folder() / path.name, binary, report)
    except OSError as error:
        raise OSError(
            f"neither {path.parent} ({reason}) nor a temporary folder ({error.strerror or error}) can be written; "
            "set TRAPETUM_CACHE to a folder that can."
        ) from error
    if not _moved:
        warnings.warn(
            f"{path.parent} cannot be written ({reason}), so kernels are compiled in each process anew; "
            "set TRAPETUM_CACHE to a folder that can.",
            RuntimeWarning,
            stacklevel=3,
        )
    _moved[path] = entry.path
    return entry


def _write(path: Path, binary: bytes, report: str) -> Entry:
    encoded = report.encode()
    write_atomically(path.with_suffix(".log"), _seal(binary, encoded) + b"\n" + encoded)
    write_atomically(path, binary)
    return Entry(path, report)


def _private_folder() -> Path:
    return Path(_private().name)


@functools.cache
def _private() -> tempfile.TemporaryDirectory:
    """Readable by this user only, and removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="trapetum-", ignore_cleanup_errors=True)
