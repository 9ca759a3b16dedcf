"""Checks of what must not matter: hidden tokens, padding, batch mates; and of what is no text."""

from collections.abc import Sequence

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.evaluation.certificate.method import Row
from diffusionlm.evaluation.certificate.subject import Subject
from diffusionlm.evaluation.certificate.verdicts import Finding, judge, not_applicable
from diffusionlm.likelihood.pairs import LENGTH_MULTIPLE, Pair

MASS = 1e-3  # the probability that all tokens that are no text may have: it costs as many nats a token


def no_leak(subject: Subject) -> Finding:
    """Change the token at each place that is predicted, and those after it: its prediction must stay."""
    if not subject.autoregressive:
        return not_applicable(
            "A mask stands at the place of every token that a masked diffusion model predicts; where scores saw the "
            "token nevertheless, sums_to_one would fail."
        )
    rows, changed, places = [], [], []
    for prefix, target in subject.samples:
        for i in range(len(target)):
            others = map(subject.other_token, target[i:])
            rows.append(Row(tuple(prefix), tuple(target), (False,) * len(target)))
            changed.append(rows[-1]._replace(target=(*target[:i], *others)))
            places.append(i)
    before, after = _predicted(subject, rows), _predicted(subject, changed)
    moved = [np.abs(np.exp(x[i]) - np.exp(y[i])).max() for x, y, i in zip(before, after, places, strict=True)]
    return judge(
        float(max(moved)),
        subject.rounding,
        f"The largest change of a probability at {len(places)} places whose own token and those after it were "
        "replaced by others; it may be a rounding error.",
    )


def padding(subject: Subject) -> Finding:
    """Pad sequences on the right, into another bucket of lengths: predictions must stay."""
    rows = [_hidden(subject, pair) for pair in subject.samples]
    length = max(len(row.prefix) + len(row.target) for row in rows)
    room = subject.model.config.max_length - length
    added = min(LENGTH_MULTIPLE, room)
    if added <= 0:
        return not_applicable("The context has no room for padding.")
    plain = _predicted(subject, rows)
    padded = _predicted(subject, [row._replace(padding=added) for row in rows])
    moved = [np.abs(np.exp(x) - np.exp(y)).max() for x, y in zip(plain, padded, strict=True)]
    return judge(
        float(max(moved)),
        subject.rounding,
        f"The largest change of a probability when {added} places of padding stand after {len(rows)} short sequences; "
        "it may be a rounding error.",
    )


def batch(subject: Subject) -> Finding:
    """Score short targets alone, and together with each other and a long one: scores must stay."""
    document = max((subject.model.encode(text) for text in subject.texts), key=len)[: subject.model.config.max_length]
    long: Pair = (document[:1], document[1 : 2 * LENGTH_MULTIPLE])
    ids = list(range(len(subject.samples)))
    alone = [subject.method.score([pair], ids=[i])[0] for i, pair in zip(ids, subject.samples, strict=True)]
    together = subject.method.score([long, *reversed(subject.samples)], ids=[len(ids), *reversed(ids)])[:0:-1]
    moved = [abs(x.nats - y.nats) / len(pair[1]) for x, y, pair in zip(alone, together, subject.samples, strict=True)]
    return judge(
        float(max(moved)),
        subject.rounding,
        f"The largest change in nats a token of {len(ids)} short targets when they are scored together with each other "
        f"and one of {len(long[1])} tokens, with the same noise; it may be a rounding error.",
    )


def mask_not_predicted(subject: Subject) -> Finding:
    """Add up the probability of all that is no text: the mask, suppressed ids, rows that pad the vocabulary."""
    cfg = subject.model.config
    refused = {cfg.mask_id, *cfg.suppressed_ids}
    text = np.array([i not in refused for i in range(cfg.model.vocab_size)])
    predictions = _predicted(subject, [_hidden(subject, pair) for pair in subject.samples])
    lost = [1 - np.exp(np.asarray(log_p, np.float64)[:, text]).sum(-1).min() for log_p in predictions]
    return judge(
        float(max(lost)),
        max(MASS, 10 * subject.rounding),
        "The largest probability that the mask and other ids that are no text have together at a place of a short "
        "target; they cost the text as many nats a token.",
    )


def mask_not_scored(subject: Subject) -> Finding:
    """Ask for the score of the mask's token as if it were text."""
    if (mask_id := subject.model.config.mask_id) is None:
        return not_applicable("An autoregressive model has no mask.")
    prefix, _ = subject.samples[0]
    explanation = "The probability that the token of masks is given as text; 0, or a refusal, is right."
    try:
        score = subject.method.score([(prefix, [mask_id])], exact=True)[0]
    except UserError:
        return judge(0.0, 0.0, explanation)
    return judge(float(np.exp(-score.nats)), 0.0, explanation)


def _hidden(subject: Subject, pair: Pair) -> Row:
    prefix, target = pair
    return Row(tuple(prefix), tuple(target), (not subject.autoregressive,) * len(target))


def _predicted(subject: Subject, rows: Sequence[Row]) -> list[np.ndarray]:
    """Return the predictions of rows, which the method is given by their shapes."""
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for r, row in enumerate(rows):
        shapes.setdefault((len(row.prefix), len(row.target), row.padding), []).append(r)
    results: dict[int, np.ndarray] = {}
    for members in shapes.values():
        predictions = subject.method.predict([rows[r] for r in members])
        results |= {r: prediction[: len(rows[r].target)] for r, prediction in zip(members, predictions, strict=True)}
    return [results[r] for r in range(len(rows))]
