"""From a conversation to token ids and labels: the only file that knows templates and -100.

The ids are those of LLaVA-1.5: text before and after the image is tokenised separately, and the
image is one `IMAGE_TOKEN_INDEX`. Ids and labels are built together, turn by turn. The original
counts lengths afterwards, and drops a sample if the counts disagree (the well-known "tokenization
mismatch").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
IMAGE = "<image>"
# A turn whose role begins so is no turn: the rest of the role says why its row cannot be used. In
# this way a table of four columns carries what was wrong with a row in the file.
TROUBLE = "trouble: "
# Such a turn is no turn either: it says what of the row was left out.
NOTE = "note: "
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The same template for Hugging Face processors; `chat_template` fills in BEGIN, SYSTEM and GAP.
_CHAT_TEMPLATE = """\
BEGIN{% set has_system = messages[0].role == 'system' %}{% if not has_system %}{{ 'SYSTEM ' }}\
{% elif messages[0].content is string %}{{ messages[0].content + ' ' }}{% else %}\
{% for c in messages[0].content if c.type == 'text' %}{{ c.text + ' ' }}{% endfor %}{% endif %}\
{% for m in (messages[1:] if has_system else messages) %}\
{% if m.role not in ('user', 'assistant') %}\
{{ raise_exception('The roles are user and assistant, and system in the first place.') }}\
{% endif %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}\
{% if m.content is string %}{{ m.content }}{% else %}\
{% for c in m.content if c.type == 'image' %}{{ '<image>GAP' }}{% endfor %}\
{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endif %}\
{{ ' ' if m.role == 'user' else eos_token }}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


class Audit(NamedTuple):
    """What of a conversation can be trained on.

    pairs: (question, answer) without image tokens. has_image: whether an image precedes the first
    question. dropped: what was left out, in words.
    """

    pairs: list[tuple[str, str]]
    has_image: bool
    dropped: list[str]


def audit(conversations: list[dict]) -> Audit:
    """Split a conversation into (question, answer) pairs; keep what is sound and name the rest.

    `<image>` always moves to the front of the first pair that is kept, and a system text, in the
    first or last turn, is left out: the template has its own. ValueError says why nothing can be
    trained on: wrong order or role, `<image>` in the wrong place, a turn without text, or no
    answer.
    """
    if not conversations:
        raise ValueError("no turns")
    turns, dropped, notes = list(conversations), [], []
    for turn in conversations:
        role = str(turn.get("from"))
        if role.startswith(TROUBLE):
            raise ValueError(role.removeprefix(TROUBLE))
        if role.startswith(NOTE):
            notes.append(role.removeprefix(NOTE))
    if notes:
        turns = [turn for turn in turns if not str(turn.get("from")).startswith(NOTE)]
    while turns and "system" in (turns[0].get("from"), turns[-1].get("from")):
        turns.pop(0 if turns[0].get("from") == "system" else -1)
        dropped = ["the row's own system text"]
    dropped = [*notes, *dropped]
    for number, turn in enumerate(turns, 1):
        if turn.get("from") not in ("human", "gpt"):
            raise ValueError(f"unknown role {repr(turn.get('from')):.80} in turn {number}")
        if as_text(turn.get("value")) is None:
            raise ValueError(without_text(turn, number))
    if turns and turns[0]["from"] == "gpt":
        turns, dropped = turns[1:], [*dropped, "the first turn, an answer without a question"]
    if turns and turns[-1]["from"] == "human":
        turns, dropped = turns[:-1], [*dropped, "the last turn, a question without an answer"]
    if not turns:
        raise ValueError("wrong order: no question is followed by an answer")
    # What is left begins with a question and ends with an answer: it has to alternate.
    for turn, role in zip(turns, ["human", "gpt"] * len(turns)):
        if turn["from"] != role:
            raise ValueError(f"wrong order: two {turn['from']} turns in a row")
    texts = [as_text(turn["value"]) for turn in turns]
    questions, answers = texts[::2], texts[1::2]
    if any(IMAGE in answer for answer in answers):
        raise ValueError("image token in an answer")
    if sum(IMAGE in question for question in questions) > 1:
        raise ValueError("image token in more than one question")
    pairs = []
    for question, answer in zip(questions, answers):
        if question.count(IMAGE) > 1:
            dropped.append("a repeated image token")
        if IMAGE in question:
            question = question.replace(IMAGE, "").strip()
        if answer.strip():
            pairs.append((question, answer))
        else:
            dropped.append("an empty answer with its question")
    if not pairs:
        raise ValueError("empty answer")
    return Audit(pairs, any(IMAGE in text for text in texts), dropped)


def as_text(value: object) -> str | None:
    """A turn's value as text, numbers and true/false as json writes them; None for all else."""
    if isinstance(value, str):
        return value
    # NaN is how pandas writes null.
    is_number = isinstance(value, int) or isinstance(value, float) and math.isfinite(value)
    return json.dumps(value) if is_number else None


def kind_of(value: object) -> str:
    """What a json value is, in words for a message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    words = {str: "text", list: "a list", dict: "an object", float: "a number", int: "a number"}
    return "NaN" if value != value else words.get(type(value), f"of type {type(value).__name__}")


def without_text(turn: dict, number: int, key: str = "value") -> str:
    """The reason why turn `number` has no text: its `key` is missing or holds something else."""
    if key in turn:
        return f"a turn without text: the {key} of turn {number} is {kind_of(turn[key])}"
    keys = f"{', '.join(map(str, turn)):.80}" or "nothing"
    return f"a turn without text: turn {number} has no {key}, only {keys}"


def encode(
    conversations: list[dict], tokenizer: Tokenizer, template: str = "vicuna_v1"
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation: two lists of the same length.

    A label is the id where the model learns, -100 elsewhere. `vicuna_v1` learns every answer and
    the end token after it. `plain` (projector stage) drops the question and learns the caption and
    a newline. The image is one `IMAGE_TOKEN_INDEX`, -200; `expand` widens it. ValueError says why
    nothing can be learned.

    For example, with the tokenizer in data/tiny/language_model, for which the system text is one
    token (980), the record

    >>> record = {
    ...     "id": "1", "image": "1.png", "task_name": "color",
    ...     "conversations": [
    ...         {"from": "human", "value": "<image>\\nWhat color is it?"},
    ...         {"from": "gpt", "value": "red"},
    ...     ],
    ... }

    becomes the prompt "A chat between ... user's questions. USER: <image>\\nWhat color is it?
    ASSISTANT: red</s>". The last two tokens are learned, "red" and the end token:

    >>> ids, labels = encode(record["conversations"], tokenizer)
    >>> ids
    [1, 980, 429, 354, -200, 354, 259, 534, 543, 387, 532, 290, 463, 418, 2]
    >>> labels
    [-100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, 418, 2]
    """
    (encoded,) = encode_many([conversations], tokenizer, template)
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded


def encode_many(
    many: Iterable[list[dict]], tokenizer: Tokenizer, template: str = "vicuna_v1"
) -> list[tuple[list[int], list[int]] | ValueError]:
    """`encode` for many conversations with one call of the tokenizer, which is much faster.

    Where nothing can be learned, the list holds the ValueError.
    """
    requests = []
    for conversations in many:
        try:
            requests.append(_request(*audit(conversations)[:2], tokenizer, template))
        except ValueError as reason:
            requests.append(reason)
    # One call for all requests; their ids come back in the same order.
    ids = iter(_tokenize(tokenizer, [r for r in requests if isinstance(r, _Request)]))
    return [r.join(next(ids)) if isinstance(r, _Request) else r for r in requests]


def prompt_ids(
    text: str,
    tokenizer: Tokenizer,
    template: str = "vicuna_v1",
    has_image: bool = True,
    before: Iterable[tuple[str, str]] = (),
) -> list[int]:
    """Ids to generate from, exactly as training shows them before an answer.

    They end in "ASSISTANT:" (`plain`: in the image; `own`: as the tokenizer's own chat template has
    it, for models that vflan did not train). before: the (question, answer) pairs of the
    conversation so far; the image precedes the first question of all.
    """
    if template == "plain":
        return [*_bos(tokenizer), IMAGE_TOKEN_INDEX]
    if template == "own":
        return _own_prompt_ids(text, tokenizer, has_image, before)
    pairs = [*before, (text, "")]
    if has_image:
        pairs = [(question.replace(IMAGE, "").strip(), answer) for question, answer in pairs]
    request = _request(pairs, has_image, tokenizer, template)
    # The last two texts belong to the answer, which is not there yet.
    (ids,) = _tokenize(tokenizer, [request._replace(texts=request.texts[:-2])])
    earlier, _ = _join_turns(ids[:-1], tokenizer, has_image)
    # A later prompt begins with the end token of the turn before, which `earlier` has already.
    return earlier + ids[-1][len(pairs) > 1 :]


def _own_prompt_ids(text, tokenizer, has_image, before) -> list[int]:
    messages = []
    for question, answer in [*before, (text, None)]:
        content = [{"type": "text", "text": question.replace(IMAGE, "").strip()}]
        if has_image and not messages:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        if answer is not None:
            spoken = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": spoken})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    # A template may write the beginning of the text itself.
    begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = ids if begins else [*_bos(tokenizer), *ids]
    if has_image and ids.count(image_id) != 1:
        raise ValueError(f"the model's chat template does not write {IMAGE} once for a picture")
    return [IMAGE_TOKEN_INDEX if token == image_id else token for token in ids]


def chat_template(tokenizer: Tokenizer) -> str:
    """The template saved with every run: `AutoProcessor` alone gives the model training's ids.

    It tokenises the whole text at once, where training takes the text before and after the image
    separately. Some tokenizers begin every text with a space, but not after a special token
    (Vicuna's, for instance): for them the template has to write that space. Some name a token that
    begins a text, but do not put it there (SmolLM2's): for them the template writes that too.
    """
    begins = tokenizer("").input_ids[:1] == _bos(tokenizer) or not _bos(tokenizer)
    separate = prompt_ids(f"{IMAGE}\nWhat?", tokenizer)[len(_bos(tokenizer)) :]
    separate[separate.index(IMAGE_TOKEN_INDEX)] = tokenizer.convert_tokens_to_ids(IMAGE)
    at_once = tokenizer(f"{SYSTEM} USER: {IMAGE} \nWhat? ASSISTANT:", add_special_tokens=False)
    gap = " \n" if at_once.input_ids == separate else "\n"
    template = _CHAT_TEMPLATE.replace("BEGIN", "" if begins else "{{ bos_token }}")
    return template.replace("SYSTEM", SYSTEM.replace("'", "\\'")).replace("GAP", gap)


def expand(
    ids: list[int], labels: list[int], num_image_tokens: int, image_token_id: int
) -> tuple[list[int], list[int]]:
    """Ids and labels with the image widened to as many features as the model inserts."""
    if IMAGE_TOKEN_INDEX not in ids:
        return ids, labels
    at = ids.index(IMAGE_TOKEN_INDEX)
    ids = [*ids[:at], *[image_token_id] * num_image_tokens, *ids[at + 1 :]]
    labels = [*labels[:at], *[IGNORE_INDEX] * num_image_tokens, *labels[at + 1 :]]
    return ids, labels


# ----------------------------------------------------------------------- prompts and their ids


class _Request(NamedTuple):
    """Texts to tokenise, all that people wrote in them, and how their ids become ids and labels."""

    texts: list[str]
    written: str
    join: Callable[[list[list[int]]], tuple[list[int], list[int]]]


def _request(pairs: list[tuple[str, str]], has_image: bool, tokenizer, template: str) -> _Request:
    written = "".join(map("".join, pairs))
    if template == "plain":
        if not has_image:
            raise ValueError("no image token: the plain template is a picture and its caption")
        if len(pairs) > 1:
            problem = f"{len(pairs)} answers"
            raise ValueError(f"{problem}: the plain template is a picture and one caption")
        return _Request([pairs[0][1] + "\n"], written, lambda ids: _join_plain(ids[0], tokenizer))
    (first, _), *later = pairs
    head, tail = (f"{SYSTEM} USER: ", "\n") if has_image else ("", f"{SYSTEM} USER: ")
    start = f"{tail}{first}" if first or not has_image else ""
    # Some tokenizers spell "USER" differently after an end token, hence the end token in the text.
    questions = [start, *(f"{tokenizer.eos_token}USER: {question}" for question, _ in later)]
    texts = [head]
    for question, (_, answer) in zip(questions, pairs):
        prompt = f"{question} ASSISTANT:"
        texts += [prompt, f"{prompt} {answer}", f" {answer}"]
    return _Request(texts, written, lambda ids: _join_turns(ids, tokenizer, has_image))


def _join_plain(caption: list[int], tokenizer) -> tuple[list[int], list[int]]:
    head = [*_bos(tokenizer), IMAGE_TOKEN_INDEX]
    return head + caption, [IGNORE_INDEX] * len(head) + caption


def _join_turns(ids: list[list[int]], tokenizer, has_image: bool) -> tuple[list[int], list[int]]:
    """ids: of the head, then of the prompt, the prompt with its answer, and the answer, a turn."""
    ids = iter(ids)
    input_ids = [*_bos(tokenizer), *next(ids), *([IMAGE_TOKEN_INDEX] if has_image else [])]
    labels = [IGNORE_INDEX] * len(input_ids)
    for turn, (prompt, whole, answer) in enumerate(zip(ids, ids, ids)):
        # The answer is what it adds to the prompt, so that generation starts from the very ids
        # that training saw before it. Where the two merge, the answer is tokenised alone.
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
        # A later prompt begins with the end token of the turn before.
        prompt = prompt[turn > 0 :]
        input_ids += [*prompt, *answer, tokenizer.eos_token_id]
        labels += [*[IGNORE_INDEX] * len(prompt), *answer, tokenizer.eos_token_id]
    return input_ids, labels


def _tokenize(tokenizer, requests: list[_Request]) -> list[list[list[int]]]:
    """The ids, without BOS, of each text of each request.

    A "</s>" or "<image>" that a person wrote is tokenised as text, not as a special token.
    """
    special = [token for token in tokenizer.all_special_tokens if token != SYSTEM]
    is_plain = [not any(token in request.written for token in special) for request in requests]
    # Each distinct text is tokenised once: the system text, for instance, is in all requests.
    plain = (request for request, easy in zip(requests, is_plain) if easy)
    texts = list(dict.fromkeys(text for request in plain for text in request.texts))
    given = [keep_first_space(tokenizer, text) for text in texts]
    known = dict(zip(texts, tokenizer(given, add_special_tokens=False).input_ids)) if texts else {}
    return [
        [known[text] for text in request.texts] if easy else _spell(tokenizer, request.texts)
        for request, easy in zip(requests, is_plain)
    ]


def keep_first_space(tokenizer: Tokenizer, text: str) -> str:
    """`text` as a fast tokenizer needs it to keep a space at its start as a token of its own.

    SentencePiece puts a space before every text. The fast tokenizers do so only before a text that
    does not begin with one: `" ASSISTANT:"`, after an image without a question, would lose a token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    scheme = getattr(getattr(backend, "pre_tokenizer", None), "prepend_scheme", "never")
    # SentencePiece writes a space as "▁".
    return " " + text if scheme != "never" and text.startswith((" ", "▁")) else text


def _spell(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts in which special tokens are only text."""
    eos = tokenizer.eos_token
    # The end token that `_request` wrote before "USER: " is the exception.
    has_eos = [text.startswith(f"{eos}USER: ") for text in texts]
    texts = [text[len(eos) :] if lead else text for text, lead in zip(texts, has_eos)]
    texts = [keep_first_space(tokenizer, text) for text in texts]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    return [[tokenizer.eos_token_id] * lead + row for row, lead in zip(ids, has_eos)]


def _bos(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
