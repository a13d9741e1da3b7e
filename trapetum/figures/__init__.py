"""Every figure of the workbook: one function makes one plotly figure, which works live, headless and in a saved page."""

from trapetum.figures.accuracy import Loss, codebooks_of_channel, losses, perplexity_by_bits, weight_error
from trapetum.figures.accuracy_ladder import (
    LADDER_ORDER,
    SAME_BYTES,
    Share,
    accuracy_ladder,
    newest_ladders,
    of_ladder,
    shares,
)
from trapetum.figures.agreement import AGREEMENT_HEADINGS, agreement_rows
from trapetum.figures.batch import batch_cells, batch_map, batch_times, crossover_sentences, crossovers
from trapetum.figures.by_bytes import speed_by_bytes
from trapetum.figures.by_shape import FASTEST, best_dense, losers_map, pairs, speedups
from trapetum.figures.ceilings import ceilings, roofline, your_machine
from trapetum.figures.claims import claims
from trapetum.figures.contexts import bound_tok_s, cache_gains, cache_of, reach, speed_by_context
from trapetum.figures.decode import decode_stages
from trapetum.figures.energy import GRIDS, GRIDS_SOURCE, carbon, carbon_g, energy_bars
from trapetum.figures.energy_windows import (
    WINDOW_HEADINGS,
    by_stage,
    energy_windows,
    logged_range,
    name_of,
    window_rows,
)
from trapetum.figures.ladder import rungs, rungs_in_words
from trapetum.figures.law import (
    four_terms,
    law_fit,
    laws_by_method,
    left_out_errors,
    method_and_shape,
    predicted_vs_measured,
)
from trapetum.figures.pareto import pareto
from trapetum.figures.pareto_state import on_front
from trapetum.figures.peers import fastest_each, peers
from trapetum.figures.speed import dequantize_or_fuse, ladder, shape_of
from trapetum.figures.style import label_of
from trapetum.figures.tokens import cards, speed_bound, token_bytes
from trapetum.figures.tradeoffs import Point, fastest, groups, pick, tradeoffs
from trapetum.figures.walk import stage_walk
from trapetum.figures.waterfall import bridge, bridges, waterfall

__all__ = [
    "AGREEMENT_HEADINGS",
    "FASTEST",
    "GRIDS",
    "GRIDS_SOURCE",
    "LADDER_ORDER",
    "SAME_BYTES",
    "WINDOW_HEADINGS",
    "Loss",
    "Point",
    "Share",
    "accuracy_ladder",
    "agreement_rows",
    "batch_cells",
    "batch_map",
    "batch_times",
    "best_dense",
    "bound_tok_s",
    "bridge",
    "bridges",
    "by_stage",
    "cache_gains",
    "cache_of",
    "carbon",
    "carbon_g",
    "cards",
    "ceilings",
    "claims",
    "codebooks_of_channel",
    "crossover_sentences",
    "crossovers",
    "decode_stages",
    "dequantize_or_fuse",
    "energy_bars",
    "energy_windows",
    "fastest",
    "fastest_each",
    "four_terms",
    "groups",
    "label_of",
    "ladder",
    "law_fit",
    "laws_by_method",
    "left_out_errors",
    "logged_range",
    "losers_map",
    "losses",
    "method_and_shape",
    "name_of",
    "newest_ladders",
    "of_ladder",
    "on_front",
    "pairs",
    "pareto",
    "peers",
    "perplexity_by_bits",
    "pick",
    "predicted_vs_measured",
    "reach",
    "roofline",
    "rungs",
    "rungs_in_words",
    "shape_of",
    "shares",
    "speed_bound",
    "speed_by_bytes",
    "speed_by_context",
    "speedups",
    "stage_walk",
    "token_bytes",
    "tradeoffs",
    "waterfall",
    "weight_error",
    "window_rows",
    "your_machine",
]
