"""
Draw the sentences of the demo: home-assistant commands, digits, small stories, and words in any order.

All text is lower case without punctuation. Everything is drawn from the `random.Random` that is passed in, so that a
seed gives the same sentences on every machine.
"""

import hashlib
import random
from collections.abc import Callable
from functools import cache

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TENS = ("ten", "twenty", "thirty", "forty", "fifty")

_LIGHTS = ("light", "lamp")
_DEVICES = ("fan", "heater", "radio", "light", "lamp")
_ROOMS = ("kitchen", "bedroom", "bathroom", "garden", "garage")
_OPENINGS = ("door", "window", "gate")
_MUSIC = ("music", "jazz", "news")
_NAMES = ("anna", "peter", "john", "mary")
_SHOPPING = ("bread", "milk", "apples", "coffee", "fish", "corn")
_DAYS = ("today", "tomorrow")
_COLOURS = ("red", "green", "blue")
_COMMAND_WORDS = (
    "turn on off the in to set percent degrees play stop open close call a timer for minutes what time is it add list "
    "how weather today tomorrow please wake me at and make"
).split()

# What may eat, drink, wear or sail what: sentences a language model can tell apart where the sound cannot
# (goat, coat and boat; pear and bear).
_DIET = {
    "goat": ("hay", "corn", "pear", "apples"),
    "bear": ("fish", "pear", "apples"),
    "horse": ("hay", "corn", "apples"),
    "dog": ("bread", "fish"),
    "cat": ("fish",),
}
_ANIMALS = tuple(_DIET)
_PEOPLE = ("farmer", "sailor", "king", "queen", "child")
_CLOTHES = ("coat", "hat")
_VESSELS = ("boat", "ship")
_WATERS = ("river", "lake", "sea")
_INSIDE = ("forest", "house", "garden")
_LAND = (*_INSIDE, "hill")
_SWEET = ("pear", "apples", "corn")
_STORY_ADJECTIVES = ("old", "young", "little")
_STORY_WORDS = (
    "eats drinks water wears buys sails sings runs sleeps sees reads gives brown warm small sweet hungry across "
    "under near tree book with"
).split()


def _without_repeats(*groups: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for group in groups for word in group))


VOCABULARY: tuple[str, ...] = _without_repeats(
    DIGITS, _TENS, _DEVICES, _ROOMS, _OPENINGS, _MUSIC, _NAMES, _SHOPPING, _COLOURS, _COMMAND_WORDS,
    _ANIMALS, *_DIET.values(), _PEOPLE, _CLOTHES, _VESSELS, _WATERS, _LAND, _STORY_ADJECTIVES, _STORY_WORDS,
)  # fmt: skip


def _number(rng: random.Random) -> str:
    """Draw a number from zero to fifty-nine, in one or two words."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(DIGITS)
    tens = rng.choice(_TENS)
    if kind < 0.6 or tens == "ten":
        return tens
    return f"{tens} {rng.choice(DIGITS[1:])}"


def _maybe(rng: random.Random, *words: str) -> str:
    """Draw one of the words and a space, or nothing."""
    return rng.choice(("", *(f"{word} " for word in words)))


def commands(rng: random.Random) -> str:
    """Draw a home-assistant command of at most eight words."""
    pick = rng.choice
    kind = rng.randrange(16)
    switch, room, please = pick(("on", "off")), _maybe(rng, *_ROOMS), pick(("", " please"))
    if kind == 0:
        return f"turn {switch} the {pick(_DEVICES)} in the {pick(_ROOMS)}{please}"
    if kind == 1:
        first, second = rng.sample(_DEVICES, 2)
        return f"turn {switch} the {room}{first} and the {second}"
    if kind == 2:
        return f"turn {switch} the {room}{pick(_DEVICES)} at {_number(rng)}"
    if kind in (3, 4):
        return f"set the {room}{pick(_DEVICES)} to {_number(rng)} {pick(('percent', 'degrees'))}"
    if kind == 5:
        return f"play {_maybe(rng, 'the')}{pick(_MUSIC)} in the {pick(_ROOMS)}{please}"
    if kind == 6:
        return f"play {pick(_MUSIC)} in the {pick(_ROOMS)} at {_number(rng)}"
    if kind == 7:
        return f"{pick(('open', 'close'))} the {room}{pick(_OPENINGS)}{please}"
    if kind == 8:
        when = pick(("", " today", " tomorrow"))
        return f"{pick(('open', 'close'))} the {room}{pick(_OPENINGS)} at {_number(rng)}{when}"
    if kind == 9:
        return f"call {' '.join(pick(DIGITS) for _ in range(rng.randint(3, 6)))}"
    if kind == 10:
        names = " and ".join(rng.sample(_NAMES, rng.randint(1, 2)))
        return f"call {names}{please}" if rng.random() < 0.3 else f"call {names} at {_number(rng)} {pick(_DAYS)}"
    if kind == 11:
        return f"set a timer for {_number(rng)} minutes{please}"
    if kind == 12:
        goods = rng.sample(_SHOPPING, rng.randint(1, 2))
        number = f"{pick(DIGITS[2:])} " if goods[0] == "apples" else ""
        return f"add {number}{' and '.join(goods)} to the list"
    if kind == 13:
        return f"make the {room}{pick(_LIGHTS)} {pick(_COLOURS)}{please}"
    if kind == 14:
        return f"wake me at {_number(rng)} {pick(_DAYS)}{please}"
    return pick(
        (
            f"stop the {pick(_MUSIC)}{please}",
            f"stop the {pick(_MUSIC)} in the {pick(_ROOMS)}{please}",
            f"how is the weather {pick(_DAYS)}{please}",
            f"what {pick(('time is it', 'is the time'))}{please}",
        )
    )


def digit_string(rng: random.Random, max_digits: int = 6) -> str:
    """Draw one to `max_digits` digit words, every length equally often."""
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(1, max_digits)))


def _article(rng: random.Random, noun: str) -> str:
    """Put "the" or, where English allows it, "a" before a noun, which may begin with adjectives."""
    return f"the {noun}" if noun.startswith("old") or rng.random() < 0.6 else f"a {noun}"


def stories(rng: random.Random) -> str:
    """Draw a story sentence of four to eight words whose subject, verb and object make sense together."""
    pick = rng.choice
    kind = rng.randrange(10)
    person = _article(rng, _maybe(rng, *_STORY_ADJECTIVES) + pick(_PEOPLE))
    animal = pick(_ANIMALS)
    food = pick(_DIET[animal])
    beast = _article(rng, _maybe(rng, *_STORY_ADJECTIVES, "brown", "hungry") + animal)
    if kind < 2:
        # Without the second article there is room for the place.
        if food != "pear" and rng.random() < 0.6:
            return f"{beast} eats {food} {_on_land(rng)}"
        return f"{beast} eats the {_maybe(rng, 'sweet') if food in _SWEET else ''}{food}"
    if kind < 4:
        garment = _maybe(rng, "warm", "old", "small") + _maybe(rng, *_COLOURS) + pick(_CLOTHES)
        return f"{person} wears {_article(rng, garment)}"
    if kind < 6:
        vessel = _article(rng, _maybe(rng, "old", "small", "little") + _maybe(rng, *_COLOURS) + pick(_VESSELS))
        return f"{vessel} sails {pick(('across', 'near', 'to'))} the {pick(_WATERS)}"
    if kind == 6:
        place = pick((f"under the {_maybe(rng, 'old', 'small')}tree", f"near the {pick(_LAND + _WATERS)}"))
        return f"{beast} {pick(('sleeps', 'runs'))} {place}"
    if kind == 7:
        if food == "pear":
            return f"{person} gives the {animal} {_article(rng, food)}"
        return f"{person} gives the {_maybe(rng, 'hungry', 'brown', 'old')}{animal} {food}"
    if kind == 8:
        ashore = f"{_article(rng, animal)} near the {pick(_LAND)}"
        afloat = f"{_article(rng, pick(_VESSELS))} near the {pick(_WATERS)}"
        seen = pick((ashore, afloat))
        return f"{_article(rng, pick(_PEOPLE))} sees {seen}"
    if rng.random() < 0.5:
        bought = pick(("pear", "book", *(f"{how} {what}" for how in ("warm", *_COLOURS) for what in _CLOTHES)))
        return f"{_article(rng, pick(_PEOPLE))} buys a {bought} for {pick(_NAMES)}"
    company = f"with the {pick(('cat', 'dog', 'child', 'queen', 'king'))}"
    where = pick((company, _on_land(rng)))
    return f"{person} {pick(('reads', 'sings', 'sleeps', 'drinks milk', 'drinks water'))} {where}"


def _on_land(rng: random.Random) -> str:
    return rng.choice((f"near the {rng.choice(_LAND)}", f"in the {rng.choice(_INSIDE)}"))


def random_words(rng: random.Random, max_words: int = 7) -> str:
    """Draw one to `max_words` words of the vocabulary in any order, to teach words without the grammar."""
    return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(1, max_words)))


@cache
def _words_of_text() -> tuple[str, ...]:
    """Return the words of commands and stories, each as often as it occurs there."""
    rng = random.Random(0)
    return tuple(word for domain in (commands, stories) for _ in range(4000) for word in domain(rng).split())


def frequent_words(rng: random.Random, max_words: int = 9) -> str:
    """
    Draw one to `max_words` words in any order, half of them with their frequency in sentences.

    Frequent words thus occur most often, but never in a sentence.
    """
    drawn = (_words_of_text() if rng.random() < 0.5 else VOCABULARY for _ in range(rng.randint(1, max_words)))
    return " ".join(rng.choice(words) for words in drawn)


DOMAINS: dict[str, Callable[[random.Random], str]] = {
    "commands": commands,
    "digits": digit_string,
    "stories": stories,
    "words": random_words,
    "frequent words": frequent_words,
}


def is_held_out(text: str) -> bool:
    """
    Return whether a sentence belongs to the tests: about 10 % do, the same ones on every machine.

    One and two digits are never held out: there are only 110 of them, and every recogniser has to learn them all.
    """
    words = text.split()
    if len(words) <= 2 and all(word in DIGITS for word in words):
        return False
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10 == 0


def sample(
    domain: str, count: int, rng: random.Random, held_out: bool | None = False, unique: bool = True
) -> list[str]:
    """
    Draw sentences of a domain.

    Args:
        domain: a key of `DOMAINS`.
        count: number of sentences.
        rng: source of randomness.
        held_out: draw only training sentences (False), only test sentences (True), or both (None).
        unique: never return a sentence twice.

    Raises:
        ValueError: for an unknown domain, or when the domain has too few such sentences.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; accepted: {', '.join(DOMAINS)}.")
    chosen: list[str] = []
    seen: set[str] = set()
    misses = 0
    while len(chosen) < count:
        text = DOMAINS[domain](rng)
        if (held_out is not None and is_held_out(text) != held_out) or (unique and text in seen):
            misses += 1
            if misses > 5000:
                raise ValueError(f"the domain {domain!r} has too few sentences: found {len(chosen)} of {count}")
            continue
        misses = 0
        seen.add(text)
        chosen.append(text)
    return chosen
