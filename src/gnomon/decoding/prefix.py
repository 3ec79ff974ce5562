"""What prompts begin with together, and when that is worth a pass of its own."""

from __future__ import annotations

from collections.abc import Sequence

SHARED_LEAST = 64  # a common beginning shorter than this is not worth a pass of its own
AGAIN_LEAST = 8  # what stands in the spare slot already is used from here on


def common_prefix(prompts: Sequence[tuple[int, ...]], least: int = SHARED_LEAST) -> int:
    """How many leading ids all prompts share, at least one id of each left over; 0 below `least` or for one prompt."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what the extremes share, all share
    longest = min(map(len, prompts)) - 1
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    return shared if shared >= least else 0
