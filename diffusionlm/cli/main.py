"""The `diffusionlm` command. Every verb is thin: what it does is a call that a notebook can make too.

A new verb is one function and one entry in `VERBS`. A user's mistake is one line on stderr and exit code 2.
"""

import dataclasses
import errno
import functools
import json as json_lib
import logging
import operator
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from diffusionlm import config_io, flops
from diffusionlm.cli import evaluate as cli_evaluate
from diffusionlm.cli import sweep as cli_sweep
from diffusionlm.cli import weights as cli_interop
from diffusionlm.config import Config
from diffusionlm.errors import UserError, suggest
from diffusionlm.options import SETTINGS, fields, parse, retyped
from diffusionlm.registry import experiments as registry
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.version import __version__

PROGRAM = "diffusionlm"
# What the file system refuses is the user's to mend: no space, no permission, a file where a directory should be.
FILE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def entry_point() -> None:
    """The console script: `main`, with the logging and warnings of a program rather than of a library."""
    logging.getLogger().addHandler(StderrHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of third parties, which a user cannot act on
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `diffusionlm experiments | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit code: 0, 2 for a user's mistake, 1 for a run that failed, 130 for Ctrl-C."""
    try:
        return _dispatch(list(argv))
    except UserError as error:
        return _fail(str(error), 2)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(list(VERBS)))
        return 0
    if argv == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return 0
    for words in (2, 1):
        verb = " ".join(argv[:words])
        if verb in VERBS:
            return VERBS[verb](argv[words:], f"{PROGRAM} {verb}")
    family = [verb for verb in VERBS if verb.startswith(f"{argv[0]} ")]
    if family and argv[1:2] in ([], ["-h"], ["--help"]):
        print(_help(family))
        return 0
    verb = " ".join(argv[: 2 if family else 1])
    raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}")


def _help(verbs: Sequence[str]) -> str:
    width = max(map(len, verbs))
    lines = [f"{verb:{width}}  {_summary(VERBS[verb])}" for verb in verbs]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [...] | --version",
            "",
            "Masked diffusion language models: prepare text, train, sample, evaluate, find scaling laws.",
            "",
            *lines,
            "",
            f"`{PROGRAM} VERB --help` lists everything that a verb takes.",
        ]
    )


def _summary(function: Callable) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def _fail(message: str, code: int) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class StderrHandler(logging.Handler):
    """Our own and JAX's warnings as one line each; of other libraries, errors only."""

    def emit(self, record: logging.LogRecord) -> None:
        ours = record.name.split(".")[0] in ("diffusionlm", "jax")
        if record.levelno >= (logging.WARNING if ours else logging.ERROR):
            print(f"{PROGRAM}: {record.levelname.lower()}: {' '.join(record.getMessage().split())}", file=sys.stderr)


def train(args: list[str], prog: str) -> int:
    """Train an experiment, or go on with a run: train EXPERIMENT [--workdir DIR] [--FIELD.SUBFIELD VALUE ...]."""
    cfg, rest = _experiment_first(args, prog, f"{prog} EXPERIMENT [--workdir DIR] [--FIELD.SUBFIELD VALUE ...]")
    if cfg is None:
        return 0

    def bind(config: Annotated[Config, *SETTINGS] = cfg, workdir: str | None = None) -> tuple[Config, str]:
        """Train this experiment, or go on with the run that is in the directory.

        Args:
          config: the experiment.
          workdir: the run directory; None: runs/NAME.
        """
        return config, workdir or f"runs/{config.name}"

    cfg, workdir = parse(bind, rest, f"{prog} {args[0]}")()
    return _train(cfg, workdir)


def _train(cfg: Config, workdir: str) -> int:
    import jax

    from diffusionlm.storage import run_path
    from diffusionlm.training.loop import DivergenceError
    from diffusionlm.training.loop import train as run_training

    before = (run_path(workdir) / "DONE.json").exists()
    try:
        run = run_training(cfg, workdir)
    except DivergenceError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if error.errno not in FILE_ERRORS or error.filename:
            raise
        raise UserError(f"cannot write to the run directory {workdir}: {error.strerror}") from error  # a full disk
    if jax.process_index():  # one voice is enough
        return 0
    if not run.done:
        print(f"stopped and saved at step {run.step} of {cfg.run.steps} in {run.workdir}; the same command goes on")
        return 0
    if cfg.run.showcase and not before and jax.process_count() == 1:  # no other process waits for it
        from diffusionlm.evaluation import showcase

        showcase.show(run)
    print(_result_text(run.result, before, run.workdir, cfg))
    return 0


def _result_text(result: dict[str, Any], before: bool, workdir: Any, cfg: Config) -> str:
    held_out = result["eval"]
    error = f" +/- {held_out['nelbo_stderr']:.3f}" if cfg.objective == "mdm" else ""
    return (
        f"{cfg.name} {'was done before' if before else 'is done'}: {result['step']} steps, "
        f"{_short(result['tokens'])} tokens; held out: {held_out['bits_per_byte']:.3f} bits per byte, "
        f"{held_out['nelbo_nats_per_token']:.3f}{error} nats per token\n"
        f"run directory: {workdir}; next: {PROGRAM} sample {workdir}"
    )


def compile_check(args: list[str], prog: str) -> int:
    """Compile a run for a TPU slice, without a TPU: compile EXPERIMENT --topology v5p-128 [--slices N] [--json]."""
    usage = f"{prog} EXPERIMENT --topology v5p-128 [--slices N] [--sampling] [--json] [--FIELD.SUBFIELD VALUE ...]"
    cfg, rest = _experiment_first(args, prog, usage)
    if cfg is None:
        return 0

    def run(
        topology: str,
        config: Annotated[Config, *SETTINGS] = cfg,
        slices: int = 1,
        sampling: bool = False,
        count: int = 8,
        settings: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
        json: bool = False,
    ) -> int:
        """Compile a training step of this experiment, or its sampler, for a TPU slice, on a machine without a TPU.

        Args:
          topology: a slice as Google Cloud names it: v4-N, v5p-N or tpu7x-N (N TensorCores, two a chip), v5e-N or v6e-N
            (N chips).
          config: the experiment.
          slices: how many such slices; mesh.data must be a multiple.
          sampling: the sampler instead of the training step.
          count: with sampling, texts at a time.
          settings: of the sampler.
          json: print the report as JSON.
        """
        return _compile(config, topology, slices, settings if sampling else None, count, json)

    return parse(run, rest, f"{prog} {cfg.name}")()


def _compile(cfg: Config, topology: str, slices: int, sampling: SamplingConfig | None, count: int, json: bool) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a TPU
    from diffusionlm.compile_check import compile as aot
    from diffusionlm.compile_check import table as aot_table

    report = aot.compile(cfg, topology, slices=slices, sampling=sampling, count=count)
    if json:
        print(json_lib.dumps(aot_table.to_json(report), indent=2))
    else:
        aot_table.show(report)
    return 0 if report.fits else 1


def _experiment_first(args: list[str], prog: str, usage: str) -> tuple[Config | None, list[str]]:
    """The experiment that the first word names, and the other words; None after it has printed the help."""
    if args and not args[0].startswith("-"):
        return registry.get(args[0]), args[1:]
    if args and args[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n`{prog} EXPERIMENT --help` lists all fields. Experiments:\n\n{_experiment_list()}")
        return None, []
    raise UserError(f"name the experiment first: {usage}; known: {', '.join(registry.names())}")


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
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
    json: bool = False,
    trace: bool = False,
    html: str | None = None,
    agreement: bool = False,
) -> int:
    """Generate text with a trained model.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      prompt: the text to go on from; empty: from nothing.
      prompt_file: a file whose text is the prompt, but for a line break at its end.
      infill: instead of a prompt, a text with gaps to fill, "a{mask:8} b" for 8 tokens between a and b, or
        "a{mask:3-8} b" for 3 to 8; most tokenizers want no space before a gap.
      count: how many completions.
      raw: of a model that was fine-tuned on instructions: go on from the prompt as it is, without its chat template.
      sampling: the settings.
      json: print {"completions": [{"prompt", "text", "tokens", "nfe", "seconds"}], "config"}, and with agreement
        {"agreement", "times"}; nfe: forward passes; with infill, the prompt is the text with gaps, and text and tokens
        are the whole.
      trace: show the denoising in the terminal.
      html: also write the denoising to this file, as an animated web page.
      agreement: also generate without the cache, and report the share of new tokens that are the same, and how many
        times as fast the cache was.
    """
    if prompt and prompt_file is not None:
        raise UserError(f"prompt={prompt!r} and prompt_file={prompt_file!r} exclude each other; drop one")
    if infill is not None and (prompt or prompt_file is not None):
        raise UserError(f"infill={infill!r} goes without prompt and prompt_file; drop the others")
    if json and trace:
        raise UserError("json and trace both print; drop one (html goes with json)")
    if raw and infill is not None:
        raise UserError("raw is about prompts, and infill takes texts as they are; drop one")
    if agreement and infill is not None:
        raise UserError("agreement compares what follows a prompt; drop it, or infill")
    if count < 1:
        raise UserError(f"count={count} must be at least 1")
    sampling.validate()
    if prompt_file is not None:
        prompt = _read_text(prompt_file).removesuffix("\n")
    from diffusionlm.pretrained import terminal as display
    from diffusionlm.pretrained.model import completions_json, load, same_tokens
    from diffusionlm.pretrained.webpage import check_path, save_html

    if html is not None:
        check_path(html)
    model = load(checkpoint)
    traced = trace or html is not None
    texts = [prompt if infill is None else infill] * count
    run = functools.partial(model.generate, raw=raw) if infill is None else model.infill
    completions = run(texts, sampling, trace=traced)
    report = {}
    if agreement:
        exact = run(texts, dataclasses.replace(sampling, cache="none", refresh=0))
        report = {"agreement": same_tokens(completions, exact), "times": exact[0].seconds / completions[0].seconds}
    if html is not None:
        save_html(completions, model.tokenizer, html)
    if json:
        used = model.sampling_config(sampling) if infill is None else model.infill_config(infill, sampling)
        print(json_lib.dumps(completions_json(completions, used) | report))
        return 0
    for i, completion in enumerate(completions, start=1):
        if count > 1:
            print(f"--- {i} of {count}", flush=True)
        if trace:
            display.show(completion.trace, model.tokenizer, prompt=completion.before)
        else:
            print(completion.full_text)
    if agreement:
        share, times = report["agreement"], report["times"]
        print(f"as the uncached loop: {share:.1%} of the tokens; {times:.2f} times as fast", file=sys.stderr)
    return 0


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt_file={path!r}: {error}") from error


def data_prepare(args: list[str], prog: str) -> int:
    """Turn text into a dataset: data prepare SOURCE --output DIR --sequence_length N --vocab_size V [...]."""
    from diffusionlm.data.prepare import prepare

    parse(retyped(prepare, positional=1, output=str, tokenizer=str), args, prog)()
    return 0


def data_inspect(args: list[str], prog: str) -> int:
    """Show what a dataset holds, its documents decoded: data inspect DIR [--count N] [--json]."""
    return parse(_inspect, args, prog)()


def _inspect(path: str, /, count: int = 3, split: str = "train", json: bool = False) -> int:
    """Show what a dataset holds, its documents decoded.

    Args:
      path: the directory that `data prepare` made.
      count: records to decode, spread evenly over the split.
      split: where they and the token statistics come from.
      json: print JSON.
    """
    from diffusionlm.data.inspect import describe, inspect

    if json:
        print(json_lib.dumps(describe(path, count, split), indent=2))
    else:
        inspect(path, count, split)
    return 0


def list_experiments(args: list[str], prog: str) -> int:
    """List the experiments, or show one with its counts: experiments [NAME] [--json]."""
    return parse(_experiments, args, prog)()


def _experiments(name: str | None = None, /, json: bool = False) -> int:
    """List the experiments, or show one with its counts.

    Args:
      name: of the one to show; None: list all.
      json: print JSON.
    """
    if name is None:
        found = [_described(known) for known in registry.names()]
        print(json_lib.dumps({"experiments": found}, indent=2) if json else _experiment_list())
        return 0
    cfg = registry.get(name)
    found = _described(name) | {"config": config_io.to_dict(cfg)}
    print(json_lib.dumps(found, indent=2) if json else _experiment_text(found, cfg))
    return 0


def _described(name: str) -> dict[str, Any]:
    """An experiment's description and its counts, in JSON types."""
    cfg = registry.get(name)
    tokens = cfg.run.steps * cfg.data.batch_size * cfg.data.sequence_length
    sequences = cfg.run.steps * cfg.data.batch_size
    conventions = ("6nd", "model")
    return {
        "name": name,
        "description": _summary(registry.builder(name)),
        "objective": cfg.objective,
        "fingerprint": config_io.fingerprint(cfg),
        "parameters": dataclasses.asdict(flops.parameters(cfg.model)),
        "tokens": tokens,
        "flops": {c: sequences * flops.train(cfg.model, cfg.data.sequence_length, c) for c in conventions},
        "memory_bytes": dataclasses.asdict(flops.memory(cfg.model, cfg.optim)),
    }


def _experiment_list() -> str:
    found = [_described(name) for name in registry.names()]
    width = max(len(one["name"]) for one in found)
    return "\n".join(
        f"{one['name']:{width}}  {one['objective']}  {_short(one['parameters']['total']):>6} parameters  "
        f"{_short(one['tokens']):>6} tokens  {one['description']}"
        for one in found
    )


def _experiment_text(found: dict[str, Any], cfg: Config) -> str:
    counts = {
        "objective": found["objective"],
        "fingerprint": found["fingerprint"],
        "parameters": f"{found['parameters']['total']:,} ({found['parameters']['non_embedding']:,} non-embedding)",
        "tokens": f"{found['tokens']:,}",
        "training FLOPs": f"{found['flops']['model']:.3e} ({found['flops']['6nd']:.3e} as 6ND)",
        "training state": f"{_short(sum(found['memory_bytes'].values()))}B over all devices, and activations",
    }
    values = {name: operator.attrgetter(name)(cfg) for name in fields(Config)}
    width = max(map(len, values))
    return "\n".join(
        [
            f"{found['name']}: {found['description']}",
            *(f"  {name:{width}}  {value}" for name, value in counts.items()),
            "fields:",
            *(f"  {name:{width}}  {value!r}" for name, value in values.items()),
        ]
    )


def _short(count: float) -> str:
    """A count in four characters or so: 950, 1.1M, 15B."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


VERBS: dict[str, Callable[[list[str], str], int]] = {
    "train": train,
    "sample": sample,
    "evaluate": cli_evaluate.evaluate,
    "import": cli_interop.import_weights,
    "export": cli_interop.export_weights,
    "compile": compile_check,
    "data prepare": data_prepare,
    "data inspect": data_inspect,
    "experiments": list_experiments,
    "sweep plan": cli_sweep.plan,
    "sweep run": cli_sweep.run,
    "sweep status": cli_sweep.status,
    "sweep report": cli_sweep.report,
}
