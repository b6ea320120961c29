"""How many rows of logits a linear head computes at a time, in every front."""

from __future__ import annotations

# With fewer rows, the matrix products spend their time reading and writing the head.
_LEAST_ROWS = 128
_DEFAULT_BYTES = 1 << 25


def chunk_rows(
    chunk_bytes: int | None, *, row_bytes: int, gradient_bytes: int, rows: int | None = None
) -> int:
    """The rows of a chunk, at least one.

    Args:
        chunk_bytes: The size of the logits of a chunk. None is 32 MiB, or an eighth of the head's gradient if
            that is more, since every chunk reads and writes the whole gradient. None also means at least 128
            rows.
        row_bytes: The size of the logits of one row.
        gradient_bytes: The size of the head's gradient in the dtype in which it is summed.
        rows: How many rows there are. If it is given, the rows are spread evenly over the chunks, for a loop
            whose chunks all have the same size.

    Returns:
        The number of rows.

    Example:
        >>> chunk_rows(1000, row_bytes=100, gradient_bytes=0)
        10
        >>> chunk_rows(1000, row_bytes=100, gradient_bytes=0, rows=12)
        6
    """
    row_bytes = max(1, row_bytes)
    if chunk_bytes is None:
        most = max(_LEAST_ROWS, max(_DEFAULT_BYTES, gradient_bytes // 8) // row_bytes)
    else:
        most = max(1, chunk_bytes // row_bytes)
    if rows is None:
        return most
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))
