"""Where a data file lies: on this machine, or in a data set repository of the Hugging Face hub (`hub:owner/name/file.jsonl`)."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_routing.leetcode.rows import DataError

HUB = re.compile(r"hub:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+)")
FORM = "a path, or hub:owner/name/file.jsonl (hub:owner/name@revision/file.jsonl)"


def fault(setting: str, name: str | None) -> str | None:
    """What is wrong with a name, as far as can be said without a network; None when nothing is."""
    if not name:
        return (f"dataset=leetcode comes without data: set {setting} to {FORM} of the benchmark's jsonl without hints "
                "(docs/real_models.md says how to get it)")
    if name.startswith("hub:"):
        return None if HUB.fullmatch(name) else f"{setting} must be {FORM}; got {name!r}"
    return None if Path(name).is_file() else f"{setting}={name}: there is no such file; give {FORM}"


def located(name: str) -> Path:
    """The file on this machine; one of the hub is downloaded first, or taken from its cache. Raises DataError."""
    found = HUB.fullmatch(name)
    if found is None:
        return Path(name)
    repository, revision, file = found.groups()
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as problem:
        raise DataError(f"{name} lies on the hub, and huggingface_hub is not installed; pip install huggingface_hub, or give a path "
                        "of a file that you have") from problem
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as problem:  # no network, no such repository or file, no right to read it
        raise DataError(f"{name} could not be had from the hub ({type(problem).__name__}: {str(problem).strip().splitlines()[0]}); "
                        "download it where there is a network, or give a path of a file that you have") from problem
