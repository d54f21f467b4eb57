"""The order in which a source is walked: a pseudo-random permutation that needs no memory, however large the source."""

import hashlib
from functools import lru_cache

ROUNDS = 6
_MASK = 2**64 - 1


def permuted(place: int, size: int, key: str) -> int:
    """Item at `place` (0 <= place < size) in the permutation of range(size) that belongs to `key`.

    A Feistel network over the next even number of bits is a bijection; walking along it until the value is below
    `size` keeps it one. About four steps on average, none stored.
    """
    assert 0 <= place < size
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    value = place
    while True:
        left, right = value >> half, value & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        value = left << half | right
        if value < size:
            return value


@lru_cache(maxsize=256)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every input bit changes about half of the output bits."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
