"""What goes into a repository of the Hugging Face Hub and comes out of it, and what is wrong if it does not.

huggingface_hub is imported where it is used: it is slow, and most runs need none of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from testreg.files import plain, shown
from testreg.hub.card import CARD, is_ours

SCHEME = "hf:"
"""What a name of a repository begins with where it could be mistaken for a path."""
_CHECKPOINT = ("*.json", "*.txt", "*.safetensors")  # and no pickles
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def is_repository(name: str) -> bool:
    """Whether `name` could be that of a repository: ORGANISATION/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def check_name(name: str) -> None:
    """Raise ValueError unless `name` could be that of a repository."""
    if not is_repository(name):
        raise ValueError(f"{shown(name)} is no repository of the Hugging Face Hub: write ORGANISATION/NAME")


def fetch_file(name: str, file: str, revision: str | None = None) -> Path:
    """The file of a repository in huggingface_hub's cache, which is asked for it anew unless the network is off.

    Raises:
        OSError: there is no such repository or file, or it cannot be reached.
        ValueError: `name` cannot be one.
    """
    from huggingface_hub import hf_hub_download

    check_name(name)
    with _explained(f"no {file} could be fetched from {name}"):
        return Path(hf_hub_download(name, file, revision=revision))


def fetch_checkpoint(name: str) -> Path:
    """The folder in the cache with those files of a checkpoint that are no code; raises as `fetch_file`."""
    from huggingface_hub import snapshot_download

    check_name(name)
    with _explained(f"there is no folder {name}, and no repository of that name could be fetched"):
        return Path(snapshot_download(name, allow_patterns=list(_CHECKPOINT)))


def check_can_push(name: str) -> None:
    """Raise, before any work, what `push` would raise for want of a name or a login.

    Raises:
        ValueError: `name` cannot be that of a repository.
        PermissionError: nobody is logged in.
    """
    from huggingface_hub import get_token

    check_name(name)
    if not get_token():
        raise PermissionError(f"cannot push to {name}: log in with `hf auth login`, or set HF_TOKEN")


def push(name: str, files: Mapping[str, Path | bytes], card: str, *, message: str, private: bool | None) -> str:
    """Put `files` and a model card into a repository in one commit; it is made if there is none.

    Weights that lie there and are not among `files` are removed if these hold weights: libraries would load them.
    A card that somebody else has written stays.

    Returns:
        The address of the commit.

    Raises:
        OSError: nobody is logged in, or the Hub refuses, or it cannot be reached.
        ValueError: `name` cannot be that of a repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_can_push(name)
    api = HfApi()
    with _explained(f"cannot push to {name}"):
        api.create_repo(name, private=private, exist_ok=True)
        there = api.list_repo_files(name)
        keep = CARD in there and not is_ours(Path(api.hf_hub_download(name, CARD)).read_text(encoding="utf-8"))
        added = {**files} if keep else {**files, CARD: card.encode()}
        brings_weights = any(file.endswith(_WEIGHTS) for file in files)
        stale = [file for file in there if brings_weights and file.endswith(_WEIGHTS) and file not in added]
        commit = api.create_commit(
            name,
            [
                *(CommitOperationAdd(path, content) for path, content in sorted(added.items())),
                *map(CommitOperationDelete, stale),
            ],
            commit_message=message,
        )
    return str(commit.commit_url)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever huggingface_hub and its HTTP client raise into one error, which says `what` failed and the fix."""
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
    except Exception as error:  # of the HTTP client, which has its own classes, and another in each release
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"{what}: the Hub refuses ({status}). Log in (`hf auth login`) with a token that may write there"
            ) from error
        said = plain((str(error).strip() or type(error).__name__).splitlines()[0])
        raise OSError(f"{what}: {said}. Check the network") from error
