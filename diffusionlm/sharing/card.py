"""Model cards: what a checkpoint is, how it was trained, how well it does and what was not tried, from its files.

Nothing in a card is written by hand. The facts come from the sidecar; of a run directory, also from config.json,
environment.json, metrics.jsonl and DONE.json; and from files that `evaluate --output FILE` wrote.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from diffusionlm import config_io, flops, hub, schema, templates
from diffusionlm.checkpoint import store
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import Config, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.evaluation import report
from diffusionlm.evaluation.report import Evaluation
from diffusionlm.storage import read_json_lines
from diffusionlm.training import outcome
from diffusionlm.training.run_directory import recorded_config
from diffusionlm.untrusted import printable
from diffusionlm.version import __version__

LIBRARY = "diffusionlm"
_SHOWN = ("jax", "flax")  # of the packages
_HELD_OUT = "eval_nelbo_nats_per_token"


class _Environment(schema.Record, frozen=True, forbid_unknown_fields=False):
    """The fields of environment.json that a card shows."""

    diffusionlm: str = ""
    git: str | None = None
    packages: dict[str, str] = {}
    devices: str = ""


def model_card(
    checkpoint: epath.PathLike,
    *,
    name: str | None = None,
    evaluations: Sequence[epath.PathLike] = (),
    license: str | None = None,
) -> str:
    """Return the text of a model card, Markdown with the front matter that the Hugging Face Hub reads.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      name: the model's name, and its address where it has one (OWNER/NAME); None: that of its experiment.
      evaluations: results of this checkpoint that `evaluate --output FILE` wrote.
      license: an identifier of the Hub, such as apache-2.0; None: the card names none.

    Raises:
      UserError: no checkpoint there, a damaged file, or a result of other parameters.
    """
    path = store.locate(checkpoint).path
    sidecar = store.load_sidecar(path)
    results = _results(path, evaluations)
    address = _address(name)  # an experiment's name is no address, though it may look like one
    name = name or str(sidecar.source.get("experiment") or "model")
    facts = {
        "name": _inline(name),
        "address": address,
        "sidecar": sidecar,
        "is_mdm": sidecar.objective == "mdm",
        "instructed": sidecar.template is not None,
        "model": _model_table(sidecar),
        "training": _training_table(path, sidecar),
        "held_out": _held_out(path, sidecar),
        "results": [_result_table(result) for result in results],
        "trainer": _value(sidecar.source, "diffusionlm"),
        "family": _value(sidecar.source, "family"),
        "version": __version__,
    }
    environment = templates.environment("diffusionlm.sharing", autoescape=False)
    environment.filters["inline"] = _inline
    body = environment.get_template("model_card.md.j2").render(facts)
    return f"---\n{_front_matter(name, sidecar, results, license)}---\n\n{body}"


def source_step(sidecar: Sidecar) -> int:
    """Return the step that a checkpoint says it is of; 0 if it says none, or no number."""
    step = sidecar.source.get("step")
    return step if isinstance(step, int) else 0


def _address(name: str | None) -> str:
    """Return the address of a model with such a name on the Hub, or a placeholder for its directory."""
    try:
        return f"{hub.SCHEME}{hub.require_repository(name or '')}"
    except UserError:
        return "DIRECTORY"


def _front_matter(name: str, sidecar: Sidecar, results: Sequence[Evaluation], license: str | None) -> str:
    kind = "masked-diffusion" if sidecar.objective == "mdm" else "autoregressive"
    values: dict[str, Any] = {"license": license} if license else {}
    values |= {
        "library_name": LIBRARY,
        "pipeline_tag": "text-generation",
        "tags": [kind, "language-model", "jax", "flax"],
    }
    if results:
        listed = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": _dataset(result), "type": "custom"},
                "metrics": [
                    {"type": metric, "name": metric, "value": figure.value}
                    for metric, figure in result.file.metrics.items()
                    if figure.value is not None
                ],
            }
            for result in results
        ]
        values["model-index"] = [{"name": name, "results": listed}]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _results(path: epath.Path, evaluations: Sequence[epath.PathLike]) -> list[Evaluation]:
    """Return the results of files, which must be of these parameters."""
    results = report.read(evaluations) if evaluations else []
    digest = store.params_sha256(path) if results else ""
    for result in results:
        if result.file.params_sha256 != digest:
            raise UserError(
                f"{result.name} is a result of {printable(result.file.checkpoint)}, whose parameters are not those of "
                f"{path}; evaluate this checkpoint with --output FILE"
            )
    return results


def _model_table(sidecar: Sidecar) -> dict[str, str]:
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    counts = flops.parameters(cfg)
    kind = "masked diffusion" if sidecar.objective == "mdm" else "autoregressive"
    positions = "position i + 1" if sidecar.alignment == "shifted" else "position i"
    heads = f"{cfg.n_heads}" if cfg.n_heads == cfg.n_kv_heads else f"{cfg.n_heads} ({cfg.n_kv_heads} of keys)"
    tokenizer = sidecar.tokenizer
    return {
        "Kind": f"{kind}; position i predicts the token of {positions}",
        "Parameters": f"{counts.total:,} ({counts.non_embedding:,} outside of embeddings)",
        "Shape": f"{cfg.n_layers} layers, width {cfg.d_model}, {heads} heads, MLP width {cfg.d_ff}",
        "Context": f"{sidecar.canvas.get('max_length', cfg.max_length):,} tokens",
        "Vocabulary": f"{cfg.vocab_size:,} tokens",
        "Tokenizer": f"{tokenizer['kind']}, which comes with the model" if tokenizer else "none comes along",
    }


def _training_table(path: epath.Path, sidecar: Sidecar) -> dict[str, str]:
    source = sidecar.source
    table = {
        "Experiment": _value(source, "experiment"),
        "Fingerprint": _value(source, "fingerprint"),
        "Steps": _count(source, "step"),
        "Tokens": _count(source, "tokens"),
        "Began with": _value(source, "init_id"),
        "Imported as": _value(source, "family"),
        "Data": f"sha256 {source['dataset']}" if source.get("dataset") else "",
        "Chat template": str((sidecar.template or {}).get("name", "")),
    }
    if (workdir := _run_directory(path)) and (cfg := recorded_config(workdir)):
        table |= _run_table(workdir, cfg, source_step(sidecar))
    return {name: value for name, value in table.items() if value}


def _run_table(workdir: epath.Path, cfg: Config, step: int) -> dict[str, str]:
    """Return what the files of a run say about its training up to a step."""
    environment_file, done_file = workdir / "environment.json", workdir / outcome.FILE
    optim = cfg.optim
    table = {
        "Text": cfg.data.source,
        "Batch": f"{cfg.data.batch_size} sequences of {cfg.data.sequence_length} tokens",
        "Optimizer": f"{optim.name}, peak rate {optim.peak_lr:g}, {optim.schedule} after {optim.warmup_steps} steps of "
        f"warm-up, weight decay {optim.weight_decay:g}",
        "Seed": str(cfg.run.seed),
    }
    if cfg.objective == "mdm":
        table["Masks"] = f"{cfg.diffusion.schedule} schedule, weighted by {cfg.diffusion.weighting}"
        if cfg.diffusion.arm_steps:
            table["Masks"] += f"; the first {cfg.diffusion.arm_steps:,} steps were autoregressive"
    if environment_file.exists():
        environment = schema.read_json(environment_file, _Environment)
        table["Devices"] = environment.devices
        packages = ", ".join(f"{name} {version}" for name, version in environment.packages.items() if name in _SHOWN)
        revision = f" ({environment.git[:12]})" if environment.git else ""
        table["Software"] = f"diffusionlm {environment.diffusionlm}{revision}" + (f", {packages}" if packages else "")
    if done_file.exists() and (done := outcome.read(done_file))["step"] == step:
        table["Time"] = f"{done['seconds'] / 3600:.2f} hours"
        table["FLOPs"] = f"{done['flops']:.3g}"
    return table


def _held_out(path: epath.Path, sidecar: Sidecar) -> dict[str, str] | None:
    """Return the last evaluation of the run at or before the step of the checkpoint; None if there is none."""
    workdir = _run_directory(path)
    if workdir is None:
        return None
    step = source_step(sidecar)
    lines = read_json_lines(workdir / "metrics.jsonl", outcome.MetricsLine)
    lines = [line for line in lines if _HELD_OUT in line and line["step"] <= step]
    if not lines or not math.isfinite(lines[-1][_HELD_OUT]):
        return None
    last, cfg = lines[-1], recorded_config(workdir)
    error = last.get("eval_nelbo_stderr", math.nan)
    return {
        "text": "answers" if cfg and cfg.data.holds_examples else "text",
        "step": f"{last['step']:,}",
        "nats": f"{last[_HELD_OUT]:.4f}" + (f" ± {error:.4f}" if error and math.isfinite(error) else ""),
        "bits": f"{last['eval_bits_per_byte']:.4f}",
    }


def _run_directory(path: epath.Path) -> epath.Path | None:
    """Return the run directory that a step lies in; None for a model on its own."""
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _result_table(result: Evaluation) -> dict[str, Any]:
    def decimals(value: float | None) -> str:
        if value is None:
            return "?"
        return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"

    rows = [
        (name, decimals(figure.value), "" if figure.stderr == 0 else decimals(figure.stderr))
        for name, figure in result.file.metrics.items()
    ]
    return {"task": result.file.task, "dataset": _dataset(result), "rows": rows}


def _dataset(result: Evaluation) -> str:
    """Return the name of the file that was scored, without the directories of somebody's disk."""
    data = result.file.config.get("data")
    return printable(data).rstrip("/").rpartition("/")[2] if isinstance(data, str) and data else result.file.task


def _value(source: Mapping[str, Any], name: str) -> str:
    return str(source.get(name) or "")


def _count(source: Mapping[str, Any], name: str) -> str:
    value = source.get(name)
    return f"{value:,}" if isinstance(value, int) and value else ""


def _inline(text: Any) -> str:
    """Return text on one line that Markdown shows as it is, also in a table."""
    escaped = printable(text).translate({ord(sign): f"\\{sign}" for sign in "\\`*_[]<>|#"})
    return " ".join(escaped.split())
