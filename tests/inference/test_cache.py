"""Pages and slots, and how prompts are cut into chunks."""

import random

import pytest

from megatron_msa.inference.cache import SCRATCH_PAGE, Slots
from megatron_msa.inference.paged_rows import pages_for
from megatron_msa.inference.prefill import cut


def test_no_page_ever_belongs_to_two_sequences_or_to_none():
    draw = random.Random(1)
    slots = Slots(slots=5, pages=12, block_size=4)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(500):
        if held and draw.random() < 0.45:
            slots.release(slot := draw.choice(list(held)))
            del held[slot]
        else:
            tokens = draw.randint(1, 30)
            slot = slots.admit(tokens)
            if slot is None:
                used = sum(len(slots.pages(each)) for each in held)
                assert len(held) == 5 or used + pages_for(tokens, 4) > 12
                refused += 1
                continue
            assert slot not in held
            held[slot] = tokens
        pages = [page for each in held for page in slots.pages(each)]
        assert len(pages) == len(set(pages))
        assert SCRATCH_PAGE not in pages
        assert all(1 <= page <= 12 for page in pages)
        assert all(len(slots.pages(each)) == pages_for(tokens, 4) for each, tokens in held.items())
    assert refused > 20
    for slot in held:
        slots.release(slot)
    everything = slots.admit(48)
    assert everything is not None
    assert sorted(slots.pages(everything)) == list(range(1, 13))


@pytest.mark.parametrize("size", [1, 3, 4, 10, 100])
def test_chunks_are_full_and_every_token_is_in_one(size):
    lengths = [10, 1, 4, 7]
    chunks = list(cut(lengths, [[number] for number in range(4)], size))
    sizes = [sum(piece.stop - piece.start for piece in chunk) for chunk in chunks]
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= size
    tokens = [
        (piece.number, position)
        for chunk in chunks
        for piece in chunk
        for position in range(piece.start, piece.stop)
    ]
    assert tokens == [(number, position) for number in range(4) for position in range(lengths[number])]
    assert all(piece.pages == [piece.number] for chunk in chunks for piece in chunk)
