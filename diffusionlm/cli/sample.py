"""The verb `sample`, over `diffusionlm.pretrained`."""

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from diffusionlm import untrusted
from diffusionlm.cli.output import load_model, print_json, working
from diffusionlm.console import write
from diffusionlm.errors import UserError, naming
from diffusionlm.options import SETTINGS, parse
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.storage import disk_path

if TYPE_CHECKING:
    from diffusionlm.pretrained.completion import Completion
    from diffusionlm.pretrained.model import LoadedModel

LONGEST_PROMPT = 64 << 20  # bytes of a prompt file


def sample(args: list[str], prog: str) -> int:
    """Generate text with a trained model: sample CHECKPOINT [--prompt TEXT] [--length N] [--json] [--html PAGE]."""
    return parse(_sample, args, prog)()


def _sample(
    checkpoint: str,
    /,
    prompt: str = "",
    prompt_file: str | None = None,
    infill: str | None = None,
    count: int = 1,
    raw: bool = False,
    special_tokens: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
    json: bool = False,
    trace: bool = False,
    html: str | None = None,
    agreement: bool = False,
) -> int:
    """Generate text with a trained model.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      prompt: the text to continue; empty: generate from nothing.
      prompt_file: a file whose text is the prompt, without a line break at its end; -: standard input.
      infill: instead of a prompt, a text with gaps to fill, "a{mask:8} b" for 8 tokens between a and b, or
        "a{mask:3-8} b" for 3 to 8; most tokenizers want no space before a gap.
      count: how many completions.
      raw: for a model that was fine-tuned on instructions: continue the prompt without its chat template.
      special_tokens: special tokens written in the prompt are tokens, and not text; with raw, or infill.
      sampling: the settings.
      json: print {"completions": [{"prompt", "text", "tokens", "nfe", "seconds", "mask_tokens"}], "config",
        "checkpoint", "passed_over"}, and with agreement {"agreement", "times"}; nfe: forward passes; mask_tokens:
        predicted masks; passed_over: newer, incomplete steps; with infill, the prompt has the gaps.
      trace: show the denoising in the terminal.
      html: also write the denoising to this file, as an animated web page.
      agreement: also generate uncached; report the share of equal new tokens, and how many times as fast the cache was.
    """
    _refuse_conflicts(prompt, prompt_file, infill, count, raw=raw, json=json, trace=trace, agreement=agreement)
    sampling.validate()
    if prompt_file is not None:
        prompt = _read_prompt(prompt_file)
    from diffusionlm.pretrained.completion import completions_json
    from diffusionlm.pretrained.webpage import check_page_path, save_page

    if html is not None:
        check_page_path(html)
    model = load_model(checkpoint)
    generate = functools.partial(model.generate, raw=raw) if infill is None else model.infill
    generate = functools.partial(generate, special_tokens=special_tokens)
    texts = [prompt if infill is None else infill] * count
    with working("compiling and generating"):
        completions = generate(texts, sampling, trace=trace or html is not None)
        uncached = dataclasses.replace(sampling, cache="none", refresh=0)
        comparison = _compare(completions, generate(texts, uncached)) if agreement else {}
    if html is not None:
        save_page(completions, model.reader, html, ends=model.config.eos_ids)
    if json:
        settings = model.sampling_config(sampling) if infill is None else model.infill_config(infill, sampling)
        print_json(completions_json(completions, settings) | comparison | model.location.to_json(), indent=None)
    else:
        _show(model, completions, trace, comparison)
    _warn_of_masks(completions)
    return 0


def _warn_of_masks(completions: Sequence["Completion"]) -> None:
    if masks := sum(completion.mask_tokens for completion in completions):
        write(
            f"{masks} of the tokens are the mask, which this model may predict and which is no text; "
            "import it with --suppress_mask yes to rule that out",
            error=True,
        )


def _refuse_conflicts(
    prompt: str,
    prompt_file: str | None,
    infill: str | None,
    count: int,
    *,
    raw: bool,
    json: bool,
    trace: bool,
    agreement: bool,
) -> None:
    """Raise `UserError` for options of `sample` that exclude each other, or that ask for nothing."""
    if count < 1:
        raise UserError(f"count={count} must be at least 1")
    if prompt and prompt_file is not None:
        raise UserError(f"prompt={prompt!r} and prompt_file={prompt_file!r} exclude each other; drop one")
    if infill is not None and (prompt or prompt_file is not None):
        raise UserError(f"infill={infill!r} excludes prompt and prompt_file; drop them")
    if json and trace:
        raise UserError("json and trace both print; drop one (html can be used with json)")
    if raw and infill is not None:
        raise UserError("raw is about prompts, and infill uses no chat template; drop one")
    if agreement and infill is not None:
        raise UserError("agreement compares what follows a prompt; drop it, or infill")


def _read_prompt(path: str) -> str:
    """Return the text of a file as it is, CRLF included, without a mark of its encoding and a line break at its end."""
    try:
        if path == "-":
            with naming("standard input"):
                data = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
            if len(data) > LONGEST_PROMPT:
                raise UserError(f"standard input has more than {LONGEST_PROMPT:,} bytes, the most of a prompt")
            text = untrusted.decoded(data, "standard input")
        else:
            text = untrusted.read_text(disk_path(path), LONGEST_PROMPT)
        return re.sub(r"\r?\n\Z", "", text.removeprefix("\ufeff"))
    except OSError as error:
        raise UserError(f"cannot read prompt_file={path!r}: {error.strerror or error}") from error


def _compare(completions: Sequence["Completion"], exact: Sequence["Completion"]) -> dict[str, float]:
    """Return the share of tokens that agree with the uncached loop, and how many times as fast the cache was."""
    from diffusionlm.pretrained.completion import token_agreement

    return {"agreement": token_agreement(completions, exact), "times": exact[0].seconds / completions[0].seconds}


def _show(
    model: "LoadedModel", completions: Sequence["Completion"], trace: bool, comparison: Mapping[str, float]
) -> None:
    """Print the completions, or how they were denoised, and the comparison with the uncached loop if there is one."""
    from diffusionlm.pretrained import terminal

    for i, completion in enumerate(completions, start=1):
        if len(completions) > 1:
            write(f"--- {i} of {len(completions)}", flush=True)
        if trace and completion.trace is not None:
            terminal.show(completion.trace, model.reader, ends=model.config.eos_ids, prompt=completion.before)
        else:
            write(completion.full_text)
    if comparison:
        share, times = comparison["agreement"], comparison["times"]
        write(f"{share:.1%} of the tokens agree with the uncached loop; {times:.2f} times as fast", error=True)
