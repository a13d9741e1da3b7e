"""Trapetum: measure why batch-1 LLM decode is memory-bound, and what 4-bit codebook weights buy.

Modules from the bottom up; each imports only from the ones above it in this list.

    paths, build                                              where things are; compile and cache kernels
    hardware, shapes, law, pareto, records, machine           facts and formulas; none needs torch
    formats, kmeans, quantizers                               codebook weights and how their values are chosen
    launch, cuda, cpu, cpu_layout, ops                        the kernels and the torch operator over them
    linear, swap, projection, checkpoint, models, hf          models with codebook layers: make, save, load
    llama_step, decoders, decode                              one token after another, stage by stage
    stdlib, text, training_text, pretraining, builtin         texts, and the model trained on them
    perplexity, timing, energy, bench, waterfall              measurements, and records made of them
    figures, widgets, workbook, claims                        what a notebook shows
    html, report, readme, verify, generation, cli             the report, the README and the command
"""

from trapetum.register import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
