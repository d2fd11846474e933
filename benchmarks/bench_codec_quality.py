"""What each codec costs and saves on a model: bytes, KL, flips, recall and TPOT, by codec and side.

    python benchmarks/bench_codec_quality.py [MODEL] [--variant biased_keys] [--samples 64] [--json OUT]

The table of codec x side x bits against bf16 keys and values. KL and flips (top-1 changes) are over every
token of drawn dialogues, recall over their answers, all paired with bf16; the A/A row is bf16 in other
chunks. `n8_rh@4` is n8_rh read from its high planes alone, at run time. Bytes are the allocator's per token,
scales, padding and all planes included; for `n8_rh@4` those left once low planes are dropped. TPOT is the
median over a batch of greedy decodes; it means something only on a machine where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from models import model_folders, new_record
from transformers import AutoTokenizer

from kvtune import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from kvtune.engine import LoadedModel, load_model, reading_planes
from kvtune.engine.identity import kv_bytes_per_token
from kvtune.errors import KVTuneError
from kvtune.quality import bootstrap_mean, divergence, draw, is_bit_equal
from kvtune.target import ScoreItem, Scores
from kvtune.testing.reference import reference_model_path
from kvtune.testing.reference.corpus import load_corpus
from kvtune.testing.reference.dialogue import Dialogue, DialogueEncoder, material
from kvtune.testing.variants import VARIANTS

CODECS = ("fp8", "int8", "n8_rh", "n8_rh@4", "int4", "int4_rh", "n4_rh")
SIDES = ("k", "v", "kv")
TASKS = ("recall", "second_question")
CHUNK, AA_CHUNK = 512, 96
BOUND = 1.05
"""A high plane may cost this many times what the 4-bit codec costs."""


class Sample:
    """Drawn dialogues, the bf16 engine's scores of them, and what others differ by."""

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
        encoder = DialogueEncoder(tokenizer)
        source = material(tokenizer, load_corpus(held_out=True).prose)
        rng = random.Random(args.seed)
        self.dialogues: list[Dialogue] = [
            encoder.dialogue(draw(TASKS[i % len(TASKS)], rng, source, num_tokens=args.tokens))
            for i in range(args.samples)
        ]
        self.items = [
            ScoreItem(item_id=str(i), prompt_token_ids=d.prompt, continuation=d.continuation)
            for i, d in enumerate(self.dialogues)
        ]
        # the context's own text, scored too: recall answers are few tokens
        self.texts = [
            ScoreItem(item_id=str(i), prompt_token_ids=d.prompt[:16], continuation=d.prompt[16:])
            for i, d in enumerate(self.dialogues)
        ]

    def score(self, engine: Engine, chunk: int = CHUNK) -> tuple[list[Scores], list[Scores]]:
        vocab = engine.loaded.vocab_size
        return (
            engine.score(self.items, num_top=vocab, chunk=chunk),
            engine.score(self.texts, num_top=vocab, chunk=chunk),
        )

    def recall(self, scores: Sequence[Scores]) -> list[bool]:
        pairs = zip(self.dialogues, scores, strict=True)
        return [right for dialogue, one in pairs for right in dialogue.is_answered(one.argmax.tolist())]

    def compare(
        self, base: tuple[list[Scores], list[Scores]], found: tuple[list[Scores], list[Scores]]
    ) -> dict[str, Any]:
        """KL [nats per token] with a cluster bootstrap interval, flips [share of tokens], recall pairs."""
        per_text = [divergence(a, b) for a, b in zip(base[1], found[1], strict=True)]
        kl = np.array([one.kl.mean() for one in per_text])
        flips = [float((a.argmax != b.argmax).mean()) for a, b in zip(base[1], found[1], strict=True)]
        was, now = self.recall(base[0]), self.recall(found[0])
        return {
            "kl": bootstrap_mean(
                kl, [item.item_id for item in self.texts], rng=np.random.default_rng(0)
            ).to_dict(),
            "flips": float(np.mean(flips)),
            "recall": sum(now) / len(now),
            "num_answers": len(now),
            "lost": sum(a and not b for a, b in zip(was, now, strict=True)),
            "gained": sum(b and not a for a, b in zip(was, now, strict=True)),
        }


def start(loaded: LoadedModel, args: argparse.Namespace, k: str = "bf16", v: str = "bf16") -> Engine:
    return Engine.from_pretrained(
        loaded,
        cache=CacheConfig(
            kv_budget=args.kv_budget, k_codec=k, v_codec=v, enable_prefix_caching=False,
            key_centring=args.key_centring,
        ),
        config=EngineConfig(num_threads=args.threads),
    )  # fmt: skip


def median_tpot(engine: Engine, args: argparse.Namespace) -> float | None:
    """Seconds per output token, median over a batch of equal requests; None where not asked for."""
    if not args.tpot_tokens:
        return None
    ids = np.random.default_rng(0).integers(8, engine.loaded.vocab_size, (args.tpot_batch, args.tpot_context))
    params = SamplingParams(max_tokens=args.tpot_tokens, temperature=0.0, ignore_eos=True)
    engine.generate([row[:64].tolist() for row in ids], params)  # warm
    outputs = engine.generate([row.tolist() for row in ids], params)
    return statistics.median(float(output.metrics.tpot_s) for output in outputs)


def bytes_read(engine: Engine, args: argparse.Namespace, side: str) -> float:
    """Bytes per token once the low planes of those sides are dropped."""
    config = engine.cache_config
    names = {f"{s}_codec": "n4_rh" if s in side else getattr(config, f"{s}_codec") for s in "kv"}
    dropped = CacheConfig(**{**config.to_dict(), "layer_codecs": {}, **names})
    return kv_bytes_per_token(engine.loaded.spec, dropped, SchedulerConfig(), context=args.tokens)


def measure(
    loaded: LoadedModel, sample: Sample, base: Any, args: argparse.Namespace, codec: str, side: str
) -> dict[str, Any]:
    """One row of the table."""
    stored, _, bits = codec.partition("@")
    names = [stored if s in side else "bf16" for s in "kv"]
    with start(loaded, args, *names) as engine, ExitStack() as reads:
        before = sample.score(engine) if bits else None
        if bits:
            planes = (1 if "k" in side else 2, 1 if "v" in side else 2)
            reads.enter_context(reading_planes(engine, dict.fromkeys(engine.attention_layers, planes)))
        row = sample.compare(base, sample.score(engine)) | {"tpot_s": median_tpot(engine, args)}
        row["bytes_per_token"] = engine.effective(context=args.tokens)["kv_bytes_per_token"]
        row["bytes_per_token_read"] = bytes_read(engine, args, side) if bits else row["bytes_per_token"]
        reads.close()  # both planes again
        if before is not None:
            after = sample.score(engine)
            row["restored_bit_equal"] = all(
                is_bit_equal(a, b) for old, new in zip(before, after, strict=True)
                for a, b in zip(old, new, strict=True)
            )  # fmt: skip
    return {"codec": codec, "side": side} | row


def table(model: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    loaded = load_model(model, EngineConfig(num_threads=args.threads))
    sample = Sample(args, model)
    with start(loaded, args) as engine:
        base = sample.score(engine)
        aa = sample.compare(base, sample.score(engine, AA_CHUNK))
        size = engine.effective(context=args.tokens)["kv_bytes_per_token"]
        sizes = {"bytes_per_token": size, "bytes_per_token_read": size}
        yield {"codec": "bf16", "side": "A/A"} | sizes | aa | {"tpot_s": median_tpot(engine, args)}
    for codec in args.codecs.split(","):
        for side in SIDES:
            yield measure(loaded, sample, base, args, codec, side)


def checks(rows: Sequence[dict[str, Any]], *, biased: bool) -> dict[str, bool]:
    """The claims this table stands for, and whether they held."""
    kl = {(row["codec"], row["side"]): row["kl"]["value"] for row in rows}
    floor = kl["bf16", "A/A"]
    found: dict[str, bool] = {}
    for side in SIDES:
        if {("n8_rh", side), ("int8", side)} <= kl.keys():
            found[f"{side}: n8_rh no worse than int8"] = kl["n8_rh", side] <= BOUND * kl["int8", side] + floor
        if {("n8_rh@4", side), ("int4_rh", side)} <= kl.keys():
            found[f"{side}: the high plane no worse than int4_rh within 5 %"] = (
                kl["n8_rh@4", side] <= BOUND * kl["int4_rh", side] + floor
            )
    if biased and {("int4_rh", "k"), ("int4", "k")} <= kl.keys():
        found["int4_rh clearly better than int4 on biased keys"] = kl["int4_rh", "k"] < kl["int4", "k"] / 2
    restored = [row["restored_bit_equal"] for row in rows if "restored_bit_equal" in row]
    if restored:
        found["dropping and restoring a plane restores bit-equal logits"] = all(restored)
    return found


def line(row: dict[str, Any]) -> str:
    kl, tpot = row["kl"], row["tpot_s"]
    speed = "" if tpot is None else f"  TPOT {1e3 * tpot:7.2f} ms"
    return (
        f"{row['codec']:8} {row['side']:3}  {row['bytes_per_token_read']:7.0f} B/token  KL {kl['value']:.3g} "
        f"[{kl['low']:.3g}, {kl['high']:.3g}]  flips {100 * row['flips']:.2f} %  recall {row['recall']:.3f} "
        f"(-{row['lost']} +{row['gained']} of {row['num_answers']}){speed}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="model folder; default the reference model")
    parser.add_argument("--variant", action="append", default=[], choices=sorted(VARIANTS))
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--key-centring", default="auto", choices=("auto", "bias", "probe", "off"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024, help="length of a dialogue")
    parser.add_argument("--tpot-tokens", type=int, default=64, help="decoded per request; 0 leaves TPOT out")
    parser.add_argument("--tpot-context", type=int, default=1024)
    parser.add_argument("--tpot-batch", type=int, default=8)
    parser.add_argument("--kv-budget", default="128MiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    model = args.model or reference_model_path()
    out = new_record(args)
    held = True
    for name, folder in model_folders(model, ("model", *args.variant)):
        rows: list[dict[str, Any]] = []
        for row in table(folder, args):
            rows.append(row)
            print(line(row), flush=True)
        claims = checks(rows, biased=name == "biased_keys")
        for claim, is_held in claims.items():
            print(f"{'held  ' if is_held else 'FAILED'} {claim}")
        held &= all(claims.values())
        out["models"][name] = {"rows": rows, "checks": claims}
    if args.json is not None:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KVTuneError as error:
        sys.exit(f"bench_codec_quality: {error}")
