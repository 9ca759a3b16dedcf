"""Documents to train tokenizers on, and texts that are hard to encode."""

DOCUMENTS = [
    f"def f{i}(x):\n    return x + {i}  # two  spaces\n\n\tThe tab, the  emoji 😀 and the word naïve number {i}.\n"
    for i in range(40)
]


TEXTS = [
    "",
    " ",
    "plain words",
    "  leading and trailing  ",
    "tabs\t\tand\n\nlines\r\nend\n",
    "emoji 😀👩‍👩‍👧 and flags 🇫🇷",
    "你好，世界。こんにちは",
    "e\u0301 is not é; ﬁ stays a ligature; ½ stays ½",
    "the whitespace mark \u2581 itself, \u2581\u2581twice",
    "nul \0 and controls \x1b\x7f, line separator \u2028",
    "<s> </s> <unk> <pad> <0x0A> [MASK]",
    "\ufeffbyte order mark",
]
