"""From the name of a model to a quantized directory: load, calibrate, quantize, save; taken up again after a stop.

Until it is saved, a run keeps its finished layers in a folder beside the directory, named after it with `.partial`.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from trapetum import checkpoint, models
from trapetum.calibration import LENGTH, SEQUENCES, Calibration, take
from trapetum.models import Loaded, QuantizeSpec
from trapetum.partial import finished, is_partial
from trapetum.quantizers import METHODS
from trapetum.quantizing import quantize_calibrated, ranks
from trapetum.swap import Report

_PATIENCE = timedelta(days=1)  # processes wait for the slowest one's last layer


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        bits, method, lm_head, outliers: as for `trapetum.quantizing.quantize_calibrated`.
        text: to calibrate on, as for `trapetum.calibration.read`; None for no calibration.
        sequences, length, seed: as for `trapetum.calibration.take`; the length is cut to the model's context.
        resume: take up what an interrupted run left; otherwise start over.
    """

    bits: int = 4
    method: str = "kmeans"
    lm_head: bool = False
    text: str | None = None
    sequences: int = SEQUENCES
    length: int = LENGTH
    seed: int = 0
    resume: bool = True
    outliers: float = 0.0

    @property
    def streams(self) -> bool:
        """Whether the weights can be quantized while they are read."""
        known = METHODS.get(self.method)
        only_whole = known is not None and known.transform and not known.needs
        return self.text is None and not only_whole


@contextmanager
def processes(device: str) -> Iterator[bool]:
    """Join the processes that torchrun started, if it did, each with a GPU of its own; whether this is the first of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield ranks()[0] == 0
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield ranks()[0] == 0
    finally:
        distributed.destroy_process_group()


def partial_folder(out: str | Path) -> Path:
    """Where a run that will write `out` keeps its finished layers."""
    out = Path(out).expanduser().absolute()
    return out.with_name(f"{out.name}.partial")


def _calibration(loaded: Loaded, job: Job, say: Callable[[str], object]) -> Calibration | None:
    if job.text is None:
        return None
    length = min(job.length, loaded.model.config.max_position_embeddings)
    found = take(loaded.tokenizer, job.text, job.sequences, length, job.seed, loaded.model.config.vocab_size)
    say(f"calibration: {len(found.rows)} sequences of {length} tokens of {found.text}, seed {found.seed}")
    return found


def _prepared(folder: Path, resume: bool, say: Callable[[str], object]) -> Path:
    """The folder for finished layers, emptied if the run is to start over."""
    if is_partial(folder) and not resume and ranks()[0] == 0:
        shutil.rmtree(folder)
    if ranks()[1] > 1:
        distributed.barrier()
    if is_partial(folder) and finished(folder):
        say(f"going on from {folder}: {finished(folder)} results of an interrupted run are there")
    return folder


def _whole(
    model: str, job: Job, out: Path, device: str, say: Callable, progress: bool
) -> tuple[Loaded, Report]:
    loaded = models.load(model, device)
    calibration = _calibration(loaded, job, say)
    folder = _prepared(partial_folder(out), job.resume, say)
    report = quantize_calibrated(
        loaded.model,
        job.bits,
        job.method,
        calibration,
        lm_head=job.lm_head,
        progress=progress,
        resume_dir=folder,
        outliers=job.outliers,
    )
    return loaded, report


def quantize_to(
    model: str,
    out: str | Path,
    job: Job,
    device: str = "cpu",
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> tuple[Report, Path]:
    """Quantize a model by name and write it to a directory.

    Without calibration each weight is quantized as it is read. Otherwise the model is loaded dense; what is finished is kept in
    `partial_folder(out)` until the directory is written, and a second call goes on from it.

    Args:
        model: as for `trapetum.models.load`.
        out: a new directory, or one that holds a model quantized before.
        job: how.
        device: where.
        say: is told what an interrupted run left, and what the model is calibrated on.
        progress: show progress bars.

    Returns:
        what was done, and the directory; of several processes the first writes it.

    Raises:
        ModelError: the model cannot be had, or the directory not written.
        ValueError: a method, text or size that does not fit, or finished layers of another run.
    """
    out = Path(out)
    checkpoint.require_replaceable(out.expanduser().absolute())
    if job.streams:
        spec = QuantizeSpec(job.bits, job.method, lm_head=job.lm_head, outliers=job.outliers)
        loaded = models.load(model, device, quantize=spec, progress=progress)
        report = loaded.report
    else:
        loaded, report = _whole(model, job, out, device, say, progress)
    if ranks()[0] != 0:
        return report, out
    folder = models.save(loaded.model, loaded.tokenizer, out)
    if is_partial(partial_folder(out)) and not job.streams:
        shutil.rmtree(partial_folder(out), ignore_errors=True)
    return report, folder
