"""Which icon families descend from each other, and the names of icons without their style.

Families copy each other: as a fork, as a second edition, as another weight of the same drawings. Families of one
lineage must be in one split, or the training set would hold the answers of the evaluation sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from fnmatch import fnmatchcase

# Families that are known to descend from each other. The group has the first name. A pattern stands for all that match.
LINEAGES: tuple[tuple[str, ...], ...] = (
    ("fluent", "fluent-*"),
    ("noto", "noto-*"),
    ("emojione", "emojione-*"),
    ("material-symbols", "material-symbols-*", "ic", "mdi", "mdi-*"),
    ("ion", "famicons"),
    ("boxicons", "bx", "bxs", "bxl"),
    ("solar", "reicon"),
    ("streamline", "streamline-*", "guidance", "covid"),
    ("pepicons", "pepicons-*"),
    ("lucide", "lucide-*", "feather", "meteor-icons", "keyline-icons"),
    ("pinhead", "temaki", "maki", "map"),
    ("icon-park", "icon-park-*"),
    ("uil", "uim", "uis", "uit"),
    ("mi", "mono-icons"),
    ("fa", "fa-*", "fa6-*", "fa7-*"),
    ("flag", "circle-flags", "flagpack", "cif"),
    ("heroicons", "heroicons-*", "sidekickicons"),
    ("devicon", "devicon-*"),
    ("glyphs", "glyphs-*"),
    ("token", "token-*"),
    ("cryptocurrency", "cryptocurrency-*"),
    ("entypo", "entypo-*"),
    ("thesvg", "thesvg-*"),
)
OVERLAP = 0.05  # two families are one group if more than this share of the smaller one's images is in both
# Words that always say how an icon is drawn. Others ("line", "bold") do so only where the family declares them.
STYLES = frozenset(
    ["outline", "outlined", "fill", "filled", "solid", "linear", "duotone", "twotone", "rounded", "sharp"]
)
# Words that say how an icon is drawn if the group also has the name without the word.
SIBLINGS = frozenset(
    "line bold light thin regular broken duo alt variant round color colour flat stroke".split()  # noqa: SIM905
)
# Words at the end of a name that make it a variant of the name without them. The split itself keeps to the lists above:
# with the last four words other icons would be held out, some that the shipped dense model was trained on. So these
# words only take icons out of evaluation (`drop_variants`).
VARIANTS = STYLES | SIBLINGS | {"negative", "dark", "icon", "wordmark"}
TONES = "medium-light|medium-dark|light|medium|dark"


def group_families(pictures: Mapping[str, set[bytes]]) -> dict[str, str]:
    """Family -> group. `LINEAGES` and equal images (`OVERLAP`) join families; `pictures` are the images' digests.

    A group is named after its first lineage in `LINEAGES`, else after its first family.
    """
    parent = {family: family for family in pictures}

    def root(family: str) -> str:
        while parent[family] != family:
            family = parent[family]
        return family

    def join(families: Sequence[str]) -> None:
        for other in families[1:]:
            parent[root(other)] = root(families[0])

    for lineage in LINEAGES:
        join([family for family in pictures if any(fnmatchcase(family, pattern) for pattern in lineage)])
    for first, second in overlapping(pictures):
        join([first, second])
    members: dict[str, list[str]] = {}
    for family in sorted(pictures):
        members.setdefault(root(family), []).append(family)
    named: dict[str, str] = {}
    for families in members.values():
        heads = [lineage[0] for lineage in LINEAGES if lineage[0] in families]
        named |= dict.fromkeys(families, (heads or families)[0])
    return named


def overlapping(pictures: Mapping[str, set[bytes]]) -> list[tuple[str, str]]:
    """Pairs of families that have more than `OVERLAP` of the smaller one's images in common."""
    families = sorted(pictures)
    return [
        (first, second)
        for number, first in enumerate(families)
        for second in families[number + 1 :]
        if len(pictures[first] & pictures[second]) > OVERLAP * min(len(pictures[first]), len(pictures[second]))
    ]


def skin_tones(names: Iterable[str]) -> set[str]:
    """The names of icons in a skin tone: "...-skin-tone", or "artist-dark" if there is an "artist-medium-dark"."""
    names = set(names)
    found = {name for name in names if "skin-tone" in name}
    stems = {name.partition("-medium-dark")[0] for name in names if "-medium-dark" in name}
    for name in names:
        match = re.fullmatch(rf"(.+?)((?:-(?:{TONES}))+)", name)
        if match and match[1] in stems:
            found.add(name)
    return found


def base_name(name: str, declared: Iterable[str] = ()) -> str:
    """The name without style words, sizes and counters at its ends: "arrow-left-24-filled" -> "arrow-left".

    `declared` are the style affixes that the family declares ("bold", "sharp-duotone"). The result is never empty.
    """
    styles = STYLES.union(*(affix.split("-") for affix in declared))
    return _without(name, styles, styles)


def plain_name(name: str) -> str:
    """The name without `VARIANTS` words, sizes and counters at its end: "foot-negative-24px" -> "foot"."""
    return _without(name, VARIANTS, STYLES)


def _without(name: str, last: AbstractSet[str], first: AbstractSet[str]) -> str:
    words = name.split("-")
    while len(words) > 1 and (words[-1] in last or re.fullmatch(r"\d+(px)?", words[-1])):
        words.pop()
    while len(words) > 1 and words[0] in first:
        words.pop(0)
    return "-".join(words)


def drawings(names: Iterable[str], declared: Iterable[str]) -> dict[str, str]:
    """Name -> drawing, of all names of a group; coarser than `base_name`: names that may be one drawing have one key.

    `declared` are the style affixes of all families of the group, since a family also uses affixes that only another
    one declares. A `SIBLINGS` word is taken off if the group has the name without it: "badge-check-line" becomes
    "badge-check" if there is a "badge-check".
    """
    affixes = set(declared)
    words = SIBLINGS.union(*(affix.split("-") for affix in affixes))
    keys = {name: base_name(name, affixes) for name in names}
    bases = set(keys.values())
    for name, key in keys.items():
        bare, _, last = key.rpartition("-")
        while last in words and bare in bases:
            key = bare
            bare, _, last = key.rpartition("-")
        keys[name] = key
    return keys


def caption(name: str) -> str:
    """An icon's name in words: "arrow-left-circle" -> "arrow left circle"."""
    return " ".join(name.replace("_", "-").split("-"))
