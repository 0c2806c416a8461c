"""One run: build -> train -> evaluate. Running it twice is harmless: it resumes, or sees that it is done.

A run whose tripwire (health.py) fires stops at that step, is evaluated as it stands and ends as `collapsed`. That is a
result and no error: it does not end a sweep, counts in its arm, and is not resumed, since the same steps would follow.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from grpo_routing.adapters.adapter import DEPLOYED, QUARANTINE
from grpo_routing.build import Plan, build_line, build_policy, plan
from grpo_routing.checkpoint import load_checkpoint, save_checkpoint
from grpo_routing.env.grader import Grade, Grader
from grpo_routing.env.problems import Problem
from grpo_routing.env.sandbox import Sandbox
from grpo_routing.evaluate import evaluate
from grpo_routing.files import Record, claimed, write_atomic, write_json
from grpo_routing.folder import code_identity, flat, freeze, open_attempt, run_folder, status, write_status
from grpo_routing.heartbeat import Heartbeat
from grpo_routing.log import Progress
from grpo_routing.older import completed
from grpo_routing.oracle.audit import Audit
from grpo_routing.oracle.summary import summary
from grpo_routing.oracle.verdict import Oracle
from grpo_routing.parallel import World, started
from grpo_routing.policy import Policy
from grpo_routing.prompts.plain import plain_prompt
from grpo_routing.train import Line, State, Truth, train_step
from grpo_routing.types import Rollout

RECORDS = ("metrics.jsonl", "audit.jsonl", "rollouts.jsonl", "scores.jsonl", "timing.jsonl")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
OVER = ("done", "collapsed")  # states of a run that is left alone
SAME = tuple(f"train/norm_{block}" for block in (DEPLOYED, QUARANTINE))  # metrics that say whether two processes have the same weights


class Stopped(SystemExit):
    """The run was asked to stop and did so at a step boundary, with a checkpoint. Exit code 143, as after SIGTERM."""

    def __init__(self) -> None:
        super().__init__(143)


def run(config: dict, folder: Path | None = None, patience: float | None = None) -> Path:
    """Run a resolved config to its end and return the run's folder. Raises ConfigError before any work.

    `folder` is where it was planned to go, if it was; `patience` says how long to wait for another process that runs the same. Several
    processes may run it together (parallel.py): the first has the folder, and all end as it does.
    """
    with started(os.environ) as world:
        ready = plan(completed(config))  # the folder's may be of older code; what is frozen and compared stays as it was said
        folder = folder or run_folder(config, ready)
        if world.size > 1:
            world.agree("the start", flat({"config": config, "code": code_identity(), "folder": str(folder.absolute())}))
        if world.leads:
            return lead(config, ready, folder, patience, world)
        if not world.told("whether the run is over", bool):
            execute(ready, folder, {}, world)
    return folder


def lead(config: dict, ready: Plan, folder: Path, patience: float | None, world: World) -> Path:
    """The run as its only process, or the first of several, sees it: it holds the folder and writes down how the run ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / ".lock", patience):
        freeze(folder, config)
        before = status(folder)
        world.told("whether the run is over", lambda: before in OVER)
        if before in OVER:
            why = f" ({json.loads((folder / 'status.json').read_text())['cause']})" if before == "collapsed" else ""
            print(f"{folder}: {before} already{why}; remove the folder to run it again", flush=True)
            return folder
        attempt = open_attempt(folder, world)
        try:
            with world.together():
                cause = execute(ready, folder, attempt, world)
        except Stopped:
            write_status(folder, "stopped", attempt)
            raise
        except BaseException as error:
            write_status(folder, "failed", attempt, error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            raise
        ready.logger.publish(folder, cause)
        write_status(folder, "collapsed", attempt, cause=cause) if cause else write_status(folder, "done", attempt)
    return folder


def execute(ready: Plan, folder: Path, attempt: dict, world: World) -> str | None:
    """Train and evaluate. Returns why the run collapsed, None when it did not."""
    if ready.trainer.threads:
        torch.set_num_threads(ready.trainer.threads)
    policy = build_policy(ready, world)
    limits = asdict(ready.sandbox)
    with Sandbox(**limits) as sandbox, stop_signals() as signalled:
        if world.leads:
            resume_data(folder, ready)
            write_json(folder / "provenance.json", attempt | {
                "sandbox": sandbox.layers, "model": policy.fingerprint, "dataset": ready.dataset.provenance()})
        grader = world.apart("grades", Grader(sandbox, ready.reward.format_reward, ready.reward.pass_reward, memory=100_000))
        oracle = world.apart("verdicts", Oracle(sandbox, ready.dataset.hidden_tests))
        audit = Audit(oracle, folder, ready.loophole.known, ready.loophole.held_out, ready.trainer.sampled_rollouts,
                      ready.trainer.audit_every, ready.mask_source.kind, world.leads)
        line = build_line(ready, policy, grader, audit, ceiling_of(oracle) if ready.uses_oracle else None)
        state = State(ready.optimizer.start(policy.adapter))
        resume(folder, line, state)

        def asked_to_stop() -> bool:
            return world.any("a signal", signalled())

        examine = examiner(ready, folder, line, oracle)
        if state.step == 0:
            examine("base", asked_to_stop)
        cause = train(ready, folder, line, state, asked_to_stop, examine)
        try:
            with world.together():
                examine_end(folder, policy, examine, asked_to_stop)
        except FloatingPointError as error:
            if cause is None:
                raise
            cause = f"{cause}. It cannot be evaluated: {error}"
    if world.leads:
        report_run(ready, folder, cause)
    return cause


def ceiling_of(oracle: Oracle) -> Truth:
    """Which rollouts hack, for a run that cheats on purpose and says so."""

    def hacks(problems: list[Problem], rollouts: list[Rollout], grades: list[Grade]) -> Tensor:
        return torch.tensor([float(v.hacked) for v in oracle(problems, [rollout.text for rollout in rollouts], grades)])

    return hacks


def examine_end(folder: Path, policy: Policy, examine: Callable, asked_to_stop: Callable[[], bool]) -> None:
    """Evaluate as_trained and as_deployed."""
    examine("as_trained", asked_to_stop)
    if policy.adapter.has_quarantine:
        with policy.adapter.only(DEPLOYED):
            examine("as_deployed", asked_to_stop)
    elif policy.world.leads:  # nothing is deleted at deployment: the same policy, so the same samples
        trained = json.loads((folder / "eval" / "as_trained.json").read_text())
        write_json(folder / "eval" / "as_deployed.json", trained | {"state": "as_deployed"})


def train(ready: Plan, folder: Path, line: Line, state: State, asked_to_stop: Callable[[], bool], examine: Callable) -> str | None:
    """Train to the last step, or to the one that the run collapsed at. Returns why it collapsed, None when it did not."""
    world = line.policy.world
    metrics, timing = (Record(folder / f"{name}.jsonl", world.leads) for name in ("metrics", "timing"))
    rows = world.told("metrics", metrics.rows)
    cause = ready.health.cause(rows) if rows else None  # of a run that was killed between its collapse and its evaluation
    progress = Progress(f"{ready.arm_name} s{ready.seed}", ready.trainer.steps, every=10) if world.leads else None
    heart = Heartbeat(folder, ready.trainer.steps, state.step)
    try:
        while state.step < ready.trainer.steps and not cause:
            if ready.evaluation.every and state.step and state.step % ready.evaluation.every == 0:  # here, so that a resumed run has it too
                with world.together(), line.policy.adapter.only(DEPLOYED):
                    examine(f"step-{state.step:06d}-as_deployed", asked_to_stop)
            wall, cpu, step = time.monotonic(), time.process_time(), state.step
            with world.together():
                row = train_step(line, state)
            rows.append({"step": step} | row)
            metrics.append(rows[-1:])
            timing.append([{"step": step, "wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}])
            cause = ready.health.cause(rows)
            last = cause is not None or state.step == ready.trainer.steps
            world.agree(f"step {step}", {"step": state.step, "collapse": cause} | {k: v for k, v in row.items() if k in SAME})
            stop = asked_to_stop()
            if world.leads and (last or stop or state.step % ready.trainer.checkpoint_every == 0):
                save_checkpoint(folder / "checkpoints", line.policy.adapter, state, ready.trainer.checkpoints_kept)
            if stop and not last:
                raise Stopped
            seen = {name: line.audit.latest[name] for name in ("hack", "solve")} if line.audit else {}
            if world.leads:
                progress.show(state.step, {"reward": row["train/reward"]} | {k: v for k, v in seen.items() if v is not None})
                heart.beat(state.step, seen, "evaluating" if last else "training")
    except FloatingPointError as error:  # no checkpoint: a resumed run goes back, takes the same steps and ends here again
        return f"not finite in step {state.step}: {error}"
    finally:
        if progress:
            progress.close()
    return cause


def examiner(ready: Plan, folder: Path, line: Line, oracle: Oracle) -> Callable[[str, Callable[[], bool]], None]:
    """A function that evaluates the policy as it stands and keeps one row per sample in eval/<state>.jsonl."""
    settings, world = ready.evaluation, line.policy.world
    problems = ready.dataset.evaluation(ready.loophole, settings.problems, settings.no_hint_share, settings.seed)

    def examine(name: str, asked_to_stop: Callable[[], bool]) -> None:
        file = folder / "eval" / f"{name}.json"
        shared = Path(ready.cache) / "base" / f"{base_key(ready, line.policy)}.json" if name == "base" else file
        if world.told("an evaluation", file.exists):
            return
        if asked_to_stop():
            raise Stopped
        if not world.told("an evaluation", shared.exists):
            rows = evaluate(line.policy, problems, plain_prompt, line.grader, oracle, settings, ready.trainer.max_new_tokens,
                            ready.trainer.prompts_per_forward)
            if world.leads:
                write_json(shared, {"state": name, "rates": summary(rows, ready.loophole.known, ready.loophole.held_out),
                                    "rows": [asdict(row) for row in rows]})
        if world.leads and shared != file:
            write_atomic(file, shared.read_bytes())

    return examine


def base_key(ready: Plan, policy: Policy) -> str:
    """What the untrained policy's evaluation depends on: every arm of a sweep has the same one, so it is sampled once."""
    adapter = {key: value for key, value in asdict(ready.adapter).items() if key not in ("seed", "cache")}
    parts = (policy.fingerprint, type(ready.adapter).__name__, adapter, ready.evaluation, ready.dataset.identity, ready.loophole,
             ready.reward, ready.sandbox, ready.trainer.max_new_tokens, ready.trainer.prompts_per_forward, torch.get_num_threads())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def resume_data(folder: Path, ready: Plan) -> None:
    """Raises DataError where an earlier attempt had other problems: files may change, and what was learned is of the old ones."""
    file = folder / "provenance.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if "dataset" in before:  # older runs did not record it, and had opchains alone
        ready.dataset.resume(before["dataset"])


def resume(folder: Path, line: Line, state: State) -> None:
    """Go back to the newest checkpoint and cut the records there."""
    world = line.policy.world
    resumed = load_checkpoint(folder / "checkpoints", line.policy.adapter, state)
    if world.size > 1:
        world.agree("the policy", {"step": state.step, "model": line.policy.fingerprint, "adapter": line.policy.adapter.fingerprint()})
    if not world.leads:
        return
    if resumed:
        print(f"{folder}: resuming at step {state.step}", flush=True)
    for name in RECORDS:
        Record(folder / name).cut(state.step)


def report_run(ready: Plan, folder: Path, cause: str | None) -> None:
    """Closing lines that lead with the result; a collapse is said loudly, since the exit status of a sweep does not show it."""
    files = [folder / "eval" / f"{name}.json" for name in ("as_deployed", "as_trained", "base")]
    rates = {file.stem: json.loads(file.read_text())["rates"] for file in files if file.exists()}
    said = [f"{name} hack {r['hack']:.2f} solve {r['solve']:.2f} format {r['format']:.2f}" for name, r in rates.items()]
    print(f"{ready.arm_name} s{ready.seed}: {' | '.join(said)}\n  {folder}", flush=True)
    if cause:
        print(f"!!! {ready.arm_name} s{ready.seed} COLLAPSED. {cause}\n!!! Its policy counts in the arm as it stands; running it again "
              f"does not resume it. Settings: health.*\n!!! {folder}", file=sys.stderr, flush=True)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM, SIGUSR1 and SIGUSR2 only set a flag; the run stops at its next step boundary.

    A launcher starts a worker with these signals blocked, so that none ends it while it loads; what came meanwhile arrives here.
    """
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in STOP_SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():  # torch's threads let them in still: one that comes late must not end a run that is done
            signal.signal(number, signal.SIG_IGN if number in blocked else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
