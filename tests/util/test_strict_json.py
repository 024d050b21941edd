"""JSON has no NaN and no infinity: what is written has none, and what has some is refused and named."""

import json
import math
from typing import Any

import pytest

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.strict_json import dumps, loads

TREE = {"b": [1, 2.5, {"c": None}], "a": "ü", "big": 10**400}


@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"sort_keys": True, "separators": (",", ":")}])
def test_finite_trees_have_the_bytes_of_json(form: dict[str, Any]) -> None:
    assert dumps(TREE, **form) == json.dumps(TREE, **form)
    assert loads(dumps(TREE)) == TREE


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        (math.nan, "a number is nan"),
        ({"layers": {"vision.1": {"drift": math.inf}}}, "layers.vision.1.drift is inf"),
        ({"scores": [{"value": 1.0}, {"value": -math.inf}]}, "scores.1.value is -inf"),
        ({"pair": (1.0, math.nan)}, "pair.1 is nan"),
    ],
)
def test_a_number_that_is_not_finite_is_named_in_one_line(tree: Any, where: str) -> None:
    with pytest.raises(UserError, match=where) as raised:
        dumps(tree)
    assert isinstance(raised.value, ValueError) and "\n" not in str(raised.value)


def test_a_name_twice_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match="'status' stands twice"):
        loads('{"runs": [{"status": "ok", "status": "failed"}]}')


def test_other_errors_stay() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match="Circular reference"):
        dumps(circle)
    with pytest.raises(TypeError, match="not JSON serializable"):
        dumps({1, 2})


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "[1e999]", "[-1e999]"])
def test_such_numbers_are_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"(NaN|Infinity|1e999) is no JSON"):
        loads(text)
