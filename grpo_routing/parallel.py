"""One run in several processes, one per GPU: data-parallel over rollouts with torch.distributed, under torchrun, srun or the launchers.

    shared out   sampling by whole groups, grading and judging by rollout, the gradients' backwards by rollout
    gathered     rollouts, grades, verdicts: in the one order, so whatever reads a whole batch sees the batch of a run in one process
    summed       what was computed about gradients: sums, inner products, lengths
    repeated     the rest (labels, fits, projection, optimizer) in every process; where rounding could differ, the first one's is taken
    written      by the first process alone

Randomness is named by rollout and not by process, so the same ids are sampled whatever the number of processes. Sums are added in another
order, so weights agree to rounding. In one process nothing here does anything, and torch.distributed is not loaded.

No process waits for one that has failed. Every exchange begins with a word from everyone, and one that fails says why in place of its
next word: all raise that error, and so come to the same end. A process that is gone without a word closes its connection; one that
hangs is given up after PATIENCE.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # the longest that one process may work while the others wait, such as grading or making the organism
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORTS = range(10_000, 30_000)  # below the kernel's ephemeral ports


class ProcessLost(RuntimeError):
    """Another process of the run is gone, or did not answer in time."""


class Disagreement(RuntimeError):
    """The processes of a run do not do the same."""


@dataclass(frozen=True)
class Word:
    """What a process says at an exchange. `error` is a pickled exception and its text with traceback, of a process that failed."""

    at: str
    value: Any = None
    error: tuple[bytes | None, str] | None = None


class World:
    """The processes of a run. `rank` is this one's number, `size` how many there are."""

    def __init__(self, rank: int = 0, size: int = 1, device: int = 0) -> None:
        self.rank, self.size, self.device, self.lost = rank, size, device, False

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process' part of the items: neighbours stay together, and no part is more than one longer than another."""
        return list(items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size])

    def joined(self, at: str, own: list[T]) -> list[T]:
        """The items of all processes, in the order that `share` had them in."""
        return own if self.size == 1 else [item for part in self._exchange(Word(at, own)) for item in part]

    def apart(self, at: str, judge: Callable[..., list]) -> Callable[..., list]:
        """`judge`, which gives one answer per row of its columns, asked about each row in one process."""
        return judge if self.size == 1 else lambda *columns: self.joined(at, judge(*map(self.share, columns)))

    def any(self, at: str, flag: bool) -> bool:
        return flag if self.size == 1 else any(word for word in self._exchange(Word(at, flag)))

    def told(self, at: str, ask: Callable[[], T]) -> T:
        """What the first process, which alone is asked, finds: such as whether a file is there."""
        return self.first(at, ask() if self.leads else None)

    def first(self, at: str, value: T) -> T:
        """The first process' value, its tensors on this one's device."""
        if self.size == 1:
            return value
        self._exchange(Word(at))
        sent, own = [None], io.BytesIO()
        if self.leads:
            torch.save(value, own)
            sent = [own.getvalue()]
        self._distributed(lambda distributed: distributed.broadcast_object_list(sent, 0))
        return value if self.leads else torch.load(io.BytesIO(sent[0]), self._own_device, weights_only=False)

    def sum(self, at: str, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.sums(at, {at: tensor})[at]

    def sums(self, at: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of tensors of one kind, at once."""
        if self.size == 1:
            return tensors
        self._exchange(Word(at))
        total = torch.cat([tensor.flatten() for tensor in tensors.values()])
        self._distributed(lambda distributed: distributed.all_reduce(total))
        parts = total.split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(tensors.items(), parts)}

    def agree(self, at: str, facts: Mapping[str, object]) -> None:
        """Raises Disagreement, with both values, when a fact is not the same in every process."""
        if self.size == 1:
            return
        first, *others = self._exchange(Word(at, dict(facts)))
        for rank, other in enumerate(others, 1):
            for name in [*first, *(other.keys() - first.keys())]:
                mine, its = (repr(side.get(name, "nothing")) for side in (first, other))
                if mine != its:  # as text: nan agrees with nan
                    raise Disagreement(f"{at}: {name} is {mine} in process 0 and {its} in process {rank}; the processes of a run must do "
                                       f"the same. Start all of them with the same words, code and files")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, an error of one process is raised in all of them, so that all may go on alike."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not self.lost and not getattr(error, "told", False):
                error.told = True
                self._exchange(Word("an error", None, (_pickled(error), "".join(traceback.format_exception(error)))))
            raise

    def _exchange(self, own: Word) -> list[Any]:
        """What everyone says, by rank. Raises what another process failed with, or Disagreement when they are at different places."""
        words: list[Word] = [own] * self.size
        self._distributed(lambda distributed: distributed.all_gather_object(words, own))
        if own.error:
            return []
        for rank, word in enumerate(words):
            if word.error:
                raise _revived(word.error, rank)
        if len({word.at for word in words}) > 1:
            error = Disagreement("the processes are at different places: " + ", ".join(f"{rank} at {w.at}" for rank, w in enumerate(words)))
            error.told = True
            raise error
        return [word.value for word in words]

    def _distributed(self, call: Callable[[Any], None]) -> None:
        if self.lost:
            raise ProcessLost("another process of the run is gone")
        import torch.distributed

        try:
            call(torch.distributed)
        except RuntimeError as error:
            self.lost = True
            raise ProcessLost(f"process {self.rank} of {self.size} lost another one, which was killed or did not answer within "
                              f"{PATIENCE}: {str(error).splitlines()[0]}. Its own output says why, if it could") from error

    def _own_device(self, storage: Any, location: str) -> Any:
        return storage if location == "cpu" else storage.cuda(self.device)


ALONE = World()


def _pickled(error: BaseException) -> bytes | None:
    try:
        pickle.loads(whole := pickle.dumps(error))
    except Exception:  # a library's error may raise anything while it is taken apart; its text still arrives
        return None
    return whole


def _revived(said: tuple[bytes | None, str], rank: int) -> BaseException:
    """The error of another process, as its own kind where that can be sent."""
    whole, text = said
    error = pickle.loads(whole) if whole else RuntimeError(text.strip().splitlines()[-1])
    error.add_note(f"raised in process {rank}:\n{text}")
    error.told = True
    return error


# ------------------------------------------------------------------------------------------------ who starts them


@dataclass(frozen=True)
class Place:
    """A process' place among those of its run, as whoever started it says."""

    rank: int
    size: int
    local: int  # number among those on this machine
    address: str  # where the processes meet
    port: int
    hosted: bool  # somebody else listens there

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"expected a process number below the number of processes; got {self.rank} of {self.size}")


def place_of(environment: Mapping[str, str]) -> Place | None:
    """From the variables of torchrun, or of srun; None for a run in one process. Raises ValueError where some are missing.

    A batch script has SLURM's variables of the job; only what srun starts has those of a step.
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environment]:
            raise ValueError(f"WORLD_SIZE={environment['WORLD_SIZE']} says several processes, and {', '.join(missing)} is not set; start "
                             f"them with torchrun --nproc-per-node N -m grpo_routing …")
        return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"]), environment["MASTER_ADDR"],
                     int(environment["MASTER_PORT"]), environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in environment:
        if int(environment["SLURM_STEP_NUM_NODES"]) > 1 and "MASTER_ADDR" not in environment:
            raise ValueError("srun started processes on several nodes and MASTER_ADDR does not say where they meet; before srun: "
                             "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)")
        number = int(environment["SLURM_JOB_ID"]) * 8 + int(environment["SLURM_STEP_ID"])
        return Place(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_LOCALID"]),
                     environment.get("MASTER_ADDR", "127.0.0.1"),
                     int(environment.get("MASTER_PORT", PORTS[number % len(PORTS)])), False)
    return None


@contextmanager
def started(environment: Mapping[str, str]) -> Iterator[World]:
    """The processes of this run, connected; ALONE when there is one. An error of one ends all of them."""
    place = place_of(environment)
    if place is None:
        yield ALONE
        return
    import torch.distributed

    world = World(place.rank, place.size, connect(place))
    try:
        with world.together():
            yield world
    finally:
        if not world.lost:
            try:  # the first process has written how it ended: whoever started us ends all once one has ended
                world._exchange(Word("the end"))
            except (ProcessLost, Disagreement):
                pass
        torch.distributed.destroy_process_group()


def connect(place: Place) -> int:
    """Meet the other processes; returns the number of this one's GPU. Tensors on a GPU are summed by nccl, everything else goes by gloo.

    On one machine nothing listens beyond its loopback. Raises ProcessLost when not all come.
    """
    import torch.distributed as distributed

    address = "127.0.0.1" if place.address in LOOPBACK else place.address
    listening = None
    if place.address in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if place.rank == 0 and not place.hosted:  # bound here, because a store of torch's own listens on every address
        try:
            listening = socket.create_server((address if place.address in LOOPBACK else "", place.port)).detach()
        except OSError as error:
            raise OSError(f"expected to listen on {address}:{place.port} for the other processes, but {error}. Set MASTER_PORT to a free "
                          f"port") from error
    device, backend = 0, "gloo"
    if torch.cuda.is_available():
        device, backend = place.local % torch.cuda.device_count(), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        store = distributed.TCPStore(address, place.port, place.size, listening is not None, PATIENCE, master_listen_fd=listening)
        store = distributed.PrefixStore(f"grpo_routing/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE)
    except RuntimeError as error:
        raise ProcessLost(f"process {place.rank} expected {place.size} processes to meet at {address}:{place.port}, but "
                          f"{str(error).splitlines()[0]}. Start all of them, within {PATIENCE}") from error
    return device
