"""Do the stages make transformers' tokens: greedy tokens and logits against the dense twin of the same weights.

The reference is transformers' own greedy generation on the dequantized weights in the same dtype. Then its tokens are
fed to the stage one by one (teacher-forced), so that one flipped token does not count sixteen times, and logits are
compared place by place.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum import swap
from trapetum.bench.generating import NOT_POSSIBLE, engine_options, kernel_sha, refuser, text_tokens
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import Variant, codebook_variant, variants
from trapetum.decode import Engine
from trapetum.decode import stages as stages_of
from trapetum.models import Loaded
from trapetum.records import Record

PROMPTS, NEW_TOKENS = 32, 16
LONGEST_PROMPT = 48
BASELINE = "transformers"
_SMOKE_PROMPTS = 3


@dataclass(frozen=True)
class Reference:
    """What transformers made of one prompt.

    Attributes:
        prompt: token ids.
        tokens: greedy ones.
        logits: float32 [tokens, vocab], those that each token was chosen by.
    """

    prompt: list[int]
    tokens: list[int]
    logits: Tensor


@dataclass(frozen=True)
class Comparison:
    """A stage against the reference of one prompt.

    Attributes:
        equal: how many of the first tokens of a free generation are the reference's, up to the first that is not.
        count: tokens of the reference.
        same: share of places whose arg max is the reference's token when that token's predecessors are fed.
        worst: the largest absolute difference of a logit.
        worst_agreed: the same over the places where the arg max agrees: what rounding does here.
        relative: `worst` over the standard deviation of the reference's logits.
        gaps: for each place that disagrees, the reference's logit of its token less that of the token chosen.
    """

    equal: int
    count: int
    same: float
    worst: float
    worst_agreed: float
    relative: float
    gaps: tuple[float, ...]


def agreement(
    model_name: str = "builtin",
    device: str = "auto",
    stages: Sequence[str] | None = None,
    profile: str = "quick",
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    lm_head: bool = False,
    kv: str = "fp16",
    prompts: int | None = None,
    new_tokens: int = NEW_TOKENS,
) -> list[Record]:
    """Compare each stage's greedy tokens and logits with transformers' on the same weights.

    Args:
        model_name: as for `models.load`.
        device: "auto", "cpu" or "cuda".
        stages: None for all of the device's.
        profile: "smoke", "quick" or "full": 3 prompts, or 32.
        methods: "codebook" and dense dtypes; None for codebook in fp32 on a CPU and in fp16 on a GPU.
        bits, lm_head, kv: as for `decode`.
        prompts: how many, seeded; None for the profile's.
        new_tokens: per prompt.

    Returns:
        `token_agreement` records with `config.variant` "prompts" (share of prompts whose tokens are all equal) and "tokens"
        (teacher-forced share of tokens), `logit_error` with "absolute" and "relative" (to the standard deviation of the
        reference's logits), and where an arg max disagrees `logit_gap` with the gaps as samples and in config how
        many are near-ties: below the worst logit difference seen where the arg max agrees.
    """
    recorder = Recorder(device, profile)
    dtype = "fp32" if recorder.device == "cpu" else "fp16"
    wanted = prompts or (_SMOKE_PROMPTS if profile == "smoke" else PROMPTS)
    for variant in _variants(model_name, recorder, methods or ("codebook",), bits, lm_head, dtype):
        references = _references(variant, prompt_set(variant.loaded, wanted), new_tokens)
        for stage in stages or stages_of(recorder.device):
            _one_stage(recorder, variant, stage, references, kv)
        del variant, references
    return recorder.close()


def _variants(name, recorder, methods, bits, lm_head, dtype):
    dense = [m for m in methods if m != "codebook"]
    yield from variants(name, recorder.device, dense, (), lm_head, refuser(recorder))
    for b in bits if "codebook" in methods else ():
        yield codebook_variant(name, recorder.device, dtype, b, lm_head)


def prompt_set(loaded: Loaded, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 48 tokens: pieces of the built-in text where there is a tokenizer, else random tokens.

    The first is one token long.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = loaded.model.get_input_embeddings().weight.shape[0]
    text = text_tokens(loaded) if loaded.tokenizer is not None else None
    prompts = []
    for number in range(count):
        length = 1 if number == 0 else int(torch.randint(1, LONGEST_PROMPT + 1, (1,), generator=generator))
        if text is None:
            prompts.append(torch.randint(0, vocab, (length,), generator=generator).tolist())
        else:
            at = int(torch.randint(0, len(text) - length, (1,), generator=generator))
            prompts.append(text[at : at + length])
    return prompts


def _references(variant: Variant, prompts: Sequence[list[int]], new_tokens: int) -> list[Reference]:
    """Transformers' tokens and logits; the twin is given back before the stages run."""
    twin = variant.loaded.model
    if swap.is_quantized(twin):
        twin = swap.dequantize_model(copy.deepcopy(twin))
    return [reference(twin, prompt, new_tokens) for prompt in prompts]


@torch.inference_mode()
def reference(model, prompt: list[int], new_tokens: int) -> Reference:
    """Transformers' greedy generation after one prompt; a stop token does not stop it."""
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([prompt], device=device)
    how = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    mask = torch.ones_like(ids)
    made = _without_stop(model, lambda: model.generate(ids, attention_mask=mask, generation_config=how))
    logits = torch.cat(made.logits).float().cpu()
    return Reference(prompt, made.sequences[0, len(prompt) :].tolist(), logits)


def _without_stop(model, generate):
    """Call `generate` with no stop token set on the model, which would fill what a generation config leaves open."""
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        return generate()
    finally:
        model.generation_config.eos_token_id = kept


def compare(engine: Engine, wanted: Reference) -> Comparison:
    """Run one stage on one prompt, freely and teacher-forced.

    Args:
        engine: has room for prompt and tokens.
        wanted: what transformers made.
    """
    free = engine.generate(wanted.prompt, len(wanted.tokens)).tokens
    logits = engine.forced_logits(wanted.prompt, wanted.tokens[:-1]).float().cpu()
    return compared(free, logits, wanted)


def compared(free: Sequence[int], logits: Tensor, wanted: Reference) -> Comparison:
    """The comparison of a stage's free tokens and forced logits [tokens, vocab] with the reference's."""
    right = [a == b for a, b in zip(free, wanted.tokens, strict=True)]
    equal = right.index(False) if False in right else len(right)
    chosen, places = logits.argmax(-1), torch.arange(len(wanted.tokens))
    target = torch.tensor(wanted.tokens)
    agrees = chosen == target
    apart = (logits - wanted.logits).abs().amax(-1)
    gaps = (wanted.logits[places, target] - wanted.logits[places, chosen])[~agrees]
    worst = float(apart.max())
    return Comparison(
        equal=equal,
        count=len(right),
        same=float(agrees.float().mean()),
        worst=worst,
        worst_agreed=float(apart[agrees].max()) if bool(agrees.any()) else 0.0,
        relative=worst / float(wanted.logits.std()),
        gaps=tuple(gaps.tolist()),
    )


def _one_stage(
    recorder: Recorder, variant: Variant, stage: str, references: Sequence[Reference], kv: str
) -> None:
    room = max(len(r.prompt) + len(r.tokens) for r in references)
    config = {**variant.config, **engine_options(kv), "stage": stage, "baseline": BASELINE}
    try:
        engine = Engine(variant.loaded, stage, max_context=room, **engine_options(kv))
        found = [compare(engine, r) for r in references]
    except NOT_POSSIBLE as error:
        refuser(recorder)(variant.method, config, error)
        return
    _record(recorder, variant, config, found)


def _record(recorder: Recorder, variant: Variant, config: dict, found: Sequence[Comparison]) -> None:
    config = {**config, "prompts": len(found), "new_tokens": found[0].count}
    method, sha = variant.method, kernel_sha(recorder, variant)

    def add(quantity: str, kind: str, samples: list[float], value: float, **more) -> None:
        labelled = {**config, "variant": kind, **more}
        recorder.add(quantity, samples, method, labelled, value=value, kernel_sha256=sha)

    whole, same = [float(c.equal == c.count) for c in found], [c.same for c in found]
    add("token_agreement", "prompts", whole, sum(whole) / len(found))
    add("token_agreement", "tokens", same, sum(same) / len(found))
    for kind, errors in (("absolute", [c.worst for c in found]), ("relative", [c.relative for c in found])):
        add("logit_error", kind, errors, max(errors))
    gaps = [gap for c in found for gap in c.gaps]
    if gaps:
        noise = max(c.worst_agreed for c in found)
        ties = sum(gap < noise for gap in gaps)
        add(
            "logit_gap",
            "disagreements",
            gaps,
            max(gaps),
            noise=noise,
            near_ties=ties,
            faults=len(gaps) - ties,
        )
