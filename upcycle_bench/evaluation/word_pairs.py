"""Hard negatives from real captions: pairs of images whose captions differ by exactly one word.

    chosen = choose([["arrow left"], ["bell"], ["arrow right"], ["bell off"]])
    chosen.pairs[0]          # images 0 and 2, "arrow left" and "arrow right", words ("left", "right")

Captions are lower-cased and split at white space. Two captions are a candidate if one word replaces another in the same
place, or if one caption has one more word, anywhere. They share at least one word, and neither image has the caption of
the other. `choose` goes through all candidates in the order of a hash of their two captions, which favours no word. It
takes a candidate if no earlier one took one of its images. So the pairs depend on the captions and their order alone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from upcycle_bench.util import strict_json
from upcycle_bench.util.rng import Stream

NOTHING = ""  # stands where one caption has a word and the other has none
Words = tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two images and a caption of each. `words`: the word of each that the other lacks, or NOTHING."""

    images: tuple[int, int]
    captions: tuple[str, str]
    words: tuple[str, str]

    @property
    def swapped(self) -> str:
        """The two words in alphabetical order, as one name: "left / right", "- / off"."""
        return " / ".join(sorted(word or "-" for word in self.words))

    @property
    def added(self) -> bool:
        """Whether one caption is the other one with a word added."""
        return NOTHING in self.words


@dataclass(frozen=True)
class Chosen:
    """Pairs that share no image, in the order of their first image, and the number of all candidates."""

    pairs: tuple[Pair, ...]
    candidates: int

    @cached_property
    def sha256(self) -> str:
        """Hash of the images and captions of all pairs."""
        rows = [[*pair.images, *pair.captions] for pair in self.pairs]
        return hashlib.sha256(strict_json.dumps(rows).encode()).hexdigest()


def choose(captions: Sequence[Sequence[str]]) -> Chosen:
    """The pairs among these images, which have one or more captions each, as the module docstring says."""
    found = sorted(candidates(captions), key=_place)
    free = [True] * len(captions)
    pairs = []
    for pair in found:
        first, second = pair.images
        if free[first] and free[second]:
            free[first] = free[second] = False
            pairs.append(pair)
    return Chosen(tuple(sorted(pairs, key=lambda pair: pair.images)), len(found))


def candidates(captions: Sequence[Sequence[str]]) -> Iterator[Pair]:
    """All candidates, each once, the image with the smaller number first.

    Two images with several captions can make several candidates.
    """
    texts = [(image, text, tuple(text.lower().split())) for image, own in enumerate(captions) for text in own]
    words_of = [{tuple(text.lower().split()) for text in own} for own in captions]
    for (one, one_text, one_words), (two, two_text, two_words), differing in _one_word_apart(texts):
        if one != two and one_words not in words_of[two] and two_words not in words_of[one]:
            pair = Pair((one, two), (one_text, two_text), differing)
            yield pair if one < two else Pair((two, one), (two_text, one_text), differing[::-1])


Text = tuple[int, str, Words]  # image, caption, its words


def _one_word_apart(texts: Sequence[Text]) -> Iterator[tuple[Text, Text, tuple[str, str]]]:
    """Pairs of texts that share all words but one, and these words.

    Texts are grouped by what is left without one word; comparing each with each would take too long.
    """
    same_words: dict[Words, list[Text]] = defaultdict(list)
    without: dict[tuple[int, Words], list[tuple[Text, str]]] = defaultdict(list)
    for text in texts:
        words = text[2]
        same_words[words].append(text)
        for place, word in enumerate(words):
            without[place, words[:place] + words[place + 1 :]].append((text, word))
    for (_, rest), group in without.items():
        if rest:
            yield from (
                (one, two, (word, other)) for (one, word), (two, other) in combinations(group, 2) if word != other
            )
    for text in texts:
        words = text[2]
        # Where a word stands twice in a row, leaving out either gives the same rest, so a dictionary keeps one.
        shorter = {words[:place] + words[place + 1 :]: word for place, word in enumerate(words)}
        for rest, word in shorter.items():
            yield from ((bare, text, (NOTHING, word)) for bare in (same_words.get(rest, ()) if rest else ()))


def _place(pair: Pair) -> tuple[int, tuple[int, int], tuple[str, str]]:
    """The place of a candidate in the order: by the hash of its captions, then by its images."""
    return Stream(("word pairs", *sorted(pair.captions))).seed(), pair.images, pair.captions


def most_frequent(pairs: Iterable[Pair], number: int) -> list[str]:
    """The names (`Pair.swapped`) that occur most often, equally frequent ones in alphabetical order."""
    counts: dict[str, int] = defaultdict(int)
    for pair in pairs:
        counts[pair.swapped] += 1
    return sorted(counts, key=lambda name: (-counts[name], name))[:number]
