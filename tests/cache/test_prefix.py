"""A key says which tokens a page holds, after which others, and whose."""

from hashlib import blake2b
from itertools import product

from k2dist.cache import next_key, page_keys


def test_keys_are_what_the_definition_says() -> None:
    """Written out by hand: eight bytes a token, least significant first on every machine that we run on."""
    root = blake2b(b"acme", digest_size=32).digest()
    first = blake2b(root + bytes([7, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]), digest_size=32).digest()
    second = blake2b(first + bytes([2] + [0] * 7 + [3] + [0] * 7), digest_size=32).digest()
    assert [*page_keys("acme", (7, 257, 2, 3), 2)] == [first, second]


def test_only_full_pages_have_keys() -> None:
    lengths = {num_tokens: len([*page_keys("", (1,) * num_tokens, 4)]) for num_tokens in range(10)}
    assert lengths == {n: n // 4 for n in range(10)}


def test_no_two_prefixes_and_no_two_tenants_have_a_key_in_common() -> None:
    """All prompts of six tokens 0 or 1 in pages of two, for three tenants: a key for each distinct prefix."""
    keys = {
        (tenant, prompt[: 2 * index + 2]): key
        for tenant in ("", "a", "b")
        for prompt in product((0, 1), repeat=6)
        for index, key in enumerate(page_keys(tenant, prompt, 2))
    }
    assert len(keys) == 3 * (4 + 16 + 64)
    assert len(set(keys.values())) == len(keys)


def test_a_key_needs_only_the_one_before_it() -> None:
    first, second = page_keys("a", (1, 2, 3, 4), 2)
    assert next_key(first, (3, 4)) == second
    assert next_key(first, (4, 3)) != second


def test_keys_are_hashed_when_they_are_asked_for() -> None:
    class Prompt(tuple[int, ...]):
        num_pages_read = 0

        def __getitem__(self, index):
            Prompt.num_pages_read += 1
            return super().__getitem__(index)

    keys = page_keys("", Prompt(range(100)), 10)
    next(keys)
    assert Prompt.num_pages_read == 1
