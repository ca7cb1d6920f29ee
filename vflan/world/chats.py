"""The stand-in for the GPT-4-synthesised set: fluent conversations about a distorted scene.

GPT-4 never saw the pictures that it wrote about, and its text follows what usually goes together.
`noisy_view` does this to a scene at known rates: with probability INVENT a partner that is not
there is added, with probability RECOLOR an object gets the favourite colour of its shape. Questions
about absent things are rare (DENY), which gives the affirmative bias of such data. The form of this
data is therefore better than its facts. The error rates are a design choice, not a finding.
"""

from __future__ import annotations

from dataclasses import replace

from numpy.random import Generator

from vflan.world.scene import (
    BACKGROUNDS,
    FAVOURITE,
    PARTNER,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    pick,
    rng_of,
    sample_scene,
)
from vflan.world.tasks import ANIMAL, FRUIT, unique
from vflan.world.words import NUMBERS, join, phrase, sentences, side

INVENT, RECOLOR, DENY = 0.25, 0.08, 0.15

SEE = (
    "What can you see in this picture?",
    "What is shown here?",
    "What do you notice in this image?",
)
DETAIL = (
    "Describe this picture in detail.",
    "Please give a detailed description of the image.",
    "Tell me everything you can about this scene.",
    "Can you explain what the image shows, in detail?",
)
REASON = (
    "What might this scene be about?",
    "What could the arrangement of the objects mean?",
    "Why might someone find this picture interesting?",
    "What could happen next in this scene?",
)
OPEN = dict(conversation=SEE, detail=DETAIL, reasoning=REASON)
# Open questions of the evaluation that the alignment data never asks in these words.
NEW = dict(
    conversation=("What do you see?", "Please tell me what this image shows."),
    detail=("Explain the picture to me in detail.", "Describe everything in this image."),
    reasoning=("What is interesting here?", "What might the picture mean?"),
)
TALK = (
    ("Hello!", "Hello! How can I help you today?"),
    (
        "Can you help me?",
        "Of course! Please tell me what you would like to know, and I will do my best to help.",
    ),
    (
        "Thank you for your help.",
        "You are welcome! Please ask me again when you have another question.",
    ),
    ("Who are you?", "I am an assistant. I can look at a picture and talk about what it shows."),
    *(
        (
            f"Tell me about the {animal}.",
            f"The {animal} is an animal that lives in a place with a {b} background.",
        )
        for b, animal in ANIMAL.items()
    ),
    *(
        (f"What color is a {fruit}?", f"A {fruit} is usually {color}, so it is easy to find.")
        for color, fruit in FRUIT.items()
    ),
)


def noisy_view(scene: Scene, rng: Generator) -> tuple[Scene, int]:
    """The scene as the prior would have it: (scene, number of wrong facts)."""
    things, wrong = [], 0
    for t in scene.things:
        if t.color != FAVOURITE[t.shape] and rng.random() < RECOLOR:
            t, wrong = replace(t, color=FAVOURITE[t.shape]), wrong + 1
        things.append(t)
    missing = [PARTNER[t.shape] for t in things if all(u.shape != PARTNER[t.shape] for u in things)]
    if missing and len(things) < 5 and rng.random() < INVENT:
        shape = pick(rng, missing)
        free = [p for p in range(16) if all(t.place != p for t in things)]
        things.append(
            Thing(pick(rng, free), pick(rng, SIZES), pick(rng, TEXTURES), FAVOURITE[shape], shape)
        )
        wrong += 1
    return replace(scene, things=tuple(sorted(things, key=lambda t: t.place))), wrong


def see(view: Scene) -> str:
    """What can be seen, in two sentences."""
    return (
        f"In this picture I can see {join([phrase(t) for t in view.things])}. They are on a "
        f"{view.background} background."
    )


def reason(view: Scene, rng: Generator) -> str:
    """An open answer that connects what is seen with what one knows."""
    t = pick(rng, view.things)
    out = [f"The scene shows {join([phrase(u) for u in view.things])}."]
    out.append(
        f"The {t.color} {t.shape} might make you think of a {FRUIT[t.color]}, because it has the "
        "same color."
    )
    out.append(
        f"The {view.background} background could be a place where a {ANIMAL[view.background]} "
        "lives."
    )
    if len(view.things) > 1:
        a, b = view.things[0], view.things[-1]
        out.append(f"The {a.shape} is {side(a, b)} the {b.shape}, so the two may belong together.")
    return " ".join(out)


def small_talk(view: Scene, rng: Generator) -> tuple[str, str]:
    """A short question with an answer in a full sentence."""
    t = pick(rng, unique(view, "shape") or view.things)
    form = int(rng.integers(4))
    if form == 0:
        return f"What color is the {t.shape}?", f"The {t.shape} in the picture is {t.color}."
    if form == 1:
        return (
            f"Where can I find the {t.shape}?",
            f"You can find the {t.color} {t.shape} at {PLACES[t.place]}.",
        )
    if form == 2:
        n = len(view.things)
        return "How many objects are there?", (
            f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {'object' if n == 1 else 'objects'} "
            "in the picture."
        )
    if rng.random() < DENY:
        missing = [s for s in SHAPES if all(u.shape != s for u in view.things)]
        shape = pick(rng, missing)
        return f"Is there a {shape} in the image?", f"no, I cannot see a {shape} in the image."
    return (
        f"Is there a {t.shape} in the image?",
        f"yes, there is a {t.color} {t.shape} in the image.",
    )


def conversation(scene: Scene, rng: Generator) -> tuple[str, list[tuple[str, str]], int]:
    """(task_name, [(question, answer), ...], number of wrong facts) about a picture of objects."""
    view, wrong = noisy_view(scene, rng)
    sort = pick(rng, ("conversation", "detail", "reasoning"), (0.4, 0.35, 0.25))
    if sort == "detail":
        text = " ".join(sentences(view.things, view.background, view.condition))
        return sort, [(pick(rng, DETAIL), text)], wrong
    if sort == "reasoning":
        return sort, [(pick(rng, REASON), reason(view, rng))], wrong
    turns = [(pick(rng, SEE), see(view))] if rng.random() < 0.7 else []
    while len(turns) < 3:
        turn = small_talk(view, rng)
        if turn[0] not in [q for q, _ in turns]:
            turns.append(turn)
    return sort, turns, wrong


def phrases() -> list[str]:
    """All wordings of this file, for the tokenizer."""
    out = [f"{q} {a}" for q, a in TALK] + [
        q for group in (OPEN, NEW) for qs in group.values() for q in qs
    ]
    for i in range(400):
        rng = rng_of("phrases", i)
        out += [f"{q} {a}" for q, a in conversation(sample_scene(rng, "objects"), rng)[1]]
    return [*out, *BACKGROUNDS]
