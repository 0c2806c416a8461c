"""Offline files of W&B, read back; and a run's own files, written without running anything."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from grpo_routing.files import Record, write_json
from grpo_routing.folder import freeze


def datastore(file: Path) -> list[WandbRecord]:
    """Records of an offline run: LevelDB framing in blocks of 32 KiB around protocol buffers (infra.md, section 4)."""
    data, place, part, records = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # too small for a header: padding
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(WandbRecord.FromString(part))
            part = b""
    return records


def items(entries) -> dict:
    return {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in entries}


@dataclass(frozen=True)
class Told:
    """What the one W&B run in a run's folder says."""

    records: list[WandbRecord]
    files: Path

    def kind(self, name: str) -> list:
        return [getattr(record, name) for record in self.records if record.HasField(name)]

    @property
    def start(self):
        (start,) = self.kind("run")
        return start

    @property
    def config(self) -> dict:
        return items(self.start.config.update)

    @property
    def history(self) -> list[dict]:
        """Rows along trainer/step, without what W&B adds."""
        rows = [items(row.item) for row in self.kind("history")]
        return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows if "trainer/step" in row]

    @property
    def summary(self) -> dict:
        found: dict = {}
        for row in self.kind("summary"):
            found |= items(row.update)
        return found


def told(folder: Path) -> Told:
    (found,) = (folder / "wandb").glob("*run-*/*.wandb")
    return Told(datastore(found), found.parent / "files")


def write_run(experiment: Path, config: dict, state: str = "done", done: int = 4, ending: str = "0123abcd") -> Path:
    """A run that trained `done` steps and, when it is done, was evaluated; with an evaluation on the way after two steps."""
    folder = experiment / "runs" / f"{config['arm_name']}-{config['loophole']['name']}-s{config['seed']}-{ending}"
    freeze(folder, config)
    write_json(folder / "provenance.json", {"commit": "c" * 40, "diff": "", "host": "my-machine", "argv": ["/home/me/x.py"]})
    cause = {"collapsed": {"cause": "format below 0.2"}, "failed": {"error": "FileNotFoundError: /home/me/x"}}
    write_json(folder / "status.json", {"state": state, "host": "my-machine"} | cause.get(state, {}))
    Record(folder / "metrics.jsonl").append([{"step": s, "train/reward": s / 10, "train/format": 1.0} for s in range(done)])
    Record(folder / "audit.jsonl").append([{"step": s, "audit/hack": s / 10, "audit/solve": 0.5, "audit/hack_held_out": None}
                                           for s in range(done)])
    Record(folder / "rollouts.jsonl").append([{"step": s, "completion": f"c{s}"} for s in range(done)])
    ends = {"base": 0.1, f"step-{2:06d}-as_deployed": 0.7} | ({"as_trained": 0.9, "as_deployed": 0.3} if state == "done" else {})
    for name, rate in ends.items():
        rates = {"hack": rate, "hack_known": rate, "hack_held_out": None, "solve": 1 - rate, "format": 1.0}
        write_json(folder / "eval" / f"{name}.json", {"rates": rates, "rows": []})
    write_json(folder / "eval" / "obfuscation.json", {"monitors": {}, "scores": {}})  # what other commands keep there
    return folder
