"""Measure the parts of a certificate as items of a session, so that an interrupted one goes on where it stopped."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.evaluation.certificate.checks import CHECKS
from diffusionlm.evaluation.certificate.figures import score_texts, settings_of
from diffusionlm.evaluation.certificate.method import LibraryMethod, Score
from diffusionlm.evaluation.certificate.reference import Reference
from diffusionlm.evaluation.certificate.subject import ROUNDING, Subject, repeated
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.likelihood.perplexity import rolling_windows
from diffusionlm.pretrained.model import LoadedModel

DOCUMENTS = 8  # scored at a time
# Draws and passes of the repeated estimates of a short target, whatever the user's: passes of few draws are skewed, and
# 95% intervals hold less than they say.
REPEATED = {"draws": 16, "passes": 8}


class Documents(NamedTuple):
    """Texts that have something to score.

    Attributes:
      texts: the texts.
      ids: their token ids, of which the first is given.
      n_bytes: bytes of the scored part of each.
      too_short: the number of texts that were left out, as they have no token after the first.
    """

    texts: list[str]
    ids: list[list[int]]
    n_bytes: list[int]
    too_short: int = 0

    @classmethod
    def of(cls, model: LoadedModel, texts: Sequence[str]) -> "Documents":
        """Encode texts, and leave out those without a second token."""
        ids, n_bytes = model.encode_documents(list(texts))
        kept = [i for i, document in enumerate(ids) if len(document) > 1]
        too_short = len(ids) - len(kept)
        return cls([texts[i] for i in kept], [ids[i] for i in kept], [n_bytes[i] for i in kept], too_short)

    @property
    def tokens(self) -> list[int]:
        """The number of scored tokens of each."""
        return [len(ids) - 1 for ids in self.ids]

    def first(self, count: int) -> "Documents":
        """Return the first texts."""
        return Documents(self.texts[:count], self.ids[:count], self.n_bytes[:count])


@dataclass(frozen=True)
class Measurements:
    """A model that is measured in a session.

    Attributes:
      session: keeps the records.
      model: the model, in the number format that is computed in.
      settings: draws, passes, seed and rows.
    """

    session: Session
    model: LoadedModel
    settings: LikelihoodConfig

    @property
    def rounding(self) -> float:
        """The nats a token by which correct computations may differ."""
        return ROUNDING[self.model.config.model.dtype]

    def scores(self, title: str, documents: Documents, *, compared: bool = True) -> list[Record]:
        """Return the records of `figures.score_texts`, with all estimates or the first one alone."""
        windows = [rolling_windows(ids, self.model.config.max_length) for ids in documents.ids]
        first = [0, *itertools.accumulate(map(len, windows))]
        settings = settings_of(self.model, self.settings)
        if not compared:
            settings = dict(list(settings.items())[:1])

        def compute(batch: list[int]) -> list[Record]:
            ids = [list(range(first[d], first[d + 1])) for d in batch]
            return score_texts(self.model, [windows[d] for d in batch], ids, settings)

        return self.session.evaluate(title, documents.texts, compute, DOCUMENTS)

    def left_to_right(self, documents: Documents) -> list[Record]:
        """Return the exact nats of each text from left to right, and the forward passes that they took."""
        settings = settings_of(self.model, self.settings)
        chain = LikelihoodConfig(estimator="chain_rule", rows=self.settings.rows)
        if "autoregressive" in settings:
            documents = documents.first(0)

        def compute(batch: list[int]) -> list[Record]:
            records = []
            for d in batch:
                windows = rolling_windows(documents.ids[d], self.model.config.max_length)
                with self.model.on_mesh():
                    results = estimate(self.model.params, self.model.config, windows, chain)
                nats = -sum(result.log_likelihood for result in results)
                records.append({"nats": nats, "forwards": sum(result.nfe for result in results)})
            return records

        return self.session.evaluate("score from left to right", documents.texts, compute, 1)

    def costs(self, samples: Sequence[Pair]) -> list[Record]:
        """Return the cross-entropies of short targets under every set of masks, and the passes that they took."""

        def compute(batch: list[int]) -> list[Record]:
            records = []
            for p in batch:
                reference = Reference(self.model)
                (cost,) = reference.costs([samples[p]])
                if not np.isfinite(cost).all():
                    raise UserError(f"the model gives no finite cost for {samples[p][1]}: its parameters are damaged")
                records.append({"costs": cost.tolist(), "forwards": reference.forwards})
            return records

        return self.session.evaluate("try every set of masks", [list(pair) for pair in samples], compute, 1)

    def estimates(self, samples: Sequence[Pair]) -> list[Record]:
        """Return the scores of `subject.repeated` in JSON types, and the passes that they took."""

        def compute(batch: list[int]) -> list[Record]:
            method = LibraryMethod(self.model, dataclasses.replace(self.settings, **REPEATED))
            scores = [dataclasses.asdict(score) for score in repeated(method, samples)]
            return [{"scores": scores, "forwards": method.forwards}]

        items = [] if self.model.config.autoregressive else [list(samples[0])]
        return self.session.evaluate("repeat the estimate of a short target", items, compute, 1)

    def checks(
        self, texts: Sequence[str], samples: Sequence[Pair], costs: Sequence[Record], estimates: Sequence[Record]
    ) -> list[Record]:
        """Return the finding of every check in JSON types, and "forwards".

        Args:
          texts: documents.
          samples: short targets.
          costs: what `costs` returns for these.
          estimates: what `estimates` returns for these.
        """
        names = list(CHECKS)
        arrays = [np.array(record["costs"]) for record in costs]
        scores = [Score(**score) for record in estimates for score in record["scores"]]

        def compute(batch: list[int]) -> list[Record]:
            records = []
            for name in (names[i] for i in batch):
                method, reference = LibraryMethod(self.model, self.settings), Reference(self.model)
                subject = Subject(self.model, method, reference, texts, samples, arrays, scores)
                record = CHECKS[name](subject).to_json(name)
                records.append(record | {"forwards": method.forwards + reference.forwards})
            return records

        return self.session.evaluate("check", [[name, *texts] for name in names], compute, 1)

    def own_dtype(self, samples: Sequence[Pair]) -> list[Record]:
        """Return the exact nats of short targets in the number format of the model itself, and the passes taken.

        There is no record if that is the one that is computed in anyway.
        """

        def compute(batch: list[int]) -> list[Record]:
            method = LibraryMethod(self.session.model, self.settings)
            scores = method.score(samples, exact=True)
            return [{"nats": sum(score.nats for score in scores), "forwards": method.forwards}]

        same = self.session.model.config.model.dtype == self.model.config.model.dtype
        items = [] if same else [list(map(list, samples))]
        return self.session.evaluate("score in the model's own format", items, compute, 1)
