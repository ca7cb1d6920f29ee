"""Lenient readers: what an answer in sentences says, where a benchmark asks for a word or a letter.

An official script decides what counts; these readers only fill the column `lenient` beside it. They
read nothing rather than guess: an answer that names two options, or denies one, has no reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A denial holds from its word to the end of the clause, as far as the words that it can reach.
_DENIAL = re.compile(
    r"\b(?:no|not|never|without|neither|nor|cannot|none|nothing|nobody|unlike|except|\w+n['’]t)\b"
    r"|\b(?:instead of|rather than)\b"
)
_CLAUSE_END = re.compile(r"[.,;:!?\n]|\b(?:but|yet|however|though|although|while|whereas)\b")
_REACH = 6  # words between a denial and what it denies: "I do not think that this is a dog"
_DENIED_AFTER = re.compile(
    r"\s+(?:is|are|was|were|does|do|did|has|have|can|could|would|will)(?:\s+not\b|n['’]t\b)"
    r"|\s+cannot\b|\s+(?:is|are)\s+(?:wrong|incorrect|false)\b"
)
# Words that announce a choice, and what may stand between them and the letter.
_CUE = r"(?:answer|option|choice|letter|correct one|选项|答案|选择|选|choose|chose|pick|select)"
_LINK = (
    r"(?:\s*(?:is|would be|should be|must be|为|是)\b|\s*[:：=是为])?\s*(?:option|choice|letter)?"
)


def places(text: str, phrase: str) -> Iterator[re.Match]:
    """The matches of `phrase` in `text` as whole words; both in lower case."""
    return re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text)


def denied(text: str, start: int, end: int) -> bool:
    """Whether the clause around text[start:end] denies it: "no dog", "is not red", "a dog is not
    there".
    """
    before = _CLAUSE_END.split(text[:start])[-1]
    denials = list(_DENIAL.finditer(before))
    if denials and len(before[denials[-1].end() :].split()) < _REACH:
        return True
    return _DENIED_AFTER.match(text, end) is not None


def affirms(text: str, phrase: str) -> bool:
    """Whether `text` says `phrase` as whole words, and denies it nowhere; both cleaned to lower
    case.

    "The star is not blue, it is red." affirms "red", and does not affirm "blue".
    """
    found = [denied(text, match.start(), match.end()) for match in places(text, phrase)]
    return bool(found) and not any(found)


def plain(answer: object) -> str:
    """An answer without Markdown, with single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"[*_`#]+", "", str(answer))).strip()


def stated_letters(answer: str, letters: str) -> set[str]:
    """The letters that an answer states as its choice: "the answer is B", "option (c)", "选项B".

    A small letter, and "A", may be an article, so they count only in brackets or before an end:
    "The answer is a dog." states no letter. Neither does a denial: "I would not choose B".
    """
    others = letters.lower().replace("a", "")
    word = f"[{others + others.upper()}](?![\\w'])" if others else "(?!)"
    sure = rf"{word}|A(?![\w'])(?!\s+[a-z])|a(?=[).\]]|\s*$)"
    announced = rf"(?i:{_CUE}{_LINK})\s*[\"'“(\[]*({sure})"
    matches = re.finditer(announced, answer)
    return {m[1].lower() for m in matches if not denied(answer.lower(), m.start(), m.end())}


def choose(answer: object, options: dict[str, str]) -> str | None:
    """The letter that an answer chooses, or None where it chooses none or several.

    options: {letter: its text}, small letters. Read are the letter alone ("b", "**B**", "(b) blue",
    "B. blue", "b b b"), a stated letter ("I think the answer is B."), or one option's text that is
    not denied ("The answer is a dog.").
    """
    answer, letters = plain(answer), "".join(options) or "abcd"
    for pattern in (
        rf"[\"'(\[]*([{letters}])[\"')\]]*[.:,)]?$",  # nothing but the letter
        rf"[(\[]([{letters}])[)\]]",  # (b) blue
        rf"([{letters}])[.:)](?:\s|$)",  # b. blue
        rf"([{letters}])(?:\s+\1)+(?!\w)",  # b b b: a model that does not stop
    ):
        if match := re.match(pattern, answer, re.I):
            return match[1].lower()
    if stated := stated_letters(answer, letters):
        return stated.pop() if len(stated) == 1 else None
    text = answer.strip("\"'").rstrip(" .!").lower()
    exact = [letter for letter, option in options.items() if option == text]
    named = exact or [letter for letter in options if option_named(text, letter, options)]
    return named[0] if len(named) == 1 else None


def option_named(text: str, letter: str, options: dict[str, str]) -> bool:
    """Whether `text` affirms an option at a place that is no part of a longer option ("star" in
    "red star").
    """
    option = options[letter]
    if not option:
        return False
    longer = [other for other in options.values() if other != option and option in other]
    covered = [match.span() for other in longer for match in places(text, other)]
    own = [
        match
        for match in places(text, option)
        if not any(start <= match.start() and match.end() <= end for start, end in covered)
    ]
    return bool(own) and not any(denied(text, *match.span()) for match in own)
