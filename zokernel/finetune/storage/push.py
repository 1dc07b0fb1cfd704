"""Uploading a run to the hub: the finished folder, once, at the end."""

from __future__ import annotations

import copy
import glob
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from zokernel.data import hub
from zokernel.data.hub_requests import bounded_requests
from zokernel.errors import RunError, UsageError, ZokernelError
from zokernel.finetune.settings.config import ZOConfig
from zokernel.finetune.storage.run_folder import ARTEFACTS, RUN_FILE

logger = logging.getLogger(__name__)

# What belongs to the running of a run: checkpoints, logs of other programs, locks, halves, and anything pickled.
LEFT_OUT = (
    *("checkpoint-*", "checkpoint-*/**", "last-good", "last-good/**", "runs/**", ".*", ".*/**", "*/.*"),
    *("*.partial", "*.lock", "*.tmp", "journal.zkj.*", "held-out-start.json", "__pycache__/**"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"),
)
_NEEDS_PUSH = ("hub_model_id", "hub_private_repo", "hub_revision")


def check_push(config: ZOConfig) -> None:
    """Check the flags of ``--push_to_hub`` and the access token, before anything is read.

    Args:
        config: The run's settings.

    Raises:
        UsageError: If a flag has no effect here.
        RunError: If there is no access token, or the hub does not accept it for writing.
    """
    if not config.push_to_hub:
        for flag in _NEEDS_PUSH:
            if getattr(config, flag, None) is not None:
                raise UsageError(f"--{flag} has no effect without --push_to_hub true: add it, or leave both out.")
    strategy = str(getattr(config.hub_strategy, "value", config.hub_strategy))
    if strategy in ("checkpoint", "all_checkpoints"):
        raise UsageError(
            f"--hub_strategy {strategy} uploads checkpoints, which stay here: the finished folder is uploaded at the "
            "end (leave the flag out, or give 'end')."
        )
    if config.hub_always_push:
        raise UsageError("--hub_always_push has no effect: there is one upload, at the end of the run.")
    if not config.push_to_hub:
        return
    if not config.do_train:
        raise UsageError("--push_to_hub uploads what was trained, and --do_train false trains nothing.")
    if not config.should_save:
        return
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        raise UsageError("--push_to_hub needs the hub, and HF_HUB_OFFLINE=1 keeps from asking it: unset one of them.")
    if not (config.hub_token or huggingface_hub.get_token()):
        raise RunError(
            "--push_to_hub needs an access token that may write: log in with 'hf auth login', or set HF_TOKEN."
        )
    with _HubErrors(config):
        who = _api(config).whoami()
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise RunError(
            "Your access token may read and not write, so --push_to_hub cannot upload: make one that may at "
            f"{huggingface_hub.constants.ENDPOINT}/settings/tokens, and log in with it."
        )


def without_trainer_push(config: ZOConfig) -> ZOConfig:
    """Return settings with which ``transformers.Trainer`` does not upload: it would at every save, and all there is."""
    config = copy.copy(config)
    config.push_to_hub = False
    return config


def open_repository(config: ZOConfig) -> str:
    """Make the repository if there is none, and check that it can be written, before the expensive part.

    Args:
        config: The run's settings.

    Returns:
        Its id; nothing if nothing is to be uploaded, or another process does.

    Raises:
        RunError: If it cannot be made or written.
    """
    if not (config.push_to_hub and config.should_save):
        return ""
    with _HubErrors(config):
        api = _api(config)
        name = str(api.create_repo(_name(config), private=config.hub_private_repo, exist_ok=True).repo_id)
        api.auth_check(name, write=True)
    return name


def push_finished(folder: Path, config: ZOConfig) -> str:
    """Upload a finished run: model, card, report and measurements; no checkpoint, lock or pickle.

    Args:
        folder: The output folder.
        config: The run's settings.

    Returns:
        The address of the repository; nothing if nothing is to be uploaded.

    Raises:
        RunError: If the hub refuses it or cannot be reached; the folder stays as it is.
    """
    name = open_repository(config)
    if not name:
        return ""
    with _HubErrors(config, f"the finished run is in {folder}, and the same command uploads it"):
        api = _api(config)
        if config.hub_revision:
            api.create_branch(name, branch=config.hub_revision, exist_ok=True)
        stale = _stale_files(api.list_repo_files(name, revision=config.hub_revision), folder, name)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Fine-tuned with zokernel",
            revision=config.hub_revision,
            ignore_patterns=list(LEFT_OUT),
            delete_patterns=[glob.escape(path) for path in stale] or None,
        )
    address = f"{api.endpoint}/{name}"
    logger.info("Uploaded to %s.", address)
    return address


def _stale_files(remote: list[str], folder: Path, name: str) -> list[str]:
    """Return the files of an earlier run that the upload does not replace, such as a whole model beside an adapter.

    They are deleted in the commit of the upload, and the history of the repository keeps them.  Where no run of
    zokernel was uploaded before, files are somebody else's: they stay, and are named.

    Args:
        remote: Paths in the repository.
        folder: The finished run.
        name: Id of the repository.
    """
    from huggingface_hub.utils import filter_repo_objects

    local = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    uploaded = set(filter_repo_objects(local, ignore_patterns=list(LEFT_OUT)))
    stale = [
        path
        for path in filter_repo_objects(sorted(remote), ignore_patterns=list(LEFT_OUT))
        if path not in uploaded and any(fnmatch(path.split("/")[0], pattern) for pattern in ARTEFACTS)
    ]
    if stale and RUN_FILE not in remote:
        logger.warning(
            "%s holds files that no run of zokernel wrote, and they stay beside the new ones: %s.",
            name,
            ", ".join(stale),
        )
        return []
    if stale:
        logger.info("%s: deleted by the upload, since they belong to an earlier run: %s.", name, ", ".join(stale))
    return stale


def _name(config: ZOConfig) -> str:
    return config.hub_model_id or Path(str(config.output_dir)).absolute().name


def _api(config: ZOConfig) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=config.hub_token)


class _HubErrors:
    """Turns what the hub answers within the block into one sentence."""

    def __init__(self, config: ZOConfig, advice: str = ""):
        self.name, self.token, self.advice = _name(config), config.hub_token, advice
        self.requests = bounded_requests()

    def __enter__(self) -> None:
        self.requests.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.requests.__exit__(None, None, None)
        if not isinstance(error, Exception):
            return
        explanation: ZokernelError | None = hub.explain(
            error, self.name, token_from="--hub_token" if self.token else ""
        )
        if explanation is None:
            return
        ending = f" ({self.advice})." if self.advice else "."
        raise type(explanation)(str(explanation).rstrip(".") + ending) from error
