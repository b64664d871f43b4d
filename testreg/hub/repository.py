"""Downloads files from repositories of the Hugging Face Hub, and uploads them, with errors that name the fix.

huggingface_hub is imported in the functions that use it, since its import is slow and most runs do not need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from testreg.files import plain, shown
from testreg.hub.card import CARD, is_ours

SCHEME = "hf:"
"""What a repository's name begins with where a path could be given instead."""
_CHECKPOINT = ("*.json", "*.txt", "*.safetensors")  # files of a checkpoint that are downloaded: no code, no pickles
_WEIGHTS = (".safetensors", ".safetensors.index.json")  # how names of files of weights end


def is_repository(name: str) -> bool:
    """Whether `name` has the form ORGANISATION/NAME, as names of repositories have."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def check_name(name: str) -> None:
    """Raise ValueError unless `name` has the form ORGANISATION/NAME."""
    if not is_repository(name):
        raise ValueError(f"{shown(name)} is no repository of the Hugging Face Hub: write ORGANISATION/NAME")


def fetch_file(name: str, file: str, revision: str | None = None) -> Path:
    """Download a file of a repository into huggingface_hub's cache, if it is not there yet, and return its path.

    Raises:
        OSError: there is no such repository or file, or the Hub cannot be reached.
        ValueError: `name` cannot be the name of a repository.
    """
    from huggingface_hub import hf_hub_download

    check_name(name)
    with _clear_errors(f"no {file} could be fetched from {name}"):
        return Path(hf_hub_download(name, file, revision=revision))


def fetch_checkpoint(name: str) -> Path:
    """Download a checkpoint without its code, and return its folder in the cache. Raises what `fetch_file` raises."""
    from huggingface_hub import snapshot_download

    check_name(name)
    with _clear_errors(f"there is no folder {name}, and no repository of that name could be fetched"):
        return Path(snapshot_download(name, allow_patterns=list(_CHECKPOINT)))


def check_can_push(name: str) -> None:
    """Check, before any work is done, that `push` has a valid name and a login.

    Raises:
        ValueError: `name` cannot be the name of a repository.
        PermissionError: nobody is logged in.
    """
    from huggingface_hub import get_token

    check_name(name)
    if not get_token():
        raise PermissionError(f"cannot push to {name}: log in with `hf auth login`, or set HF_TOKEN")


def push(name: str, files: Mapping[str, Path | bytes], card: str, *, message: str, private: bool | None) -> str:
    """Upload files and a model card to a repository in one commit. The repository is created if it does not exist.

    If `files` has weights, other files of weights in the repository are deleted, since libraries might load them. A
    card that testreg did not write is kept.

    Args:
        files: {path in the repository: local file or its content}.
        card: the text of the model card.
        message: the message of the commit.
        private: whether a new repository is private; None for the default of its owner.

    Returns:
        The URL of the commit.

    Raises:
        OSError: nobody is logged in, the Hub refuses, or it cannot be reached.
        ValueError: `name` cannot be the name of a repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_can_push(name)
    api = HfApi()
    with _clear_errors(f"cannot push to {name}"):
        api.create_repo(name, private=private, exist_ok=True)
        existing = api.list_repo_files(name)
        keeps_card = CARD in existing and not is_ours(Path(api.hf_hub_download(name, CARD)).read_text(encoding="utf-8"))
        added = {**files} if keeps_card else {**files, CARD: card.encode()}
        brings_weights = any(file.endswith(_WEIGHTS) for file in files)
        stale_weights = [file for file in existing if brings_weights and file.endswith(_WEIGHTS) and file not in added]
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(path, content) for path, content in sorted(added.items())),
                *map(CommitOperationDelete, stale_weights),
            ],
            commit_message=message,
        )
    return str(commit.commit_url)


@contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and its HTTP client into an OSError that says `what` failed, and the fix."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{what}: it is gated. Ask for access on its page, and log in (`hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: there is no such repository on the Hugging Face Hub, or it is private. Check the name, and log "
            "in (`hf auth login`, or HF_TOKEN) if it is yours"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{what}: it has no such revision. Check the branch, tag or commit") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"{what}: it is not in the cache, and the Hugging Face Hub cannot be reached. Check the network, and unset "
            "HF_HUB_OFFLINE if it is set"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{what}: the repository has no such file") from error
    except Exception as error:  # the HTTP client's errors, whose classes differ between releases of huggingface_hub
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"{what}: the Hub refuses ({status}). Log in (`hf auth login`) with a token that may write there"
            ) from error
        reason = plain((str(error).strip() or type(error).__name__).splitlines()[0])
        raise OSError(f"{what}: {reason}. Check the network") from error
