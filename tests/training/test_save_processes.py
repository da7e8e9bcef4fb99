"""The state that is written in the background is that of the step that saved it."""

import torch

from megatron_msa.training.save_processes import _staged


def test_what_is_staged_does_not_follow_the_training_process() -> None:
    live = torch.zeros(4)

    def preload_tensors(buckets: list, non_blocking: bool) -> list:
        assert not non_blocking
        return buckets

    (bucket,) = _staged(
        preload_tensors, [("file", "key", ([b"bytes"], [("item", live)]))], non_blocking=False
    )
    live += 1  # the next step
    name, key, (data, ((item, written),)) = bucket
    assert (name, key, data, item) == ("file", "key", [b"bytes"], "item")
    assert written.tolist() == [0.0] * 4
