"""Tell transformers about the quantizer when, and only when, transformers itself is used.

`AutoModelForCausalLM.from_pretrained(quantized_directory)` needs `trapetum.hf` registered; importing that at
`import trapetum` would bring torch and transformers (seconds) to programs that only want a formula or a record. So an
import hook waits for the one transformers module that holds the registry and registers right after it has run.
"""

import importlib.abc
import importlib.util
import sys

REGISTRY = "transformers.quantizers.auto"


class _RegisterAfter(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        import trapetum.hf  # noqa: F401  registers on import


class _Waiter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register the quantizer now if transformers' registry is loaded, else as soon as it is; safe to call twice."""
    if REGISTRY in sys.modules:
        import trapetum.hf  # noqa: F401
    elif not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())
