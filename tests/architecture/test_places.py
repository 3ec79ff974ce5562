"""One place per concept (docs/architecture.md): each rule names the file and line that breaks it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from places import SRC, calls, docstrings, dotted, imports, trees

from gnomon.protocol.tags import BOS, EOS, PAD, STRUCTURE_TOKENS, TAGS

LITERALS = (*TAGS, *STRUCTURE_TOKENS, BOS, EOS, PAD, "<plan:")
UNSEEDED = re.compile(
    r"(?:np|numpy)\.random\.\w+|torch\.(?:manual_seed|seed|initial_seed|random\.\w+)|torch\.cuda\.manual_seed\w*"
)
SAMPLERS = {f"torch.{n}" for n in ("rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal")}
WEIGHT_IO = ("pickle", "dill", "cloudpickle", "joblib", "safetensors", "torch.save", "torch.load")


def report(found: list[str]) -> None:
    assert not found, "\n".join(found)


def test_tag_literals_live_in_protocol_tags() -> None:
    found = []
    for name, tree in trees().items():
        if name == "protocol/tags.py":
            continue
        skip = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
                found += [f"{name}:{node.lineno} spells {tag!r}" for tag in LITERALS if tag in node.value]
    report(found)


def test_print_is_for_interfaces() -> None:
    report(
        [
            f"{name}:{call.lineno} prints; emit an event (base/telemetry.py)"
            for name, tree in trees().items()
            if not name.startswith("interfaces/")
            for called, call in calls(tree)
            if called in ("print", "sys.stdout.write")
        ]
    )


def test_one_backward_in_the_training_loop() -> None:
    where = [
        name
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    ]
    assert where == ["training/loop.py"]


def test_randomness_comes_from_seeds() -> None:
    found = []
    for name, tree in trees().items():
        if name == "base/seeds.py":
            continue
        # Initial weights come from the global generator, which seeds.seed_torch sets.
        weights = {id(n) for c, p in calls(tree) if c.endswith("Parameter") for n in ast.walk(p)}
        for called, call in calls(tree):
            named = any(dotted(a.func).endswith("derive") for a in ast.walk(call) if isinstance(a, ast.Call))
            bare = called.startswith("random.") or called == "Random" or bool(UNSEEDED.fullmatch(called))
            free = called in SAMPLERS and not any(k.arg == "generator" for k in call.keywords)
            if (bare and not named) or (free and id(call) not in weights):
                found.append(f"{name}:{call.lineno} {called}: take a generator from base/seeds.py")
    report(found)


def test_weights_pass_through_checkpoint() -> None:
    found = []
    for name, tree in trees().items():
        if name == "base/checkpoint.py":
            continue
        used = imports(tree) | {called for called, _ in calls(tree)}
        found += [f"{name} uses {u}" for u in sorted(used) for w in WEIGHT_IO if u == w or u.startswith(w + ".")]
    report(found)


def test_nothing_is_evaluated() -> None:
    """Model text is parsed as a literal at most."""
    report(
        [
            f"{name}:{call.lineno} calls {called}"
            for name, tree in trees().items()
            for called, call in calls(tree)
            if called in ("eval", "exec", "compile", "os.system", "sympy.sympify", "sympy.parse_expr")
        ]
    )


def test_files_and_functions_stay_readable() -> None:
    found = []
    for name, tree in trees().items():
        lines = (SRC / name).read_text(encoding="utf-8").count("\n")
        if lines > 400:
            found.append(f"{name} has {lines} lines; 400 is the limit")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > 60:
                    found.append(f"{name}:{node.lineno} {node.name} has {size} lines; 60 is the limit")
    report(found)


def test_no_unfinished_marks() -> None:
    marks = re.compile(r"\b(?:TODO|FIXME|XXX)\b|NotImplementedError")
    report(
        [
            f"{name}:{number} {line.strip()[:80]}"
            for name in trees()
            for number, line in enumerate((SRC / name).read_text(encoding="utf-8").splitlines(), 1)
            if marks.search(line)
        ]
    )


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (test_tag_literals_live_in_protocol_tags, f"x = 'a {TAGS[0]}'"),
        (test_print_is_for_interfaces, "print(1)"),
        (test_one_backward_in_the_training_loop, "loss.backward()"),
        (test_randomness_comes_from_seeds, "import random\nx = random.random()"),
        (test_randomness_comes_from_seeds, "import torch\nx = torch.rand(3)"),
        (test_weights_pass_through_checkpoint, "import torch\ntorch.save(1, 2)"),
        (test_weights_pass_through_checkpoint, "from safetensors.torch import load_file"),
        (test_nothing_is_evaluated, "eval('1')"),
    ],
)
def test_every_rule_can_fail(rule: object, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "trees", lambda: {"model/bad.py": ast.parse(code)})
    with pytest.raises(AssertionError):
        rule()  # type: ignore[operator]
