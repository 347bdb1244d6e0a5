"""A long run in parts, of which those that are done are not repeated."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parts:
    """
    Runs the parts of a recipe in order and remembers, in `parts.json`, which are done, how long they took and with
    which settings; a part is repeated when its settings or an earlier part changed.
    """

    def __init__(self, folder: Path):
        self.path = folder / "parts.json"
        self.done = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.changed = False

    def run(self, name: str, settings: Any, work: Callable[[], Any]):
        settings = json.loads(json.dumps(settings, default=str, sort_keys=True))
        if not self.changed and name in self.done and self.done[name]["settings"] == settings:
            print(f"{name}: done before, in {self.done[name]['seconds']:.0f} s")
            return
        self.changed = True
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        result = work()
        self.done[name] = {"settings": settings, "seconds": time.monotonic() - start, "result": result}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=1, default=str))
        os.replace(temporary, self.path)
        print(f"{name}: {self.done[name]['seconds']:.0f} s" + (f", {result}" if result else ""), flush=True)
