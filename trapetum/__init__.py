"""Trapetum: measure why batch-1 LLM decode is memory-bound, and what 4-bit codebook weights buy."""

__version__ = "0.1.0"
