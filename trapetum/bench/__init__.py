"""Measurements that make records; every function returns a list of them and prints nothing.

sizes        how much each profile measures
recording    from samples to gated records
reading      read bandwidth
products     the ways to compute y = W x          multiply    their times
unpacking    dequantize; all products of a token
ladder       the numbered GPU kernels, and their instructions per weight
variants     one model in several weights         generating  decode speed, memory, energy
accuracy     perplexity and weight error
"""

from trapetum.bench.accuracy import perplexity, weight_error
from trapetum.bench.generating import decode, energy
from trapetum.bench.ladder import ladder, ladder_instructions
from trapetum.bench.multiply import gemv, methods_on
from trapetum.bench.profiles import PROFILES, Sizes, sizes
from trapetum.bench.reading import bandwidth
from trapetum.bench.unpacking import dequant, gemv_chain

__all__ = [
    "PROFILES",
    "Sizes",
    "bandwidth",
    "decode",
    "dequant",
    "energy",
    "gemv",
    "gemv_chain",
    "ladder",
    "ladder_instructions",
    "methods_on",
    "perplexity",
    "sizes",
    "weight_error",
]
