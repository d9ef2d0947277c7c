"""A folder goes to the Hub in one commit: all of it, on the branch that was looked at, or nothing."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvtrain.errors import UsageError, causes, first_line
from kvtrain.export.folder import check_folder
from kvtrain.models.portable import SHIM

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_PATIENCE = 20.0  # seconds for an answer that carries no weights
_LONGEST_REASON = 300
_LONGEST_NAME = 96
_NAME = r"\w(?:(?!--|\.\.|\.git$)[\w.-])*(?<![.-])"
# What a model is opened from: of an older model on the branch, none of these may stay beside the new one's.
_OPENED = (
    *("config.json", "generation_config.json", "adapter_config.json", "model*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *(SHIM.name, "kvtrain_*.py"),
)
_REMEDIES = {
    401: "run `hf auth login` again, or set HF_TOKEN to a token that is valid",
    402: "make room on the Hub, or pay for more",
    403: "use a token that may write there",
    404: "look at the name, and use a token that may see it",
    409: "it exists, where this token sees nothing: choose another name, or a token that may see it",
    412: "somebody else has changed it in the meantime: look at what is there, then push again",
    413: "make room on the Hub, or pay for more",
    429: "push again later",
}


@dataclass(frozen=True)
class PushTarget:
    """Where a folder goes.

    Attributes:
        repository: ``org/name``; made where it is not there yet.
        branch: Made from ``main`` where it is not there yet.
        private: Nobody else may see the repository; one that others see already is refused.

    Raises:
        UsageError: The Hub takes no such names.
    """

    repository: str
    branch: str = "main"
    private: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(f"{_NAME}/{_NAME}", self.repository, re.ASCII) or len(self.repository) > _LONGEST_NAME:
            raise UsageError(f"a Hub repository is named org/name, not {self.repository!r}")
        if re.fullmatch(r"[0-9a-f]{40}", self.branch):
            raise UsageError(f"{self.branch} is a commit, which stays as it is; name a branch")
        if not re.fullmatch(r"\w+(?:[./-]?\w+)*", self.branch, re.ASCII):
            raise UsageError(f"no name of a branch: {self.branch!r}")

    def __str__(self) -> str:
        return f"{self.repository}@{self.branch}"


class Pushed(NamedTuple):
    """What a push has come to.

    Attributes:
        commit: The commit at which the branch holds the folder.
        changed: Whether there was anything to push.
    """

    commit: str
    changed: bool


def require_token() -> str:
    """Make sure, before anything is written, that there is somebody to push as; the token is for the client alone.

    Raises:
        UsageError: No token.
    """
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # from an identity provider, where the environment names one
        raise UsageError(f"no token can be had: {first_line(error)}") from error
    if not token:
        raise UsageError("pushing needs a token: run `hf auth login`, or set HF_TOKEN")
    return token


def push_folder(folder: Path, target: PushTarget) -> Pushed:
    """Upload a folder to the Hub in one commit; files of another model that the branch held before go with it.

    Weights that the Hub holds already, as after a push that was broken off, are not sent again.

    Args:
        folder: As ``kvtrain export`` writes it; looked over before the Hub is asked for anything.
        target: Where it goes.

    Raises:
        UsageError: The folder is not whole, there is no token, or the Hub refused, cannot be reached, or holds another
            commit than the one that was looked at. The message says what is where, and a token is never part of it.
    """
    token = require_token()
    files = check_folder(folder)
    push = _Push(folder, target, token)
    head = push.find_branch()
    commit = push.commit(files, head)
    return Pushed(commit, changed=commit != head.sha)


class _Push:
    """One push, which knows at any time what it may have left on the Hub."""

    def __init__(self, folder: Path, target: PushTarget, token: str) -> None:
        from huggingface_hub import HfApi

        self._api, self._folder, self._target, self._token = HfApi(token=token), folder, target, token
        self._head: str | None = None
        self._new: Literal["repository", "branch"] | None = None  # made by this push, or about to be

    def find_branch(self) -> "ModelInfo":
        """The branch as it is before the push; it and its repository are made where they are not there."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        repository, branch = self._target.repository, self._target.branch
        with self._explained():
            try:
                info, there = self._look(branch), True
            except RepositoryNotFoundError:
                self._new = "repository"
                self._api.create_repo(repository, private=self._target.private or None)
                info, there = self._look("main"), branch == "main"
            except RevisionNotFoundError:
                info, there = self._look("main"), False
        self._require_fit(info)
        if not there:
            with self._explained():
                self._new = self._new or "branch"
                self._api.create_branch(repository, branch=branch, revision=info.sha)
                info = self._look(branch)
        self._head = info.sha
        return info

    def _require_fit(self, info: "ModelInfo") -> None:
        repository = self._target.repository
        if self._target.private and not info.private:
            raise UsageError(
                f"{repository} is there and public, which --private does not change; nothing was pushed: "
                "make it private in its settings, or choose another name"
            )
        if any(file.rfilename == ".gitignore" for file in info.siblings or []):
            raise UsageError(
                f"{repository} has a .gitignore, by which the Hub leaves files out; nothing was pushed: remove it first"
            )

    def commit(self, files: list[Path], head: "ModelInfo") -> str:
        """Upload, and make the branch hold these files at once; the commit's name, ``head``'s where nothing changes."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = [file.relative_to(self._folder).as_posix() for file in files]
        held = {file.rfilename for file in head.siblings or [] if "/" not in file.rfilename}
        stale = [name for name in sorted(held.difference(names)) if any(fnmatch(name, each) for each in _OPENED)]
        with self._explained(), _without_log():
            commit: Any = self._api.create_commit(
                self._target.repository,
                [
                    *(CommitOperationAdd(name, file) for name, file in zip(names, files, strict=True)),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=f"Upload {self._folder.resolve().name}",
                revision=self._target.branch,
                parent_commit=head.sha,
            )
        return str(commit.oid)

    def _look(self, branch: str) -> "ModelInfo":
        return self._api.model_info(self._target.repository, revision=branch, timeout=_PATIENCE)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever goes wrong while the Hub is asked is told in a line, with what is where then."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {self._left_behind()}") from None
        except Exception as error:  # HTTP's, the system's and the client's own, and RuntimeErrors of shards
            reason = _said(error).replace(self._token, "***")[:_LONGEST_REASON]
            raise UsageError(
                f"{self._target}: not pushed ({reason}); {_remedy(error)}; {self._left_behind()}; "
                f"{self._folder} is complete"
            ) from error

    def _left_behind(self) -> str:
        """What is on the Hub after a push that failed."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        new = f"the {self._new} {self._target.repository if self._new == 'repository' else self._target.branch}"
        empty = f"{new} was made for this push and holds nothing of it: push again, or remove it"
        try:
            now = self._look(self._target.branch).sha
        except RepositoryNotFoundError:
            return "nothing was made on the Hub"
        except RevisionNotFoundError:
            return empty if self._new == "repository" else "the Hub holds what it held before"
        except Exception:  # the network, most likely, which is what the line is about
            if self._new:
                return f"{new} may have been made for this push"
            return "the branch may have changed" if self._head else "nothing was changed on the Hub"
        if self._head not in (None, now):
            return f"the branch is at {now} now"
        return empty if self._new else "the Hub holds what it held before"


def _said(error: BaseException) -> str:
    """What the client's error says, without what signs an address."""
    from huggingface_hub.errors import HfHubHTTPError

    parts = []
    below = None if isinstance(error, HfHubHTTPError) else error.__cause__  # a shard's error says nothing by itself
    for cause in filter(None, (error, below)):
        if isinstance(cause, HfHubHTTPError):
            parts.append(f"{cause.response.status_code} {cause.server_message or cause.response.reason_phrase}")
        elif isinstance(cause, JSONDecodeError):
            parts.append("an answer that is not the Hub's")
        else:
            parts.append(first_line(cause))
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(" ".join(parts).split()))


def _remedy(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            full = status == 403 and re.search("quota|storage|limit", str(cause.server_message), re.IGNORECASE)
            return _REMEDIES[402] if full else _REMEDIES.get(status, "push again: what was uploaded stays")
    return "push again when the Hub can be reached"


@contextmanager
def _without_log() -> Iterator[None]:
    """The client logs each retry with an address that carries a signature, and that nothing has changed."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
