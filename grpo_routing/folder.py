"""The folder of a run: its name, the frozen config, who computed it with which code, and how it stands."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf

from grpo_routing.build import Plan
from grpo_routing.files import write_atomic, write_json
from grpo_routing.older import unsaid
from grpo_routing.parallel import World

NOT_IDENTITY = ("logger", "output", "cache", "experiment_name")  # where things go, not what is computed


def identity(config: dict) -> str:
    """Hash of the resolved config minus where things go and what changes nothing (older.py)."""

    def strip(node: object) -> object:
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items() if key not in NOT_IDENTITY}
        return [strip(value) for value in node] if isinstance(node, (list, tuple)) else node

    return hashlib.sha256(json.dumps(strip(unsaid(config)), sort_keys=True).encode()).hexdigest()[:8]


def run_folder(config: dict, ready: Plan) -> Path:
    name = f"{ready.arm_name}-{ready.loophole.name}-s{ready.seed}-{identity(config)}"
    return Path(ready.output) / ready.experiment_name / "runs" / name


def freeze(folder: Path, config: dict) -> None:
    """Write the config, or refuse a folder that holds another one."""
    file, text = folder / "config.yaml", yaml.dump(config, Dumper=Frozen, sort_keys=False, allow_unicode=True)
    if file.exists():
        if file.read_text(encoding="utf-8") != text and identity(frozen(folder)) != identity(config):
            raise FileExistsError(f"run folder {folder} holds another config; move it away or rename the experiment")
    else:
        write_atomic(file, text.encode())


class Frozen(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """YAML as OmegaConf reads it: words that it would take for a number are quoted. A sweep writes a thousand of them."""

    def words(self, text: str) -> yaml.Node:
        try:
            float(text.replace("_", ""))
        except ValueError:
            return self.represent_scalar("tag:yaml.org,2002:str", text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'")


Frozen.add_representer(str, Frozen.words)


def frozen(folder: Path) -> dict:
    """The config that a run folder holds."""
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def status(folder: Path) -> str:
    file = folder / "status.json"
    return json.loads(file.read_text())["state"] if file.exists() else "new"


def write_status(folder: Path, state: str, attempt: dict, **more: str) -> None:
    write_json(folder / "status.json", {"state": state, "attempt": attempt["attempt"], "host": attempt["host"],
                                        "started": attempt["started"], "updated": time.time()} | more)


def open_attempt(folder: Path, world: World) -> dict:
    """Provenance of this attempt: who, when, which code, which versions."""
    attempts = folder / "attempts"
    attempts.mkdir(exist_ok=True)
    number = len(list(attempts.glob("*.json"))) + 1
    facts = {"attempt": number, "started": time.time(), "host": socket.gethostname(), "argv": sys.argv, **code_state(),
             "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "hydra-core", "omegaconf")},
             "python": platform.python_version(), "machine": platform.platform(), "torch_threads": torch.get_num_threads(),
             "processes": world.size}
    write_json(attempts / f"{number:03d}.json", facts)
    write_status(folder, "running", facts)
    return facts


def code_state() -> dict[str, str | list[str]]:
    """Commit, uncommitted difference and untracked files of the code, when it lies in a git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {"commit": git("rev-parse", "HEAD") or "not in git", "diff": git("diff", "HEAD"),
            "untracked": git("ls-files", "--others", "--exclude-standard").splitlines()}


def code_identity() -> dict[str, str]:
    """What must not differ between the processes of a run."""
    code = code_state()
    return {"commit": code["commit"], "difference": hashlib.sha256(code["diff"].encode()).hexdigest()[:12], "torch": torch.__version__}


def flat(node: object, name: str = "") -> dict[str, object]:
    """The leaves of nested dicts, by their dotted names."""
    if not isinstance(node, dict):
        return {name: node}
    return {key: leaf for own, value in node.items() for key, leaf in flat(value, f"{name}.{own}" if name else own).items()}
