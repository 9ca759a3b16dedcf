"""The tokenizer of bytes."""

from diffusionlm.data import tokenizers


def test_byte_ids():
    tokenizer = tokenizers.load("byte")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    assert tokenizer.decode([0xC3]) == "\ufffd"
