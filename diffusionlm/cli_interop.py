"""The verbs `import` and `export`: thin, over `diffusionlm.interop`."""

from pathlib import Path

from diffusionlm.arguments import parse


def import_weights(args: list[str], prog: str) -> int:
    """Make a checkpoint of a released model: import SOURCE --output DIR [--family NAME]."""
    return parse(_import, args, prog)()


def _import(source: str, /, output: str, family: str | None = None) -> int:
    """Make a checkpoint of a released model, with its tokenizer.

    Args:
      source: a directory as Hugging Face has it (config.json, safetensors, tokenizer files), or a .safetensors file.
      output: the checkpoint's directory, to be made.
      family: gpt2, llama, qwen2, dream, llada, smdm, diffugpt or diffullama; None: as config.json says.
    """
    from diffusionlm.interop.importing import import_weights

    sidecar = import_weights(source, output, family=family)
    kind = "an autoregressive model" if sidecar.objective == "arm" else "a diffusion model"
    tokenizer = "with its tokenizer" if sidecar.tokenizer else "without a tokenizer, as there is none"
    print(f"{output}: {kind} of family {sidecar.source['family']}, {tokenizer}; next: diffusionlm sample {output}")
    return 0


def export_weights(args: list[str], prog: str) -> int:
    """Make files that others load of a checkpoint: export CHECKPOINT --format NAME --output DIR [--dtype TYPE]."""
    return parse(_export, args, prog)()


def _export(checkpoint: str, /, format: str, output: str, dtype: str | None = None) -> int:
    """Make config.json, safetensors and tokenizer files, which others load, of a checkpoint.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      format: the family whose layout is written: gpt2, llama, qwen2, dream, llada, smdm, diffugpt or diffullama.
      output: the directory, to be made.
      dtype: float32, bfloat16 or float16; None: as saved.
    """
    from diffusionlm.interop.exporting import export_weights

    notes = export_weights(checkpoint, output, format=format, dtype=dtype)
    print("\n".join([f"{output}: {', '.join(sorted(path.name for path in Path(output).iterdir()))}", *notes]))
    return 0
