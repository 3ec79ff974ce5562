"""The operation lists behind `programs`: their text in Python and their interpreter. Nothing executes text."""

from __future__ import annotations

# ["set", v, n] | ["let", v, w, sign, n] | ["aug", v, sign, n] | ["if", v, limit, sign, n] | ["for", v, times, sign, n]
Op = list
UNDO = {"+": "-", "-": "+", "*": "/"}


def calc(a: int, sign: str, b: int) -> int:
    """a sign b for + - *."""
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def show(op: Op) -> str:
    """One operation as a line of Python."""
    kind, v = op[0], op[1]
    if kind == "set":
        return f"{v} = {op[2]}"
    if kind == "let":
        return f"{v} = {op[2]} {op[3]} {op[4]}"
    if kind == "aug":
        return f"{v} {op[2]}= {op[3]}"
    if kind == "if":
        return f"if {v} > {op[2]}: {v} = {v} {op[3]} {op[4]}"
    return f"for i in range({op[2]}): {v} {op[3]}= {op[4]}"


def run_op(op: Op, env: dict[str, int]) -> list[str]:
    """Apply one operation to `env`; returns the sums it needs in words ("7 + 5 = 12")."""
    kind, v, work = op[0], op[1], []
    if kind == "set":
        env[v] = op[2]
        return [f"{v} = {op[2]}"]
    if kind == "if" and env[v] <= op[2]:
        return [f"{env[v]} > {op[2]} False"]
    if kind == "let":
        env[v] = env[op[2]]
    times = op[2] if kind == "for" else 1
    sign, n = op[-2], op[-1]
    for _ in range(times):
        before = env[v]
        env[v] = calc(before, sign, env[n] if isinstance(n, str) else n)
        work.append(f"{before} {sign} {env[n] if isinstance(n, str) else n} = {env[v]}")
    return [f"{before} > {op[2]} True", *work] if kind == "if" else work
