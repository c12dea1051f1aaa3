"""The blocks of code in docs/engines.md, by section."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/engines.md").read_text()


def blocks(section, language):
    """What the section's blocks in `language` hold."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
