"""The names of the files that a params-only checkpoint has, by which others inside it are told apart."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from etils import epath

from diffusionlm.untrusted import printable

# Orbax keeps arrays in stores of TensorStore (OCDBT), of each process and of all; data files have random names.
_STORE = r"(?:manifest\.ocdbt|(?:d|ocdbt_data|ocdbt_meta)/[0-9a-f]{32})"
_FILE = re.compile(
    r"_CHECKPOINT_METADATA|commit_success\.txt|orbax\.checkpoint|(?:sidecar|integrity)/data\.json"
    rf"|params/(?:_METADATA|_sharding|array_metadatas/process_\d+|(?:ocdbt\.process_\w+/)?{_STORE})"
)
_FOLDER = re.compile(
    r"sidecar|integrity|params(?:/array_metadatas|(?:/ocdbt\.process_\w+)?(?:/(?:d|ocdbt_data|ocdbt_meta))?)"
)


class Files(NamedTuple):
    """The files in the directory of a checkpoint, by their paths in it."""

    parts: list[str]  # of the checkpoint
    strays: list[str]  # what lies in its folders and is none of it, without hidden files; folders end with "/"


def files(checkpoint: epath.PathLike) -> Files:
    """Return the files of a params-only checkpoint on a disk; what lies beside its folders is passed over."""
    parts, strays, root = [], [], Path(checkpoint)
    for folder, folders, names in os.walk(root, followlinks=True):
        inside = Path(folder).relative_to(root)
        paths = {name: (inside / name).as_posix() for name in (*names, *folders)}
        others = [f"{paths[name]}/" for name in folders if not _FOLDER.fullmatch(paths[name])]
        folders[:] = [name for name in folders if _FOLDER.fullmatch(paths[name])]
        parts += [paths[name] for name in names if _FILE.fullmatch(paths[name])]
        others += [paths[name] for name in names if not _FILE.fullmatch(paths[name])]
        if folder != os.fspath(root):
            strays += [path for path in others if not Path(path).name.startswith(".")]
    return Files(sorted(parts), sorted(map(printable, strays)))
