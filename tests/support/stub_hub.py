"""A stand-in for the Hub in a folder: the calls of huggingface_hub that are used, with its layout and its errors."""

import fnmatch
import hashlib
import importlib
import os
import shutil
import types
from pathlib import Path

from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

# The package by which the installed huggingface_hub sends requests: httpx or httpx2.
httpx = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


class StubHub:
    """Repositories in a folder, each a list of commits; a cache of snapshots, as huggingface_hub lays it out.

    Args:
      root: an empty folder.
    """

    def __init__(self, root):
        self.root, self.commits, self.private, self.downloads = Path(root), {}, {}, 0
        self.gated, self.offline = set(), False

    def files(self, repository):
        """Return the names of the files at the newest commit."""
        folder = self._folder(repository, self.commits[repository][-1])
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def add(self, repository, name, text):
        """Put a file that is none of a checkpoint into the newest commit, as another client may have done."""
        (self._folder(repository, self.commits[repository][-1]) / name).write_text(text)

    def _folder(self, repository, commit):
        return self.root / "server" / repository / commit

    def _refuse(self, kind, repository, status):
        request = httpx.Request("GET", f"https://huggingface.co/api/models/{repository}")
        raise kind(f"{status} Client Error.\nmany lines", response=httpx.Response(status, request=request))

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        """Lay out the files of a commit as links to blobs, and return their directory."""
        cache = self.root / "cache" / f"models--{repo_id.replace('/', '--')}"
        if self.offline:
            kept = sorted((cache / "snapshots").glob("*"))
            if not kept:
                raise errors.LocalEntryNotFoundError("cannot find the requested files\nin the disk cache")
            return str(kept[-1])
        if repo_id in self.gated:
            self._refuse(errors.GatedRepoError, repo_id, 403)
        if repo_id not in self.commits:
            self._refuse(errors.RepositoryNotFoundError, repo_id, 401)
        commits = self.commits[repo_id]
        commit = commits[-1] if revision in (None, "main") else revision
        if commit not in commits:
            self._refuse(errors.RevisionNotFoundError, repo_id, 404)
        source, target = self._folder(repo_id, commit), cache / "snapshots" / commit
        names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        self.downloads += not target.exists()
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            blob = cache / "blobs" / hashlib.sha256((source / name).read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, blob)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if not (target / name).exists():
                os.symlink(os.path.relpath(blob, (target / name).parent), target / name)
        return str(target)

    def HfApi(self):
        """Return the object whose methods write."""
        return types.SimpleNamespace(create_repo=self._create_repo, upload_folder=self._upload_folder)

    def _create_repo(self, repo_id, *, private, exist_ok, repo_type):
        assert exist_ok and repo_type == "model"
        if self.offline:
            raise httpx.ConnectError("[Errno 111] Connection refused\nmany lines")
        if repo_id.startswith("somebody-else/"):
            self._refuse(errors.HfHubHTTPError, repo_id, 403)
        self.private.setdefault(repo_id, private)
        self.commits.setdefault(repo_id, [])

    def _upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns, allow_patterns=None):
        commits = self.commits[repo_id]
        commit = hashlib.sha1(f"{repo_id} {len(commits)} {commit_message}".encode()).hexdigest()
        target = self._folder(repo_id, commit)
        if commits:
            shutil.copytree(self._folder(repo_id, commits[-1]), target)
            for path in [path for path in target.rglob("*") if path.is_file()]:
                if any(fnmatch.fnmatch(str(path.relative_to(target)), pattern) for pattern in delete_patterns):
                    path.unlink()
        target.mkdir(parents=True, exist_ok=True)
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder_path) / name, target / name)
        commits.append(commit)
        return types.SimpleNamespace(oid=commit)


def install(monkeypatch, root):
    """Put a stand-in in the place of the calls of huggingface_hub, and return it."""
    import huggingface_hub

    stub = StubHub(root)
    for name in ("snapshot_download", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, getattr(stub, name))
    return stub
