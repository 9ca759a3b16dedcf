"""The task `generative`: what free samples of a model cost another model, and how much they repeat themselves."""

import math
from typing import Annotated

from diffusionlm.checkpoint import store
from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers
from diffusionlm.evaluation.diversity import distinct, ratio, self_bleu, unigram_entropy
from diffusionlm.evaluation.graders import words
from diffusionlm.evaluation.results import Metric, Result, mean
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole

MOST_SAMPLES = 1000  # of which each is compared with all others
NGRAMS = 4


def generative(
    session: Session,
    *,
    scorer: str,
    samples: int = 64,
    examples: int = 0,
    batch_size: int = 16,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(length=128),  # noqa: B008
) -> Result:
    """Sample from nothing, and score the texts by an autoregressive model and by their diversity.

    Read both together: repetition makes texts cheap, and noise makes them diverse. The metrics are, of the scorer,
    nats_per_token, perplexity (the generative perplexity) and bits_per_byte, all samples together; of the words and
    punctuation of the texts, unigram_entropy (nats, the mean over texts), distinct_1 to distinct_4 (the share of
    different n-grams among all) and self_bleu (the mean BLEU-4 of a text for all others); and counts: samples,
    empty_samples, which are scored by none of them, and tokens. Standard errors are those of other samples of the same
    model (of self_bleu, as if the texts that each is compared with stayed the same). Compare models at equal numbers of
    samples and equal lengths.

    Args:
      session: the model to evaluate.
      scorer: the checkpoint of an autoregressive model, which may have another tokenizer.
      samples: the number of texts.
      examples: the number of texts to show, the first ones.
      batch_size: texts at a time; the noise of a text does not depend on it.
      sampling: the settings.

    Raises:
      UserError: any of `answer`, no such checkpoint, a scorer that is not autoregressive or has no tokenizer, more than
        1000 samples, or none with text.
    """
    samples, examples = whole("samples", samples, 1), whole("examples", examples, 0, "not be negative")
    if samples > MOST_SAMPLES:
        raise UserError(f"samples={samples} must be at most {MOST_SAMPLES}: each is compared with all others")
    judge = _load_scorer(scorer)
    model, identity = session.model, store.params_sha256(judge.location.path)
    ids = model.encode("")
    prompts = [answers.Prompt(ids, [i, identity], i) for i in range(samples)]
    answers.fitting(model, prompts[:1], sampling.length)

    def grade(i: int, text: str) -> Record:
        documents, n_bytes = judge.encode_documents([text])
        if not text.strip() or len(documents[0]) < 2:
            return {"nats": 0.0, "tokens": 0, "bytes": 0}
        return {"nats": judge.perplexity([text]).nats, "tokens": len(documents[0]) - 1, "bytes": n_bytes[0]}

    records = answers.answer(session, "write samples", prompts, sampling, batch_size, grade)
    scored = [record for record in records if record["tokens"]]
    if not scored:
        raise UserError(f"none of the {samples} samples has text; there is nothing to score")
    counts = {
        "samples": Metric(samples),
        "empty_samples": Metric(samples - len(scored)),
        "tokens": Metric(sum(record["tokens"] for record in scored)),
    }
    config = {"scorer": scorer, "scorer_sha256": identity, "samples": samples, "batch_size": batch_size}
    shown = [{"sample": record["answer"]} | _costs(record) for record in records[:examples]]
    return answers.result(model, _figures(scored) | counts, records, config, sampling, shown)


def _load_scorer(path: str) -> LoadedModel:
    model = load(path)
    if not model.config.autoregressive:
        raise UserError(f"scorer={path!r} is a masked diffusion model; give an autoregressive one, which is exact")
    model.require_tokenizer()
    return model


def _costs(record: Record) -> Record:
    return {name: record[name] for name in ("nats", "tokens", "bytes")}


def _figures(records: list[Record]) -> dict[str, Metric]:
    """Return the figures of the samples that have text."""
    nats, tokens = [record["nats"] for record in records], [record["tokens"] for record in records]
    bits = [value / math.log(2) for value in nats]
    texts = [words(record["answer"]) for record in records]
    figures = {
        "nats_per_token": ratio(nats, tokens),
        "perplexity": ratio(nats, tokens, math.exp),
        "bits_per_byte": ratio(bits, [record["bytes"] for record in records]),
        "unigram_entropy": mean([unigram_entropy(text) for text in texts]),
    }
    figures |= {f"distinct_{n}": distinct(texts, n) for n in range(1, NGRAMS + 1)}
    if len(texts) > 1:
        figures["self_bleu"] = mean(self_bleu(texts))
    return figures
