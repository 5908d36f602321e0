"""An answer in words, metered in two parts: the prompt (prefill), and each further token
(decode)."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from greenvis.meters.track import Tracker

PREFILL, DECODE = "prefill", "decode"


class Answered(NamedTuple):
    """What a model answered, and what was observed meanwhile.

    Args:
        output: What `generate` returned.
        prefill: Observations until the first token, as `Tracker.observed` has them.
        decode: From there to the end.
    """

    output: Any
    prefill: dict[str, float]
    decode: dict[str, float]


class _Parts:
    """A streamer of transformers that begins the phase of the answer with its first token."""

    def __init__(self, run: Tracker) -> None:
        self.run, self.puts, self.phase = run, 0, run.phase(PREFILL)
        self.seen = [_seen(run)]
        self.phase.__enter__()

    def put(self, value: Any) -> None:
        """Take the prompt, or the next tokens of each answer."""
        self.puts += 1
        if self.puts == 2:  # the prompt came first
            self.close()
            self.phase = self.run.phase(DECODE)
            self.phase.__enter__()

    def end(self) -> None:
        """Take note that the answers have ended."""

    def close(self) -> None:
        """End the phase that is open."""
        self.phase.__exit__(None, None, None)
        self.seen.append(_seen(self.run))


def generate(run: Tracker, model: Any, **inputs: Any) -> Answered:
    """Answer as `model.generate(**inputs)` does, with the prompt in the phase "prefill" of a run
    and all behind the first token in "decode".

    Args:
        run: A tracked run.
        model: Of transformers; without beams, which have no first token until the end.
        inputs: Of its `generate`.

    Returns:
        The answers, and what was observed in both parts.
    """
    parts = _Parts(run)
    try:
        output = model.generate(**inputs, streamer=parts)
    finally:
        parts.close()
    first, second = (
        {q: v - before.get(q, 0.0) for q, v in after.items()}
        for before, after in zip(parts.seen, [*parts.seen[1:], parts.seen[-1]][:2], strict=False)
    )
    return Answered(output, first, second)


def _seen(run: Tracker) -> dict[str, float]:
    return run.observed() | {"at_s": time.monotonic()}
