"""How many rows of logits a chunk of a linear head has: one rule for torch and JAX."""

import pytest
from rgd._chunk_rows import chunk_rows

MIB = 1 << 20


@pytest.mark.parametrize(
    ("chunk_bytes", "row_bytes", "gradient_bytes", "rows"),
    [
        (1000, 100, 0, 10),
        (99, 100, 0, 1),  # at least one row
        (1000, 0, 0, 1000),  # a head of no classes
        (None, 4096, 0, 32 * MIB // 4096),
        (None, 4096, 1024 * MIB, 128 * MIB // 4096),  # an eighth of the gradient is more than 32 MiB
        (None, MIB, 0, 128),  # 32 rows would take the 32 MiB
        (1000, 100, 1024 * MIB, 10),  # what the caller gave holds whatever the head
    ],
)
def test_a_chunk_has_the_rows_that_its_bytes_hold(chunk_bytes, row_bytes, gradient_bytes, rows):
    assert chunk_rows(chunk_bytes, row_bytes=row_bytes, gradient_bytes=gradient_bytes) == rows


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (1, 1), (10, 10), (11, 6), (20, 10), (21, 7)])
def test_rows_that_are_known_are_spread_evenly_over_the_chunks(rows, expected):
    assert chunk_rows(1000, row_bytes=100, gradient_bytes=0, rows=rows) == expected
