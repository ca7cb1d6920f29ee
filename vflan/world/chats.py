"""The stand-in for the GPT-4-synthesised set: fluent long-form conversations from a noisy, prior-led view of the scene.

GPT-4 never saw the pictures it wrote about, and its talk follows what usually goes together. Here `noisy_view` does that to
a scene, at stated rates: a partner that is not there is invented with probability INVENT, an object takes the favourite
colour of its shape with probability RECOLOR. And questions after what is not there are rare (DENY): the affirmative bias
of such data. So its form is better than its facts. The error rates are the design of the set, not a finding.
"""

from dataclasses import replace

from vflan.world.scene import (
    BACKGROUNDS,
    FAVOURITE,
    PARTNER,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Thing,
    pick,
)
from vflan.world.tasks import ANIMAL, FRUIT, unique
from vflan.world.words import NUMBERS, join, phrase, sentences, side

INVENT, RECOLOR, DENY = 0.25, 0.08, 0.15

SEE = (
    "What can you see in this picture?",
    "What is shown here?",
    "What do you notice in this image?",
)
DETAIL = ("Describe this picture in detail.", "Please give a detailed description of the image.",
          "Tell me everything you can about this scene.", "Can you explain what the image shows, in detail?")  # fmt: skip
REASON = ("What might this scene be about?", "What could the arrangement of the objects mean?",
          "Why might someone find this picture interesting?", "What could happen next in this scene?")  # fmt: skip
OPEN = dict(conversation=SEE, detail=DETAIL, reasoning=REASON)
# Open questions of the evaluation that the alignment data never asks in these words.
NEW = dict(conversation=("What do you see?", "Please tell me what this image shows."),
           detail=("Explain the picture to me in detail.", "Describe everything in this image."),
           reasoning=("What is interesting here?", "What might the picture mean?"))  # fmt: skip
TALK = (
    ("Hello!", "Hello! How can I help you today?"),
    ("Can you help me?", "Of course! Please tell me what you would like to know, and I will do my best to help."),
    ("Thank you for your help.", "You are welcome! Please ask me again when you have another question."),
    ("Who are you?", "I am an assistant. I can look at a picture and talk about what it shows."),
    *((f"Tell me about the {animal}.", f"The {animal} is an animal that lives in a place with a {b} background.")
      for b, animal in ANIMAL.items()),
    *((f"What color is a {fruit}?", f"A {fruit} is usually {color}, so it is easy to find.") for color, fruit in FRUIT.items()),
)  # fmt: skip


def noisy_view(scene, rng):
    """The scene as a language prior would have it: (scene, number of facts that are wrong)."""
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


def see(view):
    return f"In this picture I can see {join([phrase(t) for t in view.things])}. They are on a {view.background} background."


def reason(view, rng):
    t = pick(rng, view.things)
    out = [f"The scene shows {join([phrase(u) for u in view.things])}."]
    out.append(
        f"The {t.color} {t.shape} might make you think of a {FRUIT[t.color]}, because it has the same color."
    )
    out.append(
        f"The {view.background} background could be a place where a {ANIMAL[view.background]} lives."
    )
    if len(view.things) > 1:
        a, b = view.things[0], view.things[-1]
        out.append(f"The {a.shape} is {side(a, b)} the {b.shape}, so the two may belong together.")
    return " ".join(out)


def small_talk(view, rng):
    """One bare question with an answer in a full sentence."""
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
            f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} {'object' if n == 1 else 'objects'} in the picture."
        )
    if rng.random() < DENY:
        missing = [s for s in SHAPES if all(u.shape != s for u in view.things)]
        shape = pick(rng, missing)
        return f"Is there a {shape} in the image?", f"no, I cannot see a {shape} in the image."
    return (
        f"Is there a {t.shape} in the image?",
        f"yes, there is a {t.color} {t.shape} in the image.",
    )


def conversation(scene, rng):
    """(task_name, turns as (question, answer), number of wrong facts) about one picture with objects."""
    view, wrong = noisy_view(scene, rng)
    sort = pick(rng, ("conversation", "detail", "reasoning"), (0.4, 0.35, 0.25))
    if sort == "detail":
        return (
            sort,
            [
                (
                    pick(rng, DETAIL),
                    " ".join(sentences(view.things, view.background, view.condition)),
                )
            ],
            wrong,
        )
    if sort == "reasoning":
        return sort, [(pick(rng, REASON), reason(view, rng))], wrong
    turns = [(pick(rng, SEE), see(view))] if rng.random() < 0.7 else []
    while len(turns) < 3:
        turn = small_talk(view, rng)
        if turn[0] not in [q for q, _ in turns]:
            turns.append(turn)
    return sort, turns, wrong


def phrases():
    """Every wording of this file, for the tokenizer."""
    from vflan.world.scene import rng_of, sample_scene

    out = [f"{q} {a}" for q, a in TALK] + [
        q for group in (OPEN, NEW) for qs in group.values() for q in qs
    ]
    for i in range(400):
        rng = rng_of("phrases", i)
        out += [f"{q} {a}" for q, a in conversation(sample_scene(rng, "objects"), rng)[1]]
    return out + [f"{b}" for b in BACKGROUNDS]
