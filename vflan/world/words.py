"""What can be said about a scene: running descriptions, captions and long-form prose, exact by construction."""

from vflan.world.scene import PLACES

NUMBERS = ("no", "one", "two", "three", "four", "five")


def note(thing, rng=None):
    """The five words of an object and a full stop; with `rng` in random order, so that only nearness binds them."""
    words = [PLACES[thing.place], thing.size, thing.texture, thing.color, thing.shape]
    if rng is not None:
        rng.shuffle(words)
    return " ".join(words) + "."


def describe(scene, rng=None):
    """The scene as running text. This is how the tiny language model meets scenes before it ever sees a picture.

    Without `rng` it is the caption of the projector stage: header, then every object in reading order with its place and
    attributes. With `rng` objects come in random order, and half of the time the words of each object too.
    """
    if scene.kind == "handwritten":
        return f"digit {scene.text}."
    parts = [f"{scene.background} {scene.condition}."]
    things = list(scene.things)
    shuffled = rng is not None and rng.random() < 0.5
    if rng is not None:
        rng.shuffle(things)
    parts += [note(thing, rng if shuffled else None) for thing in things]
    if scene.kind in ("text", "number"):
        parts.append(f"{scene.kind} " + " ".join(scene.text) + ".")
    if scene.kind == "chart":
        parts += ["chart."] + [f"{color} {height}." for color, height in scene.bars]
    return " ".join(parts)


def phrase(thing, article=True):
    """'a small red striped star'; a plain texture is not mentioned."""
    words = (
        [thing.size, thing.color]
        + ([thing.texture] if thing.texture != "plain" else [])
        + [thing.shape]
    )
    return ("a " if article else "") + " ".join(words)


def join(parts):
    """'x', 'x and y', 'x, y and z'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def side(a, b):
    """Where a lies as seen from b: 'left of', 'right of', 'above' or 'below' (columns first)."""
    if a.column != b.column:
        return "left of" if a.column < b.column else "right of"
    return "above" if a.row < b.row else "below"


def sentences(things, background, condition="clear"):
    """Long-form prose about objects, a list of sentences."""
    out = [f"The picture shows {join([phrase(t) for t in things])} on a {background} background."]
    for a, b in zip(things, things[1:]):
        out.append(f"The {a.color} {a.shape} is {side(a, b)} the {b.color} {b.shape}.")
    out.append(f"In total there {'is' if len(things) == 1 else 'are'} {NUMBERS[len(things)]} "
               f"{'object' if len(things) == 1 else 'objects'} in the scene.")  # fmt: skip
    if condition != "clear":
        out.append(f"The picture itself looks {condition}.")
    return out
