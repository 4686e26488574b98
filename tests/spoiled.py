"""JSON that was damaged, or made to do damage: one place of it is changed."""

import copy

__all__ = ["spoil"]

_JUNK = (
    None, True, False, -1, 0, 1, 3, 7, 2**63, -(2**63), 1.5, float("nan"), float("inf"), "", "x", "\0", "../../x",
    "W99A1", "none", "channel", "token", [], [1], ["a"] * 3, {}, {"a": 1}, [[[[]]]],
)  # fmt: skip


def _places(tree):
    """Every place in a tree of dicts and lists, as (container, key)."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def spoil(tree, rng):
    """Changes, drops or repeats one place of a tree; says which."""
    container, key = rng.choice(list(_places(tree)))
    match rng.choice(["set", "set", "set", "drop", "repeat"]):
        case "set":
            container[key] = copy.deepcopy(rng.choice(_JUNK))
            return f"{key!r} is {container[key]!r}"
        case "drop":
            del container[key]
            return f"{key!r} is gone"
        case _ if isinstance(container, dict):
            container[rng.choice(["x", "", f"{key}x"])] = container[key]
        case _:
            container.append(container[key])
    return f"{key!r} is there twice"
