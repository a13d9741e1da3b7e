"""Trapetum: measure why batch-1 LLM decode is memory-bound, and what 4-bit codebook weights buy.

`import trapetum` is cheap (no torch) and makes `AutoModelForCausalLM.from_pretrained` understand the directories that
`trapetum quantize` writes.
"""

from trapetum.register import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
