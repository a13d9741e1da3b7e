"""Where the workbook's folders are.

Trapetum is a workbook: it is used from its clone (`pip install -e .`), beside its notebooks, kernels and data.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
RECORDS = DATA / "records"
PUBLISHED = DATA / "published"
BUILTIN_MODEL = DATA / "model"
RUNS = ROOT / "papermill_runs"


def require_clone() -> None:
    """Raise if the package was installed away from the folders it needs.

    Raises:
        RuntimeError: `kernels/` is not beside the package.
    """
    if not KERNELS.is_dir():
        raise RuntimeError(
            f"{KERNELS} is missing: Trapetum runs from its clone, so install it there with `pip install -e .`."
        )


def cache_dir() -> Path:
    """The folder for compiled kernels: `$TRAPETUM_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("TRAPETUM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trapetum"
