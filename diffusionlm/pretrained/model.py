"""A loaded checkpoint that completes, fills in, scores and chooses texts; it needs nothing of training."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from diffusionlm.checkpoint import store
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import tokenizers
from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError, suggest
from diffusionlm.likelihood.choose import Choice, choose
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.greedy import is_greedy
from diffusionlm.likelihood.monte_carlo import Estimate, estimate
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.likelihood.perplexity import Perplexity, perplexity
from diffusionlm.model.spec import ModelSpec
from diffusionlm.pretrained import chat
from diffusionlm.pretrained.completion import Completion, Draft, MaskFree, row_trace
from diffusionlm.pretrained.drafts import completion_drafts, infill_drafts
from diffusionlm.pretrained.mask_notation import GappedText, split_at_gaps
from diffusionlm.sampling.canvas import Span, span_lengths
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, infill
from diffusionlm.tree_types import Params
from diffusionlm.untrusted import unencodable


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that is ready to generate.

    Prompts begin with what a document began with in training: the sidecar's `canvas["start_id"]`, or else EOS, which
    ends the document before. It counts towards the context. A model that was fine-tuned on instructions brings its chat
    template, in which `generate` writes prompts; everything else takes texts unchanged.
    """

    params: Params
    config: ModelSpec
    sidecar: Sidecar
    tokenizer: tokenizers.Tokenizer | None
    mesh: jax.sharding.Mesh  # the devices that the parameters lie on
    location: store.Location

    def __repr__(self) -> str:
        n = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"LoadedModel({str(self.location.path)!r}, {self.sidecar.objective}, {n:,} parameters)"

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        sampling: SamplingConfig | None = None,
        *,
        messages: Sequence[chat.MessageLike] | Sequence[Sequence[chat.MessageLike]] | None = None,
        trace: bool = False,
        raw: bool = False,
        special_tokens: bool = False,
        **settings: Any,
    ) -> list[Completion]:
        """Complete one or several texts as one batch; an empty text samples from nothing.

        Args:
          prompts: a text, or several.
          sampling: the settings; None: the defaults.
          messages: instead of prompts, a dialogue, or several, whose last message is answered (see `encode_messages`).
          trace: also record every state of the denoising.
          raw: continue the texts without a template, even if the model has a chat template.
          special_tokens: control tokens that are written in a text are their tokens, and not text; needs `raw`, because
            a chat template writes its own.
          **settings: fields of `SamplingConfig` that replace those of `sampling`, e.g. `length=100, temperature=0.8`.

        Returns:
          One completion per prompt, in order. The prompt of a dialogue is its last message.

        Raises:
          UserError: any of `diffusionlm.sampling.generate.generate`, an unknown setting, a checkpoint without a
            tokenizer, a text that the template has no place for, or arguments that exclude each other.
        """
        requests = self._encode_requests(prompts, messages, raw, special_tokens)
        resolved = self.sampling_config(sampling, **settings)
        with self.on_mesh():
            result = generate(self.params, self.config, [r.ids for r in requests], resolved, trace=trace)
        completions = []
        for r, (request, tokens) in enumerate(zip(requests, result.tokens.tolist(), strict=True)):
            completions.append(
                Completion(
                    request.text,
                    self.decode_after(request.ids, tokens),
                    tokens,
                    int(result.nfe[r]),
                    result.seconds,
                    row_trace(result.trace, r, len(tokens)),
                    templated=request.templated and self.template is not None and not self.template.bare,
                    mask_tokens=self._count_masks(tokens),
                )
            )
        return completions

    def stream(
        self,
        prompt: str = "",
        sampling: SamplingConfig | None = None,
        *,
        messages: Sequence[chat.MessageLike] | None = None,
        raw: bool = False,
        special_tokens: bool = False,
        pinned: Mapping[int, str] | None = None,
        **settings: Any,
    ) -> Iterator[Draft]:
        """Yield the states of one completion as they come; the last has the text that `generate` returns.

        Every step is a call to the device of its own, so this is for watching. The arguments are those of `generate`
        for one text or dialogue, without `trace`, and so are the errors. The new text has the texts of `pinned` at the
        positions that they name, in tokens from 0; their tokens count towards `length`.
        """
        requests = self._encode_requests(prompt, messages, raw, special_tokens)
        if len(requests) != 1:
            raise UserError(f"{len(requests)} texts or dialogues, and one can be watched at a time; use `generate`")
        return completion_drafts(self, requests[0], self.sampling_config(sampling, **settings), pinned or {})

    def stream_infill(
        self, text: str, sampling: SamplingConfig | None = None, *, special_tokens: bool = False, **settings: Any
    ) -> Iterator[Draft]:
        """Yield the states of one text whose gaps, which have one length each, are filled; else as `infill`."""
        gapped = self._encode_gaps(self._check_texts(text)[0], special_tokens)
        return infill_drafts(self, gapped, self._replaced(sampling, settings), self._decode_until_end)

    def infill(
        self,
        texts: str | Sequence[str],
        sampling: SamplingConfig | None = None,
        *,
        trace: bool = False,
        special_tokens: bool = False,
        **settings: Any,
    ) -> list[Completion]:
        """Fill the gaps of texts as one batch: `{mask:8}` stands for 8 tokens, `{mask:3-8}` for 3 to 8 of them.

        What was given stays as it is, in the tokens as in the text; only a tokenizer that cannot write some of it (one
        without bytes, or that composes accents) reads something else there. No end of text is drawn in a gap that text
        follows.

        Args:
          texts: a text, or several.
          sampling: the settings; None: the defaults. Their `length` is ignored.
          trace: also record every state of the denoising.
          special_tokens: control tokens that are written in a text are their tokens, and not text.
          **settings: fields of `SamplingConfig` that replace those of `sampling`.

        Returns:
          One completion per text, in order: its prompt is the text with gaps, its text and tokens are the whole row.

        Raises:
          UserError: any of `diffusionlm.sampling.generate.infill`, an unknown setting, or a text without a gap or
            with a malformed one.
        """
        texts = self._check_texts(texts)
        gapped = [self._encode_gaps(text, special_tokens) for text in texts]
        sampling = self._replaced(sampling, settings)
        with self.on_mesh():
            result = infill(self.params, self.config, [text.template for text in gapped], sampling, trace=trace)
        completions = []
        for r, (text, row, lengths) in enumerate(zip(texts, result.rows, result.span_lengths, strict=True)):
            filled, nfe = gapped[r].filled(row, lengths, self._decode_until_end), int(result.nfe[r])
            states, masks = row_trace(result.trace, r, len(row)), self._count_masks(row)
            completions.append(
                Completion(text, filled, row, nfe, result.seconds, states, infilled=True, mask_tokens=masks)
            )
        return completions

    def log_likelihood(
        self, pairs: Sequence[tuple[str, str]], settings: LikelihoodConfig | None = None
    ) -> list[Estimate]:
        """Estimate log p(continuation | context) of pairs of texts, in nats, with standard errors.

        The texts are split into tokens by `encode_pairs`.

        Raises:
          UserError: any of `diffusionlm.likelihood.monte_carlo.estimate`, or a checkpoint without a tokenizer.
        """
        with self.on_mesh():
            return estimate(self.params, self.config, self.encode_pairs(pairs), settings)

    def is_greedy(self, pairs: Sequence[tuple[str, str]], settings: LikelihoodConfig | None = None) -> list[bool]:
        """Tell for each (context, continuation) pair if greedy decoding of the context gives the continuation.

        Raises:
          UserError: any of `log_likelihood`.
        """
        with self.on_mesh():
            return is_greedy(self.params, self.config, self.encode_pairs(pairs), settings)

    def choose(
        self,
        context: str,
        answers: Sequence[str],
        settings: LikelihoodConfig | None = None,
        *,
        error_rate: float = 0.05,
    ) -> Choice:
        """Find the likeliest of several continuations of a context, by `diffusionlm.likelihood.choose.choose`.

        Raises:
          UserError: any of `log_likelihood`; answers whose encodings leave different contexts; fewer than two answers.
        """
        if isinstance(answers, str):
            raise UserError(f"answers={answers!r} must be a list of texts")
        pairs = self.encode_pairs([(context, answer) for answer in answers])
        prefixes = {tuple(prefix) for prefix, _ in pairs}
        if len(prefixes) > 1:
            raise UserError(f"the answers change how {context!r} is encoded; move its last word into the answers")
        prefix = list(prefixes.pop()) if prefixes else []
        ids = [answer for _, answer in pairs]
        with self.on_mesh():
            return choose(self.params, self.config, prefix, ids, settings, error_rate=error_rate)

    def perplexity(
        self, texts: str | Sequence[str], settings: LikelihoodConfig | None = None, *, stride: int | None = None
    ) -> Perplexity:
        """Score documents of any length; bits per byte are of their UTF-8 text.

        Args:
          texts: a document, or several.
          settings: the settings of the likelihoods of a masked diffusion model; None: the defaults.
          stride: tokens that a window scores at a time in documents longer than the context; None: half the context.

        Raises:
          UserError: any of `diffusionlm.likelihood.perplexity.perplexity`, or a checkpoint without a tokenizer.
        """
        documents, n_bytes = self.encode_documents(texts)
        with self.on_mesh():
            return perplexity(self.params, self.config, documents, settings, stride=stride, n_bytes=n_bytes)

    def encode_documents(self, texts: str | Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Return the ids of each document, the first of which is given, and the bytes of the text of the others.

        Without a start token the first token of the text is given. Its bytes do not count; they may be a part of a
        character.
        """
        texts = self._check_texts(texts)
        documents, n_bytes = [self.encode(text) for text in texts], [len(text.encode()) for text in texts]
        if self.encode(""):
            return documents, n_bytes
        for d, (text, ids) in enumerate(zip(texts, documents, strict=True)):
            n_bytes[d] -= int(self.token_bytes[ids[:1]].sum()) - self.added_bytes(text)
        return documents, n_bytes

    def added_bytes(self, text: str) -> int:
        """Return the bytes of the space that some tokenizers put before a text, and not inside of one."""
        encode = self.require_tokenizer().encode
        return int(self.token_bytes[encode(text)].sum() - self.token_bytes[encode(text, inside=True)].sum())

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """Return the ids of contexts and continuations, split as in the field's evaluation harness.

        White space at the end of a context counts as the start of its continuation, whose tokens are those by which the
        encoding of both together is longer than the context's.

        Raises:
          UserError: they are not pairs of texts, or the checkpoint carries no tokenizer.
        """
        if isinstance(pairs, str | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
        ):
            raise UserError(f"{pairs!r} must be a list of pairs, (context, continuation)")
        self._check_texts([text for pair in pairs for text in pair])
        encoded = []
        for context, continuation in pairs:
            prefix, whole = self.encode(context.rstrip()), self.encode(context + continuation)
            encoded.append((whole[: len(prefix)], whole[len(prefix) :]))
        return encoded

    def sampling_config(self, sampling: SamplingConfig | None = None, **settings: Any) -> SamplingConfig:
        """Return the settings that `generate` uses: with `settings` replaced, checked, and every default filled in."""
        return self._replaced(sampling, settings).resolve(autoregressive=self.config.autoregressive)

    def infill_config(
        self, texts: str | Sequence[str], sampling: SamplingConfig | None = None, **settings: Any
    ) -> SamplingConfig:
        """Return the settings that `infill` uses: `length` is the number of gap tokens of the text with the most."""
        templates = [self._encode_gaps(text).template for text in self._check_texts(texts)]
        gaps = [sum(span_lengths(r, template)[-1]) for r, template in enumerate(templates)]
        return self.sampling_config(sampling, **{**settings, "length": max(gaps, default=1)})

    def _replaced(self, sampling: SamplingConfig | None, settings: dict[str, Any]) -> SamplingConfig:
        known = [field.name for field in dataclasses.fields(SamplingConfig)]
        if unknown := sorted(set(settings) - set(known)):
            raise UserError(f"unknown sampling setting {unknown[0]!r}{suggest(unknown[0], known)}")
        return dataclasses.replace(sampling or SamplingConfig(), **settings)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the functions of `diffusionlm` find the mesh of the parameters."""
        return jax.set_mesh(self.mesh)

    def require_tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer, which texts need; raise `UserError` if the checkpoint carries none."""
        if self.tokenizer is None:
            raise UserError(
                "this checkpoint carries no tokenizer; import it again with --tokenizer FILE, or call "
                "diffusionlm.sampling.generate with token ids"
            )
        return self.tokenizer

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """The bytes of text that each id of the tokenizer stands for, int32 (vocab_size,), counted once."""
        return self.require_tokenizer().token_bytes()

    @property
    def reader(self) -> MaskFree:
        """The tokenizer for showing what was generated: a mask is no text."""
        return MaskFree(self.require_tokenizer(), self.config.mask_id)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Return the ids of a prompt, after the token that documents began with in training.

        Args:
          text: the prompt.
          special_tokens: control tokens that are written in it are their tokens, and not text. A text that begins with
            one is written in full: nothing is put before it.
        """
        tokenizer, start_id = self.require_tokenizer(), self.sidecar.start_id
        written = special_tokens and text.startswith(tokenizer.controls)
        start = [] if start_id is None or written else [start_id]
        return start + tokenizer.encode(text, special=special_tokens)

    @functools.cached_property
    def template(self) -> chat.AnyTemplate | None:
        """The chat template of a model that was fine-tuned on instructions; None: prompts are taken unchanged."""
        return chat.template_of(self.sidecar)

    @property
    def has_chat_template(self) -> bool:
        """Return True if dialogues are written in a form of their own; the template "none" leaves prompts unchanged."""
        return self.template is not None and not self.template.bare

    def encode_messages(self, messages: Sequence[chat.MessageLike]) -> list[int]:
        """Return the ids of a dialogue, to be followed by the answer to its last message.

        Args:
          messages: each a `Message`, or {"role": "system", "user" or "assistant", "content": a text}.

        Raises:
          UserError: the model has no template, or no place for these messages in it; one is malformed, or none is of
            a user.
        """
        return chat.encode_messages(self.template, messages, self.require_tokenizer())

    def _encode_requests(self, prompts: Any, messages: Any, raw: bool, special_tokens: bool) -> list[chat.Prompt]:
        chat.refuse_conflicts(prompts, messages, raw=raw, special_tokens=special_tokens, template=self.template)
        if messages is None:
            return [self._encode_prompt(text, raw, special_tokens) for text in self._check_texts(prompts)]
        return [self._encode_dialogue(dialogue) for dialogue in chat.dialogues(messages)]

    def _encode_prompt(self, text: str, raw: bool, special_tokens: bool) -> chat.Prompt:
        if self.template is None or raw or text == "":
            return chat.Prompt(text, self.encode(text, special_tokens=special_tokens), templated=False)
        return chat.Prompt(text, self.encode_messages([Message("user", text)]), templated=True)

    def _encode_dialogue(self, messages: Sequence[chat.MessageLike]) -> chat.Prompt:
        ids = self.encode_messages(messages)
        return chat.Prompt(chat.text_of(messages[-1]), ids, templated=True)

    def _count_masks(self, tokens: Sequence[int]) -> int:
        return sum(token == self.config.mask_id for token in tokens)

    def decode_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Return the text that `tokens` add to the prompt's, up to the first end of text."""
        return self._decode_until_end(tokens, inside=self.require_tokenizer().decode(prompt) != "")

    def _decode_until_end(self, tokens: Sequence[int], inside: bool) -> str:
        kept = itertools.takewhile(lambda token: token not in self.config.eos_ids, tokens)
        return self.reader.decode([*kept], inside=inside)

    def _check_texts(self, texts: object) -> list[str]:
        self.require_tokenizer()
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{texts!r} must be a text, or a list of texts")
        for i, text in enumerate(texts):
            if (reason := unencodable(text)) is not None:
                raise UserError(f"text {i} has {reason}; give text that UTF-8 can write")
        return list(texts)

    def _encode_gaps(self, text: str, special_tokens: bool = False) -> GappedText:
        first, *parts = split_at_gaps(text, self.config.max_length)
        assert isinstance(first, str)
        pieces: list[tuple[str, list[int]] | Span] = [(first, self.encode(first, special_tokens=special_tokens))]
        encode = functools.partial(self.require_tokenizer().encode, inside=True, special=special_tokens)
        return GappedText(pieces + [(part, encode(part)) if isinstance(part, str) else part for part in parts])
