"""Score the requests of the harness on a model: in batches, with records that are taken up again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers
from diffusionlm.evaluation.harness.options import ModelOptions
from diffusionlm.evaluation.harness.requests import Encoded, Request, encode, encode_prompt, encode_text, key_of
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.likelihood.choose import decide
from diffusionlm.likelihood.confidence import confidences
from diffusionlm.likelihood.greedy import is_greedy, most_passes
from diffusionlm.likelihood.monte_carlo import Estimate, Scorer, estimate
from diffusionlm.likelihood.pairs import check_pairs
from diffusionlm.likelihood.perplexity import perplexity, rolling_windows
from diffusionlm.sampling.config import SamplingConfig

REQUESTS = 64  # scored at a time, so that those of one shape share a batch, and records are written now and then


class Score(NamedTuple):
    """The score of a request.

    Attributes:
      estimate: of its log-likelihood; a confidence counts as exact.
      greedy: whether greedy decoding gives the continuation; None where it was not asked for.
      truncated: whether the context lost tokens at its start.
    """

    estimate: Estimate
    greedy: bool | None
    truncated: bool

    def to_json(self) -> Record:
        """Return the score as a record."""
        ll, stderr, passes, nfe = vars(self.estimate).values()
        record = {"log_likelihood": ll, "stderr": stderr, "passes": passes, "forwards": nfe}
        return record | {"greedy": self.greedy, "truncated": self.truncated}

    @classmethod
    def from_json(cls, record: Record) -> "Score":
        """Read a record."""
        values = [record[name] for name in ("log_likelihood", "stderr", "passes", "forwards")]
        return cls(Estimate(*values), record["greedy"], record["truncated"])


def score(
    session: Session, options: ModelOptions, requests: Sequence[Request], greedy: Callable[[Request, bool], bool]
) -> list[Score]:
    """Score continuations after their contexts.

    Args:
      session: the model, and the records.
      options: the settings.
      requests: those of one document beside each other, in the order of its choices.
      greedy: tells for a request, and whether it is its document's only one, if greedy decoding is compared with it.

    Raises:
      UserError: a request that the model cannot score, or a setting that does not suit it.
    """
    encoded = [_checked(session, options, request) for request in requests]
    documents = _documents(requests)
    alone = {members[0] for members in documents if len(members) == 1}
    compared = {r for r, request in enumerate(requests) if greedy(request, r in alone)}
    contests = (
        [m for m in documents if len(m) > 1 and all(requests[r].context for r in m)] if options.sequential else []
    )
    single = sorted(set(range(len(requests))) - {r for members in contests for r in members})
    scores: dict[int, Score] = {}

    def finish(members: list[int], estimates: Sequence[Estimate]) -> list[Record]:
        matches = _matches(session, options, encoded, [r for r in members if r in compared])
        records = [
            Score(e, matches.get(r), encoded[r].truncated).to_json() for r, e in zip(members, estimates, strict=True)
        ]
        for r, record in zip(members, records, strict=True):
            target = encoded[r].pair[1]
            passes = most_passes(session.model.config, target, options.likelihood) if r in compared else 0
            record["forwards"] += passes
        return records

    def score_single(batch: list[int]) -> list[Record]:
        members = [single[i] for i in batch]
        return finish(members, _estimates(session, options, encoded, requests, members))

    def score_choices(batch: list[int]) -> list[Record]:
        return [
            {"choices": finish(contests[i], _contest(session, options, encoded, requests, contests[i]))} for i in batch
        ]

    lengths = [len(pair[0]) + len(pair[1]) for pair, _ in encoded]
    order = sorted(range(len(single)), key=lambda i: lengths[single[i]])  # similar lengths share a program
    items = [requests[r].to_json() for r in single]
    records = session.evaluate(_title("score", requests), items, score_single, REQUESTS, order)
    for r, record in zip(single, records, strict=True):
        scores[r] = Score.from_json(record)
    order = sorted(range(len(contests)), key=lambda i: max(lengths[r] for r in contests[i]))
    items = [[requests[r].to_json() for r in members] for members in contests]
    records = session.evaluate(_title("choose", requests), items, score_choices, 1, order)
    for members, record in zip(contests, records, strict=True):
        scores |= dict(zip(members, map(Score.from_json, record["choices"]), strict=True))
    return [scores[r] for r in range(len(requests))]


def _title(verb: str, requests: Sequence[Request]) -> str:
    """Return what is done and for which tasks, for the progress."""
    return f"{verb} {', '.join(dict.fromkeys(request.document.task for request in requests))}"


def score_documents(session: Session, options: ModelOptions, requests: Sequence[Request]) -> list[Score]:
    """Score all tokens of whole texts, each in windows where it is longer than the context; their contexts are empty.

    Raises:
      UserError: a text that the model cannot score, or a setting that does not suit it.
    """
    model, settings = session.model, options.likelihood
    if options.scoring == "confidence":
        raise UserError("scoring=confidence scores choices; leave it out for perplexities")
    documents, given = [], 0
    for request in requests:
        try:
            ids, given = encode_text(model, request.continuation)
        except UserError as error:
            raise UserError(f"{request.document}: {error}") from error
        documents.append(ids)
    windows = [len(rolling_windows(ids, model.config.max_length, given=given)) for ids in documents]

    def compute(batch: list[int]) -> list[Record]:
        keys = [key_of("rolling", requests[d].continuation, w) for d in batch for w in range(windows[d])]
        some = [documents[d] for d in batch]
        with model.on_mesh():
            scores = perplexity(model.params, model.config, some, settings, given=given, request_ids=keys)
        return [Score(document, None, False).to_json() for document in scores.documents]

    items = [request.to_json() for request in requests]
    order = sorted(range(len(items)), key=lambda d: len(documents[d]))
    records = session.evaluate(_title("score texts of", requests), items, compute, REQUESTS, order)
    return [Score.from_json(record) for record in records]


class Prompt(NamedTuple):
    """A context to continue."""

    request: Request  # its continuation is empty
    sampling: SamplingConfig
    repeat: int  # the number of the answer among those to this request

    def to_json(self) -> list:
        """Return what identifies the prompt among the records of an evaluation."""
        return [*self.request.to_json()[:3], self.repeat, vars(self.sampling)]


class Answer(NamedTuple):
    """The text that a model wrote after a prompt."""

    text: str
    forwards: int
    truncated: bool


def answer(session: Session, options: ModelOptions, prompts: Sequence[Prompt]) -> list[Answer]:
    """Continue prompts, up to the end of the text.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.generate`, or no room for a prompt.
    """
    model = session.model
    encoded = [encode_prompt(model, prompt.request.context, prompt.sampling.length) for prompt in prompts]
    groups: dict[SamplingConfig, list[int]] = {}
    for p, prompt in enumerate(prompts):
        groups.setdefault(prompt.sampling, []).append(p)
    title, results = _title("answer", [prompt.request for prompt in prompts]), dict[int, Answer]()
    for sampling, members in groups.items():
        asked = [answers.Prompt(encoded[p].pair[0], prompts[p].to_json(), _key_of_prompt(prompts[p])) for p in members]
        records = answers.answer(session, title, asked, sampling, options.batch_size)
        for p, record in zip(members, records, strict=True):
            results[p] = Answer(record["answer"], record["forwards"], encoded[p].truncated)
    return [results[p] for p in range(len(prompts))]


def _key_of_prompt(prompt: Prompt) -> int:
    return key_of("generate", prompt.request.context, prompt.sampling.length, prompt.repeat)


def _checked(session: Session, options: ModelOptions, request: Request) -> Encoded:
    """Return the ids of a request that the model can score; the message of a refusal names its document."""
    encoded = encode(session.model, request)
    try:
        check_pairs(session.model.config, [encoded.pair], options.likelihood)
    except UserError as error:
        raise UserError(f"{request.document}: {error}") from error
    return encoded


def _documents(requests: Sequence[Request]) -> list[list[int]]:
    """Return the indices of the requests of each document."""
    documents: dict[object, list[int]] = {}
    for r, request in enumerate(requests):
        documents.setdefault(request.document, []).append(r)
    return list(documents.values())


def _keys(requests: Sequence[Request], members: Sequence[int]) -> list[int]:
    return [key_of("score", requests[r].context, requests[r].continuation) for r in members]


def _estimates(
    session: Session,
    options: ModelOptions,
    encoded: Sequence[Encoded],
    requests: Sequence[Request],
    members: Sequence[int],
) -> list[Estimate]:
    model, settings = session.model, options.likelihood
    pairs = [encoded[r].pair for r in members]
    with model.on_mesh():
        if options.scoring == "confidence":
            passes = 2 if settings.guidance else 1
            return [Estimate(c, 0.0, 1, passes) for c in confidences(model.params, model.config, pairs, settings)]
        return estimate(model.params, model.config, pairs, settings, request_ids=_keys(requests, members))


def _contest(
    session: Session,
    options: ModelOptions,
    encoded: Sequence[Encoded],
    requests: Sequence[Request],
    members: Sequence[int],
) -> list[Estimate]:
    """Return the estimates of a document's choices, which stop once the best is clear, also per character."""
    model = session.model
    pairs = [encoded[r].pair for r in members]
    lengths = [max(1, len(requests[r].continuation.strip())) for r in members]
    scales = [[1.0] * len(members)]
    if len(set(lengths)) > 1:
        scales.append([1.0 / length for length in lengths])
    with model.on_mesh():
        scorer = Scorer(model.params, model.config, pairs, options.likelihood, _keys(requests, members))
        decide(scorer, options.likelihood, scales)
        return scorer.estimates()


def _matches(
    session: Session, options: ModelOptions, encoded: Sequence[Encoded], members: Sequence[int]
) -> dict[int, bool]:
    """Return for each request if greedy decoding gives its continuation."""
    if not members:
        return {}
    model = session.model
    with model.on_mesh():
        pairs = [encoded[r].pair for r in members]
        matches = is_greedy(model.params, model.config, pairs, options.likelihood)
    return dict(zip(members, matches, strict=True))
