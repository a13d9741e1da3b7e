"""The claims: who says what, why it is doubtful, how to test it, and which published records it rests on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trapetum.claims import ceilings, decoding, kernel_lists, products
from trapetum.claims import documents as doc
from trapetum.claims.evidence import Evidence, Implied, Verdict
from trapetum.records import Record


@dataclass(frozen=True)
class Claim:
    """One published claim.

    Attributes:
        id: its number.
        who: the document.
        says: the claim, in our words.
        doubt: what is doubtful in it.
        test: how to test it here.
        rests_on: filters for `Evidence.published` that find the figures behind it; empty where it has none.
        implications, judgement: from an `Evidence` to what follows from the claim, and to the verdict.
    """

    id: int
    who: str
    says: str
    doubt: str
    test: str
    rests_on: tuple[dict, ...]
    implications: Callable[[Evidence], list[Implied]]
    judgement: Callable[[Evidence], Verdict]

    def published(self, records: Sequence[Record]) -> list[Record]:
        """The published records that the claim rests on."""
        evidence = Evidence(records)
        return [r for filters in self.rests_on for r in evidence.published(**filters)]

    def implies(self, records: Sequence[Record]) -> list[Implied]:
        """What follows from the claim, in bytes, seconds and shares of a peak.

        Raises:
            LookupError: a published figure it rests on is not among `records`.
        """
        return self.implications(Evidence(records))

    def judge(self, records: Sequence[Record], device: str | None = None) -> Verdict:
        """The verdict that `records` support.

        Args:
            records: published, recorded and this run's, in any order.
            device: name of the machine at hand; its measurements go first.

        Raises:
            LookupError: a published figure it rests on is not among `records`.
        """
        return self.judgement(Evidence(records, device))


def _at(document: str, quantity: str, place: str = "", **filters) -> dict:
    return {"quantity": quantity, "document": document, "place": place, **filters}


_SQUARE = dict(in_features=4096, out_features=4096)
_ARTICLE, _STUDY, _LANDING, _TORCHAO = "article", "Trapetum page", "Trapetum page", "torchao list"

CLAIMS = (
    Claim(
        1,
        _ARTICLE,
        "Marlin with 4-bit weights decodes Llama-2-7B at 520 to 530 tok/s on an H100, 3.6 times fp16.",
        "The bytes allow it, but its code says the table is simulated, and every measured engine is near half of that.",
        "Time Marlin's products of one token; compare the fastest 4-bit decode of this machine.",
        (_at(doc.ARTICLE, "decode_speed", "Marlin"), _at(doc.ARTICLE, "speedup", "Marlin")),
        products.marlin_implies,
        products.judge_marlin,
    ),
    Claim(
        2,
        _ARTICLE,
        "At 2048 rows fp16 reaches 71 % of the H100's peak, FP8 66 %, INT8 69 %, TF32 41 %.",
        "The throughputs in the same rows over the peaks in its other table give about 17 %.",
        "Divide one table by the other; time the products.",
        (_at(doc.ARTICLE, "peak_fraction"), _at(doc.ARTICLE, "gemm_throughput")),
        products.peaks_imply,
        products.judge_peaks,
    ),
    Claim(
        3,
        _ARTICLE,
        "An fp16 product of 2048 x 4096 x 4096 takes 0.39 ms on an H100.",
        "That is under a fifth of the peak; cuBLAS is expected near 0.1 ms.",
        "Time cuBLAS at that size.",
        (_at(doc.ARTICLE, "gemm_time", "cuBLAS GEMM", method="linear-fp16"),),
        products.prefill_implies,
        products.judge_prefill,
    ),
    Claim(
        4,
        _ARTICLE,
        "At 2048 rows fp16 wins over Marlin.",
        "Marlin's time in that row is the smaller one.",
        "Compare the row with itself; time fp16 and tinygemm at 2048 rows.",
        (_at(doc.ARTICLE, "gemm_time", "row (2048"),),
        products.winner_implies,
        products.judge_winner,
    ),
    Claim(
        5,
        _ARTICLE,
        "cuBLAS fp16 takes 0.039 ms for a batch-1 product of 4096 x 4096 on an H100.",
        "The bytes need 10 to 14 us, and another page has 0.02 ms for the same thing.",
        "Time it with a cold and with a warm L2.",
        (_at(doc.ARTICLE, "gemv_time", method="linear-fp16", **_SQUARE), _at(doc.LIST, "gemv_time", "row 5")),
        products.cublas_implies,
        products.judge_cublas,
    ),
    Claim(
        6,
        _ARTICLE,
        "Hopper and Blackwell have INT4 tensor cores; binary ones exist on Turing only.",
        "A compiler for Hopper turns an int4 operation into int8 ones.",
        "Compile one operation of each format for each architecture and count instructions; needs no GPU.",
        (),
        ceilings.formats_imply,
        ceilings.judge_formats,
    ),
    Claim(
        7,
        _ARTICLE,
        "Its benchmark code times INT8 and FP8 products as printed.",
        "_int_mm refuses few rows; _scaled_mm wants scales and a column-major second operand.",
        "Run each call as printed, then as it has to be.",
        (),
        ceilings.calls_imply,
        ceilings.judge_calls,
    ),
    Claim(
        8,
        _ARTICLE,
        "A 70B model in FP4 with 2:4 sparsity is 17.5 GB and decodes at 457 tok/s on a B200.",
        "The positions of the kept weights and the block scales are left out.",
        "Count the bits.",
        (_at(doc.ARTICLE, "model_memory", "Sparsity"), _at(doc.ARTICLE, "decode_speed", "Sparsity")),
        ceilings.sparse_implies,
        ceilings.judge_sparse,
    ),
    Claim(
        9,
        _STUDY,
        "On an H100 a 4-bit codebook product only ties with fp16, because fp16 is near the roofline already.",
        "The kernel spends some nine instructions a weight, so it is bound by instructions, not by memory.",
        "Time another 4-bit codebook kernel beside cuBLAS.",
        (_at(doc.TRAPETUM, "speedup", "H100 PCIe"),),
        ceilings.parity_implies,
        ceilings.judge_parity,
    ),
    Claim(
        10,
        _STUDY,
        "On an RTX 4090 the MLP shapes are 3.7 times faster than fp16.",
        "fp16 comes from memory while the codes fit the 72 MB L2, so the two sides do not read from the same place.",
        "Time both sides cold, then only the codes warm.",
        (
            _at(
                doc.TRAPETUM,
                "speedup",
                "by layer shape",
                in_features=(11008, 4096),
                out_features=(4096, 11008),
            ),
        ),
        ceilings.mlp_implies,
        ceilings.judge_mlp,
    ),
    Claim(
        11,
        _STUDY,
        "On an H100 every quantized 7B decodes slower than fp16 (43.7 tok/s), because bandwidth is plentiful.",
        "43.7 tok/s uses a sixth to a third of the bandwidth: launches bind, not bytes.",
        "Decode the same model module by module and as one CUDA graph, fp16 and codes alike.",
        (_at(doc.TRAPETUM, "decode_speed", "single-harness", model="llama-2-7b"),),
        decoding.slower_implies,
        decoding.judge_slower,
    ),
    Claim(
        12,
        _LANDING,
        "135 tok/s on an RTX 4090, thanks to a runtime without Python.",
        "The same runtime makes 81 over 512 tokens, and a captured graph leaves Python nothing to slow down.",
        "Compare its own figures at equal context; replay one graph from Python and from C++.",
        (
            _at(doc.LANDING, "decode_speed", "headline"),
            _at(doc.TRAPETUM, "decode_speed", "Rust runtime"),
            _at(doc.TRAPETUM, "decode_speed", "integration path"),
        ),
        decoding.runtime_implies,
        decoding.judge_runtime,
    ),
    Claim(
        13,
        _STUDY,
        "The fp16 perplexity of Llama-2-7B is 5.28, 5.47 and 5.83.",
        "Three protocols; a perplexity without window, stride and token count is no number.",
        "Score one model under several windows and strides.",
        (_at(doc.TRAPETUM, "perplexity", model="llama-2-7b", method="fp"),),
        decoding.perplexities_imply,
        decoding.judge_perplexities,
    ),
    Claim(
        14,
        _STUDY,
        "Calibration and vector quantization do not close the accuracy gap at 4 bits.",
        "Only diagonal weights and a weak additive fit were tried; others publish under 2 % at the same bits.",
        "Compare plain and calibrated codebooks on one model, text and protocol.",
        (
            _at(doc.TRAPETUM, "perplexity", "4-bit accuracy table"),
            _at(doc.LIST, "perplexity_ratio", "row 14"),
        ),
        decoding.calibration_implies,
        decoding.judge_calibration,
    ),
    Claim(
        15,
        _LANDING,
        "A 4-bit token takes 2.1 times less energy than an fp16 one.",
        "One run, idle power included, unequal speeds; measured again it was 1.35 gross and 2.17 net of idle.",
        "Read the energy counter over long windows, several times, gross and net.",
        (
            _at(doc.LANDING, "energy_ratio"),
            _at(doc.TRAPETUM, "energy_per_token"),
            _at(doc.LIST, "energy_ratio"),
        ),
        decoding.energy_implies,
        decoding.judge_energy,
    ),
    Claim(
        16,
        "QTIP benchmark",
        "Its settings, V = 1 among them, are the HYB code of the QTIP paper.",
        "Paper and kernels decode two weights an entry (V = 2); its phase times come from a coarse clock.",
        "Compare the settings.",
        (_at(doc.QTIP, "bits_per_weight"), _at("QTIP paper", "bits_per_weight")),
        kernel_lists.qtip_implies,
        kernel_lists.judge_qtip,
    ),
    Claim(
        17,
        _TORCHAO,
        "With fp6 weights the 7B decodes at 117.9 tok/s and the 8B at 161.6.",
        "The smaller model is the slower one, and nothing explains it.",
        "Decode both shapes with the same kernel.",
        (_at(doc.TORCHAO, "decode_speed", method="torchao-fp6", compile=True, dtype="float16"),),
        kernel_lists.fp6_implies,
        kernel_lists.judge_fp6,
    ),
    Claim(
        18,
        _TORCHAO,
        "Quantizing the key-value cache slows decode at every length, down to under 2 tok/s at 131072.",
        "The flags suggest attention over a padded, nearly empty cache.",
        "Compare the added time with the time to read the cache; decode with attention over the live length.",
        (_at(doc.TORCHAO, "decode_speed", "kv cache"),),
        kernel_lists.cache_implies,
        kernel_lists.judge_cache,
    ),
    Claim(
        19,
        _TORCHAO,
        "int8 with dynamic activations decodes at 9.6 tok/s, uintx weights at 40 to 51.",
        "Fallback kernels; the formats' bytes allow far more.",
        "Time a kernel of ours that moves as many bytes.",
        (
            _at(
                doc.TORCHAO,
                "decode_speed",
                method=("torchao-int8dq", "torchao-uintx-4-64", "torchao-uintx-2-8"),
            ),
        ),
        kernel_lists.slow_implies,
        kernel_lists.judge_slow,
    ),
)
