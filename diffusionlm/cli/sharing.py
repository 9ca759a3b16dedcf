"""The verbs `card` and `push`, over `diffusionlm.sharing`."""

from diffusionlm.cli.output import working
from diffusionlm.console import write
from diffusionlm.errors import UserError
from diffusionlm.options import parse
from diffusionlm.storage import run_path, write_atomically


def card(args: list[str], prog: str) -> int:
    """Describe a checkpoint in a model card: card CHECKPOINT [--evaluations RESULT.json ...] [--output README.md]."""
    return parse(_card, args, prog)()


def _card(
    checkpoint: str,
    /,
    evaluations: list[str] | None = None,
    name: str | None = None,
    license: str | None = None,
    output: str | None = None,
) -> int:
    """Describe a checkpoint in a model card, from its files and those of its run.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      evaluations: results of this checkpoint that `evaluate --output FILE` wrote.
      name: the model's name, OWNER/NAME on the Hub; None: that of its experiment.
      license: an identifier of the Hub, such as apache-2.0; None: the card names none.
      output: a new file; None: print the card.
    """
    if output is not None and run_path(output).exists():
        raise UserError(f"output={output!r} exists; give another file, or delete it")
    from diffusionlm.sharing.card import model_card

    text = model_card(checkpoint, name=name, evaluations=evaluations or (), license=license)
    if output is None:
        write(text.removesuffix("\n"))
    else:
        write_atomically(run_path(output), text)
        write(f"written: {output}")
    return 0


def push(args: list[str], prog: str) -> int:
    """Push a checkpoint with its card to the Hugging Face Hub: push CHECKPOINT OWNER/NAME [--private]."""
    return parse(_push, args, prog)()


def _push(
    checkpoint: str,
    repository: str,
    /,
    private: bool = False,
    evaluations: list[str] | None = None,
    license: str | None = None,
) -> int:
    """Push the parameters of a checkpoint and its model card to the Hugging Face Hub.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      repository: OWNER/NAME; it is made if it is missing, and its former model is replaced.
      private: make the repository private, if it is made.
      evaluations: results of this checkpoint that `evaluate --output FILE` wrote, for the card.
      license: an identifier of the Hub, such as apache-2.0, for the card.
    """
    from diffusionlm.sharing.push import push_to_hub

    with working(f"pushing to {repository}"):
        address = push_to_hub(checkpoint, repository, private=private, evaluations=evaluations or (), license=license)
    write(f"pushed: {address}; next: diffusionlm sample {address}")
    return 0
