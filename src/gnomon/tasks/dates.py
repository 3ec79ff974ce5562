"""calendar: weekdays and dates in a year without a 29 February; the file is not named calendar, like the stdlib's.

Levels: 1 a weekday 1–13 days from (or before) today, given that of a day at most two away · 2 the same, given
yesterday, today or tomorrow, 14–60 days · 3 the date 1–28 days after a date · 4 the weekday of a date one or two
months on · 5 the same, three to eleven months on, in one year.
Space: exactly 7·5·2·13 = 910 · 7·3·2·47 = 1,974 · 365·28 = 10,220; above, at least 7·28·28 per pair of months.
"""

from __future__ import annotations

from random import Random

from gnomon.tasks.golds import Parts, Slip, Step, make_gold
from gnomon.tasks.problem import Family, Gold, Problem

DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = tuple("January February March April May June July August September October November December".split())
LENGTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ANCHOR = {0: "Today is", 1: "Tomorrow is", -1: "Yesterday was", 2: "In 2 days it is", -2: "2 days ago it was"}
GAP = {4: (1, 2), 5: (3, 11)}  # level -> months between the two dates
SPACE = {1: 910, 2: 1_974, 3: 10_220, 4: 21 * 7 * 784, 5: 45 * 7 * 784}


def _join(*texts: str) -> str:
    return " ".join(t for t in texts if t)


def _mod7(n: int) -> str:
    """ "44-42=2"; a small number stays as it is; a negative one is lifted."""
    low = n % 7
    return f"{n}{low - n:+d}={low}" if n != low else ""


def _jump(day: int, shift: int) -> Step:
    """ "Sunday +2 Tuesday", checked by walking day by day."""
    walk = range(day, day + shift + 1) if shift >= 0 else range(day, day + shift - 1, -1)
    head, right = f"{DAYS[day]} {'-' if shift < 0 else '+'}{abs(shift)}", day + shift
    slips = tuple(Slip(f"{head} {DAYS[(right + e) % 7]}", "one day off") for e in (1, -1))
    return Step(f"{head} {DAYS[right % 7]}", " ".join(DAYS[d % 7] for d in walk), slips)


def _weekday_in(data: dict[str, int]) -> tuple[list[Step], Parts]:
    """Levels 1 and 2: days modulo 7, then a jump."""
    given, anchor, n, sign = data["given"], data["anchor"], data["n"], data["sign"]
    today, low = (given - anchor) % 7, n % 7
    checked = []
    if anchor:
        slip = Slip(f"today {DAYS[(given + anchor) % 7]}", "wrong side")
        first, last = (today, today + anchor) if anchor > 0 else (given, given - anchor)
        check = " ".join(DAYS[d % 7] for d in range(first, last + 1))
        checked.append(Step(f"today {DAYS[today]}", check, (slip,)))
    if n > 6:
        wrong = (low + 1) % 7
        check = f"{n // 7}*7={n - low} {n - low}+{low}={n}"
        checked.append(Step(_mod7(n), check, (Slip(f"{n}-{n - low}={wrong}", "remainder"),)))
    checked.append(_jump(today, sign * low))
    tens, ones = n // 10 * 10, n % 10
    split = _join(_mod7(tens), f"{tens % 7}+{ones}={tens % 7 + ones}", _mod7(tens % 7 + ones)) if n > 9 else _mod7(n)
    total = today + sign * low
    merge = _join(f"{today}{'-' if sign < 0 else '+'}{low}={total}", _mod7(total), DAYS[total % 7])
    lead = "today " if anchor else ""
    groups = ((f"{lead}{DAYS[today]} {today}",), (split or str(n),))
    return checked, Parts("day shift", groups, (merge,))


def _date_after(data: dict[str, int]) -> tuple[list[Step], Parts]:
    """Level 3: add the days, take the month's length off when the sum is past its end."""
    month, day, n = data["month"], data["day"], data["n"]
    total, length, name = day + n, LENGTH[month], MONTHS[month]
    columns = f"{day % 10}+{n % 10}={day % 10 + n % 10}"
    if day > 9 or n > 9:
        carry = (day % 10 + n % 10) // 10
        columns += f" {day // 10}+{n // 10}{'+1' if carry else ''}={day // 10 + n // 10 + carry}"
    if total > length:
        left, after = total - length, MONTHS[(month + 1) % 12]
        place = f"{total}-{length}={left} {after} {left}"
        slips = (Slip(f"{total}-{length}={left + 1} {after} {left + 1}", "one day off"),)
        second = Step(f"{name} {length} {place}", f"{length}+{left}={total}", slips)
    else:
        place = f"{name} {total}"
        wrong = Slip(f"{name} {length} {MONTHS[(month + 1) % 12]} {total}", "same month", f"{total}<{length + 1}")
        second = Step(f"{name} {length} {place}", f"{total}<{length + 1}", (wrong,))
    first_slips = tuple(Slip(f"{day}+{n}={total + e}", "sum") for e in (1, 10))
    checked = [Step(f"{day}+{n}={total}", columns, first_slips), second]
    return checked, Parts("month sum", ((f"{name} {length}",), (f"{columns} {total}",)), (place,))


def _weekday_of(data: dict[str, int]) -> tuple[list[Step], Parts]:
    """Levels 4 and 5: month lengths modulo 7 added up month by month, then the days, then a jump."""
    m1, d1, m2, d2, day = (data[k] for k in ("m1", "d1", "m2", "d2", "given"))
    run, work, coarse, fine = 0, [], [], []
    for m in range(m1, m2):
        extra = LENGTH[m] - 28
        text = f"{LENGTH[m]}-28={extra}" if m == m1 else _join(f"{run}+{extra}={run + extra}", _mod7(run + extra))
        run = (run + extra) % 7
        coarse.append(f"{MONTHS[m]} {run}")
        work.append(text)
        fine.append(f"{MONTHS[m]} {text}")
    gap = d2 - d1
    days = _join(f"{d2}-{d1}={gap}", _mod7(gap))
    shift = run + gap % 7
    add = _join(f"{run}+{gap % 7}={shift}", _mod7(shift))
    last = Slip(" ".join([*coarse[:-1], f"{MONTHS[m2 - 1]} {(run + 1) % 7}"]), MONTHS[m2 - 1])
    back = d1 + gap % 7
    wrong_sum = Slip(_join(f"{run}+{gap % 7}={shift + 1}", _mod7(shift + 1)), "sum")
    wrong_days = Slip(_join(f"{d2}-{d1}={gap + 1}", _mod7(gap + 1)), "days")
    checked = [
        Step(" ".join(coarse), " ".join(work), (last,)),
        Step(days, _join(f"{d1}+{gap % 7}={back}", f"{back}{d2 - back:+d}={d2}" if back != d2 else ""), (wrong_days,)),
        Step(add, f"{shift}-{run}={gap % 7}", (wrong_sum,)),
        _jump(day, shift % 7),
    ]
    merge = (add, f"{DAYS[day]} +{shift % 7} {DAYS[(day + shift) % 7]}")
    return checked, Parts("months days", ((" ".join(fine),), (days,)), merge)


class Calendar:
    """Weekdays and dates."""

    name = "calendar"

    def generate(self, rng: Random, level: int) -> Problem:
        """Dates are uniform over the months, then over the month's days."""
        given = rng.randrange(7)
        if level <= 2:
            low, high = (1, 13) if level == 1 else (14, 60)
            anchor, sign = rng.choice((0, 1, -1, 2, -2) if level == 1 else (0, 1, -1)), rng.choice((1, -1))
            n = rng.randint(low, high)
            days = f"{n} day{'s' if n > 1 else ''}"
            ask = f"What day is it in {days}?" if sign > 0 else f"What day was it {days} ago?"
            answer, prompt = DAYS[(given - anchor + sign * n) % 7], f"{ANCHOR[anchor]} {DAYS[given]}. {ask}"
            return Problem(
                self.name, level, prompt, answer, "exact", {"given": given, "anchor": anchor, "n": n, "sign": sign}
            )
        if level == 3:
            month, n = rng.randrange(12), rng.randint(1, 28)
            day = rng.randint(1, LENGTH[month])
            over = day + n - LENGTH[month]
            answer = f"{MONTHS[(month + 1) % 12]} {over}" if over > 0 else f"{MONTHS[month]} {day + n}"
            prompt = f"What date is {n} day{'s' if n > 1 else ''} after {MONTHS[month]} {day}?"
            return Problem(self.name, level, prompt, answer, "exact", {"month": month, "day": day, "n": n})
        low, high = GAP[level]
        m1, m2 = rng.choice([(a, b) for a in range(12) for b in range(a + low, min(12, a + high + 1))])
        d1, d2 = rng.randint(1, LENGTH[m1]), rng.randint(1, LENGTH[m2])
        answer = DAYS[(given + sum(LENGTH[m1:m2]) + d2 - d1) % 7]
        prompt = f"{MONTHS[m1]} {d1} is a {DAYS[given]}. What day is {MONTHS[m2]} {d2}?"
        return Problem(
            self.name, level, prompt, answer, "exact", {"given": given, "m1": m1, "d1": d1, "m2": m2, "d2": d2}
        )

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: days modulo 7, then a jump · decompose: start and shift apart · verify: inverse sums and walks."""
        work = _weekday_in if problem.level <= 2 else _date_after if problem.level == 3 else _weekday_of
        checked, parts = work(dict(problem.data))
        return make_gold(problem, strategy, rng, steps=[s.text for s in checked], parts=parts, checked=checked)

    def space(self, level: int) -> int:
        """Distinct texts of the level (exact up to level 3, a lower bound above)."""
        return SPACE[level]


FAMILY: Family = Calendar()
