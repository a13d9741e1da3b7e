"""What others published, judged by the records at hand.

    for claim in CLAIMS:
        print(claim.says, claim.judge(records, device).outcome)

evidence      records by weight, verdicts       listing    the nineteen claims
products      claims 1 to 5                     ceilings   claims 6 to 10
decoding      claims 11 to 15                   documents  names of the sources
kernel_lists  claims 16 to 19                   probes     what only these claims measure

No verdict is written down: each is computed from records, so a new measurement may turn it.
"""

from collections.abc import Sequence

from trapetum.claims.evidence import BASES, OUTCOMES, Evidence, Implied, Verdict, text
from trapetum.claims.listing import CLAIMS, Claim
from trapetum.records import Record

__all__ = [
    "BASES",
    "CLAIMS",
    "OUTCOMES",
    "Claim",
    "Evidence",
    "Implied",
    "Verdict",
    "card",
    "find",
    "implied_text",
    "judge",
    "judge_all",
    "table",
    "text",
]


def find(number: int) -> Claim:
    """The claim with that number.

    Raises:
        ValueError: there is none.
    """
    for claim in CLAIMS:
        if claim.id == number:
            return claim
    raise ValueError(f"there is no claim {number}; they are numbered 1 to {CLAIMS[-1].id}.")


def judge(number: int, records: Sequence[Record], device: str | None = None) -> Verdict:
    """The verdict on one claim; see `Claim.judge`."""
    return find(number).judge(records, device)


def judge_all(records: Sequence[Record], device: str | None = None) -> list[tuple[Claim, Verdict]]:
    """Every claim with its verdict, in order."""
    return [(claim, claim.judge(records, device)) for claim in CLAIMS]


def implied_text(claim: Claim, records: Sequence[Record]) -> str:
    """What follows from a claim, as one line."""
    rows = claim.implies(records)
    return "; ".join(f"{row.label}: {text(row.value)} {row.unit}".rstrip() for row in rows)


def card(number: int, records: Sequence[Record], device: str | None = None) -> str:
    """One claim as markdown: what is said, what that implies as a small table, and the verdict."""
    claim = find(number)
    found = claim.judge(records, device)
    implied = [f"| {row.label} | {text(row.value)} {row.unit} |" for row in claim.implies(records)]
    head = f"**Claim {claim.id}** ({claim.who}). {claim.says}"
    verdict = f"**{found.outcome.capitalize()}** ({found.basis}). {found.reason}"
    return "\n".join([head, "", "| it implies | |", "|:--|--:|", *implied, "", verdict])


def table(records: Sequence[Record], device: str | None = None) -> list[dict[str, str]]:
    """One row a claim, as `trapetum.figures.claims` draws it.

    Returns:
        dicts with `who` (and the claim's number), `claim`, `implies`, `measured` (what the records say) and `verdict`
        (the outcome and what it rests on).
    """
    return [
        {
            "who": f"{claim.id}. {claim.who}",
            "claim": claim.says,
            "implies": implied_text(claim, records),
            "measured": found.reason,
            "verdict": found.outcome + ("" if found.basis == "nothing" else f" ({found.basis})"),
        }
        for claim, found in judge_all(records, device)
    ]
