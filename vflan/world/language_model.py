"""The tiny stand-in for Vicuna: a tokenizer and a Llama that reads scenes in words, never pictures.

Visual instruction tuning needs a language model that can look things up in its context: what colour
is the star, is there one, what is left of it, how many. With 1 M parameters this skill is the
bottleneck. It is taught with

    running text     A scene is 'sand clear. b2 small striped red star. ...'. Its objects, and often
                     the words of an object, are in random order: the words have to be bound by
                     nearness before anything can be looked up.
    dense questions  A dozen questions on one text. Each sees only the text and itself (a block
                     mask; positions restart after the text). The loss is on answers only.
    a binding start  The first layer is initialised to gather the last six words at each full stop;
                     half of the heads above are initialised to look words up in what was gathered.
                     All of it is trained further.
    Muon             for the matrices (fp32, with weight decay, otherwise attention saturates);
                     AdamW for embeddings and norms.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vflan.world import chats
from vflan.world import scene as W
from vflan.world import tasks as T
from vflan.world.scene import Scene
from vflan.world.words import describe, sentences

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# ------------------------------------------------------------------------------------ the tokenizer


def corpus(seed: int = 0) -> Iterator[str]:
    """Text of every kind, for the tokenizer: each word is frequent enough to become one piece."""
    for k in (T.KINDS[name] for name in T.KINDS if name in T.SHIPPED):
        for scene, instruction, answer in T.sample(k, 120, "corpus", seed):
            yield f"USER: {describe(scene)}\n{instruction} ASSISTANT: {answer}"
            if scene.things:
                yield " ".join(sentences(scene.things, scene.background, scene.condition))
    for line in chats.phrases() * 3:
        yield f"USER:\n{line}"


def make_tokenizer(folder: Path, seed: int = 0) -> PreTrainedTokenizerFast:
    """A Llama-shaped BPE with byte fallback whose pieces are the words of the mini world.

    The system sentence is a single piece.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("\u2581", "merged_with_next"),
            pre_tokenizers.Split(Regex("[?.,!]"), "isolated"),
        ]
    )
    normal = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normal, split
    learner.train_from_iterator(
        corpus(seed),
        trainers.BpeTrainer(
            vocab_size=4000,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=[chr(c) for c in range(33, 127)],
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [
        p for p, _ in sorted(learned["vocab"].items(), key=lambda kv: kv[1]) if p not in pieces
    ]
    if "\n" not in pieces:
        pieces.append("\n")
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [tuple(m) for m in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normal, split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False, rstrip=True, special=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder / "language_model")
    return fast


# ---------------------------------------------------------------------------------------- the start
# Rotary frequency -> weight. The kernel was fitted once, so that attention is spread evenly over
# the five words before a full stop.
NEAR, CENTRE = {0: -3.1, 1: 9.28, 2: 2.18, 3: 1.83, 4: 4.84}, 3.0


# What the look-up heads of odd (1) and even (0) layers are initialised to search for, and to
# return.
LOOKUPS = {
    (1, 0): (W.PLACES, W.SIZES + W.TEXTURES + W.COLORS + W.SHAPES),
    (1, 1): (W.SHAPES, W.PLACES + W.SIZES + W.TEXTURES),
    (0, 0): (W.SHAPES, W.COLORS + W.SIZES + W.TEXTURES),
    (0, 1): (W.COLORS, W.PLACES + W.SHAPES),
}


def kernel(
    hd: int, d: int, theta: float, const: float, stretch: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key matrices (hd, d) whose product depends only on the distance of two tokens.

    It is a window over the last five tokens; with `stretch` 1 about twice as wide and as far.
    Coordinate 0 of every embedding is constant.
    """
    q, k = torch.zeros(hd, d), torch.zeros(hd, d)
    for f, weight in NEAR.items():
        angle = theta ** (-2 * f / hd) * CENTRE
        size = math.sqrt(abs(weight) * math.sqrt(hd)) / const
        f += stretch
        q[f, 0] = size
        k[f, 0], k[f + hd // 2, 0] = (
            math.copysign(size, weight) * turn(angle) for turn in (math.cos, math.sin)
        )
    return q, k


def start(model, tokenizer, seed=0, es=0.5, g2=2.5, om=1.5):
    """Initialise a Llama to gather words at full stops (layer 0) and to look them up.

    Half of the heads above layer 0 look up what was gathered.
    """
    c = model.config
    d, hd, heads = c.hidden_size, c.hidden_size // c.num_attention_heads, c.num_attention_heads
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, std=1.0):
        return torch.randn(*shape, generator=g) * std

    def orthogonal(n):
        return torch.linalg.qr(randn(n, n))[0]

    with torch.no_grad():
        E = model.model.embed_tokens.weight
        E.copy_(randn(*E.shape, std=es))
        E[:, 1:] *= es * math.sqrt(d) / E[:, 1:].norm(dim=1, keepdim=True)
        # One constant coordinate, so that attention by position alone can be written down.
        E[:, 0] = 4 * es
        rms = math.sqrt(es**2 + (4 * es) ** 2 / d)
        const = 4 * es / rms
        R = torch.eye(d)
        R[1:, 1:] = orthogonal(d - 1)
        basis = torch.zeros(d, d)
        basis[1:, 1:] = orthogonal(d - 1)
        # Their vectors start out orthogonal.
        words = [
            *W.PLACES,
            *W.SIZES,
            *W.TEXTURES,
            *W.COLORS,
            *W.SHAPES,
        ]
        unit = dict(zip(words, torch.cat([torch.zeros(d - 1, 1), orthogonal(d - 1)], 1)))
        for word, u in unit.items():
            E[tokenizer.convert_tokens_to_ids("\u2581" + word), 1:] = u[1:] * es * math.sqrt(d)
        stop, bos = (E[tokenizer.convert_tokens_to_ids(t)].clone() for t in (".", "<s>"))
        stop[0] = bos[0] = 0
        for i, layer in enumerate(model.model.layers):
            a = layer.self_attn
            q, k, v, o = (randn(d, d, std=0.2 / math.sqrt(d)) for _ in range(4))
            near = [
                kernel(hd, d, c.rope_parameters["rope_theta"], const, stretch) for stretch in (0, 1)
            ]
            for h in range(heads):
                rows = slice(h * hd, (h + 1) * hd)
                B, A = basis[rows], torch.zeros(hd, d)
                last = hd // 2 - 1  # the slowest rotation: free of position
                if i == 0:
                    # Gather the last six words, at full stops only; else attend to the first token.
                    q[rows] = (
                        0.05 * q[rows] + near[0][0][:, :1] * const * stop / (stop @ stop) * rms
                    )
                    k[rows] = 0.05 * k[rows] + near[0][1]
                    q[rows][last, 0] += 3.0 / const
                    k[rows][last] += 5.0 * bos / (bos @ bos) * rms
                    v[rows], o[:, rows] = B, R @ B.T * (6 * rms * 0.5)
                # Look up words of one sort among what the full stops gathered.
                elif h < heads // 2 and (i % 2, h) in LOOKUPS:
                    keys, values = LOOKUPS[(i % 2, h)]
                    # Slow enough to match far away.
                    free = [f + half for half in (0, hd // 2) for f in range(4, last)]
                    for f, word in zip(free, keys):
                        A[f] = unit[word]
                    q[rows] += math.sqrt(g2) * A
                    k[rows] += math.sqrt(g2) * A @ R.T
                    q[rows][last, 0] += 5.0 / const
                    k[rows][last] += 8.0 * stop / (stop @ stop) * rms
                    B = torch.zeros(hd, d)
                    B[: len(values)] = torch.stack([unit[w] for w in values])
                    v[rows], o[:, rows] = B @ R.T, B.T * om * es
                # Gather the words just before, for the answer to read the question.
                elif h == heads - 1:
                    q[rows] += near[1][0]
                    k[rows] += near[1][1]
                    v[rows], o[:, rows] = B, B.T * om * es
                else:
                    v[rows], o[:, rows] = B, B.T * om * es
            for linear, w in ((a.q_proj, q), (a.k_proj, k), (a.v_proj, v), (a.o_proj, o)):
                linear.weight.copy_(w)
            for w, std in (
                (layer.mlp.gate_proj, 0.5),
                (layer.mlp.up_proj, 0.5),
                (layer.mlp.down_proj, 0.15),
            ):
                w.weight.copy_(randn(*w.weight.shape, std=std / math.sqrt(w.weight.shape[1])))
        model.model.norm.weight.fill_(0.4 / (es * math.sqrt(d)))


# -------------------------------------------------------------------------------------- the teacher


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by four Newton-Schulz steps, in fp32, with decoupled weight decay.

    Matrices of one shape are updated together. `torch.optim.Muon` works in bf16, which two CPU
    cores emulate 40 to 80 times slower.
    """

    def __init__(self, params, lr=0.01, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = torch.lerp(p.grad, buffer, group["momentum"])  # Nesterov
                shapes.setdefault(p.shape, []).append((p, update))
            for shape, pairs in shapes.items():
                x = torch.stack([u for _, u in pairs])
                tall = shape[0] > shape[1]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(4):
                    A = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
                x = x.mT if tall else x
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for (p, _), u in zip(pairs, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                        u, alpha=-group["lr"] * scale
                    )


class Rows:
    """Turns scenes with questions into rows of tokens, with their mask.

    A row is [text | question answer | question answer | ...].
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        self.head = tokenizer(SYSTEM + " USER:").input_ids
        self.newline = tokenizer("x\n", add_special_tokens=False).input_ids[-1:]
        # The piece between a picture and its question.
        self.space = [tokenizer.convert_tokens_to_ids("\u2581")]

    def ids(self, text):
        """Token ids of a text that begins a word, word by word from a cache."""
        out = []
        for word in re.findall(r"\n|[^ \n]+", text):
            if word not in self.cache:
                self.cache[word] = self.tokenizer(word, add_special_tokens=False).input_ids
            out += self.cache[word]
        return out

    def question(self, text):
        """'\\nWhat ... ASSISTANT:' as it follows the scene.

        No space is put before the first word after the line break.
        """
        key = ("q", text.split(" ", 1)[0])
        if key not in self.cache:
            self.cache[key] = self.tokenizer("\n" + key[1], add_special_tokens=False).input_ids
        rest = text.split(" ", 1)
        return (
            self.cache[key] + (self.ids(rest[1]) if len(rest) > 1 else []) + self.ids("ASSISTANT:")
        )

    def batch(self, rows):
        """rows: [(prefix ids, [(question ids, answer ids), ...]), ...].

        Returns ids, positions, mask (B, 1, L, L), where, labels, weight.
        """
        length = max(len(p) + sum(len(q) + len(a) for q, a in blocks) for p, blocks in rows)
        length = -(-length // 16) * 16
        B = len(rows)
        ids = np.zeros((B, length), np.int64)
        positions = np.zeros((B, length), np.int64)
        block = np.full((B, length), -1)
        where, labels, weight = [], [], []
        eos = self.tokenizer.eos_token_id
        for r, (prefix, blocks) in enumerate(rows):
            n = len(prefix)
            ids[r, :n], positions[r, :n], block[r, :n] = prefix, np.arange(n), 0
            at = n
            for b, (q, a) in enumerate(blocks):
                m = len(q) + len(a)
                ids[r, at : at + m], positions[r, at : at + m], block[r, at : at + m] = (
                    q + a,
                    n + np.arange(m),
                    b + 1,
                )
                for j, token in enumerate(a):
                    where.append(r * length + at + len(q) + j - 1)
                    labels.append(token)
                    weight.append(0.1 if token == eos else 1.0)
                at += m
        same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
        mask = same & np.tri(length, dtype=bool) & (block[:, None, :] >= 0)
        mask |= np.eye(length, dtype=bool)  # a padded position sees itself, or softmax has nothing
        as_tensor = torch.tensor
        additive = torch.zeros(B, 1, length, length).masked_fill_(
            ~as_tensor(mask)[:, None], torch.finfo(torch.float32).min
        )
        return (
            as_tensor(ids),
            as_tensor(positions),
            additive,
            as_tensor(where),
            as_tensor(labels),
            as_tensor(weight, dtype=torch.float32),
        )


def logits_at(model, ids, positions, mask, where):
    hidden = model.model(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[where])


def kinds_for(scene: Scene) -> list[T.Kind]:
    """The kinds that fit a scene and that the language model may meet in text."""
    allowed = {scene.kind} | ({"", "any"} if scene.kind != "handwritten" else set())
    if len(scene.things) == 1:
        allowed.add("single")
    return [k for k in T.KINDS.values() if k.in_text and k.scenes in allowed]


def text_scene(rng: Generator, seed: int) -> W.Scene:
    """A scene for text, with some objects alike; never one set aside for evaluation."""
    while W.held(scene := draw(rng, seed)):
        pass
    return scene


def draw(rng, seed):
    u = rng.random()
    if u < 0.06:
        return W.sample_scene(rng, "objects", 1, seed=seed)
    scene = W.sample_scene(rng, W.pick(rng, W.KINDS, (0.72, 0.08, 0.08, 0.11, 0.01)), seed=seed)
    return T.alike(scene, rng) if len(scene.things) > 1 and rng.random() < 0.35 else scene


def lesson(rows, rng, weights, seed, budget, wording=lambda kind, answer: answer):
    """One training row: a text with as many questions, drawn by `weights`, as fit into `budget`."""
    scene = text_scene(rng, seed)
    eos = rows.tokenizer.eos_token_id
    u = rng.random()
    # A caption after a text, as in the template `plain`.
    if u < 0.08 and scene.kind != "handwritten":
        text = [rows.tokenizer.bos_token_id, *rows.ids(describe(scene, rng))]
        return text, [([], [*rows.ids(describe(scene)), *rows.newline])]
    if u < 0.11 and scene.things:  # prose, as plain text
        text = [rows.tokenizer.bos_token_id]
        return text, [
            ([], rows.ids(" ".join(sentences(scene.things, scene.background, scene.condition))))
        ]
    prefix = [*rows.head, *rows.ids(describe(scene, rng))]
    if rng.random() < 0.3:
        prefix += rows.space
    # Long answers, asked for in words that the alignment stage never uses.
    if u < 0.23 and scene.things:
        pairs = [
            (
                "Please give a text about the scene.",
                " ".join(sentences(scene.things, scene.background, scene.condition)),
            ),
            ("Please give a text about the objects.", chats.see(scene)),
            ("Please help: what might the objects be?", chats.reason(scene, rng)),
        ]
        pairs += [
            (f"Please explain: {q}", a) for q, a in (chats.small_talk(scene, rng) for _ in range(4))
        ]
        return prefix, [(rows.question(q), [*rows.ids(a), eos]) for q, a in dict(pairs).items()]
    kinds = kinds_for(scene)
    p = np.array([weights[k.name] for k in kinds])
    p /= p.sum()
    blocks, total, seen = [], len(prefix), set()
    for _ in range(40):
        k = kinds[int(rng.choice(len(kinds), p=p))]
        made = k.make(scene, rng)
        if made is None or made[0] in seen:
            continue
        seen.add(made[0])
        q, a = rows.question(made[0]), [*rows.ids(wording(k, made[1])), eos]
        if total + len(q) + len(a) > budget:
            break
        blocks.append((q, a))
        total += len(q) + len(a)
    return prefix, blocks


def exam(tokenizer, rows, n=40, key="text exam", kinds=None, evaluation=True, wording=None):
    """n questions for each kind, in batches of (kind, text ids, question ids, answer ids).

    evaluation: about scenes that training never draws.
    """
    items = []
    for k in kinds or T.KINDS.values():
        for i, (scene, instruction, answer) in enumerate(
            T.sample(k, n, key, evaluation=evaluation)
        ):
            text = describe(scene, W.rng_of(key, k.name, i))
            prefix = [*rows.head, *rows.ids(text)]
            answer = wording(k, answer) if wording else answer
            items.append(
                (
                    k.name,
                    prefix,
                    rows.question(instruction),
                    [*rows.ids(answer), tokenizer.eos_token_id],
                )
            )
    items.sort(key=lambda t: sum(map(len, t[1:])))
    return [items[i : i + 64] for i in range(0, len(items), 64)]


@torch.no_grad()
def grade(model, rows, batches):
    """The share of answers with all tokens right, by kind.

    Teacher-forced, which is equal to exact match of greedy decoding.
    """
    right = {}
    for items in batches:
        ids, positions, mask, where, labels, _ = rows.batch([(p, [(q, a)]) for _, p, q, a in items])
        ok = logits_at(model, ids, positions, mask, where).argmax(-1) == labels
        at = 0
        for name, _, _, a in items:
            right.setdefault(name, []).append(ok[at : at + len(a)].all().item())
            at += len(a)
    return {k: float(np.mean(v)) for k, v in right.items()}


# Looking one thing up comes first; everything else rests on it.
FIRST = (
    "color_of",
    "color_at",
    "shape_at",
    "shape_of_color",
    "where_is",
    "where_color",
    "texture_of",
    "texture_at",
    "size_of",
    "exist_shape",
    "exist_color",
    "exist_pair",
    "describe_place",
)
STEPS = (1250, 7000, 14900)  # look-ups; everything; everything with a rate that falls to zero


def teachers(model, lr, decay=0.2):
    """The optimizers: Muon for the matrices, AdamW for embeddings and norms."""
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    others = [p for n, p in model.named_parameters() if not any(p is m for m in matrices)]
    return (
        Muon(matrices, lr=lr, weight_decay=decay),
        torch.optim.AdamW(others, lr=lr / 5, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def learn(model, batch, muon, adam, rate):
    """One step of both optimizers on a batch of `Rows`; returns (loss, answer tokens).

    AdamW has a fifth of the rate.
    """
    ids, positions, mask, where, labels, weight = batch
    loss = F.cross_entropy(logits_at(model, ids, positions, mask, where), labels, reduction="none")
    loss = (loss * weight).sum() / weight.sum()
    muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate, rate / 5
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    muon.step()
    adam.step()
    return loss.item(), len(weight)


def make_language_model(
    folder: Path,
    seed: int = 0,
    steps: int = STEPS,
    rows_a_step: int = 6,
    budget: int = 224,
    log: Callable = print,
    width: int = 128,
) -> dict:
    """Pretrain a `LlamaForCausalLM` on text and save it; returns its record.

    width: of its hidden states, a multiple of 32, one head for each 32. The shipped one has 128;
    bench/scale.py makes others. `folder`/language_model holds the tokenizer.

    Kinds that are not learned yet are drawn more often. Every 800 steps the skill of each kind is
    estimated on scenes of the training part, and its weight is what it lacks, at least .12.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "language_model")
    torch.manual_seed(seed)
    begin, wall = time.process_time(), time.time()
    rows = Rows(tokenizer)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 21 // 8,
            num_hidden_layers=5,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    start(model, tokenizer, seed)
    watch = exam(
        tokenizer,
        rows,
        24,
        "text watch",
        [k for k in T.KINDS.values() if k.in_text],
        evaluation=False,
    )
    need = dict.fromkeys(T.KINDS, 1.0)
    history, asked, average = [], 0, 0.0
    for step in range(steps[-1]):
        if step in (0, steps[1]):
            lr = 0.01 if step == 0 else 0.008
            muon, adam = teachers(model, lr)
            base = step
        first = step < steps[0]
        weights = {k: n * (1.0 if k in FIRST or not first else 0.03) for k, n in need.items()}
        batch = [
            lesson(rows, W.rng_of("text lesson", seed, step, i), weights, 0, budget)
            for i in range(rows_a_step)
        ]
        pace = min(1, (step - base + 1) / 30) * (
            1.0 if step < steps[1] else 1 - (step - base) / (steps[-1] - base)
        )
        loss, tokens = learn(model, rows.batch(batch), muon, adam, lr * pace)
        average, asked = loss if step == 0 else 0.98 * average + 0.02 * loss, asked + tokens
        if step % 800 == 799:
            skill = grade(model, rows, watch)
            need = {k: max(0.12, 1.0 - skill.get(k, 1.0)) for k in T.KINDS}
            history.append((step + 1, round(float(np.mean(list(skill.values()))), 3)))
            spent = time.process_time() - begin
            log(
                f"step {step + 1}, {spent:.0f} s, loss {average:.3f}, text skill {history[-1][1]}",
                flush=True,
            )
    model.half().save_pretrained(folder / "language_model")
    return dict(
        seed=seed,
        cpu_seconds=round(time.process_time() - begin),
        wall_seconds=round(time.time() - wall),
        steps=steps[-1],
        answer_tokens=asked,
        parameters=sum(p.numel() for p in model.parameters()),
        history=history,
        skills=skills(folder),
    )


def skills(folder, n=100, name="language_model", wording=None):
    """The share of right answers of the shipped weights, by kind, on about n unseen scenes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "language_model")
    model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    rows = Rows(tokenizer)
    return {
        k: round(v, 3)
        for k, v in sorted(grade(model, rows, exam(tokenizer, rows, n, wording=wording)).items())
    }


# --------------------------------------------------------------------------- a second one (Table 7)


def in_a_sentence(kind, answer):
    """A short answer in the manner of the second language model; a letter stays a letter."""
    if kind.category == "multiple choice" or kind.group == "generation":
        return answer
    sentences_of = {"yes": "yes, I can see that.", "no": "no, I cannot see that."}
    return sentences_of.get(answer, f"The picture shows {answer}.")


def make_second_language_model(
    folder: Path,
    seed: int = 1,
    steps: int = 800,
    rows_a_step: int = 6,
    budget: int = 224,
    log: Callable = print,
) -> dict:
    """Train the shipped language model further, to one that answers in sentences and at length.

    Vicuna v1.5 and LLaMA-2-Chat, which the paper exchanges in Table 7, come from the same model by
    different fine-tuning. So do these two: the same shape and origin, another manner. Text only.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "language_model")
    model = LlamaForCausalLM.from_pretrained(folder / "language_model", dtype=torch.float32)
    rows, begin, average = Rows(tokenizer), time.process_time(), 0.0
    muon, adam = teachers(model, lr := 0.006)
    for step in range(steps):
        rngs = [W.rng_of("second lesson", seed, step, i) for i in range(rows_a_step)]
        batch = [
            talk_lesson(rows, rng, seed)
            if rng.random() < 0.3
            else lesson(rows, rng, dict.fromkeys(T.KINDS, 1.0), seed, budget, in_a_sentence)
            for rng in rngs
        ]
        loss, _ = learn(
            model, rows.batch(batch), muon, adam, lr * min(1, (step + 1) / 30) * (1 - step / steps)
        )
        average = loss if step == 0 else 0.98 * average + 0.02 * loss
        if step % 100 == 99:
            log(
                f"step {step + 1}, {time.process_time() - begin:.0f} s, loss {average:.3f}",
                flush=True,
            )
    model.half().save_pretrained(folder / "second_language_model")
    tokenizer.save_pretrained(folder / "second_language_model")
    return dict(
        seed=seed,
        cpu_seconds=round(time.process_time() - begin),
        steps=steps,
        parameters=sum(p.numel() for p in model.parameters()),
        skills=skills(folder, name="second_language_model", wording=in_a_sentence),
    )


def talk_lesson(rows, rng, seed):
    """A scene in words and a talk about it; each question sees only the scene and itself."""
    while not (scene := text_scene(rng, seed)).things:
        pass
    pairs = [
        (
            W.pick(rng, chats.DETAIL),
            " ".join(sentences(scene.things, scene.background, scene.condition)),
        ),
        (W.pick(rng, chats.SEE), chats.see(scene)),
        (W.pick(rng, chats.REASON), chats.reason(scene, rng)),
    ]
    pairs += [chats.small_talk(scene, rng) for _ in range(3)]
    eos = rows.tokenizer.eos_token_id
    blocks = [(rows.question(q), [*rows.ids(a), eos]) for q, a in dict(pairs).items()]
    return [*rows.head, *rows.ids(describe(scene, rng))], blocks
