"""How the sources of the published records begin, and the sizes that several claims share."""

ARTICLE = "Quantized GEMM article"
TRAPETUM = "Trapetum benchmarks page"
LANDING = "Trapetum landing page"
TORCHAO = "torchao llama benchmark list"
QTIP = "QTIP benchmark README"
NOTES = "Trapetum project measurement notes"
LIST = "Trapetum project claims list"

SQUARE = dict(in_features=4096, out_features=4096)
PREFILL = dict(rows=2048, **SQUARE)
MODEL = "llama-2-7b"
MEAN_CONTEXT = 262  # tokens cached on average while 512 are generated after a short prompt
LIST_CARD = "A100 SXM 80GB"  # where torchao's list was made
