"""What a budget covers across requests: a block, a turn, a tool loop or a session (row D8)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gnomon.protocol.trace import Request, Scope, Trace


@dataclass
class Ledger:
    """Think tokens drawn on one budget by the requests of a conversation.

    block, turn: every request starts anew. tool_loop: requests joined by tool results share one budget. session: all
    share one.
    """

    scope: Scope = "turn"
    spent: int = 0

    def open(self, request: Request, *, tool_result: bool = False) -> Request:
        """The request with what its scope has used before; `tool_result`: it goes on after a tool's answer."""
        keep = self.scope == "session" or (self.scope == "tool_loop" and tool_result)
        self.spent = self.spent if keep else 0
        return replace(request, scope=self.scope, spent=self.spent)

    def charge(self, trace: Trace) -> None:
        """Count a finished request."""
        self.spent += trace.used
