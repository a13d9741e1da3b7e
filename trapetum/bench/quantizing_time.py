"""How long it takes to quantize a whole model, by phase: the one cost of a better codebook, paid once."""

from collections.abc import Sequence

import torch

from trapetum import models
from trapetum.bench.recording import Recorder
from trapetum.calibration import LENGTH, SEQUENCES, Calibration, made_of
from trapetum.quantizers import METHODS
from trapetum.quantizing import quantize_calibrated
from trapetum.records import Record

#: By profile: calibration sequences, and their length.
EFFORT = {"smoke": (2, 64), "quick": (SEQUENCES // 4, 512), "full": (SEQUENCES, LENGTH)}


def quantizing_time(
    model_name: str = "random:llama-2-7b",
    device: str = "auto",
    methods: Sequence[str] = ("kmeans", "lnq-guided"),
    bits: Sequence[int] = (4,),
    profile: str = "quick",
) -> list[Record]:
    """Quantize a model whole by each method; methods that need data calibrate on random tokens, which take as long as text.

    Args:
        model_name: as for `models.load`; random shapes are the use of it.
        device: "auto", "cpu" or "cuda".
        methods: names of `trapetum.quantizers.METHODS`.
        bits: each is combined with each method.
        profile: "smoke", "quick" or "full": how much is calibrated on; full is 128 sequences of 2048 tokens.

    Returns:
        `quantize_time` records, s: one sample, calibration included and loading not. `config.phases` has the seconds of each
        phase, `config.peak_gb` the most that the GPU's allocator held.
    """
    recorder = Recorder(device, profile)
    for b in bits:
        for method in methods:
            _measure(recorder, model_name, method, b)
    return recorder.close()


def _tokens(loaded: models.Loaded, profile: str) -> Calibration:
    sequences, length = EFFORT[profile]
    length = min(length, loaded.model.config.max_position_embeddings)
    ids = torch.randint(loaded.shape.vocab, (sequences, length), generator=torch.Generator().manual_seed(0))
    return made_of(ids, "random token ids")


def _measure(recorder: Recorder, model_name: str, method: str, bits: int) -> None:
    loaded = models.load(model_name, recorder.device)
    calibration = _tokens(loaded, recorder.profile) if METHODS[method].needs_calibration else None
    on_gpu = recorder.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    report = quantize_calibrated(loaded.model, bits, method, calibration, progress=False)
    config = {
        "model": loaded.name,
        "bits": bits,
        "n_codes": report.n_codes,
        "layers": len(report.errors),
        "calibration_tokens": calibration.tokens if calibration else 0,
        "phases": {phase: round(seconds, 3) for phase, seconds in report.phases.items()},
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
    }
    recorder.add("quantize_time", [report.seconds], method, config)
