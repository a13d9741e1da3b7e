"""A reader's walk from stage to stage: a prediction, then the bar, on this machine and on the GPU recorded last."""

from collections.abc import Sequence

from trapetum import figures
from trapetum.figures.style import device_name
from trapetum.figures.walk import Place, staged
from trapetum.workbook import Workbook, significant

RECORDED_MODEL = "random:llama-2-7b"


class Walk:
    """Shows the decodes of a run stage by stage; what a CPU cannot run is taken from the recorded GPU.

    Args:
        book: the chapter's workbook, with its `decode_speed` records measured.
        model: what was decoded here, as in `config.model`.

    Attributes:
        here: this machine as it was measured in this run, a `trapetum.figures.walk.Place`.
        gpu: this GPU, or the one that was recorded last; None where neither has a decode.
        places: those with records, this machine first.
    """

    def __init__(self, book: Workbook, model: str):
        self.book, self._guesses, self._labels = book, {}, {}
        self.here, recorded = self._here(model), self._recorded()
        self.gpu = self.here if book.device == "cuda" else recorded
        self.places = [place for place in (self.here, recorded) if place and place.records]

    def _here(self, model: str) -> Place:
        name = self.book.machine["name"]
        own = self.book.select("decode_speed", "here", device=name)
        rows = staged(own, model, True if self.book.device == "cpu" else None)
        return Place(f"{device_name(rows[0])} here" if rows else name, rows, self.book.roof_gbps())

    def _recorded(self) -> Place | None:
        gpu = self.book.recorded_gpu
        if self.book.device == "cuda" or not gpu:
            return None
        rows = staged(self.book.select("decode_speed", "recorded", device=gpu), RECORDED_MODEL, False)
        return Place(f"{device_name(rows[0])} recorded", rows, self.book.roof_gbps(gpu)) if rows else None

    def _at(self, stages: Sequence[str]) -> list[tuple[Place, str]]:
        """Each machine that ran one of `stages`, with that stage."""
        found = [(place, [s for s in place.stages if s in stages]) for place in self.places]
        return [(place, ran[-1]) for place, ran in found if ran]

    def gain(self, place: Place, stage: str, coded: bool) -> float | None:
        """Speed of a stage over the stage before it; at the first stage that of codes over dense weights."""
        now, before = place.speed(stage, coded), place.before(stage)
        base = place.speed(before, coded) if before else place.speed(stage, False)
        return now.value / base.value if now and base else None

    def predict(self, *stages: str, codes: float, dense: float | None = None) -> None:
        """Note what a stage gains over the one before it, wherever it was run; at the first stage, codes over dense.

        Args:
            *stages: the stage, by each of its names (`"lean", "graph"`).
            codes: times faster, of the 4-bit model.
            dense: of the dense one; None predicts nothing for it.
        """
        self._guesses, self._labels = {}, {}
        for place, stage in self._at(stages):
            for coded, times in ((False, dense), (True, codes)):
                if times is not None and self.gain(place, stage, coded):
                    self._note(place, stage, coded, times)
        if not self._labels:
            print(
                f"No machine on record has run {' or '.join(stages)} yet: {significant(codes)} times is noted."
            )

    def _note(self, place: Place, stage: str, coded: bool, times: float) -> None:
        before = place.before(stage)
        what = "4-bit codes" if coded else "dense"
        change = f"{before} to {stage}" if before else f"over dense, {stage}"
        label = f"{place.name}, {what}: {change}"
        base = place.speed(before, coded) if before else place.speed(stage, False)
        self._guesses[place.name, coded] = times * base.value
        self._labels[label] = self.gain(place, stage, coded)
        self.book.predict(label, times, "times")

    def takeaway(self, *stages: str) -> None:
        """Display in a sentence what the stage gained, on each machine that ran it."""
        gains = [(place, stage, self._gains(place, stage)) for place, stage in self._at(stages)]
        if not gains:
            self.book.takeaway(f"Not known: no machine on record has run {' or '.join(stages)} yet.")
            return
        said = [f"{stage} on {place.name}: {words}" for place, stage, words in gains]
        first = all(place.before(stage) is None for place, stage, _ in gains)
        over = "4-bit codes over dense weights" if first else "Over the stage before"
        self.book.takeaway(f"{over}, {'; '.join(said)}.")

    def _gains(self, place: Place, stage: str) -> str:
        if place.before(stage) is None:
            return f"{significant(self.gain(place, stage, True) or float('nan'))} times"
        named = (("4-bit codes", True), ("dense", False))
        found = [(name, self.gain(place, stage, coded)) for name, coded in named]
        return ", ".join(f"{name} {significant(times)} times" for name, times in found if times)

    def reveal(self, *stages: str) -> list[dict]:
        """Compare with the prediction and show every bar up to here; without a record, say so.

        Returns:
            the rows of the comparison, [] where no machine ran the stage.
        """
        if not self._labels:
            print(
                f"data/records/ has no decode at {' or '.join(stages)}: `trapetum bench decode` on a GPU makes it."
            )
            return []
        rows = self.book.compare(self._labels, heading="found")
        title = f"The walk so far: {' and '.join(dict.fromkeys(stage for _, stage in self._at(stages)))}"
        self.book.show(figures.stage_walk(self.places, stages, self._guesses, title))
        self._labels = {}
        return rows
