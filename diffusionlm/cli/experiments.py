"""The verb `experiments`, and how other verbs read the experiment that their first word names."""

import dataclasses
from typing import Any

from diffusionlm import config_file, config_io, fingerprint, flops
from diffusionlm.cli.output import PROGRAM, print_json, require_name, short_count, summary
from diffusionlm.config import Config
from diffusionlm.console import write
from diffusionlm.errors import UserError
from diffusionlm.options import parse
from diffusionlm.registry import PublishedData, sweeps
from diffusionlm.registry import experiments as registry


def list_experiments(args: list[str], prog: str) -> int:
    """List the experiments and sweeps, or show an experiment with its counts: experiments [NAME] [--json]."""
    return parse(_experiments, args, prog)()


def experiment_first(args: list[str], prog: str, usage: str) -> tuple[Config | None, list[str]]:
    """Return the experiment that the first word names, and the other words; print the help for `--help`.

    Fields of the file of `--config` replace those of the experiment, which the file may name instead; options, which
    are read later, replace them in turn.

    Args:
      args: the words of the command line after the verb.
      prog: how the verb is called.
      usage: the line that the help and an error show.

    Returns:
      The experiment and the remaining words, or None and no words after the help was printed.

    Raises:
      UserError: the first word names no experiment.
    """
    file = _config_file(args)
    if args and not args[0].startswith("-"):
        require_name(args[0], registry, usage)
        cfg = registry.get(args[0])
        return cfg if file is None else config_file.apply(file, cfg), args[1:]
    if args and args[0] in ("-h", "--help"):
        write(f"usage: {usage}\n\n`{prog} EXPERIMENT --help` lists all fields. Experiments:\n\n{_all_as_text()}")
        return None, []
    if file is not None:
        return config_file.apply(file), args
    raise UserError(f"name the experiment first; usage: {usage}; known: {', '.join(registry.names())}")


def _config_file(args: list[str]) -> str | None:
    """Return the value of `--config`, the last one; None if it is not there, or lacks its value."""
    file = None
    for word, following in zip(args, [*args[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or not following.startswith("--")):
            file = value if equals else following
    return file


def _experiments(name: str | None = None, /, json: bool = False) -> int:
    """List the experiments and sweeps, or show an experiment with its counts.

    Args:
      name: the experiment to show; None: list all.
      json: print JSON.
    """
    if name is None and json:
        listed = {"experiments": [_describe(each) for each in registry.names()]}
        print_json(
            listed | {"sweeps": [{"name": sweep, "description": _sweep_summary(sweep)} for sweep in sweeps.names()]}
        )
    elif name is None:
        write("`train demo` needs no data of yours; `experiments NAME` shows one of these:\n\n" + _all_as_text())
        write(f"\nSweeps (`sweep plan NAME` says what one costs):\n\n{_sweeps_as_text()}")
    elif name in sweeps.names() and name not in registry.names():
        raise UserError(f"{name!r} is a sweep; see `sweep plan {name}`")
    else:
        cfg, description = registry.get(name), _describe(name)
        if json:
            print_json(description | {"config": config_io.to_dict(cfg)})
        else:
            write(_as_text(description, cfg))
    return 0


def _describe(name: str) -> dict[str, Any]:
    """Return an experiment's description and its counts, in JSON types."""
    cfg = registry.get(name)
    sequences = cfg.run.steps * cfg.data.batch_size
    conventions = ("6nd", "model")
    published = registry.published_data(name)
    return {
        "name": name,
        "description": summary(registry.builder(name)),
        "objective": cfg.objective,
        "fingerprint": fingerprint.fingerprint(cfg),
        "parameters": dataclasses.asdict(flops.parameters(cfg.model)),
        "tokens": sequences * cfg.data.sequence_length,
        "flops": {c: sequences * flops.train(cfg.model, cfg.data.sequence_length, c) for c in conventions},
        "memory_bytes": dataclasses.asdict(flops.memory(cfg.model, cfg.optim)),
        "data": published and {"mixture": published.mixture, "commands": _data_commands(name, published)},
    }


def _data_commands(name: str, published: PublishedData) -> list[str]:
    """Return the commands that prepare the data that an experiment was published with, and train on them."""
    return [*published.commands, f"{PROGRAM} train {name} {published.options}"]


def _all_as_text() -> str:
    descriptions = [_describe(name) for name in registry.names()]
    width = max(len(item["name"]) for item in descriptions)
    return "\n".join(
        f"{item['name']:{width}}  {item['objective']}  {short_count(item['parameters']['total']):>6} parameters  "
        f"{short_count(item['tokens']):>6} tokens  {item['description']}"
        for item in descriptions
    )


def _published_as_text(data: dict[str, Any] | None) -> list[str]:
    if data is None:
        return []
    return [f"published with the data {data['mixture']}:", *(f"  {command}" for command in data["commands"])]


def _sweep_summary(name: str) -> str:
    return summary(sweeps.builder(name))


def _sweeps_as_text() -> str:
    width = max(map(len, sweeps.names()))
    return "\n".join(f"{name:{width}}  {_sweep_summary(name)}" for name in sweeps.names())


def _as_text(description: dict[str, Any], cfg: Config) -> str:
    parameters, flop_counts = description["parameters"], description["flops"]
    counts = {
        "objective": description["objective"],
        "fingerprint": description["fingerprint"],
        "parameters": f"{parameters['total']:,} ({parameters['non_embedding']:,} non-embedding)",
        "tokens": f"{description['tokens']:,}",
        "training FLOPs": f"{flop_counts['model']:.3e} ({flop_counts['6nd']:.3e} as 6ND)",
        "training state": f"{short_count(sum(description['memory_bytes'].values()))}B over all devices, "
        "and activations",
    }
    values = config_io.flat(cfg)
    width = max(map(len, values))
    return "\n".join(
        [
            f"{description['name']}: {description['description']}",
            *(f"  {name:{width}}  {value}" for name, value in counts.items()),
            *_published_as_text(description["data"]),
            "fields:",
            *(f"  {name:{width}}  {value!r}" for name, value in values.items()),
        ]
    )
