"""Random damage with a fixed seed: to bytes, and to what JSON, YAML and checkpoints hold."""

import copy
import json
import os
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

TIMES = int(os.environ.get("METILR_FUZZ", "1"))  # a longer run: so many times as many cases
DEEP: Any = 1
for _ in range(50):
    DEEP = [DEEP]
SHARED: Any = "x"  # nine of the next in each, down to one: written out, 9 to the power of 30
for _ in range(30):
    SHARED = [SHARED] * 9
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "1", "../../x", "/etc/passwd", "a\0b", "\ud800", "x" * 3000, "NaN", [], {}, [[]], [1, "a"], {"a": 1}, DEEP,
)  # fmt: skip
_LEFT_OUT = object()
NUMBERS = tuple(struct.pack(form, n) for form in ("<I", ">I", "<Q") for n in (0, 1, 0xFFFF, 2**31 - 1, 2**32 - 1))


def cases(n: int, seed: int = 0) -> Iterator[random.Random]:
    """A source of randomness for each of n cases, the same in every run."""
    for i in range(n * TIMES):
        yield random.Random(f"{seed} {i}")


def mutated(content: bytes, rng: random.Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Change bytes in a few places: bits, numbers, pieces left out, doubled or swapped, and words of the format."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, length = rng.randrange(len(changed) + 1), rng.randrange(1, 1 + min(64, len(changed) + 1))
        how = rng.randrange(8)
        if how == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            del changed[at : at + length]
        elif how == 3:
            start = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + length]
        elif how == 4:
            number = rng.choice(NUMBERS)
            changed[at : at + len(number)] = number
        elif how == 5 and rng.random() < 0.3:
            del changed[at:]
        elif tokens:
            token = rng.choice(tokens)
            changed[at : at + rng.choice((0, len(token)))] = token
        else:
            changed[at:at] = rng.randbytes(length)
    return bytes(changed)


def mutated_value(value: Any, rng: random.Random, hostile: Sequence[Any] = HOSTILE_VALUES) -> Any:
    """Replace, remove or double a few parts of a value made of dicts and lists."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(changed))
        if not places:
            return rng.choice(hostile)
        holder, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == 2:
            other, other_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        else:
            holder[key] = copy.deepcopy(rng.choice(hostile))
    return changed


def json_cases(whole: Any, n: int, tokens: Sequence[bytes], hostile: Sequence[Any] = HOSTILE_VALUES) -> Iterator[bytes]:
    """JSON with each of its parts replaced, with several, and with other bytes; n of each of the last two."""
    for changed in (*each_replaced(whole, hostile), *(mutated_value(whole, rng) for rng in cases(n))):
        yield json.dumps(changed).encode()
    for rng in cases(n):
        yield mutated(json.dumps(whole).encode(), rng, tokens)


class Program:
    """What a hostile pickle runs."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def each_replaced(value: Any, hostile: Sequence[Any] = HOSTILE_VALUES) -> Iterator[Any]:
    """The value with each of its parts, one at a time, replaced by each hostile value, or left out."""
    for i in range(len([*_places(value)])):
        for replacement in (*hostile, _LEFT_OUT):
            changed = copy.deepcopy(value)
            holder, key = [*_places(changed)][i]
            if replacement is _LEFT_OUT:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(replacement)
            yield changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
