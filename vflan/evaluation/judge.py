"""Judges of open answers: (question, reference, answer, sample) -> Judgement(score, reason, out_of).

The papers' judges are language models: GPT-4 for LLaVA-Bench (it sees a description of the picture and rates a reference
and the candidate) and for MM-Vet, Vicuna-13B for forgetting. `EndpointJudge` and `LocalJudge` ask such a model, in our
own words or by the benchmark's released rules; a reply that cannot be read is no score, neither 0 nor 100. `RuleJudge`
stands in where the truth is known as facts: it reads what was said about colours and shapes, compares it with what is
there, and says why. It is exact, free and blind to style beyond whole sentences; it is no GPT-4.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from vflan.config import CACHE, weights_source
from vflan.data.conversation import prompt_ids
from vflan.evaluation.answer_cache import hash_weights, locked, read_rows
from vflan.evaluation.api_client import ask_all, endpoint_hash
from vflan.progress import counted

RULES = "rules 1"  # how rules are named in a score; the number grows when they change
VERBS = set(
    "is are was were be has have shows show see sees can could may might must will looks look lies lie stands stand "
    "sits sit contains contain makes make belong there's it's i'm".split()
)


@dataclass(frozen=True)
class Judgement:
    """`score` None: the judge failed, and this answer is left out of the mean. `version`: what the judge says it is."""

    score: float | None
    reason: str
    out_of: float = (
        10.0  # what the reference got where the two are compared, else the top of the scale
    )
    version: str = ""


class Judge(Protocol):
    """`title` names judge, version and prompt in every score; a judge that can take many rows at once has judge_all."""

    title: str

    def judge(self, question: str, reference: str, answer: str, sample: dict) -> Judgement: ...


def judge_all(judge, samples, answers):
    """A Judgement for each answer. The reference is the sample's `label`, the question its `text`."""
    rows = [(s["text"], str(s["label"]), str(a), s) for s, a in zip(samples, answers, strict=True)]
    return (
        judge.judge_all(rows)
        if hasattr(judge, "judge_all")
        else [judge.judge(*row) for row in rows]
    )


def title(judge, judgements):
    """What stands in a score's row: the judge, the versions that answered, and the hash of its prompt."""
    versions = "+".join(sorted({j.version for j in judgements if j.version}))
    return " ".join(filter(None, [judge.title, versions]))


# ------------------------------------------------------------------------------------------------------- rules


def words(text):
    """Lower-case words, with '.' ending a sentence and ',' kept, since they end a phrase."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[.,;!?]", str(text).lower())


def mentions(text, lexicon):
    """The (colour, shape) pairs that `text` speaks of, in order, each once.

    'a small red striped star' and 'the star is red' both speak of (red, star). A shape without a colour, and a pair
    that is denied ('there is no red star', 'without a red star'), are left out.
    """
    shapes = {form: s for s in lexicon["shapes"] for form in (s, s + "s", s + "es")}
    colors, tokens, found = set(lexicon["colors"]), words(text), []
    for i, token in enumerate(tokens):
        if token not in shapes:
            continue
        color, denied = None, False
        for back in reversed(tokens[max(0, i - 5) : i]):
            if back in shapes or back in ".,;!?":
                break
            if back in colors and color is None:
                color = back
            if back in ("no", "not", "without", "neither", "nor") or back.endswith("n't"):
                denied = True
        if color is None:  # the star (in the picture) is (not) red
            phrase = tokens[i + 1 : i + 6]
            phrase = phrase[
                : next((k for k, w in enumerate(phrase) if w in shapes or w in ".,;!?"), 5)
            ]
            at = next((k for k, w in enumerate(phrase) if w in ("is", "are")), 5)
            color = next((w for w in phrase[at + 1 : at + 3] if w in colors), None)
            denied = denied or "not" in phrase
        if color and not denied and (color, shapes[token]) not in found:
            found.append((color, shapes[token]))
    return found


def is_long_form(answer):
    """Whether an answer is written out: it ends as a sentence does; each sentence has a verb and four words or more."""
    answer = str(answer).strip()
    if not answer.endswith((".", "!", "?")):
        return False
    sentences = [words(s) for s in re.split(r"[.!?]+(?:\s+|$)", answer) if s.strip()]
    return bool(sentences) and all(len(s) >= 4 and VERBS & set(s) for s in sentences)


def facts(reference, answer, sample, lexicon):
    """(right, wrong, wanted): pairs said and true, said and untrue, and asked for.

    True is what the sample's facts say; asked for is what the reference mentions, since a short question about one star
    does not want the whole picture.
    """
    truth = {tuple(pair) for pair in sample.get("facts", [])}
    said = mentions(answer, lexicon)
    wanted = [pair for pair in mentions(reference, lexicon) if not truth or pair in truth]
    return [p for p in said if p in truth], [p for p in said if p not in truth], wanted


def overlap(reference, answer):
    """F1 of the words of two texts, 0 to 1; the measure of content where a reference names no colour with a shape."""
    a, b = (
        [w for w in words(t) if w.isalnum() and w not in ("a", "an", "the")]
        for t in (reference, answer)
    )
    common = sum(min(a.count(w), b.count(w)) for w in set(a))
    return 2 * common / (len(a) + len(b)) if a or b else 0.0


@dataclass(frozen=True)
class RuleJudge:
    """6 points for content, 2 for whole sentences, 2 for saying nothing untrue (only an answer that says something).

    Content is the share of the asked-for pairs that are named, or the overlap with the reference where it names none.
    Each untrue pair costs its share of all pairs named.
    """

    lexicon: dict
    title: str = RULES

    def judge(self, question, reference, answer, sample):
        if not str(answer).strip():
            return Judgement(0.0, "no answer")
        right, wrong, wanted = facts(reference, answer, sample, self.lexicon)
        if wanted:
            named = [p for p in wanted if p in right]
            content, why = len(named) / len(wanted), f"names {len(named)} of {len(wanted)} objects"
        else:
            content = overlap(reference, answer)
            why = f"{round(100 * content)} % of the words agree"
        untrue = len(wrong) / len(right + wrong) if wrong else 0.0
        form = is_long_form(answer)
        score = (
            6 * content + 2 * form * min(1, 2 * content) + 2 * (1 - untrue) * min(1, 2 * content)
        )
        why += ", whole sentences" if form else ", no whole sentences"
        if wrong:
            why += ", not there: " + ", ".join(" ".join(p) for p in wrong)
        return Judgement(round(score, 2), why)


# --------------------------------------------------------------------------------------------- language models


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked, and how its reply is read. Fields of `text`: context question reference answer rule role."""

    name: str
    text: str
    read: Callable  # reply -> (score, out_of), or None where it cannot be read
    max_tokens: int
    rules: dict = field(
        default_factory=lambda: {"": ("Answer", "")}
    )  # category ("": any) -> (role, rule)

    def fill(self, question, reference, answer, sample):
        role, rule = self.rules.get(sample.get("category"), self.rules[""])
        context = sample.get("context") or ", ".join(
            " ".join(fact) for fact in sample.get("facts", [])
        )
        given = dict(
            context=context,
            question=question,
            reference=reference,
            answer=answer,
            rule=rule,
            role=role,
        )
        return self.text.format(**given)

    @property
    def hash(self):
        return hashlib.sha256(
            json.dumps([self.text, self.rules, self.max_tokens]).encode()
        ).hexdigest()[:8]


_NUMBER = r"-?\d+(?:\.\d+)?"
# "8", "8/10" or "8 out of 10"; a number that goes on (a date, a range, 1st) is none
_SCORE = rf"({_NUMBER})(?:\s*(?:/|out of)\s*10(?:\.0+)?)?(?![\w/%-]|[.,]\d)"
_PAIR = re.compile(rf"[\W_]*?{_SCORE}[\s,;|&*()\[\]]+{_SCORE}(?P<rest>.*)", re.I)
_LABELLED = re.compile(rf"\b[a-z]+[ \t]*#?([12])\b[\s*_]*(?::|=|is\b|gets\b)[\s*_]*{_SCORE}", re.I)
_GRADE = re.compile(
    r"(?:[*_(\[\s]*)(?:\W*(?:the )?(?:score|grade)\W*(?:is\b)?\W*)?(\d+(?:[.,]\d+)?)(.*)",
    re.I | re.S,
)
_SCALE = re.compile(r"\s*(?:/|out of|of)\s*(\d+(?:\.\d+)?)(?![\w/]|[.,]\d)", re.I)


def read_pair(reply):
    """(candidate's, reference's) score from 1 to 10, or None.

    Read are two bare numbers that begin the first line, the reference's first, or one score for each label
    ("Answer 1: 8", "Answer 2: 9"). "8/10" is one score in its scale.
    """
    by_label = {}
    for label, score in _LABELLED.findall(reply):
        by_label.setdefault(label, set()).add(float(score))
    first_line, *more = reply.strip().split("\n")
    # two numbers on two lines are two bare numbers as well
    one_number = re.fullmatch(rf"[\W_]*?{_SCORE}\W*", first_line, re.I)
    first_line = _PAIR.fullmatch(" ".join([first_line, *more[:1]] if one_number else [first_line]))
    if by_label:
        one, two = (by_label.get(label, set()) for label in "12")
        scores = [*one, *two] if len(one) == len(two) == 1 else []
    elif first_line and not re.search(r"\d", first_line["rest"]):
        scores = [float(first_line[1]), float(first_line[2])]
    else:
        scores = []
    return (scores[1], scores[0]) if scores and all(1 <= s <= 10 for s in scores) else None


def read_grade(reply):
    """(grade, 1) of a reply that begins with one grade from 0 to 1, or in the scale that it names ("7/10"); else None."""
    begins = _GRADE.match(reply.strip())
    if not begins:
        return None
    grade, rest = float(begins[1].replace(",", ".")), begins[2]
    whole = not re.search(r"[.,]", begins[1])
    if scale := _SCALE.match(rest):
        grade, rest = grade / max(float(scale[1]), 1e-9), rest[scale.end() :]
    elif percent := re.match(r"\s?%", rest):
        grade, rest = grade / 100, rest[percent.end() :]
    elif whole and re.match(r"[.):]\s*\w", rest):
        return None  # "1. The answer misses it." begins a list
    # a number that goes on is no grade: 1st, a range, a date, a second number
    if re.match(r"\w|[-/–]\s*\w|[.,]\d|\s*(?:to|or|and)\s+\d", rest):
        return None
    return (grade, 1.0) if 0 <= grade <= 1 else None


def read_yes_no(reply):
    """(1 or 0, 1): the first word is yes or no."""
    found = re.match(r"\W*(yes|no)\b", reply, re.I)
    return (float(found[1].lower() == "yes"), 1.0) if found else None


# the sections are those of the released reviews, so that the benchmark's own rules (rule.json) read as they were meant
PAIR = Prompt(
    "pair",
    "[Context]\n{context}\n\n[Question]\n{question}\n\n"
    "[{role} 1]\n{reference}\n\n[End of {role} 1]\n\n[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n"
    "[System]\n{rule}\n\n",
    read_pair,
    1024,
    {
        "": (
            "Answer",
            "You compare two answers to a question about a picture. You cannot see it; the context describes it. Give each "
            "answer a score from 1 (worst) to 10 (best) for being helpful, to the point, true to the picture and detailed "
            "enough. Neither order nor length earns anything by itself. Write nothing but the two scores on the first "
            "line, that of answer 1, a space, that of answer 2; give your reasons from the second line on.",
        )
    },
)
GRADE = Prompt(
    "grade",
    "Grade an answer to a question about a picture that you cannot see.\nQuestion: {question}\nCorrect answer: {reference}\n"
    "Answer to grade: {answer}\nIn the correct answer <AND> joins parts that are all needed, <OR> joins parts of which "
    "one is enough. Reply with one number only, from 0.0 (wrong) to 1.0 (right) in steps of 0.1: the share of what is "
    "needed that the answer gives correctly.",
    read_grade,
    8,
)
YES_NO = Prompt(
    "yes_no",
    "Question: {question}\nCorrect answer: {reference}\nPrediction: {answer}\n"
    "Does the prediction give the correct answer? Reply with Yes or No only.",
    read_yes_no,
    5,
)
PROMPTS = {
    "llava_bench": PAIR,
    "mm_vet": GRADE,
}  # every other benchmark asks whether the answer is right


def prompt_for(benchmark, folder):
    """The Prompt of a benchmark; LLaVA-Bench's own rules are read from <folder>/llava_bench/rule.json where it is there."""
    path = Path(folder) / benchmark / "rule.json"
    if benchmark != "llava_bench" or not path.is_file():
        return PROMPTS.get(benchmark, YES_NO)
    prefix = "llava_bench_"
    rules = json.loads(path.read_text(encoding="utf-8"))
    own = {
        k.removeprefix(prefix): (r["role"], r["prompt"])
        for k, r in rules.items()
        if k.startswith(prefix)
    }
    if not own:
        raise ValueError(
            f"{path} has no rule whose name begins with {prefix}: is it the benchmark's rule.json?"
        )
    return replace(PAIR, rules=PAIR.rules | own)


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint (OPENAI_BASE_URL, OPENAI_API_KEY in the environment).

    prompt: None for the benchmark's own. price: US dollars per million tokens, (read, written), for the estimate that is
    printed before the first call. Replies that could be read are kept in `cache` and not paid for twice; one that could
    not is asked for once more.
    """

    model: str
    prompt: Prompt | None = None
    price: tuple[float, float] | None = None
    workers: int = 4
    timeout: float = 60.0
    retries: int = 6
    temperature: float | None = 0.0  # None: not sent; some models take no other than their own
    cache: Path = CACHE / "judgements"

    @property
    def title(self):
        return f"{self.model} {self.prompt.name}-{self.prompt.hash}"

    def judge(self, question, reference, answer, sample):
        return self.judge_all([(question, reference, answer, sample)])[0]

    def judge_all(self, rows):
        texts = [self.prompt.fill(*row) for row in rows]
        keys = [self._key(text) for text in texts]
        path = Path(self.cache) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.title)}.jsonl"
        with locked(path):
            known, trouble = {row["key"]: row for row in read_rows(path, mend=True)}, {}
            wanted = dict(zip(keys, texts))
            todo = {key: text for key, text in wanted.items() if key not in known}
            if todo:
                print(self.estimate(list(todo.values()), len(wanted) - len(todo)), flush=True)
            with path.open("a", encoding="utf-8") as file:
                for _ in range(2):
                    left = {k: text for k, text in todo.items() if k not in known}
                    for key, reply in counted(self._ask(left), "judging", len(left), "answers"):
                        if reply.trouble or self.prompt.read(reply.text) is None:
                            trouble[key] = (
                                reply.trouble or f"no score in the reply: {reply.text[:80]!r}"
                            )
                            continue
                        known[key] = {"key": key, "model": reply.model, "reply": reply.text}
                        file.write(json.dumps(known[key], ensure_ascii=False) + "\n")
                        file.flush()
        return [
            self._judgement(known[key]) if key in known else Judgement(None, trouble[key])
            for key in keys
        ]

    def estimate(self, texts, cached=0):
        """What asking would cost, in words; a token is taken as four characters."""
        read, written = sum(map(len, texts)) // 4, len(texts) * self.prompt.max_tokens
        cost = "price unknown (give price=)"
        if self.price:
            cost = f"${(read * self.price[0] + written * self.price[1]) / 1e6:.2f} at most"
        return (
            f"{self.model} is asked for {len(texts)} judgements ({cached} more are in the cache): about {read:,} tokens to "
            f"read and at most {written:,} to write; {cost}."
        )

    def _ask(self, todo):
        keys, requests = (
            list(todo),
            [lambda text=text: [{"role": "user", "content": text}] for text in todo.values()],
        )
        replies = ask_all(
            self.model,
            requests,
            self.prompt.max_tokens,
            self.temperature,
            self.workers,
            self.timeout,
            self.retries,
        )
        return ((keys[i], reply) for i, reply in replies)

    def _key(self, text):
        return hashlib.sha256(
            json.dumps([self.model, endpoint_hash(), text, self.temperature]).encode()
        ).hexdigest()

    def _judgement(self, row):
        score, out_of = self.prompt.read(row["reply"])
        return Judgement(
            score, row["reply"], out_of, row["model"] if row["model"] != self.model else ""
        )


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model on this machine, by folder or hub name (the paper's for forgetting: Vicuna-13B v1.5).

    It is asked in its tokenizer's chat template, or Vicuna's where it has none, and answers greedily. Only what it
    writes is read: the prompt itself holds the words yes and no.
    """

    model: str
    prompt: Prompt | None = None
    batch_size: int = 8

    @property
    def title(self):
        return f"{Path(self.model).name} {self.prompt.name}-{self.prompt.hash}"

    def judge(self, question, reference, answer, sample):
        return self.judge_all([(question, reference, answer, sample)])[0]

    def judge_all(self, rows):
        prompts = [self._ids(self.prompt.fill(*row)) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
        found, version = {}, self._version
        batches = (
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        )
        said = (
            pair
            for some in batches
            for pair in zip(some, self._replies([prompts[i] for i in some]))
        )
        for i, reply in counted(said, "judging", len(order), "answers"):
            score, out_of = self.prompt.read(reply) or (None, 1.0)
            reason = reply if score is not None else f"no score in the reply: {reply[:80]!r}"
            found[i] = Judgement(score, reason, out_of, version)
        return [found[i] for i in range(len(rows))]

    @property
    def _loaded(self):
        return _language_model(weights_source(self.model))

    @property
    def _version(self):
        source = weights_source(self.model)
        if Path(source).is_dir():
            return hash_weights(source)[:8]
        return str(getattr(self._loaded[0].config, "_commit_hash", None) or "")[:8]

    def _ids(self, text):
        tokenizer = self._loaded[1]
        if not tokenizer.chat_template:
            return prompt_ids(text, tokenizer, has_image=False)
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]

    def _replies(self, prompts):
        import torch

        model, tokenizer = self._loaded
        width, pad = max(map(len, prompts)), tokenizer.pad_token_id or tokenizer.eos_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
        )
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.prompt.max_tokens,
                pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        return [
            text.strip()
            for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        ]


@lru_cache(maxsize=1)  # several benchmarks, one judge
def _language_model(source):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(source, trust_remote_code=False)
