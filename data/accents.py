"""English digits written the way speakers of other languages would spell what they hear.

A voice for another language that reads these spellings speaks English digits with the vowels, the r and the rhythm of
its own language. Where a language has no "th", three begins with the sound its speakers commonly put there.
"""

from .grammar import DIGITS

_SPELLINGS = {
    "cs": "zírou uan tú srí fór fajv siks sevn ejt najn",
    "de": "siero ouann tuh sri foor faiw ßicks säwwen äjt nain",
    "el": "ζίροου ουαν του θρι φορ φάιβ σιξ σέβεν έιτ νάιν",
    "es": "síro uán tu tri for fáif siks séven éit náin",
    "fi": "siirou uan tuu srii foor faiv siks seven eit nain",
    "fr": "zirau ouanne tou sri forre faillve sixe sèvenne eillte naillne",
    "hu": "ziró uan tú szrí fór fájv sziksz szeven éjt nájn",
    "id": "ziro wan tu tri for faif siks seven eit nain",
    "it": "siro uàn tu tri for fàiv sics sèven èit nàin",
    "nl": "ziero wan toe srie foor faaiv siks sevven eejt naain",
    "pl": "zirou łan tu sri for fajw syks sewen ejt najn",
    "pt": "zirou uane tu tri fór fáiv siques séven éit náina",
    "ru": "зироу уан ту сри фор файв сикс сэвн эйт найн",
    "sv": "sirå oann to tri får fajv sicks seven ejt najn",
    "tr": "ziro uan tu tri for fayv siks sevn eyt nayn",
}

RESPELLED_DIGITS: dict[str, dict[str, str]] = {
    language: dict(zip(DIGITS, spelling.split(), strict=True)) for language, spelling in _SPELLINGS.items()
}


def respell(text: str, language: str) -> str:
    """The spelling of a digit-only text for a voice of `language`, a key of `RESPELLED_DIGITS`."""
    words = text.split()
    if not words or any(word not in DIGITS for word in words):
        raise ValueError(f"a {language!r} voice can only speak English digit words, not {text!r}")
    return " ".join(RESPELLED_DIGITS[language][word] for word in words)
