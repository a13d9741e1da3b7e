"""What quantizing does to each decoder layer by itself: the error of what it adds to the stream, given exact inputs.

With x the input of a layer in the full-precision model and f(x) what the layer adds to it, the error of its twin f' is

    ||f'(x R) - f(x) R|| / ||f(x)||

over all tokens. R is the change of basis between the two residual streams: a rotation where weights were rotated before they
were quantized, else nothing. It is read off the embeddings, which are not quantized. Scales that were moved inside a
layer cancel in f', so every method is measured alike.
"""

import torch
from torch import Tensor, nn

_FITS = 1e-3  # of the embeddings, relative: rounding in 16 bits is below it


class LayerErrorError(ValueError):
    """Two models are not a model and its quantized twin."""


def basis(reference: nn.Module, model: nn.Module) -> Tensor | None:
    """R [hidden, hidden] in float32 with embedding' = embedding R, or None where the embeddings are the same.

    Raises:
        LayerErrorError: no R maps one to the other.
    """
    before, after = (m.get_input_embeddings().weight.detach() for m in (reference, model))
    if before.shape != after.shape:
        raise LayerErrorError(
            f"the embeddings are {list(before.shape)} and {list(after.shape)}; compare a model with its own twin."
        )
    after = after.to(before.device)
    if torch.equal(before, after):
        return None
    before, after = before.double(), after.double()
    found = torch.linalg.lstsq(before, after).solution
    left = float((before @ found - after).norm() / after.norm())
    if not left < _FITS:
        raise LayerErrorError(
            f"no change of basis maps one embedding to the other (relative rest {left:.3g}); compare a model with its own twin."
        )
    return found.float()


def _output(made) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


class _Compare:
    """A hook after a layer of the reference: runs its twin on the same input and sums squares."""

    def __init__(self, twin: nn.Module, turn: Tensor | None):
        self.twin, self.turn, self.lost, self.total = twin, turn, 0.0, 0.0

    def __call__(self, _layer, inputs, more, output) -> None:
        x = inputs[0] if inputs else more["hidden_states"]
        added = _output(output).float() - x.float()
        if self.turn is not None:
            added, x = added @ self.turn, (x.float() @ self.turn).to(x.dtype)
        rest = {key: value for key, value in more.items() if key != "hidden_states"}
        found = _output(self.twin(x, *inputs[1:], **rest)).float() - x.float()
        self.lost += float((found - added).double().square().sum())
        self.total += float(added.double().square().sum())

    @property
    def error(self) -> float:
        return (self.lost / self.total) ** 0.5 if self.total else (float("inf") if self.lost else 0.0)


@torch.inference_mode()
def layer_errors(reference: nn.Module, model: nn.Module, tokens: Tensor, window: int = 512) -> list[float]:
    """The relative L2 error of each decoder layer of `model` on the inputs that `reference` gives it.

    Args:
        reference: the full-precision model, on the same device as `model`.
        model: its quantized twin.
        tokens: token ids, one dimension; whole windows of them are used, at least one.
        window: tokens a forward pass sees.

    Returns:
        one number a decoder layer; 0 is exact, 1 is as far off as adding nothing.

    Raises:
        LayerErrorError: the models do not have the same layers or embeddings, or there is less than one window.
    """
    layers, twins = reference.model.layers, model.model.layers
    if len(layers) != len(twins):
        raise LayerErrorError(
            f"the models have {len(layers)} and {len(twins)} layers; compare like with like."
        )
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    if not len(rows):
        raise LayerErrorError(f"{len(tokens)} tokens are less than a window of {window}; give more.")
    turn = basis(reference, model)
    compared = [_Compare(twin, turn) for twin in twins]
    hooks = [
        layer.register_forward_hook(one, with_kwargs=True)
        for layer, one in zip(layers, compared, strict=True)
    ]
    try:
        for row in rows:
            reference(input_ids=row[None].to(reference.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [one.error for one in compared]
