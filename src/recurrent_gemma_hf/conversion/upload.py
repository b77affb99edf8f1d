"""Upload a checkpoint folder to the Hugging Face Hub. The same call resumes an interrupted upload.

`huggingface_hub.upload_folder` asks the Hub about each file, skips existing ones, sends large files as blobs that
persist even if the rest fails, and commits files after their blobs have arrived. A repository therefore never has a
commit that points to missing weights. (huggingface_hub 2 has no `upload_large_folder`.)

    recurrent-gemma convert upload FOLDER owner/name [--private]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi, get_token

# HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2; this import gives the right one.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint folder, creating the repository if necessary.

    Args:
        folder: the checkpoint: `config.json` and safetensors.
        repo_id: the repository, "owner/name".
        private: whether a new repository is private; an existing one is not changed.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: the folder holds no checkpoint, or the name is invalid.
        PermissionError: there is no token, or it may not write to the repository.
        ConnectionError: the Hub could not be reached or the connection broke; the same call resumes.
    """
    _check_folder(folder)
    check_repository(repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name}")
    except OfflineModeIsEnabled:
        raise  # a ConnectionError whose message gives the remedy
    except (HfHubHTTPError, HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # the last three: hf_xet
        raise _explained(error, repo_id) from error
    return commit.commit_url


def check_repository(repo_id: str) -> None:
    """Raise those errors of `push` that can be detected without a request to the Hub."""
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
    """Raise ValueError if the folder lacks files that `from_pretrained` needs."""
    missing = [name for name in ("config.json", "*.safetensors") if not any(folder.glob(name))]
    if missing:
        raise ValueError(f"{folder} holds no checkpoint: {' and '.join(missing)} missing; convert one first")


def _explained(error: Exception, repo_id: str) -> OSError:
    """Convert an error of huggingface_hub to one that states the cause and the remedy."""
    # Without hf_xet, a failed blob raises a RuntimeError that names the file, from the server's error.
    answer = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    status = answer.response.status_code if isinstance(answer, HfHubHTTPError) else None
    if status in (401, 403):
        return PermissionError(f"the token may not write to {repo_id}: give one that may ({error})")
    return ConnectionError(
        f"the upload to {repo_id} broke off: {error}; run the same command again, what has arrived is not sent twice"
    )


def main() -> None:
    """Run the script: `run`, with an error as one message."""
    try:
        run()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(arguments: list[str] | None = None, program: str | None = None) -> None:
    """Upload as the arguments say, by default those of the process. `program`: its name in `--help`."""
    parser = argparse.ArgumentParser(prog=program, description="Upload a checkpoint folder to the Hub, or resume that.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("repo_id", metavar="REPO", help="owner/name")
    parser.add_argument("--private", action="store_true", help="if the repository has to be created")
    given = parser.parse_args(arguments)
    print(f"pushed: {push(given.folder, given.repo_id, given.private)}")
