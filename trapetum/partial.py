"""A folder of finished layers, so that a run that was stopped goes on where it was: `run.json` and one file a result.

Each file appears whole or not at all and holds a SHA-256 of its tensors. A file that is missing or damaged is a layer that is
not done. `run.json` says of which run the folder is; another run's is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from trapetum import additive, formats
from trapetum.additive import AdditiveWeight
from trapetum.formats import CodebookWeight, FormatError
from trapetum.kernel_cache import write_atomically

_RUN = "run.json"
_NOTES = "notes"
_CHUNK = 1 << 24


class PartialError(ValueError):
    """A folder cannot be taken up; the message says why and what to do."""


@dataclass(frozen=True)
class Done:
    """A finished layer.

    Attributes:
        weight: its codes, on the CPU.
        extra: other tensors of it by name (outliers kept apart).
        notes: errors and the like, as JSON holds them.
    """

    weight: CodebookWeight | AdditiveWeight
    extra: dict[str, Tensor] = field(default_factory=dict)
    notes: dict = field(default_factory=dict)


def fingerprint(model: nn.Module) -> str:
    """A hash (hex) of a model's config and weights that tells models apart; two sums of each tensor's bits are hashed.

    It is made where the weights are, so that a model on a GPU need not come down. It guards against mistakes, not forgery.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.named_parameters():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {_sums(tensor.detach())}".encode())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> list[int]:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for at, part in enumerate(tensor.contiguous().view(-1).view(whole).split(_CHUNK)):
        wide = part.long()
        place = torch.arange(len(wide), device=wide.device) % 65521 + 1 + at
        sums += torch.stack([wide.sum(), (wide * place).sum()])
    return sums.tolist()


class Partial:
    """Results of one run by name; without a folder nothing is kept.

    Args:
        folder: of the run, made if need be; or None.
        identity: what tells this run from others, as JSON holds it.

    Raises:
        PartialError: the folder is another run's, or holds something else.
    """

    def __init__(self, folder: Path | None, identity: Mapping):
        self._folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _RUN).is_file():
            self._require_same(json.loads(json.dumps(identity)))
        elif any(
            path.name[0] != "." and path.name != _RUN for path in folder.iterdir()
        ):  # another process may write _RUN
            raise PartialError(f"{folder} holds no {_RUN} and is not empty; choose another directory.")
        else:
            write_atomically(folder / _RUN, (json.dumps(identity, indent=1) + "\n").encode())

    def _require_same(self, identity: dict) -> None:
        try:
            kept = dict(json.loads((self._folder / _RUN).read_text()))
        except (ValueError, TypeError) as error:
            raise PartialError(f"{self._folder / _RUN} is damaged ({error}); delete the folder.") from error
        for key in sorted(identity.keys() | kept.keys()):
            if kept.get(key) != identity.get(key):
                raise PartialError(
                    f"{self._folder} holds the layers of another run ({key} {kept.get(key)!r}, now {identity.get(key)!r}); "
                    "finish that one, or start over with --no-resume."
                )

    @property
    def keeps(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def put(self, name: str, done: Done) -> None:
        """Keep a finished layer."""
        if self._folder:
            notes = {_NOTES: json.dumps(done.notes)}
            if isinstance(done.weight, AdditiveWeight):
                formats.save(self._path(name), {}, done.weight.tensors(), notes)
            else:
                formats.save(self._path(name), {name: done.weight}, done.extra, notes)

    def get(self, name: str) -> Done | None:
        """A finished layer, or None."""
        archive = self._load(name)
        if archive is None:
            return None
        notes = json.loads(archive.metadata.get(_NOTES, "{}"))
        if not archive.weights and archive.extra.keys() == set(additive.PARTS):
            return Done(additive.AdditiveWeight(**archive.extra), {}, notes)
        return Done(archive.weights[name], archive.extra, notes) if list(archive.weights) == [name] else None

    def put_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep other tensors, by names of their own."""
        if self._folder:
            formats.save(self._path(name), {}, {key: tensor.cpu() for key, tensor in tensors.items()})

    def get_tensors(self, name: str) -> dict[str, Tensor] | None:
        """What `put_tensors` kept, or None."""
        archive = self._load(name)
        return None if archive is None or archive.weights else archive.extra

    def _load(self, name: str):
        if self._folder is None or not self._path(name).is_file():
            return None
        try:
            return formats.load(self._path(name))
        except FormatError:
            return None


def is_partial(folder: Path) -> bool:
    """Whether a folder is one that `Partial` made."""
    return (folder / _RUN).is_file()


def finished(folder: Path) -> int:
    """How many results a folder holds."""
    return len(list(folder.glob("*.safetensors")))
