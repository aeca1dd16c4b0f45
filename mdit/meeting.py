"""The processes of a run meet, work as one, and learn of each other's end.

They meet at a store that rank 0, or torchrun, keeps at MASTER_ADDR:MASTER_PORT. Whoever waits says after NOTICE seconds
what for, and gives up after PATIENCE. Later the store carries the last line of a rank that ends by an error; the others
notice its end by their connections and tell that line as their own last one, in place of a traceback.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
import torch.distributed.nn.functional  # keeps the group that is there as it is imported, with its threads: none here
from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

from mdit.dist import World, cores, enumerated, logger, number, on_all_ranks, set_rendezvous, shared, work_on
from mdit.documents import UserError, explain, parse_json

NOTICE = 10.0  # seconds
PATIENCE = 300.0  # for processes that are still to come: nodes start, and read their packages, at different speeds
FAREWELL = 5.0  # for the others to notice that one has ended
COLLECTIVE = timedelta(minutes=30)
RECORDED = "2000"  # collectives that torch's flight recorder remembers, for the watchdog; some releases have 0
T = TypeVar("T")


@dataclass(frozen=True)
class Meeting:
    """The store at which the processes have met, and the hosts they are on."""

    store: PrefixStore | HashStore
    hosts: Sequence[str]
    address: tuple[str, int] | None = None


_meeting: Meeting | None = None  # as torch's own default group: there is one in a process


def _met() -> Meeting:
    assert _meeting is not None, "behind init_distributed only"
    return _meeting


@contextmanager
def joined(world: World, plan: Callable[[], Any] = lambda: None) -> Iterator[Any]:
    """All that the processes of a run do together: gives what `plan` returns, once it has returned on every rank.

    An error of `plan` on any rank is raised on all. Inside, a rank that ends by an error leaves its line to the others,
    and these raise UserError with that line when they lose their connection, or naming the rank that left none.
    """
    value, failed = None, None
    try:
        work_on(world.device)
        value = plan()
    except (UserError, OSError) as error:
        failed = error
    try:
        init_distributed(world, failed)
        yield value
    except BaseException as error:
        if _meeting is None:  # nobody else is there
            raise
        leaving = threading.Thread(target=leave, args=(world.device,), daemon=True)
        leaving.start()  # closes the connections, which the others notice; a GPU that hangs would keep it for ever
        reason = part_from(world, error) if world.size > 1 else None
        leaving.join(FAREWELL)
        if reason is not None:
            raise reason from error
        raise
    leave(world.device)


def leave(device: torch.device) -> None:
    """Leave the process group, if it has come to one."""
    work_on(device)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def init_distributed(world: World, failed: Exception | None = None) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs). One process alone gets a group of one, on no open port.

    Several meet at MASTER_ADDR:MASTER_PORT, which deepspeed and torchrun set; under srun, what is not set is found
    (`set_rendezvous`). Raises UserError where they do not meet, where a node has more processes than GPUs, and
    where any rank comes with the error for which it cannot start, `failed`.
    """
    global _meeting
    _meeting = None
    on_gpu = world.device.type == "cuda"
    try:
        work_on(world.device)
        beside = processes_here(world)
    except UserError as error:
        failed = failed or error
    if failed is not None and world.size == 1:
        raise failed
    meeting = meet(world, failed) if world.size > 1 else Meeting(HashStore(), [socket.gethostname()])
    _meeting = meeting
    local_rank = world.device.index if on_gpu else world.local_rank  # by which DeepSpeed chooses the GPU
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local_rank))
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:  # processes that share a CPU share its cores
        torch.set_num_threads(max(1, cores() // beside))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(
        backend, rank=world.rank, world_size=world.size, store=PrefixStore("group", meeting.store), timeout=COLLECTIVE
    )


def own_store() -> Store:
    """The store at which several processes have met, by a connection that no other thread's waiting blocks."""
    address = _met().address
    assert address is not None
    return PrefixStore(_prefix(), TCPStore(*address, None, is_master=False, wait_for_workers=False))


def processes_here(world: World) -> int:
    """Number of the run's processes on this node."""
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"  # torchrun's, deepspeed's
    return number(name, 1, world.size, least=1)


def meet(world: World, failed: Exception | None = None) -> Meeting:
    """Wait until every process of the run is here. Raises UserError, on all ranks alike as far as they come, when one
    does not, when they do not agree on who they are, and when one comes with an error."""
    here = socket.gethostname()
    try:
        address, store = open_store(world, PATIENCE if failed is None else NOTICE)
    except UserError:
        if failed is None:
            raise
        raise failed from None  # nobody else is here: this process tells it itself
    line = failed and (explain(failed) if world.is_rank_zero else f"{explain(failed)} (rank {world.rank} on {here})")
    try:
        if store.add(f"number/{world.rank}", 1) > 1:
            raise UserError(f"RANK = {world.rank} on {here}: another process has it; give each of {world.size} its own")
        store.set(f"here/{world.rank}", json.dumps({"host": here, "size": world.size, "error": line}))
        outcome = _call_the_roll(world, store, line) if world.is_rank_zero else _wait_for_roll(world, store, failed)
    except DistError:
        where = f"MASTER_ADDR = {address[0]}, MASTER_PORT = {address[1]}"
        gone = UserError(f"rank 0 at {where} has ended, or was cut off, before all processes had met")
        raise failed or gone from None
    if outcome["error"]:
        raise shared(outcome["error"])
    if outcome["size"] != world.size:
        raise UserError(f"WORLD_SIZE = {world.size} for rank {world.rank} on {here}, but {outcome['size']} for rank 0")
    return Meeting(store, outcome["hosts"], address)


def _call_the_roll(world: World, store: Store, line: str | None) -> dict[str, Any]:
    """Rank 0's part: hear of every rank, and let all know how that ended."""
    missing, heard, patience = set(range(world.size)), {}, Patience(PATIENCE)
    while missing and not line:
        for rank in sorted(missing):
            if store.check([f"here/{rank}"]):
                heard[rank] = parse_json(store.get(f"here/{rank}"), "the store")
                missing.remove(rank)
                line = line or heard[rank]["error"]
        absent = f"{enumerated('rank', missing)}, not here yet; WORLD_SIZE = {world.size}"
        if missing and not line and patience.over(absent):
            minutes = f"{PATIENCE / 60:.0f} minutes"
            line = f"waited {minutes} for {absent}: is each started, with the same MASTER_ADDR and MASTER_PORT?"
    hosts = [heard[rank]["host"] for rank in range(world.size)] if not missing else []
    outcome = {"size": world.size, "error": line, "hosts": hosts}
    store.set("met", json.dumps(outcome))
    if line:  # the store ends with this process: let others read it
        patience = Patience(FAREWELL, says=False)
        while store.add("read", 0) < world.size - 1 and not patience.over("the others"):
            pass
    return outcome


def _wait_for_roll(world: World, store: Store, failed: Exception | None) -> dict[str, Any]:
    patience = Patience((PATIENCE if failed is None else 0.0) + NOTICE, says=world.rank == 1)  # one is enough
    while not store.check(["met"]):
        if patience.over("rank 0, which has not come or waits for others"):
            raise failed or UserError(f"waited {PATIENCE / 60:.0f} minutes for rank 0, which has not come")
    outcome = parse_json(store.get("met"), "the store")
    store.add("read", 1)
    return outcome


def open_store(world: World, seconds: float) -> tuple[tuple[str, int], PrefixStore]:
    """The store at MASTER_ADDR:MASTER_PORT, kept there by rank 0 or by torchrun. Raises UserError when it cannot be
    opened or reached within `seconds`."""
    address, port = set_rendezvous(world)
    keeps = world.is_rank_zero and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options: dict[str, Any] = {"is_master": keeps, "wait_for_workers": False, "timeout": timedelta(seconds=seconds)}
    if keeps:
        try:
            listening = listen(port)
        except OSError as error:
            where = f"on {socket.gethostname()}, where rank 0 is"
            raise UserError(f"MASTER_PORT = {port}: cannot be opened {where}: {explain(error)}") from None
        options["master_listen_fd"] = listening.detach()
    reach(world, address, port, min(seconds, NOTICE) if keeps else seconds)

    def open_it() -> Store | None:
        with suppress(DistError):
            return TCPStore(address, port, None, **options)
        return None

    opened = within(seconds, open_it)  # it waits for ever where something else is listening
    if opened is None:
        raise UserError(f"MASTER_ADDR = {address}, MASTER_PORT = {port}: what answers there is no process of this run")
    return (address, port), PrefixStore(_prefix(), opened)


def within(seconds: float, function: Callable[[], T]) -> T | None:
    """The result of `function`, called in a thread; None where it does not come in time."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(function()), name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _prefix() -> str:
    """Before all keys: torchrun's store outlives the processes."""
    return f"mdit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def listen(port: int) -> socket.socket:
    """A socket that takes connections from anywhere, by IPv6 and IPv4 as far as there are."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def reach(world: World, address: str, port: int, seconds: float) -> None:
    """Wait until something answers there. Raises UserError."""
    patience = Patience(seconds)
    while (reason := answer(address, port)) is not None:
        where = f"rank 0 at MASTER_ADDR = {address}, MASTER_PORT = {port} ({reason})"
        if patience.over(f"{where}, which rank {world.rank} on {socket.gethostname()} does not reach"):
            raise UserError(f"rank {world.rank} on {socket.gethostname()} does not reach {where}")


def answer(address: str, port: int) -> str | None:
    """None where something answers, else why nothing does."""
    try:
        socket.create_connection((address, port), timeout=NOTICE).close()
    except (OSError, UnicodeError) as error:
        return explain(error)
    return None


class Patience:
    """Waiting, in a loop around `over`: says after NOTICE seconds what is waited for, ends after `seconds`."""

    def __init__(self, seconds: float = float("inf"), *, says: bool = True) -> None:
        self.began, self.seconds, self.notice = time.monotonic(), seconds, NOTICE if says else float("inf")

    def over(self, what: str) -> bool:
        """Sleep a moment -> whether the time is over."""
        waited = time.monotonic() - self.began
        if waited > self.notice:
            logger.warning(f"waiting for {what}")
            self.notice = float("inf")
        time.sleep(0.05 if waited < 5 else 0.5)
        return waited > self.seconds


def while_others_wait(world: World, what: str, function: Callable[[], None]) -> None:
    """Call `function` on rank 0, however long it takes. A collective: raises on all ranks what is raised there."""

    def work() -> None:
        try:
            function()
        finally:
            _met().store.set(f"done/{what}", "1")

    def wait() -> None:
        patience = Patience()
        while not _met().store.check([f"done/{what}"]):
            patience.over(f"rank 0 on {_met().hosts[0]}, which {what}")

    on_all_ranks(world, work if world.is_rank_zero else wait)


def part_from(world: World, error: BaseException) -> UserError | None:
    """Leave this rank's error to the others -> theirs, where this one is only that their connections are lost."""
    if getattr(error, "all_ranks_have_it", False):
        return None
    lost = isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    here, meeting = socket.gethostname(), _met()
    store: Any = meeting.store  # whose type lacks `append`
    try:
        if meeting.address is None or answer(*meeting.address) is not None:
            raise DistError("no store")
        store.append("ended", f"{world.rank} ")
        if not lost:
            line = "interrupted" if isinstance(error, KeyboardInterrupt) else explain(error)
            mine = f"rank {world.rank} on {here} has ended: {line}"
            told = store.compare_set("reason", "", mine).decode()
            if not isinstance(error, KeyboardInterrupt):  # which rank 0 tells, whoever has it first
                vars(error)["told_elsewhere"] = told != mine and told.endswith(f": {line}")
        patience, ended = Patience(2 * FAREWELL if world.is_rank_zero else FAREWELL, says=False), set()
        while not patience.over("the others") and len(ended) < world.size and (lost or world.is_rank_zero):
            ended = set(map(int, store.get("ended").split()))
            if lost and store.check(["reason"]):
                return UserError(store.get("reason").decode())
        missing = set(range(world.size)) - ended
    except DistError:
        missing = {0}
    if not lost:
        return None
    if not missing:
        return UserError(f"the processes have lost their connections: {explain(error)}")
    ranks, hosts = enumerated("rank", missing), dict.fromkeys(meeting.hosts[rank] for rank in sorted(missing)[:8])
    return UserError(f"{ranks} on {', '.join(hosts)}: killed or cut off without a word; what was saved before is there")
