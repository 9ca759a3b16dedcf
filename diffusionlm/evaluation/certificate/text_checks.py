"""Checks of what is counted: the tokens and bytes that nats are divided by, and which tokens are scored."""

import os

from diffusionlm.evaluation.certificate.subject import Subject
from diffusionlm.evaluation.certificate.verdicts import Finding, judge, not_applicable

# The share of bytes that a tokenizer may change. If it changes 1 of 1,000, the figures lack at most 0.008 bits a byte
# for what these were, 8 bits each, and 0.011 for where they are, the entropy of such a share.
LOST = 1e-3
SAME, NEAR = 4, 64  # characters, see `_changed_bytes`


def round_trip(subject: Subject) -> Finding:
    """Decode the encoded texts: what a tokenizer changes is not paid for."""
    tokenizer = subject.model.require_tokenizer()
    backs = [tokenizer.decode(tokenizer.encode(text)) for text in subject.texts]
    lost = sum(_changed_bytes(text, back) for text, back in zip(subject.texts, backs, strict=True))
    n_bytes = sum(len(text.encode()) for text in subject.texts)
    lossy = [i for i, (text, back) in enumerate(zip(subject.texts, backs, strict=True)) if text != back]
    explanation = (
        f"The share of the bytes of {len(subject.texts)} texts that the tokenizer changes; {len(lossy)} of them do not "
        "come back from their tokens as they were"
    )
    if lossy:
        text, back = subject.texts[lossy[0]], backs[lossy[0]]
        i = len(os.path.commonprefix([text, back]))
        explanation += (
            f", text {lossy[0]} first: {text[i : i + 12]!r} comes back as {back[i : i + 12]!r}. Several texts share "
            "such tokens, so the nats are too few for any one of them. Bytes are those of the original texts"
        )
    return judge(
        lost / n_bytes,
        LOST,
        f"{explanation}. The share that is allowed hides at most 0.02 bits a byte: what the bytes were, and where.",
    )


def _changed_bytes(text: str, back: str) -> int:
    """Return the bytes of the parts in which a text differs from what came back, of the longer side of each.

    A part ends where the next `SAME` characters are equal again; after one of more than `NEAR` all counts as changed.
    """
    i = j = lost = 0
    while i < len(text) or j < len(back):
        if text[i : i + 1] == back[j : j + 1]:
            i, j = i + 1, j + 1
            continue
        ends = ((a, length - a) for length in range(1, NEAR + 1) for a in range(length + 1))
        a, b = next(
            ((a, b) for a, b in ends if text[i + a : i + a + SAME] == back[j + b : j + b + SAME]),
            (len(text) - i, len(back) - j),
        )
        lost += max(len(text[i : i + a].encode()), len(back[j : j + b].encode()))
        i, j = i + a, j + b
    return lost


def bytes_counted(subject: Subject) -> Finding:
    """Compare the bytes that nats are divided by with those of the scored text.

    The library's own count is this one; the check is for other methods and other programs.
    """
    counts, tokenizer = subject.method.count(subject.texts), subject.model.require_tokenizer()
    if subject.model.encode(""):
        errors = [abs(count.n_bytes - len(text.encode())) for count, text in zip(counts, subject.texts, strict=True)]
        return judge(
            float(max(errors)), 0.0, "The largest error in the bytes of a text: they are those of its UTF-8 encoding."
        )
    # The first token is given. It may end inside a character, so that its text alone does not say how long it is.
    sizes, errors = tokenizer.token_bytes(), []
    for count, text in zip(counts, subject.texts, strict=True):
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) == text:
            errors.append(abs(count.n_bytes - int(sizes[ids[1:]].sum())))
    if not errors:
        return not_applicable("No text comes back from its tokens, so nothing says which bytes its first token has.")
    return judge(
        float(max(errors)),
        0.0,
        f"The largest error in the bytes of {len(errors)} texts: they are those of all tokens but the first, which is "
        "given.",
    )


def token_bytes(subject: Subject) -> Finding:
    """Compare the bytes that the tokenizer gives each token with the bytes of whole texts."""
    tokenizer = subject.model.require_tokenizer()
    sizes = tokenizer.token_bytes()
    leading = int(sizes[tokenizer.encode("a")].sum()) - 1  # a space that the tokenizer puts before every text
    errors = []
    for text in subject.texts:
        ids = tokenizer.encode(text)
        if (back := tokenizer.decode(ids)) == text:
            errors.append(abs(int(sizes[ids].sum()) - leading - len(back.encode())))
    return judge(
        float(max(errors, default=0)),
        0.0,
        f"The largest error in the sum of the tokens' bytes, over {len(errors)} texts that come back from their tokens"
        f"{f'; {leading} byte is a space that the tokenizer puts before each' if leading else ''}.",
    )


def first_token(subject: Subject) -> Finding:
    """Score the first token after what is given, alone: it must cost what it costs."""
    document = max((subject.model.encode(text) for text in subject.texts), key=len)
    pair = (document[:1], document[1:2])
    (score,) = subject.method.score([pair], exact=True)
    exact = float(subject.reference.costs([pair])[0].sum())
    start = subject.model.encode("")
    given = f"The token {start[0]}, which begins every document," if start else "The first token of a document"
    return judge(
        exact - score.nats,
        subject.noise([score]),
        f"{given} is given and not scored; the value is what the next token lacks of its {exact:.3f} nats.",
    )


def tokens_counted(subject: Subject) -> Finding:
    """Compare the tokens that nats are divided by with those that stand for text."""
    counts, tokenizer = subject.method.count(subject.texts), subject.model.require_tokenizer()
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *subject.model.config.eos_ids}
    scored = [subject.model.encode(text)[1:] for text in subject.texts]
    true = [sum(token not in control for token in ids) for ids in scored]
    return judge(
        float(max(abs(count.tokens - n) for count, n in zip(counts, true, strict=True))),
        0.0,
        "The largest error in the number of scored tokens of a text: the first one is given, and of the others those "
        "count that stand for text, so that no beginning, end or padding is among them.",
    )
