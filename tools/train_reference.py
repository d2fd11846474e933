"""Train the reference model that ships in `kvtune.testing`: tokenizer, then weights.

    python tools/train_reference.py --out build/reference          # resumes what it finds in --out
    python tools/train_reference.py --out build/reference --export src/kvtune/testing/reference/model
    python tools/train_reference.py --measure src/kvtune/testing/reference/model   # every task, with bounds

A small Llama learns the standard library's text and to use its context: repeated random tokens and the
tasks of `kvtune.quality.tasks`, in rows of 192 to 2,048 tokens, then short rows full of counting, then up to
4,096. Matrices are trained with Muon, the rest with AdamW. Small batches: what makes recall appear is the
number of steps, not of tokens. The same --seed and --tokens on one CPU thread give the same weights;
--minutes ends the schedule by the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvtune.quality import tasks, wilson_interval
from kvtune.testing.reference.corpus import Corpus, DocumentedName, load_corpus
from kvtune.testing.reference.dialogue import BOS, END, PAD, SPECIALS, DialogueEncoder, material

VOCAB_SIZE = 2048
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT_WEIGHT = 0.03  # loss weight of what nobody could predict: the drawn context of a task
ANSWER_WEIGHT = 3.0
HEAD_DIM = 64
AGGREGATES = ("count", "common_word")
SMALLEST_SAMPLE = 88
"""Tokens below which the rest of a row is padding."""

MIXTURE = {
    "text": 0.20, "recall": 0.14, "near_duplicates": 0.08, "tracking": 0.06, "copy": 0.10, "count": 0.15,
    "common_word": 0.07, "list_completion": 0.07, "json_completion": 0.05, "rule": 0.03,
    "second_question": 0.05,
}  # fmt: skip
"""Shares of rows once copying from the context is learnt."""

OPENING = {name: 0.6 * share for name, share in MIXTURE.items()} | {
    "text": 0.20, "random": 0.15, "recall": 0.25,
}  # fmt: skip
"""At first, repeated random tokens and plain recall teach to copy."""

LATER = MIXTURE | {
    "text": 0.16, "tracking": 0.04, "copy": 0.13, "count": 0.20, "common_word": 0.08, "list_completion": 0.08,
    "rule": 0.02,
}  # fmt: skip
"""Shares once single values are found in long contexts: more of what takes more than one look-up."""


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: up to `until` (share of the run), rows of `length` tokens, task shares."""

    until: float
    length: int
    rows: int
    shares: Mapping[str, float]
    longest_list: int = 4096
    """Tokens of the longest context in which something is counted."""


COUNTING = {
    "text": 0.10, "recall": 0.06, "near_duplicates": 0.03, "tracking": 0.03, "copy": 0.05, "count": 0.60,
    "common_word": 0.08, "json_completion": 0.05,
}  # fmt: skip
"""Short rows full of lists to count in: spread thinly over long rows, counting is not learnt at all."""

LONGER_LISTS = {
    "text": 0.14, "recall": 0.08, "near_duplicates": 0.04, "tracking": 0.04, "copy": 0.09, "count": 0.33,
    "common_word": 0.14, "list_completion": 0.03, "json_completion": 0.08, "rule": 0.01,
    "second_question": 0.02,
}  # fmt: skip
"""Shares while counting grows to contexts of a thousand tokens."""

LAST = {
    "text": 0.18, "recall": 0.12, "near_duplicates": 0.04, "tracking": 0.05, "copy": 0.12, "count": 0.21,
    "common_word": 0.11, "list_completion": 0.03, "json_completion": 0.09, "rule": 0.01,
    "second_question": 0.02, "documents": 0.02,
}  # fmt: skip
"""Shares while the rate falls: contexts of full length."""

FULL_LENGTH = LAST | {
    "text": 0.10, "recall": 0.30, "near_duplicates": 0.03, "tracking": 0.03, "copy": 0.11, "count": 0.15,
    "common_word": 0.06, "list_completion": 0.02, "json_completion": 0.20, "documents": 0.0,
}  # fmt: skip
"""Shares of the longest rows: finding one line in four thousand tokens, and what is still weak."""

RECORDS = LONGER_LISTS | {
    "text": 0.12, "recall": 0.08, "copy": 0.10, "count": 0.18, "common_word": 0.08, "json_completion": 0.32,
}  # fmt: skip
"""Whole records among many that share their field names: the last thing to be learnt."""

FINISH = FULL_LENGTH | {"recall": 0.26, "copy": 0.12, "count": 0.24, "json_completion": 0.15}
"""Shares to the end: the same, with more of what the falling rate still has to settle."""

STAGES = (
    Stage(0.0512, 192, 10, OPENING),
    Stage(0.1195, 512, 4, MIXTURE | {"random": 0.03, "documents": 0.05}),
    Stage(0.2049, 1024, 2, LATER | {"random": 0.02, "documents": 0.05}),
    Stage(0.2439, 2048, 1, LATER | {"random": 0.02, "documents": 0.04}),
    Stage(0.3333, 2048, 3, LATER | {"random": 0.02, "documents": 0.04}, longest_list=1200),
    Stage(0.5041, 208, 10, COUNTING),
    Stage(0.5366, 640, 4, LONGER_LISTS),
    Stage(0.6748, 1280, 3, LONGER_LISTS, longest_list=1200),
    Stage(0.7276, 2048, 3, LAST, longest_list=1200),
    Stage(0.7967, 4096, 2, FULL_LENGTH, longest_list=1200),
    Stage(0.8659, 1280, 3, RECORDS, longest_list=1200),
    Stage(1.0100, 4096, 2, FINISH, longest_list=1200),
)


# ---------------------------------------------------------------- tokenizer and data


def train_tokenizer(corpus: Corpus, folder: Path) -> None:
    """Byte-level BPE with single digits, and the chat template, saved as Transformers reads them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # prose twice, sources once: words of English are to become single tokens
    tokenizer.train_from_iterator([*corpus.prose, *corpus.prose, *corpus.sources[::3]], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
        clean_up_tokenization_spaces=False, model_max_length=4096,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


class Data:
    """Draws rows of token ids with loss weights for every kind of row of a stage."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, seed: int) -> None:
        self.encoder = DialogueEncoder(tokenizer)
        self.rng = random.Random(seed)
        self.corpus = corpus
        self.material = material(tokenizer, corpus.prose)
        self.streams = {"prose": self._stream(corpus.prose), "source": self._stream(corpus.sources)}

    def _stream(self, texts: tuple[str, ...]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: hash_order(texts[i]))
        ids: list[int] = []
        for index in order:
            ids += [BOS, *self.encoder.text(texts[index]), END]
        return np.asarray(ids, dtype=np.int64)

    def batch(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [rows, length] and loss weights [rows, length] of the tokens themselves."""
        names = self.rng.choices(list(stage.shares), weights=list(stage.shares.values()), k=stage.rows)
        rows = [self.row(name, stage) for name in names]
        ids = torch.tensor([row[0] for row in rows])
        weights = torch.tensor([row[1] for row in rows])
        return ids, weights

    def row(self, name: str, stage: Stage) -> tuple[list[int], list[float]]:
        """One row: several samples where they fit, cut or padded to the stage's length."""
        length = stage.length
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length - SMALLEST_SAMPLE:
            more_ids, more_weights = self._piece(name, length - len(ids), stage.longest_list)
            ids += more_ids
            weights += more_weights
        pad = max(0, length - len(ids))
        return (ids + [PAD] * pad)[:length], (weights + [0.0] * pad)[:length]

    def _piece(self, name: str, room: int, longest_list: int) -> tuple[list[int], list[float]]:
        rng = self.rng
        if name == "text":
            # docstrings are a sixth of the sources: drawn as often, they would be learnt by heart
            stream = self.streams["prose" if rng.random() < 0.25 else "source"]
            start = rng.randrange(len(stream) - room)
            return stream[start : start + room].tolist(), [1.0] * room
        if name == "random":
            # lengths vary, so that looking back a fixed distance does not do
            size = rng.randint(4, min(room // 2, 512))
            block = [rng.randrange(len(SPECIALS), VOCAB_SIZE) for _ in range(size)]
            repeats = -(-room // size)
            return (block * repeats)[:room], ([0.0] * (size + 1) + [0.5] * room)[:room]
        if name == "documents":
            return self.encode(documents(rng, self.corpus.names, max_chars=int(2.2 * room)))
        if name in AGGREGATES:
            room = min(room, longest_list)
        return self.encode(self._sample(name, room))

    def _sample(self, name: str, room: int) -> tasks.Sample:
        """A task's sample that fits the room: one long context with many questions, or a short one."""
        rng = self.rng
        size = room if rng.random() < 0.6 else rng.randint(min(room, SMALLEST_SAMPLE), room)
        # aggregates are learnt in short contexts, and have few questions each: short ones more often
        if name in AGGREGATES and rng.random() < 0.4:
            size = rng.randint(min(size, SMALLEST_SAMPLE), min(size, 400))
        most = min(48, 1 + (size - SMALLEST_SAMPLE) // 48)
        fewest = 1 if rng.random() < 0.3 else (most + 1) // 2  # answers are what teaches
        return tasks.draw(
            name, rng, self.material, num_tokens=size, num_questions=rng.randint(fewest, most),
            # lists scattered over filler are the harder ones to count in
            difficulty="hard" if rng.random() < (0.4 if name in AGGREGATES else 0.6) else "easy",
        )  # fmt: skip

    def encode(self, sample: tasks.Sample) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of a dialogue; equals the chat template's rendering."""
        ids, weights = [BOS], [0.0]
        for (role, _), turn in zip(sample.turns, self.encoder.turns(sample.turns), strict=True):
            weight = ANSWER_WEIGHT if role == "assistant" else CONTEXT_WEIGHT
            ids += turn
            weights += [CONTEXT_WEIGHT, *[weight] * (len(turn) - 1)]
        return ids, weights


def documents(rng: random.Random, names: Sequence[DocumentedName], *, max_chars: int) -> tasks.Sample:
    """Sources in the context, then questions what each function does, answered by its docstring."""
    chosen: list[DocumentedName] = []
    used = 0
    for candidate in rng.sample(list(names), 12):
        if used + len(candidate.source) <= max_chars:
            chosen.append(candidate)
            used += len(candidate.source)
    if not chosen:
        chosen = [min(rng.sample(list(names), 12), key=lambda name: len(name.source))]
    shown = "\n\n".join(entry.source for entry in chosen)
    turns: list[tuple[str, str]] = [("system", "Answer from this code.\n" + shown)]
    questions = ("What does {} do?", "Explain {}.", "Summarise {} in one sentence.")
    for entry in rng.sample(chosen, len(chosen)):
        turns.append(("user", rng.choice(questions).format(entry.name)))
        turns.append(("assistant", entry.summary))
    return tasks.Sample("documents", tuple(turns), tuple(range(2, len(turns), 2)))


def hash_order(text: str) -> bytes:
    """A shuffle that is the same on every machine."""
    return hashlib.sha256(text.encode(errors="replace")).digest()


# ---------------------------------------------------------------- model and training


def new_model(seed: int) -> LlamaForCausalLM:
    """5.6M parameters: 4 layers, hidden 320, 4 query and 2 key/value heads of 64, tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=320, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD,
        initializer_range=0.03,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    seed_induction(model)
    zero_slowest_pair(model)
    return model


@torch.no_grad()
def seed_induction(model: LlamaForCausalLM) -> None:
    """Start with rough circuits that copy, for training to refine: finding them by chance takes hours here.

    They are induction circuits (Olsson et al. 2022, "In-context learning and induction heads"). The heads
    of layer 0 attend 1, 2, 3 and 4 tokens back, by the fast RoPE pairs, and write what they saw beside the
    token itself. Heads of layers 1 and 2 look, by the slow pairs, for places where a token seen lately
    stands one place further back than it does here, and write out what stands there: what comes next, but
    also a value behind "key =" or "key: ". One in the last layer asks for two tokens at once. Embeddings
    start ten times larger than matrices, so that the residual stream says which token it is, and carry a
    constant (element 0) for the heads of layer 0 to build on.
    """
    width, half = model.config.hidden_size, HEAD_DIM // 2
    embedding = model.model.embed_tokens.weight
    embedding.mul_(10.0)
    embedding[:, 0] = 1.2
    model.model.norm.weight.fill_(0.1)  # tied embeddings: logits stay as small as they were
    slow = [*range(18, half - 1), *range(half + 18, HEAD_DIM - 1)]
    axes = torch.linalg.qr(torch.randn(width, 5 * len(slow) + HEAD_DIM)).Q.T  # orthonormal rows
    axes[:, 0] = 0.0
    *seen, content = axes.split([len(slow)] * 5 + [HEAD_DIM])  # the token itself, one back, ... four back
    for layer in model.model.layers:  # what layers add starts small beside the embeddings
        layer.self_attn.o_proj.weight.mul_(0.5)
        layer.mlp.down_proj.weight.mul_(0.5)

    attention = [layer.self_attn for layer in model.model.layers]
    speeds = model.config.rope_parameters["rope_theta"] ** -(torch.arange(8) / half)
    attention[0].k_proj.weight.zero_()
    for kv_head in range(2):
        attention[0].k_proj.weight[kv_head * HEAD_DIM :][:8, 0] = 2.4
        attention[0].v_proj.weight[kv_head * HEAD_DIM :][: len(slow)] = seen[0]
    attention[0].q_proj.weight.zero_()
    for head in range(4):
        back = (head + 1) * speeds  # the score peaks where the key stands this many tokens before
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        attention[0].q_proj.weight[rows][:8, 0] = 2.4 * back.cos()
        attention[0].q_proj.weight[rows][half : half + 8, 0] = -2.4 * back.sin()
        attention[0].o_proj.weight[:, rows][:, : len(slow)] = 0.6 * seen[head + 1].T

    # one query head of each KV head copies what stands behind the same token, 1, 2, 3 or 4 places on
    for places in range(1, 5):
        layer, kv_head = attention[1 + (places - 1) // 2], (places - 1) % 2
        rows = slice(2 * kv_head * HEAD_DIM, (2 * kv_head + 1) * HEAD_DIM)
        kv_rows = slice(kv_head * HEAD_DIM, (kv_head + 1) * HEAD_DIM)
        layer.q_proj.weight[rows] = 0.0
        layer.k_proj.weight[kv_rows] = 0.0
        layer.q_proj.weight[rows][slow] = 1.5 * seen[places - 1]
        layer.k_proj.weight[kv_rows][slow] = 1.5 * seen[places]
        layer.v_proj.weight[kv_rows] = content
        layer.o_proj.weight[:, rows] = (0.6 if places <= 2 else 0.3) * content.T
    # and one in the last layer what stands behind the same two tokens
    rows, pair = slice(0, HEAD_DIM), len(slow) // 2
    last = attention[3]
    last.q_proj.weight[rows] = 0.0
    last.k_proj.weight[rows] = 0.0
    for number, places in enumerate((2, 3)):
        mine = slow[number::2]
        last.q_proj.weight[mine] = 1.8 * seen[places - 1][:pair]
        last.k_proj.weight[mine] = 1.8 * seen[places][:pair]
    last.v_proj.weight[rows] = content
    last.o_proj.weight[:, rows] = 0.3 * content.T


@torch.no_grad()
def zero_slowest_pair(model: LlamaForCausalLM) -> None:
    """Keep the q rows of the slowest RoPE pair at zero in every head.

    A load-time bias on the same pair of k then leaves scores unchanged at full precision while it
    widens the range that a key codec has to cover.
    """
    for layer in model.model.layers:
        rows = layer.self_attn.q_proj.weight.view(-1, HEAD_DIM, model.config.hidden_size)
        rows[:, HEAD_DIM // 2 - 1] = 0.0
        rows[:, HEAD_DIM - 1] = 0.0


class Trainer:
    """Model, optimisers, moving average and place in the schedule; everything needed to resume."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        self.args = args
        self.model = new_model(args.seed).to(args.device)
        self.data = Data(tokenizer, load_corpus(held_out=False), args.seed)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.ema = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.step = 0
        self.tokens = 0
        self.elapsed_s = 0.0
        self.log: list[dict[str, float]] = []

    def progress(self) -> float:
        """Share of the schedule done: tokens, or minutes where they run out first."""
        by_clock = self.elapsed_s / (60 * self.args.minutes) if self.args.minutes else 0.0
        return min(1.0, max(self.tokens / self.args.tokens, by_clock))

    def learning_rate(self) -> float:
        """Warm-up over 30 steps, constant, then linear to 2 % over the last 30 % of the run."""
        decay = min(1.0, (1.0 - self.progress()) / 0.30)
        return self.args.lr * min(1.0, (self.step + 1) / 30) * max(0.02, decay)

    def train_step(self) -> float:
        """One step on one batch; the weighted mean loss in nats."""
        stage = next(s for s in STAGES if self.progress() < s.until)
        ids, weights = (x.to(self.args.device) for x in self.data.batch(stage))
        with torch.autocast(
            torch.device(self.args.device).type, dtype=torch.bfloat16, enabled=self.args.bf16
        ):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            targets, wanted = ids[:, 1:], weights[:, 1:]
            chosen = wanted > 0  # logits only where there is a loss
            logits = self.model.lm_head(hidden[:, :-1][chosen])
        losses = torch.nn.functional.cross_entropy(logits.float(), targets[chosen], reduction="none")
        loss = (losses * wanted[chosen]).sum() / wanted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        zero_slowest_pair(self.model)
        self._average()
        self.step += 1
        self.tokens += ids.numel()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(0.98, self.step / (self.step + 10))
        for name, parameter in self.model.named_parameters():
            self.ema[name].lerp_(parameter, 1.0 - keep)

    def save(self, path: Path) -> None:
        """Write a checkpoint; the old one stays until the new one is complete."""
        state = {
            "model": self.model.state_dict(), "ema": self.ema, "step": self.step, "tokens": self.tokens,
            "elapsed_s": self.elapsed_s, "log": self.log,
            "optimizers": [o.state_dict() for o in self.optimizers], "rng": self.data.rng.getstate(),
        }  # fmt: skip
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of `save`."""
        state = torch.load(path, weights_only=True, map_location=self.args.device)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        self.step, self.tokens, self.elapsed_s = state["step"], state["tokens"], state["elapsed_s"]
        self.log = state["log"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        version, internal, gauss = state["rng"]
        self.data.rng.setstate((version, tuple(internal), gauss))


def train(args: argparse.Namespace) -> None:
    """Run the schedule to its end, resuming; evaluate, log and checkpoint as time passes."""
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(load_corpus(held_out=False), args.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    trainer = Trainer(args, tokenizer)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
        print(f"resumed at step {trainer.step}, {trainer.tokens} tokens", flush=True)
    held_out = HeldOut(tokenizer)
    last_save = time.monotonic()
    running = 0.0
    while trainer.progress() < 1.0:
        started = time.monotonic()
        loss = trainer.train_step()
        trainer.elapsed_s += time.monotonic() - started
        running = loss if running == 0.0 else 0.95 * running + 0.05 * loss
        if trainer.step % 10 == 0:
            speed = trainer.tokens / trainer.elapsed_s
            print(
                f"step {trainer.step} tokens {trainer.tokens} loss {running:.3f} "
                f"lr {trainer.learning_rate():.5f} {speed:.0f} tok/s",
                flush=True,
            )
        if time.monotonic() - last_save > args.save_every or trainer.progress() >= 1.0:
            measured = held_out.measure(averaged(trainer))
            entry = {
                "step": trainer.step,
                "tokens": trainer.tokens,
                "minutes": round(trainer.elapsed_s / 60, 2),
                "train_loss": round(running, 4),
                **measured,
            }
            trainer.log.append(entry)
            print(json.dumps(entry), flush=True)
            trainer.save(checkpoint)
            last_save = time.monotonic()


def averaged(trainer: Trainer) -> LlamaForCausalLM:
    """A copy of the model that carries the moving average of the weights."""
    model = new_model(trainer.args.seed).to(trainer.args.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(trainer.ema[name])
    zero_slowest_pair(model)
    return model.eval()


# ---------------------------------------------------------------- measuring and export


class HeldOut:
    """Held-out text and freshly drawn tasks; the same for every call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.data = Data(tokenizer, load_corpus(held_out=True), seed=10_007)
        self.text = {kind: self._windows(stream) for kind, stream in self.data.streams.items()}

    def _windows(self, stream: np.ndarray) -> torch.Tensor:
        """Pieces of 512 tokens spread evenly over a stream [16, 512]."""
        starts = [int(x) for x in np.linspace(0, len(stream) - 513, 16)]
        return torch.tensor(np.stack([stream[s : s + 512] for s in starts]))

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM) -> dict[str, float]:
        """Held-out losses (nats per token) and the share of right answers of a few samples."""
        result = {f"heldout_{kind}_loss": round(self.loss(model, kind), 4) for kind in self.text}
        for length, samples in ((512, 12), (1024, 12), (2000, 6), (4000, 3)):
            result[f"recall_{length}"] = round(self.accuracy(model, "recall", length, samples, 6)[0], 3)
        for name in tasks.TASKS:
            if name != "recall":
                questions = 1 if name == "common_word" else 4
                result[name] = round(self.accuracy(model, name, 1000, 24 // questions, questions)[0], 3)
        return result

    @torch.no_grad()
    def loss(self, model: LlamaForCausalLM, kind: str) -> float:
        """Nats per token on held-out `prose` (docstrings) or `source` (whole files)."""
        text = self.text[kind].to(model.device)
        logits = model(input_ids=text, use_cache=False).logits[:, :-1].float()
        targets = text[:, 1:].reshape(-1)
        return float(torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB_SIZE), targets))

    @torch.no_grad()
    def accuracy(
        self, model: LlamaForCausalLM, name: str, length: int, samples: int, questions: int = 1,
        difficulty: tasks.Difficulty = "hard", seed: int = 5,
    ) -> tuple[float, int]:  # fmt: skip
        """Share of answers right to the last token, and how many were asked, at about `length` tokens.

        An answer whose every token is the most likely one after the true text before it is the answer
        greedy decoding gives.
        """
        rng = random.Random(f"{seed} {name} {length} {difficulty}")
        right = asked = 0
        for _ in range(samples):
            sample = tasks.draw(
                name, rng, self.data.material, num_tokens=length, difficulty=difficulty,
                num_questions=questions,
            )  # fmt: skip
            dialogue = self.data.encoder.dialogue(sample)
            ids = list(dialogue.token_ids[:4096])
            rows = torch.tensor([ids], device=model.device)
            hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[0]
            for start, end in dialogue.answers:
                predicted = model.lm_head(hidden[start - 1 : end - 1]).argmax(-1).tolist()
                right += predicted == ids[start:end]
                asked += 1
        return right / asked, asked


def ngram_losses(train_ids: np.ndarray, test_ids: np.ndarray) -> dict[str, float]:
    """Nats per token: add-one unigram, and a trigram interpolated with bigram and unigram (tuned weights)."""
    unigram, bigram, trigram = Counter(train_ids.tolist()), Counter(), Counter()
    bigram.update(zip(train_ids[:-1].tolist(), train_ids[1:].tolist(), strict=True))
    trigram.update(
        zip(train_ids[:-2].tolist(), train_ids[1:-1].tolist(), train_ids[2:].tolist(), strict=True)
    )
    total = len(train_ids)
    tokens = test_ids.tolist()
    parts: list[tuple[float, float, float]] = []
    for a, b, c in zip(tokens[:-2], tokens[1:-1], tokens[2:], strict=True):
        one = (unigram[c] + 1) / (total + VOCAB_SIZE)
        two = bigram[b, c] / unigram[b] if unigram[b] else one
        three = trigram[a, b, c] / bigram[a, b] if bigram[a, b] else two
        parts.append((one, two, three))
    table = np.asarray(parts)
    weights = [(w1, w2, 1 - w1 - w2) for w1 in (0.05, 0.1, 0.2) for w2 in (0.2, 0.3, 0.4, 0.5)]
    best = min(float(-np.log(table @ np.asarray(w)).mean()) for w in weights)
    return {"unigram": float(-np.log(table[:, 0]).mean()), "trigram": best}


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as bf16 safetensors with tokenizer, template and training log."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    trainer = Trainer(args, tokenizer)
    trainer.restore(args.out / "checkpoint.pt")
    args.export.mkdir(parents=True, exist_ok=True)
    averaged(trainer).to(torch.bfloat16).save_pretrained(args.export)
    tokenizer.save_pretrained(args.export)
    (args.export / "training_log.json").write_text(json.dumps(trainer.log, indent=1) + "\n")
    print(f"exported step {trainer.step} to {args.export}")


def measure(args: argparse.Namespace) -> None:
    """Print an exported model's held-out losses beside n-gram models and every task with Wilson bounds."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.measure)
    model = LlamaForCausalLM.from_pretrained(args.measure, dtype=torch.bfloat16).to(args.device).eval()
    held_out = HeldOut(tokenizer)
    seen = Data(tokenizer, load_corpus(held_out=False), args.seed).streams
    report: dict[str, object] = {}
    for kind, text in held_out.text.items():
        rivals = ngram_losses(seen[kind], text.reshape(-1).numpy())
        report[f"loss {kind}"] = {"model": held_out.loss(model, kind)} | rivals
        print(f"loss {kind}: {report[f'loss {kind}']}", flush=True)
    items = [("recall", length) for length in (512, 1024, 2048, 4096)]
    items += [(name, 1024) for name in tasks.TASKS if name != "recall"]
    for name, length in items:
        for difficulty in ("easy", "hard"):
            rate, count = held_out.accuracy(model, name, length, args.samples, 1, difficulty, seed=99)
            low, high = wilson_interval(round(rate * count), count)
            report[f"{name} {length} {difficulty}"] = {
                "rate": rate, "n": count, "low": round(low, 4), "high": round(high, 4)
            }  # fmt: skip
            print(f"{name} {length} {difficulty}: {rate:.3f} [{low:.3f}, {high:.3f}] n={count}", flush=True)
    print(json.dumps(report, indent=1))


def main() -> None:
    """Parse the command line and train, export or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/reference"), help="checkpoints and tokenizer")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="budget of training time (0: --tokens decides)"
    )
    parser.add_argument("--tokens", type=int, default=24_600_000)
    parser.add_argument("--lr", type=float, default=1.6e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu is deterministic; cuda is faster")
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", type=Path, default=None)
    parser.add_argument("--measure", type=Path, default=None, help="an exported model's folder")
    parser.add_argument("--samples", type=int, default=256, help="contexts per measured item")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.export:
        export(args)
    elif args.measure:
        measure(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
