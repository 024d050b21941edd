"""Lineages: which families are one group, in any order, and names without their style."""

from __future__ import annotations

import random
from itertools import count

import pytest

from upcycle_bench.data.worlds import lineage
from upcycle_bench.data.worlds.lineage import base_name, caption, group_families, overlapping, skin_tones

# The descents that must hold: each line is one group.
REQUIRED = [
    "fluent fluent-color fluent-mdl2 fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast",
    "noto noto-v1",
    "emojione emojione-monotone emojione-v1",
    "twemoji",
    "material-symbols material-symbols-light ic mdi mdi-light",
    "ion famicons",
    "boxicons bx bxs",
    "solar reicon",
    "streamline guidance streamline-flex streamline-ultimate-color",
    "pepicons pepicons-pencil pepicons-pop pepicons-print",
    "lucide lucide-lab feather meteor-icons keyline-icons",
    "pinhead temaki maki map",
    "icon-park icon-park-outline icon-park-solid icon-park-twotone",
    "uil uim uis uit",
    "mi mono-icons",
    "fa fa-brands fa-regular fa-solid fa6-brands fa6-regular fa6-solid fa7-brands fa7-regular fa7-solid",
    "flag circle-flags flagpack cif",
]


def apart(*families: str, size: int = 40) -> dict[str, set[bytes]]:
    """Families that share no picture."""
    numbers = count()
    return {family: {str(next(numbers)).encode() for _ in range(size)} for family in families}


def share(pictures: dict[str, set[bytes]], first: str, second: str, number: int) -> None:
    """Put `number` pictures of `first` into `second`, in the place of as many of its own."""
    pictures[second] = set(sorted(pictures[first])[:number]) | set(sorted(pictures[second])[number:])


def test_every_required_descent_is_one_group_of_its_own():
    sets = [line.split() for line in REQUIRED]
    families = [family for members in sets for family in members]
    for seed in range(5):
        random.Random(seed).shuffle(families)
        group_of = group_families(apart(*families, size=2))
        names = [{group_of[family] for family in members} for members in sets]
        assert all(len(found) == 1 for found in names)
        assert len(set.union(*names)) == len(sets)
        assert all(found == {members[0]} for found, members in zip(names, sets, strict=True))


@pytest.mark.parametrize("stranger", ["fluid", "notoriety", "icon", "mix", "maple", "fad", "uiw", "ionic", "lucid"])
def test_a_similar_name_is_no_descent(stranger: str):
    families = [family for line in REQUIRED for family in line.split()]
    group_of = group_families(apart(*families, stranger, size=2))
    assert [family for family, group in group_of.items() if group == stranger] == [stranger]


def test_families_without_descent_or_common_pictures_stay_apart():
    assert group_families(apart("c", "a", "b")) == {"a": "a", "b": "b", "c": "c"}
    assert group_families({}) == {}


@pytest.mark.parametrize("size", [20, 40, 60, 100, 140, 1000, 8140])
def test_exactly_five_percent_in_common_is_not_enough_one_more_is(size: int):
    for common, joined in ((size // 20, False), (size // 20 + 1, True)):
        pictures = apart("large", "small", size=size)
        pictures["large"] |= {f"more {n}".encode() for n in range(3 * size)}
        share(pictures, "large", "small", common)
        assert len(pictures["small"]) == size and len(pictures["large"] & pictures["small"]) == common
        assert overlapping(pictures) == [("large", "small")] * joined
        assert group_families(pictures) == {"large": "large", "small": "large" if joined else "small"}


def test_the_share_is_of_the_smaller_family():
    pictures = apart("large", size=1000) | {"small": {b"own"}}
    share(pictures, "large", "small", 1)  # one of one, one of a thousand
    assert group_families(pictures)["small"] == "large"


def test_a_family_without_pictures_overlaps_with_none():
    assert group_families({"a": set(), "b": set(), "c": {b"x"}}) == {"a": "a", "b": "b", "c": "c"}


def test_groups_are_transitive_through_pictures_and_descents():
    # a - b by pictures, b - c by pictures, c - lucide by pictures, lucide - feather by descent, feather - d by pictures
    families = ["a", "b", "c", "d", "e", "feather", "lucide"]
    links = [("a", "b"), ("b", "c"), ("c", "lucide"), ("d", "feather")]
    for seed in range(10):
        pictures = apart(*families)
        for number, (first, second) in enumerate(links):
            common = {f"common {number} {n}".encode() for n in range(3)}
            pictures[first] |= common
            pictures[second] |= common
        order = list(pictures)
        random.Random(seed).shuffle(order)
        group_of = group_families({family: pictures[family] for family in order})
        assert group_of == dict.fromkeys(["a", "b", "c", "d", "feather", "lucide"], "lucide") | {"e": "e"}


def test_two_joined_lineages_are_named_after_the_one_listed_first():
    pictures = apart("heroicons", "feather", "lucide")
    share(pictures, "feather", "heroicons", 3)
    assert set(group_families(pictures).values()) == {"lucide"}
    # without its head, a lineage is named after its first family
    assert set(group_families(apart("keyline-icons", "feather")).values()) == {"feather"}


def test_skin_tones_are_found_with_and_without_the_word():
    tones = {"artist-light", "artist-medium-light", "artist-medium", "artist-medium-dark", "artist-dark"}
    pairs = {"couple-medium-dark-light", "couple-medium-dark", "couple-light-medium-light"}
    marked = {"hand-light-skin-tone", "wave-skin-tone-3"}
    # light and dark things, of which there is no medium-dark
    others = {"artist", "couple", "hand", "bulb-light", "theme-dark", "steak-medium", "text-medium-light", "dark"}
    assert skin_tones(tones | pairs | marked | others) == tones | pairs | marked
    assert skin_tones([]) == set()


@pytest.mark.parametrize(
    ("name", "declared", "base"),
    [
        ("house", (), "house"),
        ("arrow-left-24-filled", (), "arrow-left"),
        ("arrow-left-20px", (), "arrow-left"),
        ("arrow-left", (), "arrow-left"),  # direction is no style
        ("outline-home", (), "home"),
        ("sharp-outline-home", (), "home"),
        ("home-rounded-solid", (), "home"),
        ("home-bold", (), "home-bold"),
        ("home-bold", ("bold",), "home"),
        ("home-sharp-duotone", ("sharp-duotone",), "home"),
        ("home-thin-line", ("thin-line",), "home"),
        ("line-chart", ("line",), "chart"),
        ("pie-chart-2", (), "pie-chart"),
        ("4k-outline", (), "4k"),
        ("filled", (), "filled"),  # never empty
        ("outline-filled", (), "outline"),
        ("24", (), "24"),
        ("3d", (), "3d"),
    ],
)
def test_base_name(name: str, declared: tuple[str, ...], base: str):
    assert base_name(name, declared) == base
    assert base_name(base, declared) == base  # nothing more comes off


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("foot-negative", "foot"),
        ("foot-dark-24px", "foot"),
        ("github-icon", "github"),
        ("github-wordmark-dark", "github"),
        ("chart-line-duotone-2", "chart"),
        ("outline-home", "home"),
        ("dark-mode", "dark-mode"),  # only at the end
        ("negative-light", "negative"),
        ("icon", "icon"),  # never empty
        ("dog-house", "dog-house"),
    ],
)
def test_plain_name(name: str, plain: str):
    assert lineage.plain_name(name) == plain
    assert lineage.plain_name(plain) == plain


def test_the_split_does_not_know_the_new_words():
    """With them other icons would be trained on, and the shipped dense model would not fit any more."""
    names = ["foot", "foot-negative", "foot-dark", "foot-icon", "foot-wordmark"]
    assert lineage.drawings(names, []) == {name: name for name in names}
    assert [base_name(name) for name in names] == names


def test_sizes_and_fill_variants_share_a_base_name():
    variants = ["cloud", "cloud-16", "cloud-24", "cloud-filled", "cloud-16-filled", "cloud-24px", "outline-cloud"]
    assert {base_name(name) for name in variants} == {"cloud"}


def test_caption():
    assert caption("arrow-left-circle") == "arrow left circle"
    assert caption("home_work-2") == "home work 2"
    assert caption("house") == "house"


def test_no_pattern_stands_in_two_lineages():
    patterns = [pattern for patterns in lineage.LINEAGES for pattern in patterns]
    assert len(patterns) == len(set(patterns))


def test_drawings_join_what_the_families_of_a_group_call_differently():
    names = [
        "badge-check",
        "badge-check-line",
        "link",
        "link-broken",
        "chart-line",
        "bell-24-filled",
        "bell-bold",
        "line",
    ]
    found = lineage.drawings(names, ["broken", "bold"])
    assert found["badge-check-line"] == found["badge-check"] == "badge-check"
    assert found["link-broken"] == found["link"] == "link"  # one family of the group declares "broken"
    assert found["chart-line"] == "chart-line"  # there is no plain chart beside it
    assert found["bell-24-filled"] == found["bell-bold"] == "bell"
    assert found["line"] == "line"


def test_a_drawing_is_never_finer_than_a_base_name():
    names = ["star", "star-sharp-line", "star-line", "sharp-star", "star-2", "star-sharp"]
    found = lineage.drawings(names, ["sharp"])
    for one in names:
        for other in names:
            if base_name(one) == base_name(other):
                assert found[one] == found[other]
