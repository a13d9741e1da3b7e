"""From samples to records: one `Recorder` per bench call keeps the machine's description and its ceilings."""

from functools import cache

from trapetum import hardware, machine, records
from trapetum.bench.profiles import Sizes, sizes
from trapetum.records import Ceilings, Record


class Recorder:
    """Collects measured records of one device.

    Attributes:
        device: "cpu" or "cuda".
        sizes: how much this profile measures.
        cold_read_gbps: what a cold read reaches here, once it is known.
    """

    def __init__(self, device: str = "auto", profile: str = "quick"):
        self.device = machine.choose_device(device)
        self.profile = profile
        self.sizes: Sizes = sizes(profile, self.device)
        self.cold_read_gbps: float | None = None
        self._origin = machine.provenance(self.device)
        self._rows: list[Record] = []

    @property
    def machine(self) -> dict:
        """The device's description, taken before the measurement."""
        return self._origin["device"]

    @property
    def cache_bytes(self) -> int:
        """The cache that a cold rotation has to exceed."""
        return int(self.machine.get("l2_bytes") or 0)

    @property
    def rotation_cache_bytes(self) -> int | None:
        """The cache size to plan a CPU's rotation with (None: unknown)."""
        return int(self.cache_bytes * self.sizes.rotation) or None

    @property
    def ceilings(self) -> Ceilings:
        """The datasheet's bandwidth and the measured cold read, each None where unknown."""
        return Ceilings(_peak_gbps(self.machine["name"]), self.cold_read_gbps)

    def add(self, quantity: str, samples, method: str, config: dict, doubt: str = "", **how) -> Record:
        """Record samples.

        Args:
            quantity, samples, method, config: as in `trapetum.records.measured`.
            doubt: why the figure is suspect beyond what the gate finds, or "".
            **how: `kernel_sha256`, `value`, `source`.
        """
        config = {"profile": self.profile, **config}
        record = records.measured(
            quantity, samples, method, config, gate=self.ceilings, **self._origin, **how
        )
        if doubt and not record.suspect:
            record = record.replace(suspect=True, why_suspect=doubt)
        self._rows.append(record)
        return record

    def close(self) -> list[Record]:
        """All records, each with the clocks and the temperature after the measurement beside those before."""
        device = machine.after(self.machine)
        return [row.replace(device=device) for row in self._rows]


@cache
def _peak_gbps(name: str) -> float | None:
    gpu = hardware.find(name)
    return gpu.bandwidth_gbps if gpu else None
