"""A long run in parts, of which those that are done are not repeated."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seam.data.files import write_text


class Parts:
    """
    Runs the parts of a recipe in order and remembers, in `parts.json`, which are done, how long they took and with
    which settings; a part is repeated when its settings or an earlier part changed.
    """

    def __init__(self, folder: Path):
        self.path = folder / "parts.json"
        self.before = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.done: dict[str, dict[str, Any]] = {}

    def run(self, name: str, settings: Any, work: Callable[[], Any]):
        settings = json.loads(json.dumps(settings, default=str, sort_keys=True))
        if name in self.before and self.before[name]["settings"] == settings:
            self.done[name] = self.before[name]
            print(f"{name}: done before, in {self.done[name]['seconds']:.0f} s")
            return
        # From here on nothing of before holds, also if this part is interrupted.
        self.before = {}
        self._write()
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        result = work()
        self.done[name] = {"settings": settings, "seconds": time.monotonic() - start, "result": result}
        self._write()
        print(f"{name}: {self.done[name]['seconds']:.0f} s" + (f", {result}" if result else ""), flush=True)

    def _write(self):
        write_text(self.path, json.dumps(self.done, indent=1, default=str))
