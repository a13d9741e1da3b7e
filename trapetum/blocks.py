"""Run a model decoder layer by decoder layer: all sequences through one layer before any goes through the next.

So only one layer has to be looked at, changed or copied at a time, whatever the size of the model; what is kept between
layers are the hidden states [1, tokens, hidden] of the sequences. The output head, with the norm before it, is the last
stage.

Dtype: a model on a GPU runs in its own. On a CPU, where 16-bit products are slow and sums of them are short of digits, a
16-bit model runs in float32, of which one layer at a time is made.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trapetum.swap import HEAD

_LAYERS = "model.layers"


class Head(nn.Module):
    """The final norm and the output head: hidden states to logits."""

    def __init__(self, norm: nn.Module, lm_head: nn.Module):
        super().__init__()
        self.norm, self.lm_head = norm, lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, tokens, hidden] to [1, tokens, vocabulary]."""
        return self.lm_head(self.norm(hidden))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model's layers run in here: its own, or float32 for a 16-bit model on a CPU."""
    weight = next(model.parameters())
    return torch.float32 if weight.device.type == "cpu" and weight.itemsize < 4 else weight.dtype


class Blocks:
    """The stages of a model: its decoder layers, then its head.

    Attributes:
        model: a transformers causal language model of a supported architecture.
        dtype: see `dtype_of`.
        device: where it is.

    Raises:
        ValueError: the model is not built of decoder layers in `model.layers`.
    """

    def __init__(self, model: nn.Module):
        body = getattr(model, "model", None)
        if not isinstance(getattr(body, "layers", None), nn.ModuleList) or not hasattr(model, HEAD):
            raise ValueError(
                f"a {type(model).__name__} has no decoder layers in {_LAYERS} and no {HEAD}; calibrate a causal language "
                "model of transformers."
            )
        self.model, self.dtype = model, dtype_of(model)
        self.device = next(model.parameters()).device
        self._stages = [*body.layers, Head(body.norm, getattr(model, HEAD))]
        self._arguments: dict[int, list[tuple]] = {}

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def head(self) -> int:
        """The index of the last stage."""
        return len(self) - 1

    def prefix(self, index: int) -> str:
        """What comes before the name of a linear of the stage in the whole model: "model.layers.3.", or nothing."""
        return "" if index == self.head else f"{_LAYERS}.{index}."

    def linears(self, index: int, module: nn.Module | None = None) -> dict[str, nn.Linear]:
        """The dense linears of a stage (or of its copy `module`) by their names in the whole model."""
        stage = self._stages[index] if module is None else module
        found = stage.named_modules()
        return {self.prefix(index) + name: part for name, part in found if isinstance(part, nn.Linear)}

    def stage(self, index: int) -> nn.Module:
        """The module of a stage, as it is in the model."""
        return self._stages[index]

    def running(self, index: int) -> nn.Module:
        """The stage in the dtype that it runs in: itself, or a copy that lives as long as the caller holds it."""
        stage = self._stages[index]
        return stage if next(stage.parameters()).dtype == self.dtype else copy.deepcopy(stage).to(self.dtype)

    def embed(self, row: Tensor) -> Tensor:
        """The hidden states [1, tokens, hidden] before the first stage, of token ids [tokens]."""
        ids = row.to(self.device).reshape(1, -1)
        return self.model.get_input_embeddings()(ids).to(self.dtype)

    def run(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """One sequence through a stage.

        Args:
            index: of the stage.
            module: what `running(index)` gave.
            hidden: [1, tokens, hidden], in `dtype`.

        Returns:
            the next hidden states; of the head, the logits.
        """
        if index == self.head:
            return module(hidden)
        positional, named = self._arguments_for(hidden.shape[1])[index]
        out = module(hidden, *positional, **named)
        return out[0] if isinstance(out, tuple) else out

    def through(self, hidden: Tensor) -> Iterator[Tensor]:
        """The hidden states before each stage, the head's among them, of one sequence from `embed`."""
        for index in range(self.head):
            yield hidden
            hidden = self.run(index, self.running(index), hidden)
        yield hidden

    def _arguments_for(self, length: int) -> list[tuple]:
        """What the model hands to each decoder layer besides the hidden states: masks, positions, rotary tables."""
        if length not in self._arguments:
            self._arguments[length] = self._listen(length)
        return self._arguments[length]

    def _listen(self, length: int) -> list[tuple]:
        heard: list[tuple] = []

        def listen(hidden, *positional, **named):
            heard.append((positional, named))
            return hidden

        layers = self._stages[:-1]
        nothing = torch.zeros(1, length, self.model.config.hidden_size, dtype=self.dtype, device=self.device)
        try:
            for layer in layers:
                layer.forward = listen
            with torch.no_grad():
                self.model.model(inputs_embeds=nothing, use_cache=False)
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)
        return heard
