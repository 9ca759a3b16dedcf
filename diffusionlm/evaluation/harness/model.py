"""The model class that lm-evaluation-harness sees. This module imports the harness; nothing else here does at once."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.evaluation.harness import decisions, scoring
from diffusionlm.evaluation.harness.options import ModelOptions, parse, refuse_foreign, sampling_of
from diffusionlm.evaluation.harness.requests import Dialogue, Document, Request, encode_dialogue
from diffusionlm.evaluation.harness.scoring import Answer, Prompt, Score
from diffusionlm.evaluation.session import Session
from diffusionlm.likelihood.monte_carlo import Estimate
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel

log = logging.getLogger(__name__)


class Estimated(float):
    """A log-likelihood that remembers its `Estimate`; to the harness it is a number."""

    estimate: Estimate

    def __new__(cls, value: float, estimate: Estimate | None = None) -> "Estimated":
        """Make a number with its estimate."""
        number = super().__new__(cls, value)
        number.estimate = estimate or Estimate(value, 0.0, 1, 0)
        return number


@register_model("diffusionlm")
class DiffusionLM(LM):
    """A model of this package for lm-evaluation-harness.

    Every score is a function of the model, the settings and the request's texts alone: batch size, padding, the other
    requests, `--limit` and caches do not change it.

    Args:
      pretrained: the path of a checkpoint, a loaded model, or the session of an evaluation.
      batch_size: prompts that are answered at a time. How many sequences the network sees at a time in likelihoods is
        `rows`.
      max_batch_size: of the harness; must be None.
      device: of the harness; must be None, the harness' own default, or the platform that JAX runs on.
      greedy_tasks: the tasks of which greedy decoding is compared with every continuation, with greedy=auto; None:
        those in which a document has one continuation.
      **arguments: see `diffusionlm.evaluation.harness.options.parse`.

    Raises:
      UserError: no such checkpoint, one without a tokenizer, or an argument without meaning.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel | Session,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        *,
        greedy_tasks: frozenset[str] | None = None,
        **arguments: Any,
    ):
        super().__init__()
        refuse_foreign(device, max_batch_size, jax.default_backend())
        self.options = parse({**arguments, "batch_size": batch_size})
        self.session = _session(pretrained, self.options)
        self.session.model.require_tokenizer()
        self.greedy_tasks = greedy_tasks
        self._scored: dict[tuple[str, str, int | None], list[Estimate]] = {}
        self.forwards, self.truncated = 0, 0

    @property
    def model(self) -> LoadedModel:
        """The loaded model."""
        return self.session.model

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[Estimated, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy decoding of its context gives it.

        Where greedy decoding was not asked for (`ModelOptions.greedy`), the second value is False.
        """
        unique = list({id(instance): instance for instance in requests}.values())  # repeats are the same object
        asked = [Request(_document(instance), *instance.args) for instance in unique]
        scores = scoring.score(self.session, self.options, asked, self._compares)
        self._count(asked, scores)
        results = {
            id(instance): (Estimated(score.estimate.log_likelihood, score.estimate), bool(score.greedy))
            for instance, score in zip(unique, scores, strict=True)
        }
        for instance in unique:
            self.cache_hook.add_partial("loglikelihood", instance.args, results[id(instance)])
        return [results[id(instance)] for instance in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Estimated]:
        """Return the log-likelihood of each text, of all its tokens (`encode_text` says what stands before them)."""
        asked = [Request(_document(instance), "", *instance.args) for instance in requests]
        scores = scoring.score_documents(self.session, self.options, asked)
        self._count(asked, scores)
        return [Estimated(score.estimate.log_likelihood, score.estimate) for score in scores]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, before the first of its `until` texts."""
        prompts, ends = [], []
        repeats: dict[int, int] = {}
        for instance in requests:
            context, gen_kwargs = instance.args
            sampling, until = sampling_of(self.options, gen_kwargs)
            repeat = repeats[id(instance)] = repeats.get(id(instance), -1) + 1
            prompts.append(Prompt(Request(_document(instance), context, ""), sampling, repeat))
            ends.append(until)
        answers = scoring.answer(self.session, self.options, prompts)
        self._count_answers(answers)
        texts = [cut(answer.text, until) for answer, until in zip(answers, ends, strict=True)]
        for instance, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Dialogue:
        """Return a dialogue in the model's chat template, with the token ids that the model will read.

        Args:
          chat_history: the messages.
          add_generation_prompt: False: the last message is the beginning of the answer.
        """
        return encode_dialogue(self.model, chat_history, answer_begins=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template as JSON, for the harness' records; None if it is not used.

        Raises:
          UserError: it is asked for, and the model has none; or another one is named, as a checkpoint has one alone.
        """
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise UserError(f"apply_chat_template={chat_template} names a template; a checkpoint has one: give no name")
        if self.model.template is None:
            raise UserError("apply_chat_template needs a chat template, and this model has none; leave it out")
        return json.dumps(self.model.template.to_dict(), sort_keys=True)

    @property
    def tokenizer_name(self) -> str:
        """A name that changes with the tokenizer and the template, for the harness' cache of requests."""
        sidecar = self.model.sidecar
        identity = json.dumps([sidecar.tokenizer, sidecar.template, sidecar.start_id], sort_keys=True)
        return f"diffusionlm-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self.model.config.max_length

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return next(iter(self.model.config.eos_ids), None)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into `config` of its results: checkpoint, settings, and Monte Carlo errors.

        For each task: `stderr_of_ll`, the root mean square of the standard errors of its log-likelihoods; of tasks with
        choices also `undecided`, of the sums that `acc` compares, and `mc_stderr_of_acc_at_most`, a bound of the error
        of `acc` that comes from the noise of the estimates. The command `diffusionlm evaluate CHECKPOINT lm_eval` knows
        the right answers and all accuracies, and gives the error itself.
        """
        counts = {"forwards": self.forwards, "truncated": self.truncated}
        noise = {task: _noise_of(documents) for task, documents in self._by_task().items()}
        checkpoint = self.session.checkpoint_json()
        return checkpoint | {"diffusionlm": self.options.to_json()} | counts | {"monte_carlo": noise}

    def estimates(self, task: str) -> list[list[Estimate]]:
        """Return the estimates of every document of a task, in the order of its requests."""
        return self._by_task().get(task, [])

    def _by_task(self) -> dict[str, list[list[Estimate]]]:
        tasks: dict[str, list[list[Estimate]]] = {}
        for (_, task, _), estimates in self._scored.items():
            tasks.setdefault(task, []).append(estimates)
        return tasks

    def _compares(self, request: Request, alone: bool) -> bool:
        if self.options.greedy != "auto":
            return self.options.greedy == "always"
        return alone if self.greedy_tasks is None else request.document.task in self.greedy_tasks

    def _count(self, requests: Sequence[Request], scores: Sequence[Score]) -> None:
        for request, score in zip(requests, scores, strict=True):
            document = request.document
            self._scored.setdefault(("score", document.task, document.number), []).append(score.estimate)
            self.forwards += score.estimate.nfe
        self._warn_truncated(sum(score.truncated for score in scores), len(scores))

    def _count_answers(self, answers: Sequence[Answer]) -> None:
        self.forwards += sum(answer.forwards for answer in answers)
        self._warn_truncated(sum(answer.truncated for answer in answers), len(answers))

    def _warn_truncated(self, truncated: int, n: int) -> None:
        self.truncated += truncated
        if truncated:
            log.warning("%d of %d contexts do not fit into the model, and lost tokens at their start", truncated, n)


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first place where one of the texts of `until` begins."""
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _session(pretrained: str | LoadedModel | Session, options: ModelOptions) -> Session:
    """Return a session with the model in the type and on the devices that the options ask for."""
    session = pretrained if isinstance(pretrained, Session) else None
    model = session.model if session else pretrained if isinstance(pretrained, LoadedModel) else None
    if model is None or not _suits(model, options):
        available = jax.local_devices()
        if options.devices > len(available):
            raise UserError(f"devices={options.devices}, and this machine has {len(available)}; give fewer")
        mesh = make_mesh(MeshConfig(), available[: options.devices])
        model = load(str(pretrained) if model is None else model.location.path, options.dtype, mesh)
    if session is None:
        return Session(model)
    session.model = model
    return session


def _suits(model: LoadedModel, options: ModelOptions) -> bool:
    """Return True if a model is as the options ask for; a single device is what nobody asked for."""
    return options.dtype in (None, model.config.model.dtype) and options.devices in (1, model.mesh.size)


def _document(instance: Instance) -> Document:
    return Document(str(instance.task_name), instance.doc_id)


def _noise_of(documents: Sequence[Sequence[Estimate]]) -> dict[str, float]:
    """Return the Monte Carlo errors of a task, as far as they do not depend on which answers are right."""
    squares = [estimate.stderr**2 for estimates in documents for estimate in estimates]
    noise = {"stderr_of_ll": math.sqrt(math.fsum(squares) / len(squares))}
    choices = [estimates for estimates in documents if len(estimates) > 1]
    if choices:
        bounds = [_most_variance(estimates) for estimates in choices]
        noise["undecided"] = sum(map(decisions.is_undecided, choices)) / len(choices)
        noise["mc_stderr_of_acc_at_most"] = math.sqrt(math.fsum(bounds)) / len(choices)
    return noise


def _most_variance(estimates: Sequence[Estimate]) -> float:
    """Return the largest variance that a document's accuracy can have, whichever choices are right."""
    win = float(decisions.win_probabilities(estimates).max())
    return win * (1 - win) if win > 0.5 else 0.25
