"""Every literal tag of the text protocol and its role. No other source file spells one."""

from __future__ import annotations

from typing import Final, Literal

Strategy = Literal["direct", "steps", "verify", "decompose"]
Role = Literal["prompt", "sampled", "forced", "tool"]
StopCause = Literal["natural", "slack", "hard", "confidence", "loop", "user", "limit"]

STRATEGIES: Final[tuple[str, ...]] = ("direct", "steps", "verify", "decompose")

THINK: Final = "<think>"
END_THINK: Final = "</think>"
ANSWER: Final = "<answer>"
END_ANSWER: Final = "</answer>"
PLAN: Final[dict[str, str]] = {name: f"<plan:{name}>" for name in STRATEGIES}

BOS: Final = "<bos>"
EOS: Final = "<eos>"
PAD: Final = "<pad>"

# Node kinds of the think grammar TG (introspection.md §1). `P` is the outline; "plan" always means strategy.
KINDS: Final[dict[str, str]] = {
    "P": "outline",
    "S": "step",
    "T": "tool",
    "M": "monitor",
    "D": "diagnosis",
    "R": "reflect",
    "F": "focus",
    "A": "answer",
}
# Single tokens of our own tokenizer in token mode: sampled, in the loss, counted as think tokens.
KIND_TOKENS: Final[dict[str, str]] = {kind: f"<|{kind}|>" for kind in KINDS}
PARENT_TOKEN: Final = "<|<|>"
NO_PARENT: Final = "-"

TAGS: Final[tuple[str, ...]] = (THINK, END_THINK, ANSWER, END_ANSWER, *PLAN.values())
STRUCTURE_TOKENS: Final[tuple[str, ...]] = (*KIND_TOKENS.values(), PARENT_TOKEN)

# Which share of the thinking a node belongs to, for the plan / exec / eval metrics.
KIND_GROUP: Final[dict[str, str]] = {
    "P": "plan", "S": "exec", "T": "exec", "M": "eval", "D": "eval", "R": "eval", "F": "eval", "A": "exec",
}  # fmt: skip
