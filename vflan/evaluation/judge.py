"""Judges of open answers: (question, reference, answer, sample) -> Judgement(score, reason).

The papers' judges are language models: GPT-4 for LLaVA-Bench (it reads a description of the
picture, and rates a reference and the candidate) and for MM-Vet; Vicuna-13B for forgetting.
`EndpointJudge` and `LocalJudge` ask such a model, in our words or by the benchmark's released
rules (judge_prompts.py). `RuleJudge` takes their place where the facts about a picture are known:
it compares what an answer says about colours and shapes with these facts, and says why. It is
exact and free. It ignores style beyond whole sentences, so it is no GPT-4.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vflan.config import CACHE, weights_source
from vflan.data.conversation import prompt_ids
from vflan.evaluation.answer_cache import append_row, hash_weights, locked, read_cache
from vflan.evaluation.api_client import Reply, ask_all, endpoint_hash
from vflan.evaluation.judge_prompts import GRADE, PAIR, YES_NO, Prompt, prompt_for
from vflan.progress import counted

__all__ = [
    "EndpointJudge", "GRADE", "Judge", "Judgement", "LocalJudge", "PAIR", "Prompt", "RuleJudge",
    "YES_NO", "judge_all", "prompt_for", "title"
]  # fmt: skip

RULES = "rules 1"  # the name of the rules in a score; the number grows when they change
VERBS = set(
    "is are was were be has have shows show see sees can could may might must will looks look lies "
    "lie stands stand sits sit contains contain makes make belong there's it's i'm".split()
)
DENIALS = ("no", "not", "without", "neither", "nor")
PHRASE_WORDS = 5  # how far a colour or a denial may be from the shape that it belongs to
Pair = tuple[str, str]  # (colour, shape)
Row = tuple[str, str, str, dict]  # (question, reference, answer, sample)


@dataclass(frozen=True)
class Judgement:
    """score: None if the judge failed; this answer is left out of the mean.

    out_of: the reference's score if both are rated, else the top of the scale. Both are from 0 to
    10: any other judgement has failed. version: what the judge reports about itself.
    """

    score: float | None
    reason: str
    out_of: float = 10.0
    version: str = ""


class Judge(Protocol):
    """A judge. `title` names judge and prompt in every score.

    A judge that takes many rows at once also has judge_all(rows) -> list of Judgements.
    """

    title: str

    def judge(self, question: str, reference: str, answer: str, sample: dict) -> Judgement:
        """The Judgement of one answer."""
        ...


def judge_all(judge: Judge, samples: list[dict], answers: Sequence[str]) -> list[Judgement]:
    """A Judgement for each answer; `label` is the reference, and `text` the question."""
    rows = [(s["text"], str(s["label"]), str(a), s) for s, a in zip(samples, answers, strict=True)]
    if hasattr(judge, "judge_all"):
        return judge.judge_all(rows)
    return [judge.judge(*row) for row in rows]


def title(judge: Judge, judgements: Sequence[Judgement]) -> str:
    """The judge as a score names it: its title, and the versions that replied."""
    versions = "+".join(sorted({j.version for j in judgements if j.version}))
    return f"{judge.title} {versions}".strip()


# -------------------------------------------------------------------------------------------- rules


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks; the marks end a phrase."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[.,;!?]", str(text).lower())


def mentions(text: str, lexicon: dict) -> list[Pair]:
    """The (colour, shape) pairs that `text` mentions, in order, each once.

    'a small red striped star' and 'the star is red' both mention (red, star). A shape without a
    colour and a denied pair ('there is no red star', 'without a red star') are left out.
    """
    shapes = {form: s for s in lexicon["shapes"] for form in (s, s + "s", s + "es")}
    colors, tokens, pairs = set(lexicon["colors"]), words(text), {}

    def phrase(tokens):
        return list(takewhile(lambda word: word not in shapes and word not in ".,;!?", tokens))

    for i, token in enumerate(tokens):
        if token not in shapes:
            continue
        # Backwards from the shape: "no red star".
        earlier = phrase(reversed(tokens[max(0, i - PHRASE_WORDS) : i]))
        color = next((word for word in earlier if word in colors), None)
        denied = any(word in DENIALS or word.endswith("n't") for word in earlier)
        if color is None:
            # Forwards: "the star (in the picture) is (not) red".
            later = phrase(tokens[i + 1 : i + 1 + PHRASE_WORDS])
            verb = next((k for k, word in enumerate(later) if word in ("is", "are")), len(later))
            color = next((word for word in later[verb + 1 : verb + 3] if word in colors), None)
            denied = denied or "not" in later
        if color and not denied:
            pairs[color, shapes[token]] = None
    return list(pairs)


def is_long_form(answer: str) -> bool:
    """Whether an answer is whole sentences: each has a verb and at least four words."""
    answer = str(answer).strip()
    if not answer.endswith((".", "!", "?")):
        return False
    sentences = [words(s) for s in re.split(r"[.!?]+(?:\s+|$)", answer) if s.strip()]
    return bool(sentences) and all(len(s) >= 4 and VERBS & set(s) for s in sentences)


class Facts(NamedTuple):
    """Pairs of an answer that are true and untrue, and the pairs that the question asks for."""

    right: list[Pair]
    wrong: list[Pair]
    expected: list[Pair]


def facts(reference: str, answer: str, sample: dict, lexicon: dict) -> Facts:
    """Compares an answer with the sample's `facts`.

    Only the pairs that the reference mentions are asked for: a short question about one star is
    not about the whole picture.
    """
    # Without facts the reference is trusted as it is.
    truth = {tuple(pair) for pair in sample.get("facts", [])}
    named = mentions(answer, lexicon)
    expected = [pair for pair in mentions(reference, lexicon) if not truth or pair in truth]
    right = [pair for pair in named if pair in truth]
    return Facts(right, [pair for pair in named if pair not in truth], expected)


def overlap(reference: str, answer: str) -> float:
    """F1 of the words of two texts, 0 to 1: the content score if a reference names no pair."""
    articles = ("a", "an", "the")
    a, b = (
        [word for word in words(text) if word.isalnum() and word not in articles]
        for text in (reference, answer)
    )
    common = sum(min(a.count(word), b.count(word)) for word in set(a))
    return 2 * common / (len(a) + len(b)) if a or b else 0.0


@dataclass(frozen=True)
class RuleJudge:
    """6 points for content, 2 for whole sentences, 2 for naming nothing untrue.

    Content is the share of the expected pairs that are named, or the overlap with the reference if
    it names none. An untrue pair costs its share of all named pairs. An answer with little content
    gets fewer of the last four points, so that silence does not earn them.
    """

    lexicon: dict
    title: str = RULES

    def judge(self, question: str, reference: str, answer: str, sample: dict) -> Judgement:
        """The Judgement of one answer, with its reason in words."""
        if not str(answer).strip():
            return Judgement(0.0, "no answer")
        right, wrong, expected = facts(reference, answer, sample, self.lexicon)
        if expected:
            named = sum(pair in right for pair in expected)
            content, reason = named / len(expected), f"names {named} of {len(expected)} objects"
        else:
            content = overlap(reference, answer)
            reason = f"{round(100 * content)} % of the words agree"
        untrue = len(wrong) / len(right + wrong) if wrong else 0.0
        # Half of the content is enough for the full points of form and truth.
        form, substance = is_long_form(answer), min(1, 2 * content)
        score = 6 * content + 2 * form * substance + 2 * (1 - untrue) * substance
        reason += ", whole sentences" if form else ", no whole sentences"
        if wrong:
            reason += ", not there: " + ", ".join(" ".join(pair) for pair in wrong)
        return Judgement(round(score, 2), reason)


# ---------------------------------------------------------------------------------- language models


def _no_score(reply: str) -> str:
    return f"no score in the reply: {reply[:80]!r}"


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL and OPENAI_API_KEY).

    prompt: None for the benchmark's own. price: US dollars per million tokens, (read, written), for
    the estimate that is printed before the first call. temperature: None sends none; some models
    accept only their own. Readable replies are stored in `cache` and not paid for again; an
    unreadable one is requested once more.
    """

    model: str
    prompt: Prompt | None = None
    price: tuple[float, float] | None = None
    workers: int = 4
    timeout: float = 60.0
    retries: int = 6
    temperature: float | None = 0.0
    cache: Path = CACHE / "judgements"

    @property
    def title(self) -> str:
        """Model and prompt, as a score names them."""
        return f"{self.model} {self.prompt.name}-{self.prompt.hash}"

    def judge(self, question: str, reference: str, answer: str, sample: dict) -> Judgement:
        """The Judgement of one answer."""
        return self.judge_all([(question, reference, answer, sample)])[0]

    def judge_all(self, rows: list[Row]) -> list[Judgement]:
        """The Judgements of many answers, asked at the same time."""
        texts = [self.prompt.fill(*row) for row in rows]
        # The key covers all that a reply depends on: model, endpoint, prompt, temperature.
        keys = [self._key(text) for text in texts]
        path = Path(self.cache) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.title)}.jsonl"
        # Equal questions have equal keys and are asked once.
        text_of, trouble = dict(zip(keys, texts)), {}
        with locked(path):
            # A damaged verdict is asked again.
            rows = [row for row in read_cache(path, mend=True) if row and self._is_read(row)]
            known = {row["key"]: row for row in rows}
            todo = {key: text for key, text in text_of.items() if key not in known}
            if todo:
                print(self.estimate(list(todo.values()), len(text_of) - len(todo)), flush=True)
            with path.open("a", encoding="utf-8") as file:
                # The second round repeats what failed in the first.
                for _ in range(2):
                    left = {key: text for key, text in todo.items() if key not in known}
                    for key, reply in counted(self._ask(left), "judging", len(left), "answers"):
                        if reply.trouble or self.prompt.read(reply.text) is None:
                            trouble[key] = reply.trouble or _no_score(reply.text)
                            continue
                        known[key] = dict(key=key, model=reply.model, reply=reply.text)
                        append_row(file, known[key])
        return [
            self._judgement(known[key]) if key in known else Judgement(None, trouble[key])
            for key in keys
        ]

    def estimate(self, texts: list[str], cached: int = 0) -> str:
        """The cost of asking, in words. A token is counted as four characters."""
        read, written = sum(map(len, texts)) // 4, len(texts) * self.prompt.max_tokens
        cost = "price unknown (give price=)"
        if self.price:
            cost = f"${(read * self.price[0] + written * self.price[1]) / 1e6:.2f} at most"
        return (
            f"{self.model} is asked for {len(texts)} judgements ({cached} more are in the cache): "
            f"about {read:,} tokens to read and at most {written:,} to write; {cost}."
        )

    def _ask(self, todo: dict[str, str]) -> Iterator[tuple[str, Reply]]:
        """Yields (key, Reply) for {key: text}."""
        keys = list(todo)
        requests = [partial(_user_turn, text) for text in todo.values()]
        limits = self.prompt.max_tokens, self.temperature
        patience = self.workers, self.timeout, self.retries
        for i, reply in ask_all(self.model, requests, *limits, *patience):
            yield keys[i], reply

    def _key(self, text: str) -> str:
        parts = json.dumps([self.model, endpoint_hash(), text, self.temperature])
        return hashlib.sha256(parts.encode()).hexdigest()

    def _is_read(self, row: dict) -> bool:
        """Whether a row of the cache holds a verdict that can be read."""
        texts = (row.get("key"), row.get("model"), row.get("reply"))
        return all(isinstance(text, str) for text in texts) and bool(self.prompt.read(row["reply"]))

    def _judgement(self, row: dict) -> Judgement:
        score, out_of = self.prompt.read(row["reply"])
        # Only a version that tells more than the name is worth naming.
        version = row["model"] if row["model"] != self.model else ""
        return Judgement(score, row["reply"], out_of, version)


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model on this machine, by folder or hub name.

    For forgetting the paper's is Vicuna-13B v1.5. The model is asked in its tokenizer's chat
    template, or in Vicuna's if it has none, and answers greedily.
    """

    model: str
    prompt: Prompt | None = None
    batch_size: int = 8

    @property
    def title(self) -> str:
        """Model and prompt, as a score names them."""
        return f"{Path(self.model).name} {self.prompt.name}-{self.prompt.hash}"

    def judge(self, question: str, reference: str, answer: str, sample: dict) -> Judgement:
        """The Judgement of one answer."""
        return self.judge_all([(question, reference, answer, sample)])[0]

    def judge_all(self, rows: list[Row]) -> list[Judgement]:
        """The Judgements of many answers, in batches."""
        prompts = [self._ids(self.prompt.fill(*row)) for row in rows]
        # Prompts of similar length share a batch; the longest first.
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
        judgements, version = {}, self._version
        for i, reply in counted(self._ask(prompts, order), "judging", len(order), "answers"):
            score, out_of = self.prompt.read(reply) or (None, 1.0)
            reason = reply if score is not None else _no_score(reply)
            judgements[i] = Judgement(score, reason, out_of, version)
        return [judgements[i] for i in range(len(rows))]

    @property
    def _loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        return _language_model(weights_source(self.model))

    @property
    def _version(self) -> str:
        source = weights_source(self.model)
        # A model of the hub is known by its commit.
        if Path(source).is_dir():
            return hash_weights(source)[:8]
        return str(getattr(self._loaded[0].config, "_commit_hash", None) or "")[:8]

    def _ids(self, text: str) -> list[int]:
        tokenizer = self._loaded[1]
        # Vicuna's tokenizer has no chat template.
        if not tokenizer.chat_template:
            return prompt_ids(text, tokenizer, has_image=False)
        options = dict(add_generation_prompt=True, return_dict=True)
        return tokenizer.apply_chat_template(_user_turn(text), **options)["input_ids"]

    def _ask(self, prompts: list[list[int]], order: list[int]) -> Iterator[tuple[int, str]]:
        """Yields (index, reply)."""
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield from zip(batch, self._replies([prompts[i] for i in batch]))

    def _replies(self, prompts: list[list[int]]) -> list[str]:
        import torch

        model, tokenizer = self._loaded
        width, pad = max(map(len, prompts)), tokenizer.pad_token_id or tokenizer.eos_token_id or 0
        # Padded on the left, so that every reply begins at the same position.
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in (ids, mask))
        options = dict(do_sample=False, max_new_tokens=self.prompt.max_tokens)
        options |= dict(pad_token_id=pad, eos_token_id=tokenizer.eos_token_id)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, **options)  # (batch, total)
        # Only the new tokens: the prompt itself contains the words yes and no.
        replies = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return [reply.strip() for reply in replies]


def _user_turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# Several benchmarks share one judge.
@lru_cache(maxsize=1)
def _language_model(source: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vflan.models.hub import hub_options

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    options = dict(trust_remote_code=False, **hub_options(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(source, **options)
