"""Push a checkpoint to the Hugging Face Hub, with its model card."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from diffusionlm import hub
from diffusionlm.checkpoint import layout, store
from diffusionlm.console import write
from diffusionlm.errors import require_package
from diffusionlm.sharing.card import model_card, source_step
from diffusionlm.storage import in_bucket


def push_to_hub(
    checkpoint: epath.PathLike,
    repository: str,
    *,
    private: bool = False,
    evaluations: Sequence[epath.PathLike] = (),
    license: str | None = None,
) -> str:
    """Push the parameters of a checkpoint and its model card to the Hub; the optimizer's state stays here.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      repository: OWNER/NAME; it is made if it is missing, and its former model is replaced.
      private: whether a repository that is made is private.
      evaluations: results of `evaluate --output FILE` for the card.
      license: an identifier of the Hub for the card, such as apache-2.0.

    Returns:
      The address of the commit, hf://OWNER/NAME@COMMIT, which `load` takes.

    Raises:
      UserError: huggingface_hub is missing, no checkpoint there, a result of other parameters, no network, or the Hub
        refuses.
    """
    repository = hub.require_repository(repository)
    require_package("huggingface_hub", f"{hub.SCHEME}{repository}", "huggingface_hub", "hub")
    path = store.locate(checkpoint).path
    step = source_step(store.load_sidecar(path))
    card = model_card(path, name=repository, evaluations=evaluations, license=license)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        _copy_params_only(path, directory)
        (directory / hub.CARD).write_text(card, encoding="utf-8")
        return str(hub.push(directory, repository, private=private, message=f"diffusionlm: step {step}"))


def _copy_params_only(path: epath.Path, directory: Path) -> None:
    """Make a params-only checkpoint of a step of a run; of one that is params-only, copy the files of a checkpoint."""
    if (path / "train").exists() or in_bucket(path):
        store.save_params(directory, store.load_params(path), store.load_sidecar(path))
    else:
        _copy_checkpoint(path, directory)


def _copy_checkpoint(path: epath.Path, directory: Path) -> None:
    """Copy the files of a params-only checkpoint, and name on stderr what lies among them and is none of it."""
    files = layout.files(path)
    for name in files.parts:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / name, directory / name)
    if files.strays:
        shown = ", ".join(files.strays[:3]) + (f" and {len(files.strays) - 3} more" if len(files.strays) > 3 else "")
        write(f"not pushed: {shown}, no part of the checkpoint {path}", error=True)
