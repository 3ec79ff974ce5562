"""gnomon: small language models that know how much to think.

Importing this package imports no torch; names are loaded when they are first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Reasoner": "gnomon.reasoner",
    "Answer": "gnomon.reasoner",
    "Request": "gnomon.protocol.trace",
    "Trace": "gnomon.protocol.trace",
    "Graph": "gnomon.protocol.graph",
    "Node": "gnomon.protocol.graph",
    "Problem": "gnomon.tasks.problem",
    "problems": "gnomon.tasks.procedural",
    "verify": "gnomon.tasks.verifiers",
    "Engine": "gnomon.decoding.engine",
    "BudgetConfig": "gnomon.decoding.budget",
    "BudgetState": "gnomon.decoding.budget",
    "Card": "gnomon.metacognition.calibration",
    "MetacogHeads": "gnomon.metacognition.heads",
    "MetacogConfig": "gnomon.metacognition.config",
    "DecoderConfig": "gnomon.model.decoder",
    "Decoder": "gnomon.model.decoder",
    "evaluate": "gnomon.evaluation.runner",
    "sweep": "gnomon.evaluation.runner",
    "GnomonError": "gnomon.base.errors",
}
__all__ = [
    "Answer",
    "BudgetConfig",
    "BudgetState",
    "Card",
    "Decoder",
    "DecoderConfig",
    "Engine",
    "GnomonError",
    "Graph",
    "MetacogConfig",
    "MetacogHeads",
    "Node",
    "Problem",
    "Reasoner",
    "Request",
    "Trace",
    "__version__",
    "evaluate",
    "problems",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'gnomon' has no attribute {name!r}; it offers {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_NAMES[name]), name)
