"""docs/real_models.md can be walked: its commands, on a folder of the hub's form with random weights and on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CONF

ROOT = CONF.parent
PAGE = ROOT / "docs" / "real_models.md"


def blocks(mark: str) -> list[str]:
    return re.findall(rf"^```bash {mark}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def script(out: Path) -> str:
    """The page's own blocks in their order, the rehearsal's names first; its folder is the only word that changes."""
    return "set -eux\n" + "\n".join(blocks("rehearsed-first") + blocks("rehearsed")).replace("outputs/rehearsal", str(out))


def test_the_page_rehearses_every_step_that_needs_no_cluster():
    said = script(Path("/x"))
    for command in ("tests.data.toy_model", "grpo_routing.env.check", "grpo_routing $RUN --cfg job", "experiment_name=debug",
                    "grpo_routing.show", "-m $RUN arm=", "launchers watch", "launchers collect", "grpo_routing.report",
                    "grpo_routing.export", "--format peft"):
        assert command in said, command
    assert subprocess.run(["bash", "-n"], input=said, text=True, check=False).returncode == 0


@pytest.mark.slow
def test_every_command_of_the_page_runs_on_a_small_folder(tmp_path):
    own = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash"], input=script(tmp_path), text=True, cwd=ROOT, env=own, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = {folder.name.split("-")[0] for folder in (tmp_path / "sweep" / "runs").iterdir()}
    assert runs == {"vanilla", "graft", "graft_rate_matched"}
    assert all(json.loads((folder / "status.json").read_text())["state"] == "done" for folder in (tmp_path / "sweep" / "runs").iterdir())
    assert (tmp_path / "sweep" / "report.html").exists() and (tmp_path / "exported" / "model.safetensors").exists()
    assert (tmp_path / "exported_lora" / "adapter_model.safetensors").exists()
