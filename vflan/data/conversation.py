"""From a conversation to token ids and labels: the only file that knows templates, `<image>` and -100.

The ids are LLaVA-1.5's: text left and right of the picture is tokenised apart, the picture itself is ONE `IMAGE_TOKEN_INDEX`.
The labels are built with the ids, turn by turn, where the original counts lengths afterwards and throws a sample away when the
counts disagree (the well-known "tokenization mismatch").
"""

from typing import NamedTuple

IMAGE_TOKEN_INDEX = -200
IGNORE_INDEX = -100
IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# the same template for Hugging Face processors; GAP: see chat_template
_CHAT_TEMPLATE = (
    "{{ '"
    + SYSTEM.replace("'", "\\'")
    + " ' }}{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content if c.type == 'image' %}{{ '<image>GAP' }}{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endif %}{{ ' ' if m.role == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class Audit(NamedTuple):
    """What of a conversation can be trained on: (question, answer) pairs, whether a picture leads, and what was left out."""

    pairs: list[tuple[str, str]]
    has_image: bool
    dropped: list[str]


def audit(conversations: list[dict]) -> Audit:
    """Sort a conversation into (question, answer) pairs, keeping what is sound and naming what is not.

    `<image>` always moves to the front of the first kept question. Raises ValueError, with the reason, when the order or a role is
    wrong, `<image>` stands where it cannot be honoured, or no answer is left to learn from.
    """
    if not conversations:
        raise ValueError("no turns")
    turns, dropped = list(conversations), []
    for number, turn in enumerate(turns, 1):
        if turn.get("from") not in ("human", "gpt"):
            raise ValueError(f"unknown role {turn.get('from')!r} in turn {number}")
    if turns[0]["from"] == "gpt":
        turns, dropped = turns[1:], ["the first turn, an answer without a question"]
    if turns and turns[-1]["from"] == "human":
        turns, dropped = turns[:-1], [*dropped, "the last turn, a question without an answer"]
    if not turns:
        raise ValueError("wrong order: no question is followed by an answer")
    for turn, role in zip(turns, ["human", "gpt"] * len(turns)):
        if turn["from"] != role:
            raise ValueError(f"wrong order: two {turn['from']} turns in a row")
    texts = [turn.get("value") or "" for turn in turns]
    if any(IMAGE in text for text in texts[1::2]):
        raise ValueError("image token in an answer")
    if sum(IMAGE in text for text in texts[::2]) > 1:
        raise ValueError("image token in more than one question")
    pairs = []
    for question, answer in zip(texts[::2], texts[1::2]):
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


def encode(
    conversations: list[dict], tokenizer, template: str = "vicuna_v1"
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation, two lists of int of the same length; -100 where nothing is learned.

    `vicuna_v1` learns every answer and the end token after it; `plain` (projector stage) drops the question and learns
    the caption and a newline. The picture is ONE `IMAGE_TOKEN_INDEX`. ValueError says why nothing can be learned.
    """
    (encoded,) = encode_many([conversations], tokenizer, template)
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded


def encode_many(
    many, tokenizer, template: str = "vicuna_v1"
) -> list[tuple[list[int], list[int]] | ValueError]:
    """`encode` for many conversations with one call of the tokenizer; where nothing can be learned stands the ValueError."""
    begun = []
    for conversations in many:
        try:
            begun.append(_texts(*audit(conversations)[:2], tokenizer, template))
        except ValueError as trouble:
            begun.append(trouble)
    ids = iter(
        _tokenize(tokenizer, [start[:2] for start in begun if not isinstance(start, ValueError)])
    )
    return [start if isinstance(start, ValueError) else start[2](next(ids)) for start in begun]


def _texts(pairs, has_image, tokenizer, template) -> tuple:
    """The texts to tokenise, what people said in them, and how ids and labels are put together from their ids."""
    said = "".join(map("".join, pairs))
    if template == "plain":
        if not has_image:
            raise ValueError("no image token: the plain template is a picture and its caption")
        if len(pairs) > 1:
            raise ValueError(
                f"{len(pairs)} answers: the plain template is a picture and one caption"
            )
        return [pairs[0][1] + "\n"], said, lambda ids: _caption(ids[0], tokenizer)
    head, prompts = _prompts([question for question, _ in pairs], tokenizer, has_image)
    texts = [
        text
        for prompt, (_, answer) in zip(prompts, pairs)
        for text in (prompt, f"{prompt} {answer}", f" {answer}")
    ]
    return [head, *texts], said, lambda ids: _turns(ids, tokenizer, has_image)


def _caption(caption: list[int], tokenizer) -> tuple[list[int], list[int]]:
    head = [*_bos(tokenizer), IMAGE_TOKEN_INDEX]
    return head + caption, [IGNORE_INDEX] * len(head) + caption


def _turns(ids: list[list[int]], tokenizer, has_image: bool) -> tuple[list[int], list[int]]:
    ids = iter(ids)
    input_ids = _head(next(ids), tokenizer, has_image)
    labels = [IGNORE_INDEX] * len(input_ids)
    for turn, (prompt, whole, answer) in enumerate(zip(ids, ids, ids)):
        # the answer is what it adds to the prompt, so that generation starts from exactly what training saw before it
        answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else answer
        prompt = prompt[turn > 0 :]  # later prompts begin with the end token of the turn before
        input_ids += [*prompt, *answer, tokenizer.eos_token_id]
        labels += [*[IGNORE_INDEX] * len(prompt), *answer, tokenizer.eos_token_id]
    return input_ids, labels


def prompt_ids(
    text: str, tokenizer, template: str = "vicuna_v1", has_image: bool = True, before=()
) -> list[int]:
    """Ids to generate from, ending in "ASSISTANT:" (`plain`: in the picture), as training shows them before an answer.

    before: the (question, answer) pairs of the conversation so far; the picture leads the first of all questions.
    """
    if template == "plain":
        return [*_bos(tokenizer), IMAGE_TOKEN_INDEX]
    pairs = [*before, (text, "")]
    if has_image:
        pairs = [(question.replace(IMAGE, "").strip(), answer) for question, answer in pairs]
    texts, said, _ = _texts(pairs, has_image, tokenizer, template)
    (ids,) = _tokenize(tokenizer, [(texts[:-2], said)])  # the last prompt without an answer
    told, _ = _turns(ids[:-1], tokenizer, has_image)
    return told + ids[-1][len(before) > 0 :]


def chat_template(tokenizer) -> str:
    """The template that is saved with every run, so that `AutoProcessor` alone prompts the model with training's very ids.

    It tokenises in one pass, where training takes the text before and after the picture apart: for tokenizers that begin
    every stretch of text with a space (but the ones after a special token, as Vicuna's), the space has to be written.
    """
    apart = prompt_ids(f"{IMAGE}\nWhat?", tokenizer)[len(_bos(tokenizer)) :]
    apart[apart.index(IMAGE_TOKEN_INDEX)] = tokenizer.convert_tokens_to_ids(IMAGE)
    spelt = f"{SYSTEM} USER: {IMAGE} \nWhat? ASSISTANT:"
    gap = " \n" if tokenizer(spelt, add_special_tokens=False).input_ids == apart else "\n"
    return _CHAT_TEMPLATE.replace("GAP", gap)


def expand(
    ids: list[int], labels: list[int], num_image_tokens: int, image_token_id: int
) -> tuple[list, list]:
    """The same ids and labels with the one picture position widened to the features the model puts there."""
    if IMAGE_TOKEN_INDEX not in ids:
        return ids, labels
    at = ids.index(IMAGE_TOKEN_INDEX)
    return (
        [*ids[:at], *[image_token_id] * num_image_tokens, *ids[at + 1 :]],
        [*labels[:at], *[IGNORE_INDEX] * num_image_tokens, *labels[at + 1 :]],
    )


def _prompts(questions: list[str], tokenizer, has_image: bool) -> tuple[str, list[str]]:
    """The text before the picture, and for each question the stretch of text that ends in "ASSISTANT:"."""
    first, *later = questions
    # some tokenizers spell "USER" differently after an end token, hence the end token in the text
    later = [f"{tokenizer.eos_token}USER: {question} ASSISTANT:" for question in later]
    if has_image:
        return f"{SYSTEM} USER: ", [f"\n{first} ASSISTANT:" if first else " ASSISTANT:", *later]
    return "", [f"{SYSTEM} USER: {first} ASSISTANT:", *later]


def _head(ids: list[int], tokenizer, has_image: bool) -> list[int]:
    return [*_bos(tokenizer), *ids, *([IMAGE_TOKEN_INDEX] if has_image else [])]


def _tokenize(tokenizer, asked: list[tuple[list[str], str]]) -> list[list[list[int]]]:
    """Ids, no BOS, of each text of each (texts, said). A "</s>" or "<image>" that a person wrote is spelled out, never obeyed."""
    special = [token for token in tokenizer.all_special_tokens if token != SYSTEM]
    plain = [not any(token in said for token in special) for _, said in asked]
    texts = list(
        dict.fromkeys(text for (texts, _), easy in zip(asked, plain) if easy for text in texts)
    )
    given = [keep_first_space(tokenizer, text) for text in texts]
    known = dict(zip(texts, tokenizer(given, add_special_tokens=False).input_ids)) if texts else {}
    return [
        [known[text] for text in texts] if easy else _spell(tokenizer, texts)
        for (texts, _), easy in zip(asked, plain)
    ]


def keep_first_space(tokenizer, text: str) -> str:
    """`text` as a fast tokenizer has to get it, so that a space at its start stays a piece of its own.

    SentencePiece puts a space before every text. The fast tokenizers do so only before a text that does not
    begin with one: `" ASSISTANT:"`, which follows a picture without a question, would lose a piece.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    scheme = getattr(getattr(backend, "pre_tokenizer", None), "prepend_scheme", "never")
    # "▁" is how SentencePiece writes a space
    return " " + text if scheme != "never" and text.startswith((" ", "▁")) else text


def _spell(tokenizer, texts: list[str]) -> list[list[int]]:
    eos = tokenizer.eos_token
    lead = [text.startswith(f"{eos}USER: ") for text in texts]
    texts = [text[len(eos) :] if led else text for text, led in zip(texts, lead)]
    texts = [keep_first_space(tokenizer, text) for text in texts]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    return [[tokenizer.eos_token_id] * led + row for row, led in zip(ids, lead)]


def _bos(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
