"""Progress bars: as wide as the terminal, or in a notebook a line that fits."""

from __future__ import annotations

import sys
from typing import Any

# What JupyterLab shows without breaking the line, in a window of 1,280 pixels with its side bar
NOTEBOOK_COLUMNS = 96
NOTEBOOK_FORMAT = (
    "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
)


def progress_bar(*, total: int, **options: Any) -> Any:
    """Return tqdm's bar, on standard error, which notebooks show as an alarm: there on output.

    Parameters
    ----------
    total : int
        How much there is to do.
    **options
        Of tqdm.

    Returns
    -------
    tqdm.tqdm
    """
    from tqdm import tqdm

    if type(sys.stdout).__module__ != "ipykernel.iostream":
        return tqdm(total=total, dynamic_ncols=True, **options)
    options |= {"ncols": NOTEBOOK_COLUMNS, "bar_format": NOTEBOOK_FORMAT}
    return tqdm(total=total, file=sys.stdout, **options)
