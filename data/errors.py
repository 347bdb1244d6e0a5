"""What errors say."""

import re


def sentence_of(error: Exception) -> str:
    """An error's message in one line; of one that a `DataLoader`'s worker met, without the traceback around it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and "Original Traceback" in str(error):
        return re.sub(r"^[\w.]+: ", "", lines[-1])
    return " ".join(" ".join(lines).split())
