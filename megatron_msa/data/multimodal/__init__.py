"""Interleaved text, images and videos, read by Megatron-Energon from WebDataset shards.

    config    the `--multimodal-*` flags
    format    what a sample is, in a shard and in memory; writing shards
    images    picture files -> normalised patches at native resolution
    encode    a sample -> token ids with placeholders, and the patches that belong to them
    packing   several samples -> one training sequence, each a document
    stream    shards -> sequences: shuffled, split over data-parallel ranks, resumable (Energon)
    mixture   sequences of the stream and of text data, by weight -> microbatches
    loaders   what Megatron's training loop takes, and the state in its checkpoints
    visuals   the patches of a microbatch on every tensor-parallel rank

Only `stream` and the writer in `format` import Energon and webdataset, which are an optional extra.
"""
