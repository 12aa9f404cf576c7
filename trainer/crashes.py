"""OUTPUT_DIR/crashes.jsonl: what ended a run, so that a restart does not repeat what cannot work.

Imports nothing heavy: an attempt that is refused costs a second.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import PeerLostError, RepeatedCrashError

CRASHES = "crashes.jsonl"


@dataclass
class Attempt:
    """One start of this rank, among those that the launcher has made and will make."""

    output_dir: Path | None
    """Of the run; None records nothing."""

    config: str
    """Tells one configuration from another: a crash says nothing about a changed one."""

    step: int = 0
    """The step it is in; 0 before the first."""

    began: float = field(default_factory=time.perf_counter)
    """When this process began, on its own clock."""

    def __post_init__(self) -> None:
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        self._start = {
            "rank": int(os.environ.get("RANK", "0")),
            "run": run,
            "launcher": f"{os.uname().nodename} {os.getppid()} {run}",
            "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        }

    def record(self, error: BaseException, *, final: bool) -> None:
        """Append what ends this rank; with `final` the launcher's next attempts, if it makes any, end at once."""
        tried_again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        if self.output_dir is None or (final and not tried_again):
            return
        kind = type(error).__name__
        line = (str(error).strip() or kind).split("\n")[0][:500]
        about = {"step": self.step, "kind": kind, "line": line, "final": final}
        # A folder that is not there or a full disk must not hide the error itself.
        # One short line in append mode: ranks that crash together do not mix theirs.
        with (
            suppress(OSError),
            (self.output_dir / CRASHES).open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps({**about, "config": self.config, **self._start}) + "\n")

    def hopeless(self) -> dict[str, Any] | None:
        """What an earlier attempt of this launcher recorded of an error that no restart mends, its `rank` and `kind` among it."""
        here = self._start
        if here["attempt"] == 0:
            return None
        for crash in self._crashes():
            earlier = crash["launcher"] == here["launcher"] and crash["attempt"] < here["attempt"]
            if crash["final"] and earlier:
                return crash
        return None

    def refuse_repetition(self) -> None:
        """Stop a run whose last two attempts ended in the same way in the same step.

        Raises:
            RepeatedCrashError: they did, with this configuration.
        """
        ends = []
        for ranks in self._attempts():
            # What ended a rank says more than what the ranks say that lost it.
            lost = [crash for crash in ranks if crash["kind"] == PeerLostError.__name__]
            causes = [crash for crash in ranks if crash not in lost]
            ends.append((causes or lost)[0])
        ends = [crash for crash in ends if crash["kind"] != RepeatedCrashError.__name__][-2:]
        if len(ends) < 2 or any(crash["config"] != self.config or crash["final"] for crash in ends):
            return
        before, last = ends
        if (before["step"], before["kind"]) == (last["step"], last["kind"]):
            assert self.output_dir is not None
            raise RepeatedCrashError(
                f"the last two attempts ended in step {last['step']} in the same way (rank "
                f"{last['rank']}, {last['kind']}: {last['line']}); mend that, or remove "
                f"{self.output_dir / CRASHES} to try again"
            )

    def _attempts(self) -> list[list[dict[str, Any]]]:
        """The crashes of each attempt: of one start of the launcher, and of no rank two."""
        attempts: list[list[dict[str, Any]]] = []
        for crash in self._crashes():
            same = attempts and all(
                (crash["run"], crash["attempt"]) == (other["run"], other["attempt"])
                and crash["rank"] != other["rank"]
                for other in attempts[-1]
            )
            if same:
                attempts[-1].append(crash)
            else:
                attempts.append([crash])
        return attempts

    def _crashes(self) -> list[dict[str, Any]]:
        crashes = []
        with suppress(OSError):
            lines = (self.output_dir / CRASHES).read_text("utf-8") if self.output_dir else ""
            for line in lines.splitlines():
                with suppress(ValueError):  # one that was cut off
                    crashes.append(json.loads(line))
        return crashes
