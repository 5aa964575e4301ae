"""A model in use on the Hugging Face Hub: what an export writes, in one commit."""

from __future__ import annotations

import tempfile
from pathlib import Path

from perdure.core.errors import PerdureError
from perdure.launch.learner.learner import Learner
from perdure.launch.learner.package import BASE, EXPERTS, TENSORS
from perdure.models.hub import HUB_ID, unreachable

STALE = [f"{EXPERTS}/*", f"{BASE}/*", TENSORS]  # what an earlier push may have left and this export may not have


def push_home(home: Learner, name: str, private: bool = False) -> str:
    """Put the model in use into the repository ``name`` (``user/name``) of the Hub, made if it is not there; return its URL.

    The login is the Hub client's own: ``HF_TOKEN``, or what ``hf auth login`` keeps. Name, login and HOME are looked at before
    any work, and nothing is asked of the Hub before the export is whole. Other files of the repository stay.
    """
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(name):
        raise PerdureError(f"'{name}' is no name of a repository. Give one as user/name.")
    if not get_token():
        raise PerdureError(
            "There is no login for the Hub. Set HF_TOKEN to a token that may write (huggingface.co/settings/tokens), or "
            "run: hf auth login"
        )
    _ = home.config  # a HOME that is none is said before a folder is made
    with tempfile.TemporaryDirectory(prefix="perdure-") as scratch:
        folder = Path(scratch) / "export"
        home.export(folder)
        return sent(folder, name, private)


def sent(folder: Path, name: str, private: bool) -> str:
    """Send a folder to a repository; ``PerdureError`` for whatever the Hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="perdure")
    failures: tuple[type[Exception], ...] = (OSError, *unreachable())
    try:
        # None: as a new repository is by default; one that is there stays as private as it is
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise PerdureError(
                f"{name} is there already, and public. Nothing was sent: make it private there, or name another."
            )
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Model in use, by perdure", delete_patterns=STALE
        )
    except HfHubHTTPError as error:
        raise PerdureError(refused(name, error.response.status_code, error.server_message)) from error
    except ValueError as error:  # a name or a card that it does not take
        raise PerdureError(f"The Hub refused {name}: {error}") from error
    except failures as error:
        raise PerdureError(
            f"The Hub could not be reached ({type(error).__name__}). Check the connection; the same command begins again."
        ) from error
    return str(url)


def refused(name: str, code: int, said: str | None) -> str:
    """What the Hub's answer means, in words."""
    if code == 401:
        return f"The Hub refused the login (401): {name} was not written. Give another token in HF_TOKEN, or run: hf auth login"
    if code == 403:
        return f"The login may not write to {name} (403). Give a token that may write, or a name of your own."
    return f"The Hub refused {name} ({code}{f': {said}' if said else ''})."
