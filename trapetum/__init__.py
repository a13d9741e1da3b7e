"""Trapetum: measure why batch-1 LLM decode is memory-bound, and what 4-bit codebook weights buy.

`import trapetum` is cheap (no torch) and makes `AutoModelForCausalLM.from_pretrained` understand the directories that
`trapetum quantize` writes.

The modules from the bottom up; a line imports only from itself and the lines above it:

    paths, kernel_cache, build, disassembly, plans, launch    where things are; compile, cache and launch kernels
    hardware, shapes, memory, law, law_terms, law_methods,    facts and formulas;
      law_cards, pareto, records, machine                     none needs torch
    tensor_files, formats, gemv_plans, cuda, ladder, cpu,     codebook weights, kernels, the torch operator
      cpu_layout, cpu_threads, cpu_dense, ops, additive,      over them,
      cuda_additive, cuda_dense, sparse, sparse_product       and dense weights in the same step
    kv_cache, cuda_attention, cuda_token                      cache and attention, and the end of a step: token, next input
    stdlib, text, calibration                                 texts, and which tokens of them a model is shown
    kmeans, quadratic, descent, gptq, lnq, grids,             how the values of a codebook
      quantizers, additive_fit                                are chosen, and the codes
    linear, additive_linear, swap, checkpoint,                models with codebook layers:
      architectures, shards, stored, reading, streaming,      make, save, load, import;
      aqlm, models, hf, register, imports, blocks, hessians,  calibrate, scale or turn,
      partial, equivalence, awq, quantizing, quantize_job     quantize layer by layer
    projection, tinygemm, llama_step, fused_step, decoders,   one token after another, stage by stage,
      decode, drafts, tensor_parallel, export_plan, export    and as files for a program without Python
    perplexity, layer_error, training_text, pretraining,      how well a model predicts a text, and the model
      trained, builtin                                        trained on texts
    timing, tuning, energy, bench, waterfall                  measurements, and records made of them
    figures, widgets, workbook, walk, claims                  what a notebook shows
    html, report, readme_cells, readme_targets,               the report, the README and its tables,
      readme_decode, readme_decode_targets, readme_accuracy,  the check of its numbers,
      readme, verify, generation, cli                         the command
"""

from trapetum.register import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()


def load(name: str, *arguments, **options):
    """Load a model by name: `trapetum.models.load`, which is imported when this is called."""
    from trapetum import models

    return models.load(name, *arguments, **options)
