"""Which matrices a model multiplies with, read from its config: no weights are loaded."""

import json
from pathlib import Path

from trapetum.shapes import MODELS


def shapes_of(source: str) -> list[tuple[int, int]]:
    """(in_features, out_features) of a model's linear layers, each shape once, in the order they are met.

    Args:
        source: a `config.json` of transformers or the directory that holds one, the name of one of
            `trapetum.shapes.MODELS` (with or without `random:`), or the id of a model on the hub.

    Raises:
        ValueError: there is no such file, it is no config of a language model, or none of its layers is linear.
    """
    name = source.removeprefix("random:")
    if name in MODELS:
        shape = MODELS[name]
        every = [(i, o) for _, i, o in shape.linears()] + [(shape.hidden, shape.vocab)]
    else:
        every = _linears_of(_config(source), source)
    return list(dict.fromkeys(every))


def _config(source: str):
    path = Path(source)
    if path.is_dir() or path.suffix == ".json":
        return _config_file(path / "config.json" if path.is_dir() else path)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source!r} is no config.json, no shape of this package ({', '.join(MODELS)}) and no model that "
            f"transformers can find: {line}"
        ) from error


def _config_file(path: Path):
    from transformers import AutoConfig

    try:
        fields = json.loads(path.read_text())
        return AutoConfig.for_model(**fields)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no config.json that transformers understands: {reason}") from error


def _linears_of(config, source: str) -> list[tuple[int, int]]:
    """The linear layers of the model, built without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.get_text_config(), trust_remote_code=False)
    except (ValueError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source} names no language model that transformers can build: {reason}") from error
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if not linears:
        raise ValueError(f"{source} names a model without linear layers ({type(model).__name__}).")
    return [(m.in_features, m.out_features) for m in linears]
