"""Imports go one way: the contracts of pyproject.toml hold, and light imports stay light."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees src/."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    call = [sys.executable, "-c", code]
    return subprocess.run(call, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_import_contracts_hold() -> None:
    tool = shutil.which("lint-imports", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool, "import-linter is part of the dev extra"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    call = [tool, "--no-cache"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "gnomon",
        "gnomon.base.config",
        "gnomon.base.telemetry",
        "gnomon.base.runs",
        "gnomon.base.checkpoint",
        "gnomon.protocol.graph",
        "gnomon.tasks.mixture",
        "gnomon.tasks.procedural",
        "gnomon.interfaces.cli",
    ],
)
def test_light_modules_import_no_torch(module: str) -> None:
    done = python(
        f"import sys, {module}; heavy = [m for m in ('torch', 'transformers', 'reasoning_gym') if m in sys.modules]; "
        "sys.exit(','.join(heavy) or 0)"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_family_draws_without_torch() -> None:
    done = python(
        "import sys; from gnomon.tasks.procedural import problems; problems('all', 'train', 's', 13); "
        "sys.exit('torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_protocol_is_standard_library_only() -> None:
    done = python(
        "import sys; before = set(sys.modules); import pkgutil, importlib, gnomon.protocol as p\n"
        "[importlib.import_module('gnomon.protocol.' + m.name) for m in pkgutil.iter_modules(p.__path__)]\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "sys.exit(','.join(sorted(new - set(sys.stdlib_module_names) - {'gnomon'})) or 0)"
    )
    assert done.returncode == 0, done.stderr[-2000:]
