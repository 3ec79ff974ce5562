"""`ask` and `chat`: one question, or many."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gnomon.base.errors import ConfigError
from gnomon.interfaces import console, options

if TYPE_CHECKING:
    from gnomon.reasoner import Reasoner

Flag = Parameter(negative=())
VOTE_TEMPERATURE = 0.8


def ask(
    text: str,
    *,
    model: str = "nano",
    plan: str = "predicted",
    budget: str = "predicted",
    temperature: float | None = None,
    seed: str = "ask",
    max_answer_tokens: int | None = None,
    votes: int = 1,
    device: str = "cpu",
    no_decode: Annotated[bool, Flag] = False,
    show: Annotated[bool, Flag] = False,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Ask one question.

    Args:
        text: The question; "-" reads it from stdin.
        model: A shipped model (nano), smollm2, or a model folder.
        plan: direct, steps, verify, decompose, or predicted.
        budget: Think tokens at most: a number, predicted, or none.
        temperature: 0 is greedy; by default 0 for one path and 0.8 for votes.
        seed: Names the random stream when temperature is above 0.
        max_answer_tokens: Cap of the answer.
        votes: Sampled paths; the majority answers, and more are drawn where they disagree.
        device: cpu or cuda.
        no_decode: Plan, budget and confidence only; nothing is generated.
        show: Show the thoughts too; with votes those of the path that stands for the answer.
        json: Print one JSON object.
    """
    limit, plan = options.budget(budget), options.check_plan(plan)
    question = sys.stdin.read().strip() if text == "-" else text
    if not question.strip():
        raise ConfigError('the question is empty; write one: gnomon ask "Compute 3 + 4."')
    temperature = _temperature(temperature, votes)
    from gnomon.reasoner import Reasoner

    reasoner = Reasoner.load(model, device=device)
    if no_decode:
        decision = reasoner.decide(question)
        (console.emit_json if json else print_decision)(decision)
        return
    if votes != 1:
        _vote(reasoner, question, votes, plan, limit, temperature, seed, max_answer_tokens, show, json)
        return
    answer = reasoner.ask(
        question, plan=plan, budget=limit, temperature=temperature, seed=seed, max_answer_tokens=max_answer_tokens
    )
    facts = answer.report()
    if json:
        console.emit_json(facts)
        return
    from gnomon.interfaces.chat import summary

    if show and answer.think:
        console.say(answer.think)
    console.say(summary(facts, reasoner.decider is not None, plan != "predicted"))
    print(answer.answer)


def _temperature(asked: float | None, votes: int) -> float:
    if asked is None:
        return 0.0 if votes == 1 else VOTE_TEMPERATURE
    if votes > 1 and asked == 0:
        raise ConfigError(
            f"--votes {votes} --temperature 0: {votes} greedy paths are {votes} times the same one; "
            f"write a temperature above 0, or leave it out for {VOTE_TEMPERATURE}"
        )
    return asked


def _vote(
    reasoner: Reasoner, question: str, votes: int, plan: str, limit: options.Budget, temperature: float, seed: str,
    max_answer_tokens: int | None, show: bool, json: bool,
) -> None:  # fmt: skip
    """`ask --votes`: the answer that most paths give, and who gave what."""
    found = reasoner.vote(question, votes, plan, limit, temperature, seed, max_answer_tokens)
    read = reasoner.read(found.trace)
    if json:
        extra = {"votes": votes, "share": found.share, "counts": dict(found.counts), "rounds": found.rounds}
        console.emit_json({**read.report(), **extra, "think_tokens_all": found.think_tokens})
        return
    if show and read.think:
        console.say(read.think)
    told = ", ".join(f"{text or 'nothing'} x{count}" for text, count in found.counts.items())
    console.say(f"{len(found.traces)} paths, {found.think_tokens} think tokens: {told}")
    print(read.answer)


def print_decision(facts: dict[str, Any]) -> None:
    """Plan, budget and confidence of `ask --no-decode`, for people."""
    probs = facts.get("plan_probs") or {}
    if isinstance(probs, dict) and probs:
        others = ", ".join(f"{k} {v:.2f}" for k, v in sorted(probs.items(), key=lambda x: -x[1]))
        print(f"plan        {facts['plan']}   ({others})")
    else:
        print(f"plan        {facts['plan']}")
    budget = facts["budget"]
    print(f"budget      about {budget['predicted']:.0f} think tokens, cap {budget['clipped']}")
    sure = facts["confidence"]
    if sure["calibrated"] and sure["before"] is not None:
        print(f"confidence  {sure['before']:.2f}")
    else:
        print("confidence  unknown: this prompt is outside what the card was fitted for")


def chat(
    *,
    model: str = "nano",
    plan: str = "auto",
    budget: str = "auto",
    device: str = "cpu",
    show: Annotated[bool, Flag] = False,
) -> None:
    """Talk to a model in the terminal; /help inside.

    Args:
        model: A shipped model (nano), smollm2, or a model folder.
        plan: A strategy, or auto.
        budget: Think tokens at most: a number, auto, or none.
        device: cpu or cuda.
        show: Show the thoughts from the start.
    """
    limit, name = options.budget(budget), options.check_plan(plan)
    from gnomon.interfaces.chat import Chat
    from gnomon.reasoner import Reasoner

    Chat(Reasoner.load(model, device=device), plan=name, budget=limit, show=show).run()
