"""Models on the Hugging Face Hub, by addresses such as hf://OWNER/NAME or hf://OWNER/NAME@REVISION.

`fetch` brings the files of one to the disk, which are then read and checked like any others. The package
huggingface_hub does the work: where it keeps files, and whose token it sends, is its own affair.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from diffusionlm.console import write
from diffusionlm.errors import UserError, require_package
from diffusionlm.untrusted import printable

SCHEME = "hf://"
SIDECAR_FILES = ("sidecar/*", "integrity/*")
FILES = (  # of a params-only checkpoint; whatever else a repository has is left there
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "orbax.checkpoint",
    "params/*",
    *SIDECAR_FILES,
)
CARD = "README.md"

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,255}"


class Address(NamedTuple):
    """A repository, and the branch, tag or commit of it; None: its main branch."""

    repository: str  # OWNER/NAME
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


_said: set[Address] = set()  # whose commits were said on stderr


class Fetched(NamedTuple):
    """Files of a model on the disk, and its address with the commit that they are of."""

    path: Path
    address: Address


def is_address(path: Any) -> bool:
    """Return True for a path that begins with hf://."""
    return isinstance(path, str) and path.startswith(SCHEME)


def parse(text: str) -> Address:
    """Return the parts of an address.

    Raises:
      UserError: it is no hf://OWNER/NAME or hf://OWNER/NAME@REVISION.
    """
    match = re.fullmatch(rf"{SCHEME}({_NAME}/{_NAME})(?:@({_REVISION}))?", text)
    if match is None or ".." in text:
        raise UserError(
            f"{printable(text)[:200]!r} is no address of a model on the Hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION"
        )
    return Address(match[1], match[2])


def require_repository(name: str) -> str:
    """Return a name OWNER/NAME, which may also be written as an address without a revision; refuse others."""
    address = parse(name if is_address(name) else f"{SCHEME}{name}")
    if address.revision:
        raise UserError(f"{printable(name)!r} has a revision; a model is pushed to OWNER/NAME")
    return address.repository


def fetch(text: str, files: Sequence[str] = FILES) -> Fetched:
    """Bring files of the model at an address to the disk, unless they are there.

    Args:
      text: the address.
      files: patterns of the names of the files; others are left on the Hub, and those that it lacks are passed over.

    Raises:
      UserError: no such address, repository or revision, a gated repository, no network where the files are not on the
        disk yet, or huggingface_hub is missing.
    """
    address = parse(text)
    require_package("huggingface_hub", printable(text), "huggingface_hub", "hub")
    import huggingface_hub

    with _one_line(address):
        path = huggingface_hub.snapshot_download(
            address.repository, revision=address.revision, allow_patterns=list(files)
        )
    commit = Path(path).name  # of the directory that huggingface_hub keeps for each commit
    pinned = Address(address.repository, commit)
    _say_once(pinned)
    return Fetched(Path(path), pinned)


def push(directory: Path, repository: str, *, private: bool, message: str) -> Address:
    """Upload the checkpoint and the card in a directory to a repository, which is made if it is missing.

    Other files of the directory stay here. Files of a checkpoint that was pushed before, which the directory lacks, are
    deleted from the repository.

    Returns:
      The repository with its new commit.

    Raises:
      UserError: no network, no right to write there, or another refusal of the Hub.
    """
    import huggingface_hub

    address = Address(repository)
    with _one_line(address):
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=str(directory),
            commit_message=message,
            allow_patterns=[*FILES, CARD],
            delete_patterns=list(FILES),
        )
    return Address(repository, commit.oid)


def _say_once(address: Address) -> None:
    """Say on stderr which commit is used, once in a process: several parts of a program may ask for one model."""
    if address not in _said:
        _said.add(address)
        write(f"using {address}", error=True)


@contextmanager
def _one_line(address: Address) -> Iterator[None]:
    """Turn the errors of the Hub into one line each."""
    from huggingface_hub import errors

    # huggingface_hub sends requests by httpx or by httpx2, depending on its version; the error of the Hub derives from
    # the base class of the errors of that package.
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{address} is gated: ask for access at https://huggingface.co/{address.repository}, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"there is no model {address}, or it is private; if it is, {login}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{SCHEME}{address.repository} has no revision {address.revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"cannot reach the Hub, and {address} is not on this disk whole; connect, or give a directory"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"the Hub asks who you are for {address}; {login}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = f"; {login}" if status in (401, 403) else ""
        raise UserError(f"the Hub refuses {address}: {printable(_first_line(error))}{hint}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{address}: {printable(_first_line(error))}") from error
    except (ConnectionError, TimeoutError, transport) as error:
        raise UserError(f"cannot reach the Hub for {address}: {printable(_first_line(error))}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
