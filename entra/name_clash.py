"""The package `entra` belongs to two distributions: `entra-reward`, which is this one, and `entra` on PyPI, another project.

Installed side by side, the files of one replace those of the other, `__init__.py` first.
"""

from __future__ import annotations

import os
import sys

REMEDY = "run pip uninstall entra entra-reward, then install entra-reward again; the two need an environment each"


def name_clash() -> str | None:
    """What is wrong and the remedy where the distribution `entra` has put its files among ours, None where it has not."""
    if not any(name.lower().startswith(("entra-", "entra.")) for folder in sys.path for name in _names_in(folder)):
        return None
    import importlib.metadata  # takes longer than all else that `import entra` does

    try:
        other = importlib.metadata.distribution("entra")
    except importlib.metadata.PackageNotFoundError:
        return None
    if other.files is not None and not any(file.parts[0] == "entra" for file in other.files):
        return None  # an editable install of this project under its former name
    return f"the distribution entra {other.version} is another project, and its files lie among those of entra-reward; {REMEDY}"


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder or ".")
    except OSError:  # an archive, or not there
        return []
