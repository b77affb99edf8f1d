"""A checkpoint folder to the Hugging Face Hub. What broke off is resumed by the same call.

`huggingface_hub.upload_folder` does the work: it asks the Hub about each file, skips what is there already, sends large
files as blobs that stay even when the rest fails, and commits files when their blobs have arrived. So a repository
never shows a commit that points to weights which are not there. (`upload_large_folder` is gone from huggingface_hub 2.)

    python conversion/upload.py FOLDER owner/name [--private]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token

# HTTPError is that of httpx in huggingface_hub 1 and of httpx2 in 2: asked from here, it is the right one of the two.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a checkpoint folder, creating the repository if it is not there.

    Args:
        folder: the checkpoint: `config.json` and the safetensors beside it.
        repo_id: the repository, "owner/name".
        private: whether a repository that is created is private; one that exists stays as it is.

    Returns:
        the address of the commit.

    Raises:
        ValueError: the folder holds no checkpoint, or the name is none.
        PermissionError: there is no token, or it may not write to the repository.
        ConnectionError: the Hub could not be reached or broke off; the same call resumes.
    """
    _check_folder(folder)
    check_repository(repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name}")
    except OfflineModeIsEnabled:
        raise  # a ConnectionError that says itself how to go online
    except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # the last three: hf_xet
        raise _explained(error, repo_id) from error
    return commit.commit_url


def check_repository(repo_id: str) -> None:
    """Raises as `push` does, as far as it can be told without asking the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository ({error}): give owner/name") from error
    if get_token() is None:
        raise PermissionError(
            f"no token to push to {repo_id} with: run `hf auth login`, or set HF_TOKEN, with a token that may write "
            "(https://huggingface.co/settings/tokens)"
        )


def _check_folder(folder: Path) -> None:
    """A folder that `from_pretrained` would not load is not worth an upload."""
    missing = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
    if missing:
        raise ValueError(f"{folder} holds no checkpoint: {' and '.join(missing)} missing; convert one first")


def _explained(error: Exception, repo_id: str) -> OSError:
    """What went wrong, and what to do, from whatever huggingface_hub raised."""
    # Without hf_xet, a failed blob is a RuntimeError that names the file, raised from what the server said.
    answer = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else None
    if status in (401, 403):
        return PermissionError(f"the token may not write to {repo_id}: give one that may ({error})")
    return ConnectionError(
        f"the upload to {repo_id} broke off: {error}; run the same command again, what has arrived is not sent twice"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Uploads a checkpoint folder to the Hub, or resumes that.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("repo_id", metavar="REPO", help="owner/name")
    parser.add_argument("--private", action="store_true", help="if the repository has to be created")
    given = parser.parse_args()
    try:
        print(f"pushed: {push(given.folder, given.repo_id, given.private)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
