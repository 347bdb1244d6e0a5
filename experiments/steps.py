"""Run the steps of an experiment in order and resume after an interruption."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seam.data.files import write_text


class Steps:
    """
    The steps of an experiment, of which those that are done are not repeated.

    `parts.json` in its folder records which are done, how long they took, and with which settings. A step is repeated
    when its settings or an earlier step changed.

    Args:
        folder: of the experiment.
    """

    def __init__(self, folder: Path):
        self.path = folder / "parts.json"
        self.previous = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.done: dict[str, dict[str, Any]] = {}

    def run(self, name: str, settings: Any, work: Callable[[], Any]) -> None:
        """
        Run a step unless it was done with the same settings.

        Args:
            name: of the step.
            settings: all that its result depends on, apart from earlier steps.
            work: does it; what it returns is recorded and printed.
        """
        settings = json.loads(json.dumps(settings, default=str, sort_keys=True))
        if name in self.previous and self.previous[name]["settings"] == settings:
            self.done[name] = self.previous[name]
            print(f"{name}: done before, in {self.done[name]['seconds']:.0f} s")
            return
        # From here on no previous step is valid, even if this one is interrupted.
        self.previous = {}
        self._write()
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        result = work()
        self.done[name] = {"settings": settings, "seconds": time.monotonic() - start, "result": result}
        self._write()
        print(f"{name}: {self.done[name]['seconds']:.0f} s" + (f", {result}" if result else ""), flush=True)

    def _write(self):
        write_text(self.path, json.dumps(self.done, indent=1, default=str))
