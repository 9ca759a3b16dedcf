"""The verbs `import` and `export`, over `diffusionlm.interop`."""

from typing import Literal

from diffusionlm.console import write
from diffusionlm.options import parse


def import_weights(args: list[str], prog: str) -> int:
    """Convert released weights to a checkpoint: import SOURCE --output DIR [--family NAME] [--tokenizer FILE]."""
    return parse(_import, args, prog)()


def _import(
    source: str,
    /,
    output: str,
    family: str | None = None,
    tokenizer: str | None = None,
    mask_id: int | None = None,
    suppress_mask: Literal["auto", "yes", "no"] = "auto",
    chat_template: str | None = None,
) -> int:
    """Convert released weights to a checkpoint.

    Args:
      source: a Hugging Face directory (config.json, safetensors, tokenizer files), or a .safetensors file.
      output: the checkpoint, a new directory.
      family: gpt2, llama, mistral, qwen2, qwen3, dream, llada, smdm, diffugpt or diffullama; None: as config.json says.
      tokenizer: a tokenizer file or directory, or hf://OWNER/NAME; None: the source's own, if it has one.
      mask_id: the id that stands for [MASK]; None: as config.json says, or the family's published one.
      suppress_mask: never predict a mask id that is in the vocabulary; auto: as the family's reference does.
      chat_template: how prompts are written: the name of one of the model's templates, or none; None: the default one,
        or else the one that the family published.
    """
    from diffusionlm.checkpoint import store as checkpoint
    from diffusionlm.interop import importing

    suppress = {"auto": None, "yes": True, "no": False}[suppress_mask]
    path = importing.import_weights(
        source,
        output,
        family,
        tokenizer=tokenizer,
        mask_id=mask_id,
        suppress_mask=suppress,
        chat_template=chat_template,
    )
    sidecar = checkpoint.load_sidecar(path)
    next_step = (
        f"diffusionlm sample {path}" if sidecar.tokenizer else "import it again with --tokenizer FILE to use texts"
    )
    write(f"{path}: {importing.summary(sidecar)}; next: {next_step}")
    return 0


def export_weights(args: list[str], prog: str) -> int:
    """Write a checkpoint for other libraries: export CHECKPOINT --format NAME --output DIR [--dtype NAME]."""
    return parse(_export, args, prog)()


def _export(
    checkpoint: str,
    /,
    format: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """Write a checkpoint for other libraries, as a Hugging Face directory.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      format: llama, mistral, gpt2, qwen2, qwen3, llada, dream, smdm, diffugpt or diffullama.
      output: a new directory.
      dtype: the tensors' dtype; None: as they are stored.
    """
    from diffusionlm.interop.exporting import export_weights as export

    for note in export(checkpoint, output, format, dtype=dtype):
        write(f"note: {note}")
    write(f"{output}: written as {format}")
    return 0
