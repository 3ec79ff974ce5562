"""A terminal chat: what the model plans, how much it thought, how sure it is; thoughts are hidden by default."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gnomon.base.errors import GnomonError, unknown
from gnomon.base.seeds import derive
from gnomon.decoding.scope import Ledger
from gnomon.interfaces import console, options
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import REGISTRY, draw

HELP = """\
/examples            questions that this model knows how to answer
/budget N|auto|none  think tokens at most
/plan NAME|auto      direct, steps, verify, decompose
/scope turn|session  a budget for every question, or one for all of them (starts anew)
/show on|off         show the thoughts
/quit                leave
A program of several lines is typed on one, with \\n between them."""
COMMANDS = ("/help", "/examples", "/budget", "/plan", "/scope", "/show", "/quit")


def summary(facts: Mapping[str, Any], known: bool = True, own: bool = False) -> str:
    """One line about an answer: plan, tokens against budget, confidence.

    known: the model has a metacognitive layer; own: the plan was given, not predicted.
    """
    budget, sure = facts["budget"], facts["confidence"]
    used = f"thought {budget['used']} tokens ({facts['plan']})"
    if budget["predicted"] is not None:
        used += f", expected {budget['predicted']:.0f}, cap {budget['effective']}"
    if facts["stop"] != "natural":
        used += f", closed: {facts['stop']}"
    if not known:
        return f"{used} · no metacognitive layer"
    before, after = (f"{v:.2f}" if v is not None else "?" for v in (sure["before"], sure["after"]))
    if sure["calibrated"]:
        return f"{used} · confidence {before} before, {after} after"
    if own or budget["source"] != "predicted":
        return f"{used} · confidence unknown under a budget or plan of your own"
    return f"{used} · confidence unknown: this prompt is outside what the card was fitted for"


def examples(number: int) -> list[str]:
    """One problem of every family, another set for every number."""
    found = (draw(name, 1 + number % 3, "test", "chat-examples", number).prompt for name in REGISTRY)
    return [prompt.replace("\n", "\\n") for prompt in found]


class Chat:
    """The loop; every line is one problem, there is no history (the shipped model answers single questions)."""

    def __init__(
        self, reasoner: Reasoner, plan: str = "predicted", budget: options.Budget = "predicted", show: bool = False
    ):
        self.reasoner, self.plan, self.budget, self.show = reasoner, plan, budget, show
        self.asked = 0
        self.ledger = Ledger()

    def run(self) -> None:
        """Read lines until /quit or the end of the input."""
        console.say(f"{self.reasoner.name}: ask a question, or /help. For example:")
        for line in examples(0)[:3]:
            console.say(f"  {line}")
        while True:
            try:
                if sys.stdin.isatty():
                    line = input("> ")
                else:
                    line = sys.stdin.readline()
                    if not line:
                        return
            except (EOFError, KeyboardInterrupt):
                console.say()
                return
            text = line.strip().replace("\\n", "\n")
            if not text:
                continue
            try:
                if not self.handle(text):
                    return
            except GnomonError as error:
                console.say(f"{error}")

    def handle(self, text: str) -> bool:
        """One line; False = leave."""
        if text.startswith("/"):
            return self.command(text)
        plan = self.plan
        self.asked += 1
        seed = f"chat/{derive(text)}/{self.asked}"
        answer = self.reasoner.ask(text, plan=plan, budget=self.budget, seed=seed, ledger=self.ledger)
        if self.show and answer.think:
            console.say(answer.think)
        print(answer.answer or "(no answer)", flush=True)
        console.say(f"  {summary(answer.report(), self.reasoner.decider is not None, plan != 'predicted')}")
        return True

    def command(self, text: str) -> bool:
        """A line that begins with a slash."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            console.say(HELP)
        elif name == "/examples":
            self.asked += 1
            console.say("\n".join(f"  {line}" for line in examples(self.asked)))
        elif name == "/budget":
            self.budget = options.budget(rest or "auto")
            console.say(f"budget: {'none' if self.budget is None else self.budget}")
        elif name == "/plan":
            self.plan = options.check_plan(rest or "auto")
            console.say(f"plan: {self.plan}")
        elif name == "/scope":
            if rest not in ("turn", "session"):
                raise unknown("scope", rest, ("turn", "session"))
            self.ledger = Ledger("turn" if rest == "turn" else "session")
            console.say(f"the budget covers {'every question' if rest == 'turn' else 'all questions from here on'}")
        elif name == "/show":
            self.show = rest != "off"
            console.say(f"thoughts {'shown' if self.show else 'hidden'}")
        else:
            raise unknown("command", name, COMMANDS)
        return True
