"""Who thinks what: an event log and one belief formula for every order (introspection.md §4).

    belief(a1..an) = value of the last event e with {a1..an} in W(e) and (focus(e) empty or it meets {a1..an})

W(e) = those in the room at e. Entering shows the place to the newcomer (focus); a peek is seen by nobody else;
"Ann tells Bob" passes Ann's belief on, W = {Ann, Bob}, focus Bob.
Levels: 1: 2 people, orders 0–1 · 2: 3 people, 0–1 · 3: 3 people, 1 · 4: 3 people, 1–2, with peek and tell · 5: order 2.
At most 9 sentences, 3–4 containers. Space: names, object and containers in order times the first moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import perm
from random import Random

from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

NAMES = ("Ann", "Eve", "Amy", "Zoe", "Ida", "Mia", "Bob", "Cid", "Dan", "Tom", "Max", "Leo")
OBJECTS = ("coin", "key", "ring", "ball")
CONTAINERS = ("box", "bag", "cup", "jar", "pot")
ORDERS = {1: (0, 1, 1), 2: (0, 1, 1), 3: (1,), 4: (1, 2), 5: (2,)}
LENGTH = {1: (5, 6), 2: (6, 7), 3: (7, 8), 4: (8, 9), 5: (9, 9)}


@dataclass(frozen=True)
class Event:
    """Something that shows where the object is: the place, who witnesses it, and whom it newly informs."""

    value: str
    witnesses: tuple[str, ...]
    focus: tuple[str, ...] = ()


def relevant(events: list[Event], chain: tuple[str, ...]) -> list[Event]:
    """Events whose focus does not rule them out for this chain."""
    return [e for e in events if not e.focus or set(e.focus) & set(chain)]


def belief(events: list[Event], chain: tuple[str, ...]) -> str | None:
    """Where a1 thinks that a2 thinks ... the object is; () is reality; None where it is undefined."""
    seen = [e.value for e in relevant(events, chain) if set(chain) <= set(e.witnesses)]
    return seen[-1] if seen else None


def log(story: list[list[str]]) -> list[Event]:
    """Events of a story of [verb, agent, argument] lines, in order."""
    room: list[str] = []
    events: list[Event] = []
    for verb, agent, arg in story:
        if verb == "enter":
            room.append(agent)
            place = belief(events, ())
            if place:
                events.append(Event(place, tuple(room), (agent,)))
        elif verb == "leave":
            room.remove(agent)
        elif verb in ("place", "move"):
            events.append(Event(arg, tuple(room)))
        elif verb == "peek":
            events.append(Event(belief(events, ()) or "", (agent,)))
        else:
            events.append(Event(belief(events, (agent,)) or "", (agent, arg), (arg,)))
    return events


def _sentence(line: list[str], thing: str) -> str:
    verb, agent, arg = line
    return {"enter": f"{agent} enters.", "leave": f"{agent} leaves.", "peek": f"{agent} peeks.",
            "place": f"{agent} puts the {thing} in the {arg}.", "move": f"{agent} moves the {thing} to the {arg}.",
            "tell": f"{agent} tells {arg}."}[verb]  # fmt: skip


def _story(rng: Random, level: int, people: list[str], boxes: list[str]) -> list[list[str]]:
    room = people[: rng.randint(2, len(people))]
    story = [["enter", p, ""] for p in room] + [["place", rng.choice(room), boxes[0]]]
    place, length = boxes[0], rng.randint(*LENGTH[level])
    while len(story) < length:
        out = [p for p in people if p not in room]
        options = [["leave", p, ""] for p in room] + [["enter", p, ""] for p in out]
        moves = [["move", p, c] for p in room for c in boxes if c != place]
        if level >= 4:
            options += [["peek", p, ""] for p in out]
            knows = [p for p in people if belief(log(story), (p,))]
            options += [["tell", p, q] for p in knows for q in people if q != p and (p in room) == (q in room)]
        line = rng.choice(moves if moves and rng.random() < 0.4 else options)
        story.append(line)
        if line[0] == "enter":
            room = [*room, line[1]]
        elif line[0] == "leave":
            room = [p for p in room if p != line[1]]
        elif line[0] == "move":
            place = line[2]
    return story


class _Belief:
    name = "belief"

    def generate(self, rng: Random, level: int) -> Problem:
        """A random story; most questions of order 1 and 2 are about a belief that is not the reality."""
        people = rng.sample(NAMES, 2 if level == 1 else 3)
        thing, boxes = rng.choice(OBJECTS), rng.sample(CONTAINERS, 3 if level <= 2 else 4)
        order, false = rng.choice(ORDERS[level]), rng.random() < 0.6
        while True:
            story = _story(rng, level, people, boxes)
            chain = tuple(rng.sample(people, order))
            events = log(story)
            answer = belief(events, chain)
            if answer and (not chain or not false or answer != belief(events, ())):
                break
        thinks = "".join(f" {'does ' if i == 0 else ''}{a} think{'s' if i else ''}" for i, a in enumerate(chain))
        question = f"Where{thinks} the {thing} is?" if chain else f"Where is the {thing}?"
        prompt = " ".join([_sentence(line, thing) for line in story] + [question])
        data = {"story": story, "chain": list(chain), "thing": thing}
        return Problem(self.name, level, prompt, answer, data=data)

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: every place with its witnesses; decompose: numbered places, who saw which; verify: chain by chain."""
        chain = tuple(problem.data["chain"])
        events = relevant(log(problem.data["story"]), chain)
        seen = [set(chain) <= set(e.witnesses) for e in events]
        steps = [f"{e.value} {' '.join(e.witnesses)}".strip() for e in events] + [problem.answer]
        numbers = range(1, len(events) + 1)
        groups = [[" ".join(f"{i} {e.value}" for i, e in zip(numbers, events, strict=True))]]
        groups += [[" ".join([a, *(str(i) for i, e in zip(numbers, events, strict=True) if a in e.witnesses)])]
                   for a in chain]  # fmt: skip
        last = max(i for i, s in zip(numbers, seen, strict=True) if s)
        if not chain:
            groups.append([f"last {last}"])
        checks, now = [], ""
        for e, s in zip(events, seen, strict=True):
            who = " ".join(f"{a} {'in' if a in e.witnesses else 'out'}" for a in chain)
            now, before = (e.value if s else now), now
            wrong = (before if s else e.value) if before or not s else ""
            checks.append(Check(f"{' '.join(e.witnesses)}: {now or 'none'}".strip(), f"{e.value} {who}".strip(),
                                f"{' '.join(e.witnesses)}: {wrong}" if wrong and wrong != now else "",
                                f"{'all saw' if s else 'not all saw'} {e.value}"))  # fmt: skip
        recipe = Recipe(steps, "places, who saw", groups, [f"{last} {problem.answer}"], checks)
        return gold(problem, strategy, rng, recipe)

    def space(self, level: int) -> int:
        """Names, object and first containers in order, times the agents who act first: a lower bound."""
        return perm(12, 2 if level == 1 else 3) * len(OBJECTS) * perm(5, 2) * 4


FAMILY: Family = _Belief()
