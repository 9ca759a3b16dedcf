"""Checks of what is counted: the tokens and bytes that nats are divided by, and which tokens are scored."""

from diffusionlm.evaluation.certificate.subject import Subject
from diffusionlm.evaluation.certificate.verdicts import Finding, judge


def round_trip(subject: Subject) -> Finding:
    """Decode the encoded texts: what a tokenizer changes is not paid for."""
    tokenizer = subject.model.require_tokenizer()
    lossy = [i for i, text in enumerate(subject.texts) if tokenizer.decode(tokenizer.encode(text)) != text]
    explanation = f"The share of {len(subject.texts)} texts that do not come back from their tokens"
    if lossy:
        text, i = subject.texts[lossy[0]], 0
        back = tokenizer.decode(tokenizer.encode(text))
        while i < min(len(text), len(back)) and text[i] == back[i]:
            i += 1
        explanation += (
            f", text {lossy[0]} first: {text[i : i + 12]!r} comes back as {back[i : i + 12]!r}. Several texts "
            "then share the tokens that are scored, so their nats are too few for any one of them"
        )
    return judge(len(lossy) / len(subject.texts), 0.0, f"{explanation}.")


def bytes_counted(subject: Subject) -> Finding:
    """Compare the bytes that nats are divided by with the UTF-8 length of the scored text."""
    counts, tokenizer = subject.method.count(subject.texts), subject.model.require_tokenizer()
    given = not subject.model.encode("")  # without a start token, the first token is given
    true = [
        len(text.encode()) - (len(tokenizer.decode(tokenizer.encode(text)[:1]).encode()) if given else 0)
        for text in subject.texts
    ]
    return judge(
        float(max(abs(count.n_bytes - n) for count, n in zip(counts, true, strict=True))),
        0.0,
        "The largest error in the bytes of a text: they are those of its UTF-8 encoding"
        f"{', without its first token, which is given' if given else ''}.",
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
    """Score the first token behind what is given, alone: it must cost what it costs."""
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
    """Compare the tokens that nats are divided by with those that are scored."""
    counts = subject.method.count(subject.texts)
    lengths = [len(subject.model.encode(text)) for text in subject.texts]
    return judge(
        float(max(abs(count.tokens - (length - 1)) for count, length in zip(counts, lengths, strict=True))),
        0.0,
        "The largest error in the number of scored tokens of a text: all but the first, masked or not.",
    )


def eos_padding(subject: Subject) -> Finding:
    """Score short targets beside longer ones: no token of padding, EOS or other, may be scored."""
    document = max((subject.model.encode(text) for text in subject.texts), key=len)
    long = (document[:1], document[1 : min(subject.model.config.max_length, 2 * len(document))])
    scores = subject.method.score([*subject.samples, long], exact=True)
    lengths = [len(target) for _, target in (*subject.samples, long)]
    return judge(
        float(max(abs(score.tokens - n) for score, n in zip(scores, lengths, strict=True))),
        0.0,
        "The largest error in the number of tokens of a target that was scored beside others: no EOS or padding behind "
        "it is one.",
    )
