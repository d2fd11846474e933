"""Does a damaged KV cache show, and does the gate tell harmless codecs from harmful ones?

    python benchmarks/bench_damage.py [MODEL] [--samples 256] [--json OUT]

Recall over drawn tasks and KL against the undamaged bf16 engine, for planted damage and for codecs; then the
gate's verdict on codecs, on the model and on twins whose keys or values are harder to encode. Every layer and
head is damaged once on contexts of their own; the most harmful of each kind is measured on fresh ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import run_claims
from harness import cpu_name
from transformers import AutoTokenizer

from kvtune import CacheConfig, Engine, EngineConfig, SchedulerConfig
from kvtune.engine import EngineTarget, LoadedModel, load_model
from kvtune.errors import UsageError
from kvtune.quality import (
    MARGINS,
    TASKS,
    Material,
    QualityVerdict,
    ReplaySettings,
    bootstrap_mean,
    divergence,
    draw,
    is_bit_equal,
    judge,
    record_reference,
    replay,
    replay_decode,
    wilson_interval,
)
from kvtune.target import ScoreItem, Scores
from kvtune.testing.damage import Damage, RoundKeys, ShuffleValues, ZeroKeys, planted
from kvtune.testing.reference.corpus import load_corpus
from kvtune.testing.reference.dialogue import Dialogue, DialogueEncoder, material
from kvtune.testing.variants import BiasedKeys, HeavyTailedValues, Variant, write_variant
from kvtune.workload import TokenRequest

CHUNK, AA_CHUNK = 512, 96  # tokens per step, and of the A/A control
KV_BUDGET = "64MiB"
CODECS = (("int8", "int8"), ("int8", "int4"), ("int4", "int8"))
GATED = (("int4", "bf16"), ("bf16", "int4"), ("int8", "int8"))
GATE_LENGTHS = (96, 512, 1024, 2000)
REPLAY = ReplaySettings(
    chunk=CHUNK, aa_chunk=AA_CHUNK, num_decode=16, decode_max_length=256, decode_budget_tokens=2048
)
MARGIN = MARGINS["near-lossless"]
CLEARLY_OVER = 10.0
"""A KL counts as well over the A/A floor when its lower bound is this many times the floor, and over the
gate's margin: where two chunkings compute the same bits the floor is zero."""


@dataclass(frozen=True)
class Asked:
    """Contexts with their questions, as the engine scores them."""

    dialogues: Sequence[Dialogue]
    items: Sequence[ScoreItem]

    @classmethod
    def recall(cls, args: argparse.Namespace, source: Material, encoder: DialogueEncoder, seed: str) -> Asked:
        count = args.screen if seed == "screen" else -(-args.samples // args.questions)
        rng = random.Random(f"{args.seed} {seed}")
        dialogues = [
            encoder.dialogue(
                draw("recall", rng, source, num_tokens=args.tokens, num_questions=args.questions)
            )
            for _ in range(count)
        ]
        items = [
            ScoreItem(
                item_id=str(index), prompt_token_ids=dialogue.prompt, continuation=dialogue.continuation
            )
            for index, dialogue in enumerate(dialogues)
        ]
        return cls(dialogues, items)

    def rows(self, index: int) -> list[int]:
        """Rows of the scores that predict answers; the others predict questions nobody could know."""
        dialogue = self.dialogues[index]
        first = dialogue.answers[0][0]
        return [row - first for start, end in dialogue.answers for row in range(start, end)]


class Ruler:
    """The undamaged bf16 engine's scores, its A/A floor, and what others differ from it by."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self.asked = asked
        self.base = score(engine, asked, CHUNK)
        self.repeated = score(engine, asked, AA_CHUNK)
        self.right = self._right(self.base)
        self.floor = self._kl(self.repeated)

    def measure(self, scores: Sequence[Scores]) -> dict[str, Any]:
        """Recall with its Wilson bounds, its paired change in points, and KL in nats per answer token."""
        right, kl = self._right(scores), self._kl(scores)
        weights = [len(self.asked.rows(index)) for index in range(len(scores))]
        clusters = [item.item_id for item in self.asked.items]
        excess = bootstrap_mean(kl - self.floor, clusters, rng=np.random.default_rng(0), weights=weights)
        low, high = wilson_interval(sum(right), len(right))
        return {
            "recall": sum(right) / len(right), "n": len(right), "recall_low": low, "recall_high": high,
            "points": 100 * (sum(right) - sum(self.right)) / len(right),
            "lost": sum(was and not is_ for was, is_ in zip(self.right, right, strict=True)),
            "gained": sum(is_ and not was for was, is_ in zip(self.right, right, strict=True)),
            "kl": float(np.average(kl, weights=weights)),
            "kl_floor": float(np.average(self.floor, weights=weights)),
            "kl_excess": excess.to_dict(),
        }  # fmt: skip

    def _right(self, scores: Sequence[Scores]) -> list[bool]:
        pairs = zip(self.asked.dialogues, scores, strict=True)
        return [answer for dialogue, one in pairs for answer in dialogue.is_answered(one.argmax.tolist())]

    def _kl(self, scores: Sequence[Scores]) -> np.ndarray:
        """Mean over the answer tokens of each context."""
        pairs = enumerate(zip(self.base, scores, strict=True))
        return np.array([divergence(a, b).kl[self.asked.rows(index)].mean() for index, (a, b) in pairs])


def score(engine: Engine, asked: Asked, chunk: int = CHUNK) -> list[Scores]:
    return engine.score(asked.items, num_top=engine.loaded.vocab_size, chunk=chunk)


def start(loaded: LoadedModel, k_codec: str = "bf16", v_codec: str = "bf16") -> Engine:
    return Engine(
        loaded,
        cache=CacheConfig(kv_budget=KV_BUDGET, k_codec=k_codec, v_codec=v_codec, enable_prefix_caching=False),
        scheduler=SchedulerConfig(),
        config=EngineConfig(),
    )


# ---------------------------------------------------------------- planted damage and codecs


def candidates(loaded: LoadedModel, beyond: int) -> dict[str, dict[str, Damage]]:
    """Damages by kind and by where they sit: every layer, every KV head."""
    layers = loaded.spec.layers
    return {
        "zero_keys": {f"layer {i}": ZeroKeys(layer=i, beyond=beyond) for i in range(len(layers))},
        "shuffle_values": {
            f"layer {i} head {head}": ShuffleValues(layer=i, head=head)
            for i, layer in enumerate(layers)
            for head in range(layer.num_kv_heads)
        },
        "round_keys_2_bits": {"all layers": RoundKeys(bits=2)},
    }


def screen(
    engine: Engine, ruler: Ruler, kinds: Mapping[str, Mapping[str, Damage]]
) -> dict[str, dict[str, Any]]:
    """Each damage measured; by kind and place."""
    found: dict[str, dict[str, Any]] = {}
    for kind, places in kinds.items():
        for place, damage in places.items():
            with planted(engine, damage):
                found.setdefault(kind, {})[place] = ruler.measure(score(engine, ruler.asked))
            say(f"screen {kind} {place}: {line(found[kind][place])}")
    return found


def most_harmful(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return min(rows, key=lambda place: (rows[place]["recall"], -rows[place]["kl"]))


def damage_rows(
    loaded: LoadedModel, screened: Mapping[str, Any], asked: Asked, beyond: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, measured): undamaged, the most harmful damage of each kind, codecs; on fresh contexts."""
    kinds = candidates(loaded, beyond)
    with start(loaded) as engine:
        ruler = Ruler(engine, asked)
        yield "undamaged", ruler.measure(ruler.base)
        yield "undamaged, A/A", ruler.measure(ruler.repeated)
        for kind, rows in screened.items():
            place = most_harmful(rows)
            with planted(engine, kinds[kind][place]):
                measured = ruler.measure(score(engine, asked))
            yield kind, measured | {"place": place, "chosen_from": len(rows)}
    for k_codec, v_codec in CODECS:
        with start(loaded, k_codec, v_codec) as engine:
            yield f"{k_codec}/{v_codec}", ruler.measure(score(engine, asked))


# ---------------------------------------------------------------- the gate


def gate_requests(source: Material, encoder: DialogueEncoder, count: int, seed: int) -> list[TokenRequest]:
    """One question of every task in turn, at several lengths; answers as long as the true ones."""
    rng = random.Random(f"{seed} gate")
    requests: list[TokenRequest] = []
    for index in range(count):
        name = list(TASKS)[index % len(TASKS)]
        length = GATE_LENGTHS[index // len(TASKS) % len(GATE_LENGTHS)]
        dialogue = encoder.dialogue(draw(name, rng, source, num_tokens=length))
        requests.append(
            TokenRequest(
                request_id=f"{name}-{index}", arrival_s=0.0, prompt_token_ids=dialogue.prompt,
                max_tokens=len(dialogue.continuation), tags={"task": name},
            )
        )  # fmt: skip
    return requests


def gate(
    folder: Path, requests: Sequence[TokenRequest]
) -> tuple[dict[str, QualityVerdict], Sequence[Scores]]:
    """Verdicts of the gated codecs on one model, and its undamaged scores."""
    target = EngineTarget(
        folder,
        cache=CacheConfig(kv_budget=KV_BUDGET),
        config=EngineConfig(num_threads=torch.get_num_threads()),
    )
    with target.start({"k_codec": "bf16", "v_codec": "bf16"}) as running:
        reference = record_reference(running, requests, REPLAY)
    verdicts: dict[str, QualityVerdict] = {}
    for k_codec, v_codec in GATED:
        with target.start({"k_codec": k_codec, "v_codec": v_codec}) as running:
            verdicts[f"{k_codec}/{v_codec}"] = judge(
                reference, replay(running, reference), margin=MARGIN, is_lossy=True,
                rng=np.random.default_rng(0),
                decode_scores=replay_decode(
                    running, reference.items, reference.decode_items, num_top=reference.num_top
                ),
            )  # fmt: skip
    return verdicts, reference.scores


def float32_scores(folder: Path, requests: Sequence[TokenRequest]) -> list[Scores]:
    """Scores of a few requests, computed and cached in float32."""
    items = [
        ScoreItem(item_id=r.request_id, prompt_token_ids=r.prompt_token_ids[:-8],
                  continuation=r.prompt_token_ids[-8:])
        for r in requests[:8]
    ]  # fmt: skip
    with Engine.from_pretrained(
        folder,
        cache=CacheConfig(kv_budget=KV_BUDGET, k_codec="fp32", v_codec="fp32"),
        config=EngineConfig(dtype="float32"),
    ) as engine:
        return engine.score(items, num_top=engine.loaded.vocab_size)


def same_bits(one: Sequence[Scores], other: Sequence[Scores]) -> bool:
    return all(is_bit_equal(a, b) for a, b in zip(one, other, strict=True))


def gate_rows(
    model: Path, requests: Sequence[TokenRequest], sigmas: Sequence[float], text: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model or variant, verdicts and whether full-precision outputs are bit-equal to the model's)."""
    variants: dict[str, Variant | None] = {"model": None, "heavy_tailed_values": HeavyTailedValues()}
    variants |= {f"biased_keys_{sigma:g}": BiasedKeys(sigma=sigma, token_ids=text) for sigma in sigmas}
    with tempfile.TemporaryDirectory() as scratch:
        own: tuple[Sequence[Scores], Sequence[Scores]] | None = None
        for name, variant in variants.items():
            folder = write_variant(model, Path(scratch) / name, variant) if variant else model
            verdicts, scores = gate(folder, requests)
            exact = scores, float32_scores(folder, requests)
            own = own or exact
            yield (
                name,
                {
                    "bf16_bit_equal": same_bits(own[0], exact[0]),
                    "float32_bit_equal": same_bits(own[1], exact[1]),
                    "verdicts": {codecs: verdict.to_dict() for codecs, verdict in verdicts.items()},
                },
            )


# ---------------------------------------------------------------- what must show


def checks(rows: Mapping[str, Mapping[str, Any]], gated: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """The claims this benchmark stands for, and whether they held."""
    found: dict[str, bool] = {}
    for kind in ("zero_keys", "shuffle_values", "round_keys_2_bits"):
        row = rows[kind]
        found[f"{kind} lowers recall by at least 20 points"] = row["points"] <= -20
        found[f"{kind} raises KL well over the A/A floor"] = row["kl_excess"]["low"] > max(
            CLEARLY_OVER * row["kl_floor"], MARGIN.kl
        )
    int8 = rows["int8/int8"]
    found["int8 changes recall by at most one point"] = abs(int8["points"]) <= 1
    found["int8 keeps the bound of its KL inside the margin"] = int8["kl_excess"]["high"] <= MARGIN.kl
    for name, row in gated.items():
        if name.startswith("biased_keys"):
            found[f"{name}: int4 keys fail the gate"] = row["verdicts"]["int4/bf16"]["verdict"] == "FAIL"
            found[f"{name}: int8 passes the gate"] = row["verdicts"]["int8/int8"]["verdict"] == "PASS"
        if name != "model":
            found[f"{name}: full-precision outputs are bit-equal in float32"] = row["float32_bit_equal"]
    return found


def line(row: Mapping[str, Any]) -> str:
    excess = row["kl_excess"]
    return (
        f"recall {row['recall']:.3f} [{row['recall_low']:.3f}, {row['recall_high']:.3f}] n={row['n']} "
        f"({row['points']:+.1f} points), KL {row['kl']:.3g}, floor {row['kl_floor']:.3g}, "
        f"excess [{excess['low']:.3g}, {excess['high']:.3g}]"
    )


def say(text: str) -> None:
    print(text, flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    corpus = load_corpus(held_out=True)
    source, encoder = material(tokenizer, corpus.prose), DialogueEncoder(tokenizer)
    loaded = load_model(args.model)
    if args.tokens + 64 > loaded.max_model_len:
        raise UsageError(f"contexts of {args.tokens} tokens asked, the model holds {loaded.max_model_len}")
    with start(loaded) as engine:
        kernels = engine.backend.reason
        ruler = Ruler(engine, Asked.recall(args, source, encoder, "screen"))
        say(f"screen undamaged: {line(ruler.measure(ruler.base))}")
        screened = screen(engine, ruler, candidates(loaded, args.beyond))
    rows: dict[str, Any] = {}
    for name, row in damage_rows(loaded, screened, Asked.recall(args, source, encoder, "fresh"), args.beyond):
        rows[name] = row
        say(f"{name}{' ' + row['place'] if 'place' in row else ''}: {line(row)}")
    gated: dict[str, Any] = {}
    requests = gate_requests(source, encoder, args.gate_requests, args.seed)
    text = encoder.text("\n".join(corpus.prose[:64]))[:1024]
    for name, row in gate_rows(args.model, requests, args.sigmas, text):
        gated[name] = row
        for codecs, verdict in row["verdicts"].items():
            say(f"gate {name} {codecs}: {verdict['verdict']} ({verdict['reason']})")
        say(f"gate {name}: bits equal in bf16 {row['bf16_bit_equal']}, float32 {row['float32_bit_equal']}")
    held = checks(rows, gated)
    return {
        "benchmark": "planted damage, codecs and the gate",
        "hardware": f"{cpu_name()}, {os.cpu_count()} CPUs", "kernels": kernels, "torch": torch.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "model": {"weights_sha256": loaded.weights_sha256, "dtype": str(loaded.dtype).removeprefix("torch.")},
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "model")},
        "margin": MARGIN.to_dict(), "screen": screened, "rows": rows, "gate": gated, "checks": held,
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=256, help="questions of each measured row")
    parser.add_argument("--questions", type=int, default=2, help="questions on each context")
    parser.add_argument("--tokens", type=int, default=2000, help="length of a context")
    parser.add_argument("--beyond", type=int, default=1024, help="position from which keys are zeroed")
    parser.add_argument("--screen", type=int, default=16, help="contexts on which the worst place is found")
    parser.add_argument("--gate-requests", type=int, default=80)
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=[10.0], help="key biases in standard deviations"
    )
    return run_claims("bench_damage", parser, run)


if __name__ == "__main__":
    sys.exit(main())
