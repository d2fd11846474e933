"""How often is the gate wrong? A calibration of its speed claims, its verdicts and its intervals.

    python benchmarks/bench_gate.py [MODEL] [--only SECTION] [--work DIR] [--json OUT]

- speed: paired studies of the baseline against itself, and against engines slowed so that one side is 10 %
  faster or slower; how many claim a difference, and with which sign.
- coverage: two-sided 95 % intervals of the mean KL of a population of requests, over resamples of it.
- damage: noise planted into the cache, graded by its true float64 KL in units of the margin; verdicts of
  studies that draw the default sample from the population, and what looks save.
- probes: questions with known answers under the same damage.
- cost: tokens and seconds per candidate against one forward pass over the sample.

What an engine computed for a population is kept in --work, by weights and settings, and not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import run_claims
from gate_population import AA_CHUNK, CHUNK, OTHER_CHUNK, Population, Setup, say, set_up

from kvtune.adapters.chat_encoder import chat_encoder
from kvtune.engine.target import RunningEngine
from kvtune.errors import UsageError
from kvtune.quality import (
    MARGINS,
    Conversation,
    GateQuestions,
    ProbeSource,
    ReplaySettings,
    Slo,
    ask_baseline,
    ask_probes,
    bootstrap_mean,
    compare_speed,
    judge_candidate,
    judge_probes,
    looks_of,
    record_probes,
    record_reference,
    replay,
    wilson_interval,
)
from kvtune.quality.divergence import TokenDivergence
from kvtune.quality.levels import Look, is_decided
from kvtune.quality.verdict import Verdict, combine, weigh_divergences
from kvtune.target import LoadReport, LoadRequest
from kvtune.testing.reference import reference_model_path
from kvtune.tune import choose_for_quality
from kvtune.tune.outcome import speed_gains

WORK = Path(tempfile.gettempdir()) / "kvtune-bench-gate"
SECTIONS = ("speed", "coverage", "damage", "probes", "cost")
MULTIPLES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
MARGIN = MARGINS["near-lossless"]
PLANTED = 0.10


# ---------------------------------------------------------------- speed


def slowed(engine: Any, share: float) -> None:
    """Let every step of this engine take `share` longer than it does."""
    step: Callable[..., Any] = engine.step

    def slower(*args: Any, **settings: Any) -> Any:
        begin = time.perf_counter()
        out = step(*args, **settings)
        until = time.perf_counter() + share * (time.perf_counter() - begin)
        while time.perf_counter() < until:  # sleeping overshoots steps of a millisecond
            pass
        return out

    engine.step = slower


def speed(setup: Setup) -> dict[str, Any]:
    """Studies of one engine against another that is equal, faster or slower by a tenth."""
    cases = {"aa": (0.0, 0.0), "gain": (1 / (1 - PLANTED) - 1, 0.0), "loss": (0.0, PLANTED)}
    return {name: _speed_case(setup, name, *slow) for name, slow in cases.items()}


def _speed_case(setup: Setup, name: str, baseline_slow: float, candidate_slow: float) -> dict[str, Any]:
    done = _journal(setup, f"speed_{name}")
    rng = np.random.default_rng((setup.args.seed, len(name)))
    with setup.start() as one, setup.start() as two:
        for running, share in ((one, baseline_slow), (two, candidate_slow)):
            if share:
                slowed(running.engine, share)
        while len(done) < setup.args.studies:
            done.append(_speed_study(setup, one, two, rng, len(done)))
            _write_journal(setup, f"speed_{name}", done)
    claims = [entry["claim"] for entry in done]
    result = {"studies": len(done), **{c: claims.count(c) for c in ("gain", "loss", "none")}}
    say(f"speed {name}: {result}")
    return {**result, "each": done}


def _speed_study(
    setup: Setup, baseline: RunningEngine, candidate: RunningEngine, rng: np.random.Generator, number: int
) -> dict[str, Any]:
    """Runs in turn, as the confirmation has them; the baseline's halves are the A/A pair."""
    chosen = [
        setup.requests[i] for i in rng.choice(len(setup.requests), setup.args.load_requests, replace=False)
    ]
    load = [
        LoadRequest(request_id=r.request_id, prompt_token_ids=r.prompt_token_ids[:256],
                    max_tokens=setup.args.load_tokens)
        for r in chosen
    ]  # fmt: skip
    sides: tuple[list[LoadReport], list[LoadReport]] = ([], [])
    for round_ in range(setup.args.rounds):
        order = (0, 1) if (round_ + number) % 2 else (1, 0)
        for side in order:
            sides[side].append((baseline, candidate)[side].load(load))
    half = len(sides[0]) // 2
    aa = compare_speed(sides[0][half:], sides[0][:half], slo=Slo(), rng=rng)
    ratios = compare_speed(sides[1], sides[0], slo=Slo(), rng=rng)
    tpot = speed_gains(ratios, aa)["tpot_s.mean"]
    claim = "none" if not tpot["significant"] else "gain" if tpot["ratio"] < 1 else "loss"
    return {"claim": claim, "ratio": tpot["ratio"], "low": tpot["low"], "high": tpot["high"]}


def _journal(setup: Setup, name: str) -> list[dict[str, Any]]:
    file = setup.args.work / f"{name}.json"
    return list(json.loads(file.read_text()))[: setup.args.studies] if file.exists() else []


def _write_journal(setup: Setup, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
    (setup.args.work / f"{name}.json").write_text(json.dumps(list(entries)))


# ---------------------------------------------------------------- coverage


def coverage(setup: Setup, population: Population) -> dict[str, Any]:
    """How often two-sided 95 % intervals from a default sample hold the population's mean KL."""
    cases = {"int8": {"k_codec": "int8", "v_codec": "int8"}, "int4": {"k_codec": "int4", "v_codec": "int4"}}
    return {
        name: _coverage_case(setup, population, population.divergences(name, codecs))
        for name, codecs in cases.items()
    }


def _coverage_case(setup: Setup, population: Population, found: Sequence[TokenDivergence]) -> dict[str, Any]:
    means = np.array([float(d.kl.mean()) for d in found])
    tokens = np.array([float(len(d.kl)) for d in found])
    truth = float(np.average(means, weights=tokens))
    rng = np.random.default_rng(setup.args.seed)
    below = above = 0
    for _ in range(setup.args.resamples):
        rows, clusters = population.draw(rng, setup.args.sample)
        bounds = bootstrap_mean(means[rows], clusters, rng=rng, weights=tokens[rows], confidence=0.975)
        below += bounds.high < truth
        above += bounds.low > truth
    held = setup.args.resamples - below - above
    result = {
        "population": len(found), "sessions": len(set(population.clusters)), "sample": setup.args.sample,
        "resamples": setup.args.resamples, "coverage": held / setup.args.resamples, "mean_kl": truth,
        "upper_misses": below, "lower_misses": above,
        "interval": wilson_interval(held, setup.args.resamples),
        "skewness": float(((means - means.mean()) ** 3).mean() / means.std() ** 3),
    }  # fmt: skip
    say(f"coverage: {result}")
    return result


# ---------------------------------------------------------------- damage


def strengths(setup: Setup, population: Population) -> dict[float, float]:
    """Noise of the wanted mean KL. KL grows about as strength squared; three replays of a part settle it."""
    file = setup.args.work / "strengths.json"
    if file.exists():
        return {float(k): v for k, v in json.loads(file.read_text()).items()}
    rows = list(range(0, len(population.items), max(1, len(population.items) // setup.args.calibration)))
    found: dict[float, float] = {0.0: 0.0}
    guess = 0.05
    for multiple in MULTIPLES[1:]:
        wanted = multiple * MARGIN.kl
        for _ in range(3):
            guess *= float(np.sqrt(wanted / max(population.mean_kl(guess, rows), 1e-9)))
        found[multiple] = guess
        say(f"noise of {multiple:g} x the margin: strength {guess:.4f}")
    file.write_text(json.dumps(found))
    return found


def damage(setup: Setup, population: Population) -> dict[str, Any]:
    """The detection curve: verdicts of studies at each true KL."""
    floor = population.divergences("floor", chunk=AA_CHUNK)
    found: dict[str, Any] = {}
    for multiple, strength in strengths(setup, population).items():
        name = f"noise_{multiple:g}"
        chunk = CHUNK if strength else OTHER_CHUNK  # undamaged: the baseline cut into other steps
        candidate = population.divergences(name, strength=strength, chunk=chunk)
        found[f"{multiple:g}"] = _damage_case(setup, population, candidate, floor, multiple)
    return found


def _damage_case(
    setup: Setup, population: Population, candidate: Sequence[TokenDivergence],
    floor: Sequence[TokenDivergence], multiple: float,
) -> dict[str, Any]:  # fmt: skip
    rng = np.random.default_rng((setup.args.seed, round(100 * multiple)))
    fixed: list[Verdict] = []
    sequential: list[Verdict] = []
    replayed = 0
    for _ in range(setup.args.damage_studies):
        rows, clusters = population.spread(rng, setup.args.sample)
        sides = [candidate[i] for i in rows], [floor[i] for i in rows]
        fixed.append(_verdict(sides, clusters, Look(len(rows), 0.95, True), rng))
        for look in looks_of(len(rows)):
            verdict = _verdict(sides, clusters, look, rng)
            passed, failed = verdict is Verdict.PASS, verdict is Verdict.FAIL
            seen = len(set(clusters[: look.num_items]))
            if is_decided(look, is_pass=passed, is_fail=failed, num_clusters=seen):
                sequential.append(verdict)
                replayed += look.num_items
                break
    result = {
        "studies": len(fixed),
        "true_mean_kl": float(np.concatenate([d.kl for d in candidate]).mean()),
        "true_flips": float(np.concatenate([d.flips for d in candidate]).mean()),
        "fixed": {v.value: fixed.count(v) for v in Verdict},
        "sequential": {v.value: sequential.count(v) for v in Verdict},
        "replayed_share": replayed / (len(fixed) * setup.args.sample),
    }  # fmt: skip
    say(f"damage {multiple:g} x: {result}")
    return result


def _verdict(
    sides: tuple[Sequence[TokenDivergence], Sequence[TokenDivergence]], clusters: Sequence[str], look: Look,
    rng: np.random.Generator,
) -> Verdict:  # fmt: skip
    n = look.num_items
    metrics = weigh_divergences(
        sides[0][:n], sides[1][:n], clusters[:n], margin=MARGIN, rng=rng, confidence=look.confidence
    )
    return combine(metrics, len(set(clusters[:n])), look.confidence)[0]


# ---------------------------------------------------------------- probes


def probe_source(setup: Setup) -> ProbeSource:
    encoder = chat_encoder(Path(setup.args.model))
    if encoder is None:
        raise UsageError(f"{setup.args.model} has no chat template; probes are asked through one")
    lengths = sorted(len(r.prompt_token_ids) for r in setup.requests)
    return ProbeSource(
        encoder=encoder, max_tokens=lengths[int(0.99 * len(lengths))],
        conversations=[
            Conversation(turns=tuple((m.role, m.content) for m in r.messages))
            for r in setup.workload.requests[:500] if r.messages and r.problem is None
        ],
    )  # fmt: skip


def probes(setup: Setup, population: Population) -> dict[str, Any]:
    """Net loss of probes at each graded damage."""
    source = probe_source(setup)
    rng = random.Random(setup.args.seed)
    with setup.start() as running:
        reference = record_probes(running, source, rng, count=setup.args.probes, chunk=CHUNK)
    found: dict[str, Any] = {"left_out": list(reference.left_out)}
    for multiple, strength in strengths(setup, population).items():
        with setup.start(strength=strength) as running:
            outcome = judge_probes(reference, ask_probes(running, reference))
        found[f"{multiple:g}"] = None if outcome is None else outcome.to_dict()
        if outcome is not None:
            say(
                f"probes {multiple:g} x: lost {outcome.lost}, gained {outcome.gained} "
                f"of {outcome.num_questions}"
            )
    return found


# ---------------------------------------------------------------- cost


def cost(setup: Setup) -> dict[str, Any]:
    """Tokens and seconds of candidates against one forward pass over the sample."""
    requests = choose_for_quality(setup.requests, setup.args.sample, np.random.default_rng(setup.args.seed))
    settings = ReplaySettings(chunk=CHUNK, aa_chunk=AA_CHUNK, max_tokens=setup.args.tokens)
    questions = GateQuestions(probes=probe_source(setup), num_probes=setup.args.probes)
    with setup.start() as running:
        reference = record_reference(running, requests, settings)
        gate = ask_baseline(running, reference, questions, margin=MARGIN, aa_chunk=AA_CHUNK)
        begin = time.perf_counter()
        replay(running, reference)
        if gate.probes is not None:
            ask_probes(running, gate.probes)
        pass_s = time.perf_counter() - begin
    found: dict[str, Any] = {"sample_tokens": gate.num_tokens, "pass_s": pass_s}
    for name in ("int8", "int4"):
        with setup.start({"k_codec": name, "v_codec": name}) as running:
            begin = time.perf_counter()
            verdict, spent = judge_candidate(running, gate, is_lossy=True, rng=np.random.default_rng(0))
            seconds = time.perf_counter() - begin
        found[name] = {
            "verdict": verdict.verdict.value, "reason": verdict.reason, "seconds": seconds,
            "passes_by_tokens": spent.passes, "passes_by_seconds": seconds / pass_s,
            "replayed": verdict.num_requests, "planned": verdict.num_planned,
            "tokens": {"replayed": spent.replayed, "decoded": spent.decoded, "probed": spent.probed},
        }  # fmt: skip
        say(f"cost {name}: {found[name]}")
    return found


# ---------------------------------------------------------------- all


def checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What the calibration promises, held against what was measured."""
    out: dict[str, bool] = {}
    if "speed" in result:
        found = result["speed"]
        out["A/A: at most 5 of 40 claim anything"] = found["aa"]["none"] >= found["aa"]["studies"] * 35 / 40
        for sign in ("gain", "loss"):
            out[f"planted {sign}: at least 35 of 40 called"] = (
                found[sign][sign] >= found[sign]["studies"] * 35 / 40
            )
    for name, found in result.get("coverage", {}).items():
        out[f"coverage {name}: 92.5-97.5 %"] = 0.925 <= found["coverage"] <= 0.975
    for multiple, found in result.get("damage", {}).items():
        for way in ("fixed", "sequential"):
            if float(multiple) >= 2:
                out[f"damage {multiple}x, {way}: none passes"] = found[way]["PASS"] == 0
            elif float(multiple) <= 0.25:
                enough = found[way]["PASS"] >= found["studies"] * 50 / 60
                out[f"damage {multiple}x, {way}: at least 50 of 60 pass"] = enough
    for name in ("int8", "int4"):
        if name in result.get("cost", {}):
            out[f"cost {name}: at most two passes"] = result["cost"][name]["passes_by_tokens"] <= 2
    return out


def run(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    setup = set_up(args)
    chosen = args.only or SECTIONS
    is_bundled = Path(args.model) == reference_model_path()
    result: dict[str, Any] = {
        "model": "reference model" if is_bundled else str(args.model), "cpu": platform.processor(),
        "cores": os.cpu_count(), "load_average": os.getloadavg(), "margin": MARGIN.to_dict(),
    }  # fmt: skip
    needs_population = {"coverage", "damage", "probes"} & set(chosen)
    population = Population(setup) if needs_population else None
    for name in chosen:
        started = time.perf_counter()
        if name in ("speed", "cost"):
            result[name] = {"speed": speed, "cost": cost}[name](setup)
        elif population is not None:
            sections = {"coverage": coverage, "damage": damage, "probes": probes}
            result[name] = sections[name](setup, population)
        result.setdefault("section_s", {})[name] = time.perf_counter() - started
    result["checks"] = checks(result)
    result["seconds"] = time.perf_counter() - begin
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section; may be repeated")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of what was computed")
    parser.add_argument("--population", type=int, default=2048, help="requests")
    parser.add_argument("--max-chars", type=int, default=2000, help="longest generated prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--sample", type=int, default=256, help="requests of a study: tune's default")
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--damage-studies", type=int, default=60)
    parser.add_argument("--calibration", type=int, default=128, help="requests that set the noise")
    parser.add_argument("--probes", type=int, default=160, help="contexts")
    parser.add_argument("--studies", type=int, default=40, help="speed studies of each kind")
    parser.add_argument("--load-requests", type=int, default=16)
    parser.add_argument("--load-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8, help="pairs of load runs per speed study")
    return run_claims("bench_gate", parser, run)


if __name__ == "__main__":
    sys.exit(main())
