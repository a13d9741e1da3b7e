"""Measurements that make records; every function returns a list of them and prints nothing.

sizes        how much each profile measures
recording    from samples to gated records
reading      read bandwidth
products     the ways to compute y = W x               multiply    their times
unpacking    dequantize; all products of a token       batch       a few rows of x at once
peers        other people's products                   crosscheck  our timer beside Triton's
with_outliers   codes with a share of the weights apart
model_shapes the matrices that a model's config names
ladder       the numbered GPU kernels, and their instructions per weight
profiled     one kernel under Nsight Compute
variants     one model in several weights              generating  decode speed, memory, energy
decode_peers decodes by other people's code            transformers_decoding, torchao_models   how they decode
decode_interleaved   in turns with transformers, on a CPU
contexts     speed and memory against the context      agreement   tokens and logits beside transformers'
breakdown    a token's time, part by part              launches    what a launch costs, and how many there are
standalone   the C++ program beside the Python engine  accuracy    the ladder of methods
accuracy_rungs   what each of them does to a model       quantizing_time   how long that takes
"""

from trapetum.bench.accuracy import accuracy, accuracy_by_rung, weight_error
from trapetum.bench.agreement import agreement
from trapetum.bench.batch import small_batches
from trapetum.bench.breakdown import breakdown
from trapetum.bench.contexts import context
from trapetum.bench.crosscheck import compare_timers
from trapetum.bench.decode_interleaved import decode_interleaved
from trapetum.bench.decode_peers import PEERS, decode_peers
from trapetum.bench.generating import decode, energy
from trapetum.bench.ladder import ladder, ladder_instructions
from trapetum.bench.model_shapes import shapes_of
from trapetum.bench.multiply import gemv, methods_on
from trapetum.bench.profiled import profile_kernel
from trapetum.bench.profiles import PROFILES, Sizes, sizes
from trapetum.bench.quantizing_time import quantizing_time
from trapetum.bench.reading import bandwidth
from trapetum.bench.standalone import compare_runtimes
from trapetum.bench.unpacking import dequant, gemv_chain

__all__ = [
    "PEERS",
    "PROFILES",
    "Sizes",
    "accuracy",
    "accuracy_by_rung",
    "agreement",
    "bandwidth",
    "breakdown",
    "compare_runtimes",
    "compare_timers",
    "context",
    "decode",
    "decode_interleaved",
    "decode_peers",
    "dequant",
    "energy",
    "gemv",
    "gemv_chain",
    "ladder",
    "ladder_instructions",
    "methods_on",
    "profile_kernel",
    "quantizing_time",
    "shapes_of",
    "sizes",
    "small_batches",
    "weight_error",
]
