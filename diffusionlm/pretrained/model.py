"""From a checkpoint to completions of text: parameters, sidecar and tokenizer, and nothing of training."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from diffusionlm import config, config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data.chat_templates import ROLES, Message, Template
from diffusionlm.data.tokenizers import kinds as tokenizers
from diffusionlm.errors import UserError, suggest
from diffusionlm.likelihood.greedy import is_greedy
from diffusionlm.likelihood.monte_carlo import Choice, Estimate, LikelihoodConfig, choose, estimate
from diffusionlm.likelihood.perplexity import Perplexity, perplexity
from diffusionlm.model import conversion as adaptation
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.sampling.canvas import Span, candidates
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, infill
from diffusionlm.sampling.loop import Trace

DTYPES = ("float32", "bfloat16")
_GAP = re.compile(r"\{mask:([0-9]{1,9})(?:-([0-9]{1,9}))?\}")
# What somebody who writes it means as a gap, so that a slip of the pen is not taken for text.
_LIKE_A_GAP = re.compile(r"\{\s*mask\b[^{}]{0,20}\}?", re.IGNORECASE)


@dataclass(frozen=True)
class Completion:
    """One prompt's result, or that of one text with gaps.

    Attributes:
      prompt: as given.
      text: the new text, up to the end-of-text token if there is one; of a text with gaps, all of it, gaps filled.
      tokens: all new ids, also those after the end of the text; of a text with gaps, all ids of its row.
      nfe: forward passes that this row needed.
      seconds: wall time of the batch it was generated in, without compilation.
      trace: the states of `tokens` as arrays (frames, length), if asked for.
      infilled: whether the prompt is a text with gaps.
      templated: whether the model's chat template wrote something around the prompt, so that the text answers it.
    """

    prompt: str
    text: str
    tokens: list[int]
    nfe: int
    seconds: float
    trace: Trace | None = None
    infilled: bool = False
    templated: bool = False

    @property
    def before(self) -> str:
        """What stands before the new text; an answer is set off from its question."""
        return "" if self.infilled else self.prompt + "\n\n" * self.templated

    @property
    def full_text(self) -> str:
        """The prompt with what was generated after it or in its gaps."""
        return self.before + self.text


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that is ready to generate.

    Prompts begin with what a document began with in training: the sidecar's `canvas["start_id"]`, or else EOS, which
    ends the document before. It counts towards the context. A model that was fine-tuned on instructions brings its chat
    template, in which `generate` writes prompts; everything else takes texts as they are.
    """

    params: Any
    config: ModelSpec
    sidecar: checkpoint.Sidecar
    tokenizer: tokenizers.Tokenizer | None
    mesh: jax.sharding.Mesh  # what the parameters lie on

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        sampling: SamplingConfig | None = None,
        *,
        trace: bool = False,
        raw: bool = False,
        **settings: Any,
    ) -> list[Completion]:
        """Completes one or several texts as one batch; an empty text samples from nothing.

        Args:
          prompts: a text, or several.
          sampling: the settings; None: the defaults.
          trace: also record every state of the denoising.
          raw: go on from the texts as they are, also where the model has a chat template.
          **settings: fields of `SamplingConfig` that replace those of `sampling`, e.g. `length=100, temperature=0.8`.

        Returns:
          One completion per prompt, in order.

        Raises:
          UserError: as of `diffusionlm.sampling.generate`, an unknown setting, a checkpoint without a tokenizer, or a
            text that the template has no place for.
        """
        texts = self._texts(prompts)
        asked = [self.template is not None and not raw and text != "" for text in texts]
        encoded = [
            self.encode_messages([Message("user", text)]) if asks else self.encode(text)
            for text, asks in zip(texts, asked, strict=True)
        ]
        with self.on_mesh():
            result = generate(
                self.params, self.config, encoded, self.sampling_config(sampling, **settings), trace=trace
            )
        completions = []
        for r, (text, prompt, tokens) in enumerate(zip(texts, encoded, result.tokens.tolist(), strict=True)):
            own = _row_of(result.trace, r, len(tokens)) if trace else None
            new_text = self.decode_after(prompt, tokens)
            templated = asked[r] and not self.template.bare
            completions.append(
                Completion(text, new_text, tokens, int(result.nfe[r]), result.seconds, own, templated=templated)
            )
        return completions

    def infill(
        self,
        texts: str | Sequence[str],
        sampling: SamplingConfig | None = None,
        *,
        trace: bool = False,
        **settings: Any,
    ) -> list[Completion]:
        """Fills the gaps of texts as one batch: `{mask:8}` stands for 8 tokens, `{mask:3-8}` for 3 to 8 of them.

        Args:
          texts: a text, or several.
          sampling: the settings; None: the defaults. Their `length` counts for nothing.
          trace: also record every state of the denoising.
          **settings: fields of `SamplingConfig` that replace those of `sampling`.

        Returns:
          One completion per text, in order: its prompt is the text with gaps, its text and tokens are the whole row.

        Raises:
          UserError: as of `diffusionlm.sampling.generate.infill`, an unknown setting, or a text without a gap or with
            a malformed one.
        """
        texts = self._texts(texts)
        gapped = [self._gapped(text) for text in texts]
        sampling = self._replaced(sampling, settings)
        with self.on_mesh():
            result = infill(self.params, self.config, gapped, sampling, trace=trace)
        first = len(self.encode(""))
        completions = []
        for r, (text, row) in enumerate(zip(texts, result.rows, strict=True)):
            own = _row_of(result.trace, r, len(row)) if trace else None
            filled, nfe = self.tokenizer.decode(row[first:]), int(result.nfe[r])
            completions.append(Completion(text, filled, row, nfe, result.seconds, own, infilled=True))
        return completions

    def log_likelihood(
        self,
        pairs: Sequence[tuple[str, str]],
        settings: LikelihoodConfig | None = None,
    ) -> list[Estimate]:
        """log p(continuation | context) of pairs of texts, in nats, with standard errors.

        The continuation's tokens are those by which the encoding of both together is longer than the context's; spaces
        at the end of a context count as the start of its continuation, as in the field's evaluation harness.

        Raises:
          UserError: as of `diffusionlm.likelihood.monte_carlo.estimate`, or a checkpoint without a tokenizer.
        """
        with self.on_mesh():
            return estimate(self.params, self.config, self._pairs(pairs), settings or LikelihoodConfig())

    def is_greedy(self, pairs: Sequence[tuple[str, str]], settings: LikelihoodConfig | None = None) -> list[bool]:
        """Whether greedy decoding of each context gives its continuation; pairs and errors as of `log_likelihood`."""
        with self.on_mesh():
            return is_greedy(self.params, self.config, self._pairs(pairs), settings)

    def choose(
        self,
        context: str,
        answers: Sequence[str],
        settings: LikelihoodConfig | None = None,
        *,
        error_rate: float = 0.05,
    ) -> Choice:
        """The likeliest of several continuations of a context, by `diffusionlm.likelihood.monte_carlo.choose`.

        Raises:
          UserError: as of `log_likelihood`; answers whose encodings leave different contexts; fewer than two answers.
        """
        if isinstance(answers, str):
            raise UserError(f"answers={answers!r} must be a list of texts")
        pairs = self._pairs([(context, answer) for answer in answers])
        prefixes = {tuple(prefix) for prefix, _ in pairs}
        if len(prefixes) > 1:
            raise UserError(f"the answers change how {context!r} is encoded; move its last word into the answers")
        prefix = list(prefixes.pop()) if prefixes else []
        with self.on_mesh():
            return choose(
                self.params,
                self.config,
                prefix,
                [answer for _, answer in pairs],
                settings or LikelihoodConfig(),
                error_rate=error_rate,
            )

    def perplexity(
        self, texts: str | Sequence[str], settings: LikelihoodConfig | None = None, *, stride: int | None = None
    ) -> Perplexity:
        """What documents cost, of any length; bits per byte are of their UTF-8 text.

        Args:
          texts: a document, or several.
          settings: of the likelihoods of a masked diffusion model.
          stride: tokens that a window scores at a time in documents longer than the context; None: half the context.

        Raises:
          UserError: as of `diffusionlm.likelihood.perplexity.perplexity`, or a checkpoint without a tokenizer.
        """
        texts = self._texts(texts)
        documents, n_bytes = [self.encode(text) for text in texts], [len(text.encode()) for text in texts]
        if not self.encode(""):  # without a start token the first one is given, and its bytes are not scored
            given = [len(self.tokenizer.decode(ids[:1]).encode()) for ids in documents]
            n_bytes = [n - first for n, first in zip(n_bytes, given, strict=True)]
        with self.on_mesh():
            return perplexity(self.params, self.config, documents, settings, stride=stride, n_bytes=n_bytes)

    def sampling_config(self, sampling: SamplingConfig | None = None, **settings: Any) -> SamplingConfig:
        """The settings as `generate` uses them: with `settings` replaced, checked, and every default filled in."""
        return self._replaced(sampling, settings).resolve(autoregressive=self.config.autoregressive)

    def infill_config(
        self, texts: str | Sequence[str], sampling: SamplingConfig | None = None, **settings: Any
    ) -> SamplingConfig:
        """The settings as `infill` uses them: `length` is the number of gap tokens of the text with the most."""
        longest = [candidates(r, self._gapped(text))[-1] for r, text in enumerate(self._texts(texts))]
        gaps = [template.count(None) for template in longest]
        return self.sampling_config(sampling, **{**settings, "length": max(gaps, default=1)})

    def _replaced(self, sampling: SamplingConfig | None, settings: dict[str, Any]) -> SamplingConfig:
        known = [field.name for field in dataclasses.fields(SamplingConfig)]
        if unknown := sorted(set(settings) - set(known)):
            raise UserError(f"unknown sampling setting {unknown[0]!r}{suggest(unknown[0], known)}")
        return dataclasses.replace(sampling or SamplingConfig(), **settings)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The context in which the functions of `diffusionlm` find the mesh of the parameters."""
        return jax.set_mesh(self.mesh)

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Pairs of ids of contexts and continuations."""
        if isinstance(pairs, str | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
        ):
            raise UserError(f"{pairs!r} must be a list of pairs, (context, continuation)")
        self._texts([text for pair in pairs for text in pair])
        encoded = []
        for context, continuation in pairs:
            bare = context.rstrip(" ")
            continuation = context[len(bare) :] + continuation
            prefix, whole = self.encode(bare), self.encode(bare + continuation)
            encoded.append((whole[: len(prefix)], whole[len(prefix) :]))
        return encoded

    def require_tokenizer(self) -> None:
        """Raises `UserError` where the checkpoint carries no tokenizer, which texts need."""
        if self.tokenizer is None:
            raise UserError(
                "this checkpoint carries no tokenizer; import it again with --tokenizer FILE, or call "
                "diffusionlm.sampling.generate with token ids"
            )

    def _texts(self, texts: Any) -> list[str]:
        self.require_tokenizer()
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{texts!r} must be a text, or a list of texts")
        return list(texts)

    def _gapped(self, text: str) -> list[int | None | Span]:
        """The tokens of a text, and None for those of its gaps."""
        most = self.config.max_length
        template: list[int | None | Span] = []
        done = 0
        for found in _LIKE_A_GAP.finditer(text):
            gap = _GAP.match(text, found.start())
            least, longest = (int(gap[1]), int(gap[2] or gap[1])) if gap else (0, 0)
            if not 1 <= least <= longest <= most:
                raise UserError(
                    f"{found[0]!r} is not a gap; write {{mask:N}} without spaces, for N tokens, or {{mask:N-M}} for N "
                    f"to M, from 1 to {most}"
                )
            before = text[done : found.start()]
            template += self.tokenizer.encode(before) if done else self.encode(before)
            template += [None] * least if least == longest else [Span(least, longest)]
            done = gap.end()
        if not done:
            raise UserError(f"{text!r} has no gap; write {{mask:8}} where 8 tokens are wanted")
        return template + self.tokenizer.encode(text[done:])

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with what documents began with in training."""
        start_id = self.sidecar.start_id
        return ([] if start_id is None else [start_id]) + self.tokenizer.encode(text)

    @functools.cached_property
    def template(self) -> Template | None:
        """How a model that was fine-tuned on instructions wants its prompts; None: as they are."""
        return Template.from_dict(self.sidecar.template) if self.sidecar.template else None

    def encode_messages(self, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
        """The ids of a dialogue, to be followed by the answer to its last message.

        Args:
          messages: each a `Message`, or {"role": "system", "user" or "assistant", "content": a text}.

        Raises:
          UserError: the model has no template, or no place for these messages in it; one is malformed, or none is of
            a user.
        """
        if self.template is None:
            raise UserError("this model has no chat template; it goes on from texts (`generate`)")
        try:
            return self.template.prompt_ids([_message(i, one) for i, one in enumerate(messages)], self.tokenizer)
        except ValueError as error:
            raise UserError(f"this model's prompts cannot be written: {error}") from error

    def decode_after(self, prompt: list[int], tokens: list[int]) -> str:
        """The text that `tokens` add to the prompt's, up to EOS: of a text on its own, decoders may drop a space."""
        if self.sidecar.eos_id in tokens:
            tokens = tokens[: tokens.index(self.sidecar.eos_id)]
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(tokens)


def load(path: epath.PathLike, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> LoadedModel:
    """Loads a checkpoint for sampling; the optimizer's files are not opened.

    Args:
      path: a run directory (its newest step), a step directory, or a params-only model.
      dtype: "float32" or "bfloat16", of the parameters and the computation; None: what the model computes in.
      mesh: devices to split the model over (`diffusionlm.parallel.mesh.make_mesh`); None: one device.

    Raises:
      UserError: no checkpoint there, one that this version does not understand, or an unknown dtype.
    """
    sidecar = checkpoint.load_sidecar(path)
    model_cfg = dataclasses.replace(config_io.from_dict(config.ModelConfig, sidecar.model), lora_rank=0)
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}")
        model_cfg = dataclasses.replace(model_cfg, dtype=dtype)
    spec = ModelSpec(
        model=model_cfg,
        diffusion=config_io.from_dict(config.DiffusionConfig, sidecar.diffusion),
        mask_id=None if sidecar.objective == "arm" else sidecar.mask_id,
        suppressed_ids=tuple(sidecar.suppressed_ids),
        shifted=sidecar.alignment == "shifted" or sidecar.objective == "arm",
        max_length=sidecar.canvas.get("max_length", model_cfg.max_length),
        eos_ids=() if sidecar.eos_id is None else (sidecar.eos_id,),
    )
    if mesh is None:  # attention's kernels are chosen by the devices of a mesh, so there is always one
        mesh = make_mesh(config.MeshConfig(), jax.local_devices()[:1])
    saved = config_io.from_dict(config.ModelConfig, sidecar.model)
    shapes = abstract_params(saved, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    params = checkpoint.load_params(path, dtype=jnp.dtype(model_cfg.dtype), shardings=shardings, expected=shapes)
    if saved.lora_rank:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model_cfg, mesh))
        params = adaptation.convert(saved, model_cfg, params, {}, shardings)
    tokenizer = tokenizers.from_dict(sidecar.tokenizer) if sidecar.tokenizer else None
    return LoadedModel(params, spec, sidecar, tokenizer, mesh)


def _message(i: int, given: Any) -> Message:
    """A message in one of its forms; `ValueError` for anything else."""
    fields = dict(given) if isinstance(given, Mapping) else given._asdict() if isinstance(given, Message) else {}
    if set(fields) != set(Message._fields):
        raise ValueError(f"messages[{i}]={given!r} is no Message, and no {{'role': ..., 'content': ...}}")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} of messages[{i}] is {type(value).__name__}, not a text")
    if fields["role"] not in ROLES:
        raise ValueError(f"role {fields['role']!r} of messages[{i}] is none of {', '.join(ROLES)}")
    return Message(**fields)


def _row_of(trace: Trace, r: int, length: int) -> Trace:
    """The states of one row, up to the last that differs from the one before."""
    own = Trace(*(states[:, r, :length] for states in trace))
    changed = (own.tokens[1:] != own.tokens[:-1]).any(-1) | (own.masked[1:] != own.masked[:-1]).any(-1)
    return Trace(*(states[: int(changed.nonzero()[0].max(initial=-1)) + 2] for states in own))


def same_tokens(some: Sequence[Completion], others: Sequence[Completion]) -> float:
    """The share of tokens that two lists of completions of the same texts have in common, place by place."""
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def completions_json(completions: Sequence[Completion], sampling: SamplingConfig) -> dict:
    """What `diffusionlm sample --json` prints: {"completions": [...], "config": the settings}, as plain JSON types."""
    keys = ("prompt", "text", "tokens", "nfe", "seconds")
    return {
        "completions": [{key: getattr(completion, key) for key in keys} for completion in completions],
        "config": dataclasses.asdict(sampling),
    }
