"""Statistics of the inputs of each linear layer, gathered over the calibration tokens one decoder layer at a time.

Inputs are those of the full-precision model, whatever was quantized before: then each layer's result depends on no other
layer's, so that layers can be done by different processes, skipped when they are done, and compared between methods. The
price is that a layer does not make up for the errors of the layers before it.

The guided Hessian weighs token t, for a group of output rows, by the mean over these rows of G_t^2, where G is the gradient
of the summed cross-entropy of all tokens with respect to the layer's output: a second-order estimate of what an error of the
weights costs at the end.

Source: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance", ICML 2025,
arXiv:2505.07004.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trapetum.blocks import Blocks
from trapetum.calibration import CalibrationError, Statistics
from trapetum.memory import AT_ONCE

#: Gradients are kept near 2**9, by powers of two, so that the smallest of a float16 model do not underflow: those of q and
#: k are smaller by the output projection and the softmax, and float16 ends at 2**16.
_PEAK = 9
#: Powers of two to go down by where a gradient inside a layer overflows float16 all the same.
_RETREATS = (0, 6, 12)
#: A product's upper half is taken in so many strips, each of at least so many rows.
_STRIPS, _STRIP = 4, 256


# Inputs and Hessians


@contextmanager
def _inputs_of(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Filled with the input [1, tokens, in] of each layer whenever its module runs: the very tensor, to see which share one."""
    seen: dict[str, Tensor] = {}

    def hook(name):
        return lambda _, inputs: seen.__setitem__(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def _products(x: Tensor) -> Iterator[None]:
    """Products of 16-bit inputs on a GPU by its TF32 units, which hold every bit of them and float32's exponent."""
    before = torch.get_float32_matmul_precision()
    if x.is_cuda and x.itemsize < 4:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _owners(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Each linear's name -> the first of those that were given the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(x), name) for name, x in inputs.items()}


def _add_square(total: Tensor, x: Tensor) -> None:
    """Add x^T x to a sum [in, in], in strips from the diagonal rightwards: what lies below mirrors it and is left out."""
    inputs = x.shape[1]
    strip = max(_STRIP, -(-inputs // _STRIPS))
    for start in range(0, inputs, strip):
        total[start : start + strip, start:].addmm_(x[:, start : start + strip].T, x[:, start:])


class Sums:
    """Running sums of x x^T over tokens, in float32, for the linears of one stage.

    Linears that get the same tensor (q, k and v; gate and up) share one plain sum. Inputs wait until there are `AT_ONCE`
    tokens, because a sum is read and written as a whole each time that something is added to it.

    Args:
        weights: s [tokens, groups] of each linear, over all tokens in order; None for the plain sums alone.

    Attributes:
        tokens: how many tokens were added.
    """

    def __init__(self, weights: Mapping[str, Tensor] | None = None):
        self._weights, self.tokens, self._summed = weights or {}, 0, 0
        self._owner: dict[str, str] = {}
        self._waiting: dict[str, list[Tensor]] = {}
        self._plain: dict[str, Tensor] = {}
        self._guided: dict[str, Tensor] = {}

    def add(self, inputs: Mapping[str, Tensor]) -> None:
        """Add the tokens of one sequence: the input [1, tokens, in] of each linear."""
        self._owner = self._owner or _owners(inputs)
        for name in set(self._owner.values()):
            self._waiting.setdefault(name, []).append(inputs[name].flatten(0, -2))
        self.tokens += next(iter(inputs.values())).shape[-2]
        if self.tokens - self._summed >= AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        rows = {name: torch.cat(waiting) for name, waiting in self._waiting.items()}
        self._waiting = {}
        for owner, x in rows.items():
            with _products(x):
                wide = x.float()
                _add_square(self._sum(self._plain, owner, wide, 1)[0], wide)
                for name in (name for name in self._weights if self._owner[name] == owner):
                    self._add_guided(name, wide, self._weights[name][self._summed : self.tokens])
        self._summed = self.tokens

    @staticmethod
    def _sum(sums: dict[str, Tensor], name: str, x: Tensor, groups: int) -> Tensor:
        if name not in sums:
            sums[name] = x.new_zeros(groups, x.shape[1], x.shape[1])
        return sums[name]

    def _add_guided(self, name: str, x: Tensor, weights: Tensor) -> None:
        roots = weights.to(x.device).sqrt().T
        for total, root in zip(self._sum(self._guided, name, x, len(roots)), roots, strict=True):
            _add_square(total, x * root[:, None])

    def finish(self) -> dict[str, tuple[Statistics, Statistics | None]]:
        """The plain and, where there are weights, the guided statistics of each linear; the sums are used up.

        Raises:
            CalibrationError: a mean is not finite.
        """
        if self._waiting:
            self._flush()
        plain, guided = (self._means(sums) for sums in (self._plain, self._guided))
        found = {}
        for name, owner in self._owner.items():
            square = plain[owner][0].diagonal().clone()
            made = [
                Statistics(h, square, self.tokens) for h in (plain[owner], guided.get(name)) if h is not None
            ]
            found[name] = made[0], made[1] if len(made) > 1 else None
        return found

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, total in sums.items():
            for one in total:
                one.div_(self.tokens).triu_()
                one += one.triu(1).T
            if not bool(total.isfinite().all()):
                raise CalibrationError(
                    f"the inputs of {name} hold NaN, infinity or squares beyond float32; check the checkpoint and its dtype."
                )
        return sums


def collect(
    blocks: Blocks,
    index: int,
    hidden: list[Tensor],
    names: Sequence[str],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[Statistics, Statistics | None]]:
    """Run all sequences through a stage, and gather the statistics of its linears on the way.

    Args:
        blocks: the model.
        index: of the stage.
        hidden: the hidden states [1, tokens, hidden] of each sequence before the stage; replaced by those after it. At the
            head they are left as they are.
        names: linears of the stage, by their names in the model; none only moves the hidden states on.
        weights: s [tokens, groups] by linear, for guided Hessians.

    Returns:
        plain and guided statistics (None without weights) by linear; on the model's device.

    Raises:
        CalibrationError: the inputs are not finite.
    """
    module, sums = blocks.running(index), Sums(weights)
    linears = blocks.linears(index, module)
    with torch.no_grad(), _inputs_of({name: linears[name] for name in names}) as seen:
        for at, states in enumerate(hidden):
            after = blocks.run(index, module, states)
            if index != blocks.head:
                hidden[at] = after
            if names:
                sums.add(seen)
    return sums.finish() if names else {}


# Gradients, and the weights of tokens made of them


def group_sizes(out_features: int, groups: int) -> list[int]:
    """How many rows each group has where row r belongs to group r * groups // out_features; at most one group a row."""
    groups = min(groups, out_features)
    ends = [-(-(g + 1) * out_features // groups) for g in range(groups)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


@contextmanager
def _outputs_of(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Filled with the output of each layer whenever its module runs."""
    seen: dict[str, Tensor] = {}

    def hook(name):
        return lambda _, inputs, output: seen.__setitem__(name, output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU attention's gradients are summed in one order, so that a run gives the same codes again."""
    if device.type != "cuda":
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*[dD]eterministic"
        )  # of products, which repeat on one stream
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
            torch.utils.deterministic.fill_uninitialized_memory = fills


def _normal(gradient: Tensor) -> tuple[Tensor, int]:
    """The gradient times a power of two that brings its largest entry near 2**_PEAK, and that power."""
    power = _PEAK - math.frexp(float(gradient.abs().max()))[1]
    return torch.ldexp(gradient.float(), torch.tensor(power, device=gradient.device)).to(
        gradient.dtype
    ), power


def _pulled(
    output: Tensor, wanted: Sequence[Tensor], gradient: Tensor, what: str
) -> tuple[tuple[Tensor, ...], int]:
    """Gradients of `wanted`, times 2**power, and the power, 0 unless float16 overflowed."""
    for retreat in _RETREATS:
        scaled = gradient * 2.0**-retreat
        found = torch.autograd.grad(output, wanted, scaled, retain_graph=True)
        if all(bool(one.isfinite().all()) for one in found):
            return found, -retreat
    raise CalibrationError(
        f"the gradients in {what} are not finite in {output.dtype}; load the model in bf16 or fp32, or choose a method "
        "without gradients."
    )


def _mean_squares(gradient: Tensor, groups: int, power: int) -> Tensor:
    """[1, tokens, out] times 2**power to float32 [tokens, groups] on the CPU: the mean of its squares in each group of rows."""
    squares = gradient[0].float().square()
    parts = squares.split(group_sizes(squares.shape[1], groups), 1)
    return torch.ldexp(torch.stack([part.mean(1) for part in parts], 1).cpu(), torch.tensor(-2 * power))


def _loss(logits: Tensor, row: Tensor) -> Tensor:
    """Summed cross-entropy of each token given those before it, in nats."""
    return F.cross_entropy(logits[0, :-1].float(), row[1:].to(logits.device), reduction="sum")


def row_squares(blocks: Blocks, row: Tensor, groups: int, lm_head: bool = False) -> dict[str, Tensor]:
    """The mean squared gradients of one sequence's loss with respect to each linear's output.

    Only the hidden states between layers are kept on the way forward; on the way back each layer runs once more with its
    graph, and gradients stop at outputs and inputs: no parameter gets one.

    Args:
        blocks: the model.
        row: token ids [tokens].
        groups: of output rows.
        lm_head: the output head's too.

    Returns:
        float32 [tokens, groups] by linear, on the CPU.

    Raises:
        CalibrationError: gradients that are not finite.
    """
    with torch.no_grad():
        befores = list(blocks.through(blocks.embed(row)))
    found: dict[str, Tensor] = {}
    gradient, power = None, 0
    for index in reversed(range(len(blocks))):
        module = blocks.running(index)
        before = befores.pop().requires_grad_()
        observed = _outputs_of(blocks.linears(index, module))
        with torch.enable_grad(), _repeatable(blocks.device), observed as outputs:
            after = blocks.run(index, module, before)
            if index == blocks.head:
                after, gradient = _loss(after, row), torch.ones((), device=blocks.device)
                outputs = outputs if lm_head else {}
            what = blocks.prefix(index).rstrip(".") or "the output head"
            pulled, retreat = _pulled(after, [before, *outputs.values()], gradient, what)
        power += retreat
        for name, one in zip(outputs, pulled[1:], strict=True):
            found[name] = _mean_squares(one, groups, power)
        gradient, raised = _normal(pulled[0])
        power += raised
    return found


def token_weights(squares: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """The weights s of all tokens for one linear: mean 1 in each group, so that Hessians have one scale.

    Args:
        squares: what `row_squares` gave, sequence by sequence.
        name: the linear.

    Returns:
        float32 [tokens, groups]; ones in a group that no output depends on.
    """
    raw = torch.cat([one[name] for one in squares]).double()
    mean = raw.mean(0, keepdim=True)
    return torch.where(mean > 0, raw / mean.clamp_min(1e-300), torch.ones_like(raw)).float()
