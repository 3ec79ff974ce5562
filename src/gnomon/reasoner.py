"""The one assembly point: backbone + codec + metacognitive layer, loaded from a name or a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch

from gnomon.base.atomic import write_atomic
from gnomon.base.errors import ModelError, unknown
from gnomon.base.seeds import derive
from gnomon.data.codec import Codec, OwnCodec
from gnomon.data.codec import fingerprint as codec_fingerprint
from gnomon.data.tokenizer import MODEL_FILE, Tokenizer
from gnomon.decoding.engine import Engine
from gnomon.decoding.room import allot
from gnomon.decoding.scope import Ledger
from gnomon.decoding.search import Vote, self_consistency
from gnomon.decoding.slack import Rules
from gnomon.metacognition import store
from gnomon.metacognition.decide import Decider, combine
from gnomon.model.backbone import Backbone, OwnBackbone
from gnomon.model.device import resolve
from gnomon.model.folder import CONFIG, MODEL_TYPE, load_decoder
from gnomon.model.native import own_backbone
from gnomon.model.overlay import FILE as OVERLAY_FILE
from gnomon.model.overlay import Overlay
from gnomon.protocol.graph import Graph, to_text
from gnomon.protocol.trace import Request, Trace

BASE_FILE = "base.json"  # in a folder that holds a metacognitive layer only: which base it belongs to
SHIPPED = ("nano",)
FOREIGN_MAX_THINK = 128  # a base that never learned to close its block should not fill its context
Budget = int | Literal["predicted"] | None


@dataclass(frozen=True)
class Answer:
    """What `ask` gives back. think: the nodes in text mode, one per line."""

    answer: str
    think: str
    graph: Graph
    trace: Trace

    def report(self) -> dict[str, Any]:
        """The schema of decisions.md §4 plus `think` and `answer`."""
        return {**self.trace.report(), "think": self.think, "answer": self.answer}


@dataclass
class Reasoner:
    """A base model with its tokenizer and, when there is one, its metacognitive layer.

    best_plan: family -> strategy with the highest val accuracy, stored when the model was shipped.
    max_think: think tokens where nobody names a number (None = what the context leaves). rules: soft rules for
    everything that is decoded (decoding.slack.factory). running: estimate again at boundaries. modulate: sample
    thoughts as the layer's decoding policy says. overlay: what training changed of the base, already in `backbone`.
    """

    name: str
    backbone: Backbone
    codec: Codec
    base: str
    decider: Decider | None = None
    folder: Path | None = None
    best_plan: dict[str, str] = field(default_factory=dict)
    max_think: int | None = None
    rules: Rules | None = None
    running: bool = False
    modulate: bool = False
    overlay: Overlay | None = None

    @classmethod
    def load(cls, name: str | Path, device: str = "cpu") -> Reasoner:
        """A shipped model by name ("nano"), "smollm2" once prepared, or a local folder; never the Hub.

        device: cpu, cuda, or auto. Raises ModelError naming what is missing, UnknownNameError with the nearest name.
        """
        folder = _folder(str(name))
        pointer = folder / BASE_FILE
        if pointer.is_file():
            found = cls.load(_below(pointer), device).with_layer(folder)
            if found.decider is None:
                raise ModelError(
                    f"{folder} names its base in {BASE_FILE} but holds no {store.CONFIG_FILE}; copy it again"
                )
            return found
        backbone, codec = _base(folder, device)
        most = None if isinstance(backbone, OwnBackbone) else FOREIGN_MAX_THINK
        base = fingerprint(backbone)
        bare = cls(str(name), backbone, codec, base, folder=folder, max_think=most)
        return bare.with_layer(folder)

    def with_layer(self, folder: Path) -> Reasoner:
        """The same base with the metacognitive layer of `folder` (unchanged when it holds none).

        This one keeps the base as it is: a layer that changes it acts on a copy, which shares all other weights.
        Raises ModelError where the base carries the changes of another layer already.
        """
        found = store.load(folder, self.base, codec_fingerprint(self.codec))
        if found is None:
            return self
        if self.overlay is not None:
            raise ModelError(
                f"{self.name} carries what training changed of its base ({OVERLAY_FILE}), and the layer in {folder} "
                "belongs to the base without it; load the base, then with_layer(folder)"
            )
        heads, card, steerer, adaptation = found
        overlay, backbone = Overlay.load(folder), self.backbone
        if adaptation is not None and (overlay is None or overlay.fingerprint() != adaptation):
            raise ModelError(
                f"the layer in {folder} was trained with changes to its base that are not the ones in {OVERLAY_FILE} "
                f"({'missing' if overlay is None else 'of another layer'}); copy the whole folder again"
            )
        if overlay is not None:
            from gnomon.model.load import rebuilt

            backbone = rebuilt(backbone, overlay.over(backbone.module))  # type: ignore[attr-defined]
        best = {**self.best_plan, **(card.best_plan if card else {})}
        return replace(self, backbone=backbone, decider=Decider(heads, card, steerer), best_plan=best, overlay=overlay)

    def save_layer(self, folder: Path) -> None:
        """Write the metacognitive layer to `folder` and, unless the base lies there too, which base it belongs to."""
        if self.decider is None:
            raise ModelError(f"{self.name} has no metacognitive layer to save; train one with `gnomon train metacog`")
        layer = self.decider
        changes = None if self.overlay is None else self.overlay.fingerprint()
        tokenizer = codec_fingerprint(self.codec)
        with _together(folder, (store.CARD_FILE, OVERLAY_FILE)) as beside:
            store.save(beside, layer.heads, layer.card, self.base, layer.steerer, tokenizer, changes)
            if self.overlay is not None:
                self.overlay.save(beside)
            if not (folder / "config.json").is_file():
                base = self.name if self.folder is None or self.name in SHIPPED else str(self.folder.resolve())
                write_atomic(beside / BASE_FILE, json.dumps({"base": base}) + "\n")

    def unpredicted(self) -> Reasoner:
        """The same model without predictions, policies and rules; gate and adapters stay (for labels)."""
        steerer = None if self.decider is None else self.decider.steerer
        decider = None if self.decider is None or steerer is None else Decider(self.decider.heads, None, steerer)
        return replace(self, decider=decider, rules=None, modulate=False)

    def engine(self, max_batch: int = 64) -> Engine:
        return Engine(
            self.backbone,
            self.codec.layout,
            self.decider,
            max_batch=max_batch,
            max_think=self.max_think,
            rules=self.rules,
            running=self.running,
            modulate=self.modulate,
        )

    def request(self, ident: str, text: str, **options: Any) -> Request:
        """A Request for a prompt text; options as in `protocol.trace.Request`."""
        return Request(ident, tuple(self.codec.encode_prompt(text)), **options)

    def read(self, trace: Trace) -> Answer:
        """A finished trace as texts."""
        graph = self.codec.think_graph(trace.think_ids, truncated=not trace.closed_naturally)
        answer = self.codec.decode(trace.answer_ids)
        return Answer(answer, to_text(graph.nodes), graph, trace)

    def ask(
        self,
        text: str,
        plan: str = "predicted",
        budget: Budget = "predicted",
        temperature: float = 0.0,
        seed: str = "ask",
        max_answer_tokens: int | None = None,
        ledger: Ledger | None = None,
    ) -> Answer:
        """Answer one question. Without a metacognitive layer "predicted" means steps and no cap.

        ledger: what the budget covers beyond this question (a session, a tool loop); it is charged.
        """
        request = self._question(text, plan, budget, temperature, seed, max_answer_tokens)
        request = request if ledger is None else ledger.open(request)
        trace = self.engine(1).run([request])[0]
        if ledger is not None:
            ledger.charge(trace)
        return self.read(trace)

    def _question(
        self, text: str, plan: str, budget: Budget, temperature: float, seed: str, max_answer_tokens: int | None
    ) -> Request:
        if self.decider is None:
            plan = "steps" if plan == "predicted" else plan
            budget = None if budget == "predicted" else budget
        return self.request(
            "ask",
            text,
            plan=plan,
            budget=budget,
            temperature=temperature,
            seed=derive(seed),
            max_answer_tokens=max_answer_tokens,
        )

    def vote(
        self,
        text: str,
        votes: int = 5,
        plan: str = "predicted",
        budget: Budget = "predicted",
        temperature: float = 0.8,
        seed: str = "ask",
        max_answer_tokens: int | None = None,
    ) -> Vote:
        """The majority answer of several sampled paths, with more paths under `verify` where they disagree."""
        request = self._question(text, plan, budget, temperature, seed, max_answer_tokens)
        reflect = "verify" if "verify" in self.codec.strategies else None
        return self_consistency(
            self.engine(), request, votes, read=lambda t: self.codec.decode(t.answer_ids), reflect=reflect
        )

    def decide(self, text: str) -> dict[str, Any]:
        """Plan, budget and confidence for a prompt without generating (`ask --no-decode`).

        Raises BudgetError, as `ask` does, where the context leaves no room for an answer.
        """
        if self.decider is None:
            raise ModelError(f"{self.name} has no metacognitive layer; train one with `gnomon train metacog`")
        prompt = self.codec.encode_prompt(text)
        layout = self.codec.layout
        allot(self.backbone.context, len(prompt), layout.overhead, None)
        cache = self.backbone.new_cache(1, len(prompt) + layout.overhead)
        out = self.backbone.extend(cache, [prompt], logits="none", taps=True)
        assert out.taps is not None
        plan = self.decider.plan(out.taps)[0]
        tags = (*layout.plan_ids(plan.plan), *layout.think)
        out = self.backbone.extend(cache, [tags], logits="none", taps=True)
        assert out.taps is not None
        sampling = self.decider.policy(out.taps, [plan.plan])[0] if self.modulate else None
        decision = combine(plan, self.decider.budget(out.taps, [plan.plan])[0], sampling)
        return {
            "plan": decision.plan,
            "plan_probs": decision.plan_probs,
            "budget": {"predicted": decision.budget_predicted, "clipped": decision.budget_clipped},
            "confidence": {"before": decision.confidence, "after": None, "calibrated": decision.calibrated},
            **({} if decision.sampling is None else {"sampling": asdict(decision.sampling)}),
        }


@contextmanager
def _together(folder: Path, optional: Sequence[str]) -> Iterator[Path]:
    """A folder inside `folder` to write into; its files take their places when all of them are written.

    A full disk leaves what was there. optional: files that belong to what lay here before, unless written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".tmp-layer-", dir=folder))
    try:
        yield beside
        for name in optional:
            if not (beside / name).is_file():
                (folder / name).unlink(missing_ok=True)
        for path in sorted(beside.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def fingerprint(backbone: Backbone) -> str:
    """Hash of a base's parameter names, shapes and a spread sample of every parameter's values."""
    digest = hashlib.sha256()
    module: torch.nn.Module = backbone.module  # type: ignore[attr-defined]
    for name, tensor in sorted(module.named_parameters()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float32)
        digest.update(f"{name}:{tuple(tensor.shape)}".encode() + sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def shipped(name: str) -> Path:
    """Folder of a model inside the package."""
    return Path(str(resources.files("gnomon") / "assets" / name))


def _folder(name: str) -> Path:
    if name in SHIPPED:
        return shipped(name)
    if name == "smollm2":
        from gnomon.model.gguf import smollm2_folder

        return smollm2_folder()
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf":
        from gnomon.model.load import resolve_base

        return resolve_base(folder)
    if folder.exists():
        return folder
    if "/" not in name and "\\" not in name:
        raise unknown("model", name, (*SHIPPED, "smollm2", "<a local folder>"))
    raise ModelError(f"no model folder at {folder.resolve()}; give a folder with config.json and weights, or a name")


def is_own(name: str) -> bool:
    """Whether a model name or folder is one of our own decoders (a folder of a layer counts as its base)."""
    folder = _folder(name)
    pointer = folder / BASE_FILE
    if pointer.is_file():
        return is_own(_below(pointer))
    return _own(folder)


def _below(pointer: Path) -> str:
    """The base that a folder with a layer of its own points to; it must be there and must not be a pointer itself."""
    try:
        name = str(json.loads(pointer.read_text(encoding="utf-8"))["base"])
    except (ValueError, KeyError, TypeError):
        raise ModelError(f'{pointer} is damaged; it should read {{"base": "<name or folder>"}}') from None
    try:
        below = _folder(name)
    except ModelError as error:
        raise ModelError(
            f"the layer in {pointer.parent} belongs to the base {name!r}, which is not there: {error}"
        ) from None
    if (below / BASE_FILE).is_file():
        raise ModelError(f"{pointer} names {name!r}, which is a layer, not a base; name the folder with the weights")
    return name


def _own(folder: Path) -> bool:
    """By model_type where config.json can be read (foreign bases may bring a tokenizer.model too), else by our file."""
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return (folder / MODEL_FILE).is_file()
    return bool(kind == MODEL_TYPE)


def _base(folder: Path, device: str) -> tuple[Backbone, Codec]:
    if _own(folder):
        return own_backbone(load_decoder(folder).to(resolve(device))), OwnCodec(Tokenizer.load(folder))
    from gnomon.data.foreign import TextCodec
    from gnomon.model.load import load_backbone

    return load_backbone(folder, device=device), TextCodec.load(folder)


def from_parts(name: str, backbone: Backbone, codec: Codec) -> Reasoner:
    """A Reasoner without a layer from a backbone and a codec that are in memory (training, tests)."""
    return Reasoner(name, backbone, codec, fingerprint(backbone))
