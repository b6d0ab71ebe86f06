"""Where the Python blocks of a page are."""

from __future__ import annotations

import re

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """The Python blocks of a page, without their fences."""
    return BLOCK.findall(text)
