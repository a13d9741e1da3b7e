"""Quantize a whole model with calibration: the statistics of one decoder layer, its transform, its linears, then the next.

Memory: the model, the hidden states of all sequences, and the Hessians of one decoder layer
(`trapetum.memory.calibration_bytes`). Every layer depends on the full-precision model alone (see `trapetum.hessians`), so
layers that are done are skipped when a run is taken up again, and the processes of `torch.distributed` share them out: process
r of n does stages r, r + n, and so on, and the gradients of every n-th sequence; in the end each holds the whole model. The
codes depend neither on how many processes there are nor on how often the run was stopped.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from trapetum import __version__, awq, equivalence, hessians, machine_cpu, sparse
from trapetum.additive import AdditiveWeight
from trapetum.additive_linear import AdditiveLinear
from trapetum.architectures import shape_of
from trapetum.blocks import Blocks
from trapetum.calibration import GROUPS, Calibration, CalibrationError, Statistics
from trapetum.linear import CodebookLinear
from trapetum.memory import calibration_bytes
from trapetum.partial import Done, Partial, fingerprint
from trapetum.quadratic import full_precision
from trapetum.quantizers import METHODS, require_scheme
from trapetum.swap import (
    Report,
    linears,
    note_method,
    quantized_layer,
    replace,
    require_groups,
    require_outliers,
)

_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Scheme:
    """What is done to each layer.

    Attributes:
        bits, method, n_codes: as for `trapetum.quantizers.quantize`.
        lm_head: the output head too.
        outliers: share of the weights that is kept apart in float16.
        groups: of output rows, where the method is guided; else 0.
        seed: of rotations.
    """

    bits: int
    method: str
    n_codes: int
    lm_head: bool
    outliers: float
    groups: int
    seed: int

    @property
    def needs(self) -> str:
        """What the method needs of calibration."""
        return METHODS[self.method].needs

    @property
    def transform(self) -> str:
        """What the model goes through before."""
        return METHODS[self.method].transform


# Processes


def ranks() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without `torch.distributed`."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _shared(value, owner: int):
    """In every process, what process `owner` has."""
    if ranks()[1] == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=owner)
    return box[0]


# What is refused before anything long begins


def _scheme(bits, method, n_codes, lm_head, outliers, groups, calibration) -> Scheme:
    """The scheme, if any layer could have it; the quantizer itself knows the rules.

    Raises:
        ValueError: none could.
    """
    codes = require_scheme(bits, method, n_codes)
    require_outliers(method, outliers)
    if groups < 1:
        raise ValueError(f"groups is {groups}; output rows form at least 1 group.")
    guided = METHODS[method].needs == "guided"
    seed = calibration.seed if calibration else 0
    return Scheme(bits, method, codes, lm_head, outliers, groups if guided else 0, seed)


def _require_tokens(model: nn.Module, calibration: Calibration | None, scheme: Scheme) -> None:
    if calibration is None:
        if scheme.needs:
            raise CalibrationError(
                f"method {scheme.method!r} weighs each input by what it is, so it needs calibration tokens; give some "
                "(--calibrate TEXT, or calibration= in Python), or use method 'kmeans', which needs none."
            )
        return
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    low, high = (int(pick(pick(row) for row in calibration.rows)) for pick in (min, max))
    if not 0 <= low <= high < vocab:
        raise CalibrationError(
            f"the calibration tokens run from {low} to {high}, and the model knows 0 to {vocab - 1}; tokenize with its own "
            "tokenizer."
        )
    longest = max(map(len, calibration.rows))
    if longest > context:
        raise CalibrationError(
            f"a calibration sequence has {longest} tokens, and the model's context is {context}; give shorter ones (--length)."
        )


def _stages(model: nn.Module, blocks: Blocks, lm_head: bool) -> list[list[str]]:
    """Names of the linears to quantize, stage by stage."""
    wanted = {name for name, _ in linears(model, lm_head)}
    if not wanted:
        raise ValueError("the model has no dense linear layers left to quantize; load the dense checkpoint.")
    stages = [[name for name in blocks.linears(index) if name in wanted] for index in range(len(blocks))]
    outside = wanted.difference(*stages)
    if outside:
        raise ValueError(
            f"{min(outside)} and {len(outside) - 1} other linear layers lie outside the model's decoder layers, where none "
            "can be calibrated."
        )
    return stages


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.is_file() else ()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return min([*found, machine_cpu.memory_bytes() or found[0]]) if found else None


def _require_memory(blocks: Blocks, calibration: Calibration, scheme: Scheme) -> None:
    longest = max(map(len, calibration.rows))
    shape, size = shape_of(blocks.model.config, "the model"), blocks.dtype.itemsize
    parts = calibration_bytes(shape, calibration.tokens, longest, scheme.groups, size, scheme.lm_head)
    on_gpu = blocks.device.type == "cuda"
    elsewhere = {"model"} | ({"token weights"} if on_gpu else set())
    needed = sum(size for part, size in parts.items() if part not in elsewhere)
    free = _free_bytes(blocks.device)
    if free is not None and needed > free:
        where = "GPU" if on_gpu else "machine"
        raise CalibrationError(
            f"calibration on {len(calibration.rows)} sequences of up to {longest} tokens takes {needed / 1e9:.1f} GB beside "
            f"the model, and the {where} has {free / 1e9:.1f} GB free; give fewer (--sequences) or shorter ones (--length)."
        )


# What one layer loses


def output_error(weight: Tensor, restored: Tensor, plain: Statistics) -> float:
    """Relative squared error of a layer's outputs over the calibration tokens: trace(D H D^T) / trace(W H W^T), D = W - Q.

    Args:
        weight: W [out, in].
        restored: Q [out, in], what the codes stand for.
        plain: statistics with the plain Hessian H.

    Returns:
        0 if nothing is lost; infinity if the outputs were all zeros and are no longer.
    """
    dense = weight.detach().float()
    pair = dense - restored.float(), dense
    with full_precision():
        lost, total = (float(((rows @ plain.hessian[0]) * rows).sum(dtype=torch.float64)) for rows in pair)
    return lost / total if total > 0 else (float("inf") if lost > 0 else 0.0)


# The run


class _Clock:
    """Seconds by phase; work on a GPU is waited for."""

    def __init__(self, device: torch.device):
        self._device, self.seconds = device, defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] += time.perf_counter() - start


class _Run:
    """One model on its way; see the module's docstring.

    Attributes:
        notes: of each layer that is done: its errors and objective.
        clock: seconds by phase.
    """

    def __init__(self, blocks: Blocks, scheme: Scheme, calibration: Calibration | None, partial: Partial):
        self.blocks, self.scheme, self.partial = blocks, scheme, partial
        self.rows = calibration.rows if calibration else ()
        self.stages = _stages(blocks.model, blocks, scheme.lm_head)
        self.rank, self.world = ranks()
        self.clock, self.notes = _Clock(blocks.device), {}
        self.dense: dict[int, dict[str, Tensor]] = {}

    def run(self, progress: bool) -> None:
        """Quantize every layer; in the end each process holds them all."""
        pending = [index for index in self._mine(range(len(self.stages))) if not self._is_kept(index)]
        everyones = {index for rank in range(self.world) for index in _shared(pending, rank)}
        squares = self._squares(progress) if self.scheme.needs == "guided" and everyones else []
        with torch.no_grad():
            hidden = [self.blocks.embed(row) for row in self.rows] if pending else []
        mine = [name for index in self._mine(range(len(self.stages))) for name in self.stages[index]]
        total = sum(self.blocks.model.get_submodule(name).weight.numel() for name in mine)
        what = f"quantize to {self.scheme.bits} bits"
        with tqdm(total=total, desc=what, unit="weight", unit_scale=True, disable=not progress) as bar:
            for index in range(len(self.stages)):
                self._stage(index, pending, hidden, squares, bar)
        self._gather()

    def _mine(self, things: Sequence) -> Sequence:
        return things[self.rank :: self.world]

    # Results that are there

    def _dense_name(self, index: int) -> str:
        return f"{self.blocks.prefix(index)}dense"

    def _is_kept(self, index: int) -> bool:
        kept = all(self._kept(name) for name in self.stages[index])
        if kept and self._scales(index):
            return self.partial.get_tensors(self._dense_name(index)) is not None
        return kept

    def _kept(self, name: str) -> Done | None:
        done = self.partial.get(name)
        layer = self.blocks.model.get_submodule(name)
        expected = layer.out_features, layer.in_features, self.scheme.bits
        if done is None or (done.weight.out_features, done.weight.in_features, done.weight.bits) != expected:
            return None
        return done if not self.scheme.outliers or done.extra.keys() == sparse.PARTS.keys() else None

    # Gradients

    def _squares(self, progress: bool) -> list[dict[str, Tensor]]:
        """`hessians.row_squares` of every sequence."""
        made: dict[int, dict] = {}
        with self.clock("gradients"):
            own = self._mine(range(len(self.rows)))
            for at in tqdm(own, desc="gradients", unit="sequence", disable=not progress):
                made[at] = self._row_squares(at)
            return [_shared(made.get(at), at % self.world) for at in range(len(self.rows))]

    def _row_squares(self, at: int) -> dict[str, Tensor]:
        name = f"gradients-{at:05d}"
        kept = self.partial.get_tensors(name)
        if kept is not None:
            return kept
        made = hessians.row_squares(self.blocks, self.rows[at], self.scheme.groups, self.scheme.lm_head)
        self.partial.put_tensors(name, made)
        return made

    # One stage

    def _stage(self, index: int, pending, hidden: list[Tensor], squares, bar) -> None:
        """Move the hidden states on as far as this process needs them, and quantize the stage if it is this process's."""
        names, computed = self.stages[index], index in pending
        found = {}
        if hidden and index <= pending[-1]:
            with self.clock("statistics"):
                found = self._observed(index, names if computed else [], hidden, squares)
        if index % self.world != self.rank or not names:
            return
        bar.set_postfix_str(self.blocks.prefix(index).rstrip(".") or names[0])
        with self.clock("transform"):
            found = self._transform(index, found) if computed else self._transformed(index)
        for name in names:
            size = self.blocks.model.get_submodule(name).weight.numel()
            with self.clock("quantize"):
                self._layer(name, *found.pop(name, (None, None)))
            bar.update(size)

    def _observed(self, index: int, names: list[str], hidden: list[Tensor], squares) -> dict:
        """Statistics of the linears that are not done; of all where a transform asks for all."""
        todo = [name for name in names if self._scales(index) or self._kept(name) is None]
        weights = {name: hessians.token_weights(squares, name) for name in todo} if squares else None
        return hessians.collect(self.blocks, index, hidden, todo, weights)

    def _layer(self, name: str, plain: Statistics | None, guided: Statistics | None) -> None:
        layer, done = self.blocks.model.get_submodule(name), self._kept(name)
        if done is None:
            done = self._quantized(name, layer, plain, guided)
            if self.partial.keeps:
                self.partial.put(name, _on_cpu(done))
        self._put(name, done)

    def _quantized(self, name: str, layer: nn.Linear, plain, guided) -> Done:
        scheme, notes, objective = self.scheme, {}, []
        statistics = guided if scheme.needs == "guided" else plain
        made, notes["error"] = quantized_layer(
            layer.weight.detach(),
            None,
            scheme.bits,
            scheme.method,
            scheme.n_codes,
            statistics,
            name,
            scheme.outliers,
            objective,
        )
        if objective:
            notes["objective"] = objective
        if plain is not None:
            notes["output_error"] = output_error(layer.weight, made.dequantize(torch.float32), plain)
        return _done(made, notes)

    def _put(self, name: str, done: Done) -> None:
        layer = self.blocks.model.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.detach()
        replace(self.blocks.model, name, _layer_of(done, self.scheme, bias, self.blocks.device))
        self.notes[name] = done.notes

    # AWQ's scales of one decoder layer

    def _scales(self, index: int) -> bool:
        return self.scheme.transform == "awq" and index != self.blocks.head

    def _dense(self, index: int) -> dict[str, nn.Parameter]:
        """What scales change beside the weights that are quantized: norms and biases."""
        coded = {f"{name.removeprefix(self.blocks.prefix(index))}.weight" for name in self.stages[index]}
        named = self.blocks.stage(index).named_parameters()
        return {name: parameter for name, parameter in named if name not in coded}

    def _transform(self, index: int, found: dict) -> dict:
        """Scale a decoder layer, and give the statistics of what it takes then."""
        if not self._scales(index):
            return found
        plain = {name: pair[0] for name, pair in found.items()}
        scaled = awq.awq_block(self.blocks.stage(index), plain, self.scheme.bits, self.scheme.n_codes)
        self.dense[index] = {name: p.detach().cpu().clone() for name, p in self._dense(index).items()}
        self.partial.put_tensors(self._dense_name(index), self.dense[index])
        return {name: (statistics, None) for name, statistics in scaled.statistics.items()}

    def _transformed(self, index: int) -> dict:
        """Put back what an interrupted run made of a scaled layer's norms and biases."""
        if self._scales(index):
            self.dense[index] = self.partial.get_tensors(self._dense_name(index)) or {}
            self._put_dense(index, self.dense[index])
        return {}

    def _put_dense(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._dense(index).items():
            if name in tensors:
                parameter.data.copy_(tensors[name])

    # All processes together

    def _gather(self) -> None:
        if self.world == 1:
            return
        for index, names in enumerate(self.stages):
            owner = index % self.world
            own = owner == self.rank
            made = {name: self._of(name) for name in names} if own else None
            made, dense = _shared((made, self.dense.get(index, {})) if own else None, owner)
            if not own:
                self._put_dense(index, dense)
                for name, done in made.items():
                    self._put(name, done)

    def _of(self, name: str) -> Done:
        return _on_cpu(_done(self.blocks.model.get_submodule(name), self.notes[name]))


def _done(layer: CodebookLinear | AdditiveLinear, notes: dict) -> Done:
    apart = layer.outliers.tensors() if layer.outliers is not None else {}
    return Done(layer.to_weight(), apart, notes)


def _on_cpu(done: Done) -> Done:
    return Done(done.weight.to("cpu"), {name: t.cpu() for name, t in done.extra.items()}, done.notes)


def _layer_of(
    done: Done, scheme: Scheme, bias: Tensor | None, device: torch.device
) -> CodebookLinear | AdditiveLinear:
    if isinstance(done.weight, AdditiveWeight):
        return AdditiveLinear.from_weight(done.weight.to(device), bias)
    apart = None
    if scheme.outliers:
        parts = (done.extra[name].to(device) for name in sparse.PARTS)
        apart = sparse.Outliers(*parts, done.weight.in_features, scheme.outliers)
    return CodebookLinear.from_weight(done.weight.to(device), bias, apart)


def _identity(model: nn.Module, scheme: Scheme, calibration: Calibration | None) -> dict:
    """What tells a run from others, for the folder of its finished layers."""
    device = next(model.parameters()).device.type
    where = {
        "model": fingerprint(model),
        "device": device,
        "trapetum": __version__,
        "torch": torch.__version__,
    }
    tokens = calibration and {"sha256": calibration.sha256, "sequences": len(calibration.rows)}
    return where | asdict(scheme) | {"calibration": tokens}


def _described(scheme: Scheme, calibration: Calibration | None, notes: list[str]) -> dict:
    """What the saved config says of how the codes were made."""
    said: dict = {"method": scheme.method}
    if calibration:
        said |= {
            "calibration": {
                "text": calibration.text,
                "sha256": calibration.sha256,
                "sequences": len(calibration.rows),
                "length": max(map(len, calibration.rows)),
                "seed": calibration.seed,
            }
        }
    said |= {"groups": scheme.groups} if scheme.groups else {}
    said |= {"outliers": scheme.outliers} if scheme.outliers else {}
    return said | ({"notes": notes} if notes else {})


def _transformed(model: nn.Module, scheme: Scheme) -> list[str]:
    """Send the whole model through what the method wants first; what there is to say of it."""
    if scheme.transform != "rotation":
        return []
    return [equivalence.rotate(model, scheme.seed).text]


def _report(run: _Run, scheme: Scheme, seconds: float) -> Report:
    order = [name for names in run.stages for name in names]

    def by_layer(key):
        return {name: run.notes[name][key] for name in order if key in run.notes[name]}

    return Report(
        by_layer("error"),
        seconds,
        scheme.bits,
        scheme.n_codes,
        scheme.method,
        by_layer("output_error"),
        by_layer("objective"),
        dict(run.clock.seconds),
    )


def quantize_calibrated(
    model: nn.Module,
    bits: int = 4,
    method: str = "lnq-guided",
    calibration: Calibration | None = None,
    n_codes: int | None = None,
    lm_head: bool = False,
    progress: bool = True,
    resume_dir: str | Path | None = None,
    outliers: float = 0.0,
    groups: int = GROUPS,
) -> Report:
    """Replace each `nn.Linear` of a model by a `CodebookLinear`, in place, decoder layer by decoder layer.

    Where `torch.distributed` is initialised, every process calls this with the same model and arguments.

    Args:
        model: a dense causal language model of transformers, of a supported architecture.
        bits: bits per code (2, 3, 4, 8).
        method: a name of `trapetum.quantizers.METHODS`.
        calibration: the tokens; None for methods that need none (no output errors are known then).
        n_codes: codebook entries per output channel; default 2**bits.
        lm_head: quantize the output head too (a tied embedding keeps its dense weight).
        progress: show progress bars, with the time left.
        resume_dir: a folder for finished layers; a run that was stopped at any moment goes on from it.
        outliers: share of the weights that is kept apart in float16.
        groups: of output rows with a Hessian each, for guided methods.

    Returns:
        errors of weights and outputs by layer, objectives where the method has them, seconds by phase.

    Raises:
        ValueError: a scheme, tokens or sizes that do not fit, a weight or input that is NaN or infinite (by name), or a folder
            of another run.
    """
    start, blocks = time.perf_counter(), Blocks(model)
    scheme = _scheme(bits, method, n_codes, lm_head, outliers, groups, calibration)
    _require_tokens(model, calibration, scheme)
    _stages(model, blocks, lm_head)
    require_groups(method, linears(model, lm_head))
    if calibration:
        _require_memory(blocks, calibration, scheme)
    partial = Partial(
        Path(resume_dir) if resume_dir else None, _identity(model, scheme, calibration) if resume_dir else {}
    )
    run = _Run(blocks, scheme, calibration, partial)
    with run.clock("transform"):
        notes = _transformed(model, scheme)
    try:
        run.run(progress and run.rank == 0)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            f"the GPU ran out of memory after {len(run.notes)} layers; give fewer (--sequences) or shorter sequences "
            "(--length), and run it again: the finished layers are kept where a folder for them was given."
        ) from error
    note_method(model, method, _described(scheme, calibration, notes))
    return _report(run, scheme, time.perf_counter() - start)
