"""The loss of a model that ignores context: the baseline that a language model must beat.

With counts of the training data and add-one smoothing, p(v) = (count(v) + 1) / (tokens + vocabulary); the
loss is the mean of -log p(token) over the validation tokens, in nats per token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 1 << 24  # tokens converted to 64-bit indices at a time: 128 MiB, whatever the dataset's size


def token_counts(token_ids: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs.

    Args:
        token_ids: integers of any shape; a memory map is read in chunks.
        vocab_size: length of the result.

    Returns:
        int64 [vocab_size].

    Raises:
        TypeError: the ids are not integers.
        ValueError: an id outside [0, vocab_size).
    """
    ids = np.asarray(token_ids).reshape(-1)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"token ids are {ids.dtype}; integers are needed")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, ids.size, _CHUNK):
        chunk = ids[start : start + _CHUNK]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token ids span {low} to {high}; allowed: 0 to {vocab_size - 1}")
        counts += np.bincount(chunk.astype(np.int64, copy=False), minlength=vocab_size)
    return counts


def unigram_cross_entropy(train_counts: ArrayLike, valid_counts: ArrayLike) -> float:
    """Cross entropy of the training data's unigram model on the validation data, in nats per token.

    Args:
        train_counts: occurrences per vocabulary entry in the training data, [vocabulary].
        valid_counts: the same of the validation data.

    Raises:
        ValueError: different vocabularies, or no validation tokens.
    """
    train, valid = np.asarray(train_counts, dtype=np.float64), np.asarray(valid_counts, dtype=np.float64)
    if train.shape != valid.shape or train.ndim != 1:
        raise ValueError(f"counts must be vectors over one vocabulary, got {train.shape} and {valid.shape}")
    if not valid.sum() > 0:
        raise ValueError("the validation data holds no tokens")
    # Add-one smoothing: a token that the training data lacks must not make the loss infinite.
    log_probability = np.log(train + 1.0) - np.log(train.sum() + train.size)
    return float(-(valid * log_probability).sum() / valid.sum())
