"""Upload of an export to the Hugging Face Hub, by the token that the environment or the Hub's own login holds."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from distill.core.errors import InputError, MachineError


def check_token(repository: str) -> None:
    """Refuse an upload for which nobody is logged in; nothing is asked of the Hub.

    Raises:
        InputError: neither the environment nor the Hub's own login holds a token.
    """
    if not get_token():
        raise _without_token(repository)


def _without_token(repository: str) -> InputError:
    return InputError(f"push_to_hub: {repository}: no token; set HF_TOKEN, or run hf auth login")


def planned(folder: Path, repository: str) -> list[str]:
    """What an upload would send, a line for each file, after a check of the card's metadata without a network.

    Args:
        folder: of the export.
        repository: ``ORG/NAME``.

    Raises:
        InputError: there is no model card in the folder, or no metadata in it.
    """
    card = folder / "README.md"
    if not card.is_file() or not ModelCard.load(card).data.to_dict().get("library_name"):
        raise InputError(f"{folder}: has no model card with metadata, which the Hub needs; export it again")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    names = [f"{file.relative_to(folder)} ({file.stat().st_size / 1e6:,.2f} MB)" for file in files]
    return [f"to {repository} on the Hub, private: {len(files)} files, {size / 1e6:,.2f} MB", *names]


def upload(folder: Path, repository: str) -> str:
    """Create a private repository if it is not there, and send the files of a folder in one commit.

    Args:
        folder: of the export.
        repository: ``ORG/NAME``.

    Returns:
        The address of the commit.

    Raises:
        InputError: there is no token, or the Hub refuses the name or the token.
        MachineError: the Hub cannot be reached.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by distill"))
    except LocalTokenNotFoundError:
        raise _without_token(repository) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"push_to_hub: {repository}: refused by the Hub ({_line(error)})") from None
    except (OSError, RuntimeError) as error:
        raise MachineError(f"push_to_hub: {repository}: the Hub cannot be reached ({_line(error)})") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
