"""A tokenizer whose ids are the UTF-8 bytes of the text, as an ordinary Hugging Face directory.

Megatron-core has a ByteLevelTokenizer class, but in 0.19.2 no `--tokenizer-type` reaches it (and its
end-of-document and padding ids are the bytes 0 and 1). A Hugging Face directory goes through Megatron's own
`--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR`, so preprocessing, training, generation and
conversion all read the same files.

Ids: 0-255 the byte itself, 256 end of document, 257 padding.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTE_EOD = 256
BYTE_PAD = 257
BYTE_VOCAB_SIZE = 258


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in the "byte level" alphabet of GPT-2; index =
    byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: chr(256 + order) for order, byte in enumerate(unprintable)}
    return [stand_ins.get(byte, chr(byte)) for byte in range(256)]


def write_byte_tokenizer(directory: str | Path) -> Path:
    """Write the byte tokenizer to `directory` unless a tokenizer is already there; returns the directory.

    The tokenizer is a byte-level BPE without merges, so that every byte stays its own token and decoding is
    exact.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        return directory
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[])
    )
    # Splitting into words first changes no id when there are no merges; it only costs time.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    directory.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(str(directory))
    return directory
