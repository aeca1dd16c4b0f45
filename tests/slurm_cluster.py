"""A real Slurm of five nodes on this host, for tests: munged, slurmctld and five slurmd in a directory of their own."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NODES = tuple(f"127.0.0.{number}" for number in range(1, 6))
QUIET, DISTURBED = NODES[:2], NODES[2:]  # of these one fails
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
FirstJobId={first_job}
GresTypes=gpu
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def why_not() -> str:
    """The reason why no Slurm can be started here; empty when it can."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "setpriv") if shutil.which(name) is None]
    if "SLURM_JOB_ID" in os.environ:
        return "inside a Slurm job already"
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    if missing and not Path("/etc/debian_version").exists():
        return f"no {', '.join(missing)}: make test installs Slurm on Debian and its kin only"
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge (make test tries it)"
    return ""


def wait_for(happens: Callable[[], object], what: str, seconds: float = 60, pause: float = 0.1):
    """Poll until `happens()` is true and return that; AssertionError that names `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(pause)
    return found


class Cluster:
    """Five nodes of eight made-up cores and two made-up GPUs each; jobs of the partition `urgent` preempt those of
    `all`. `folder` gets keys, state, logs; `close` ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons, self.nodes = folder, [], {}
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        controller, *ports = free_ports(1 + len(NODES))
        text = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            port=controller,
            first_job=random.SystemRandom().randrange(1000, 50000),  # ports of jobs come from their numbers
        )
        for node, port in zip(NODES, ports, strict=True):
            where = f"NodeName={node} NodeHostname={node} NodeAddr={node} Port={port}"
            text += f"{where} CPUs=8 RealMemory=2000 Gres=gpu:2\n"
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        try:
            self._start()
        except BaseException as error:
            self.close()
            error.add_note("\n".join(log.read_text()[-2000:] for log in folder.glob("*.log")))
            raise

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        names = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            (self.folder / f"spool.{node}").mkdir()
            self.start_node(node)
        idle = ["sinfo", "--partition=all", "--noheader", "--Node", "--states=idle", "--format=%N"]
        wait_for(lambda: self.run(*idle, check=False).split() == [*NODES], "idle nodes")

    def start_node(self, node: str) -> None:
        self.nodes[node] = self._daemon("slurmd", "-D", "-N", node)

    def fail_node(self, node: str) -> None:
        """Kill all that runs on a node at once, as when its power is lost."""
        self.nodes.pop(node).kill()
        mine = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder / 'slurm.conf'}"}
        tasks, parents = [], set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile
                if mine <= {*(process / "environ").read_text(errors="replace").split("\0")}:
                    tasks.append(int(process.name))
                    parent = re.search(r"PPid:\t(\d+)", (process / "status").read_text())[1]
                    if Path("/proc", parent, "comm").read_text() == "slurmstepd\n":
                        parents.add(int(parent))
        for number in (*parents, *tasks):  # a slurmstepd would tell of its tasks' end
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def revive(self) -> None:
        """Start what has ended by itself: slurmd 22.05 may crash ("double free") when two jobs begin at once."""
        for node, daemon in self.nodes.items():
            if daemon.poll() is not None:
                self.start_node(node)

    def _daemon(self, name: str, *arguments: str) -> subprocess.Popen:
        """In the foreground and gone with us, however we go."""
        path = shutil.which(name)
        log = (self.folder / f"{name}.log").open("a")
        command = ["setpriv", "--pdeathsig", "TERM", path, *arguments]
        self.daemons.append(subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log))
        return self.daemons[-1]

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """-> what a command printed, with this cluster's Slurm around it. AssertionError when it fails."""
        env = {**self.environment, **environment}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout + done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows of it: JobState, Restarts, ExitCode, ..."""
        self.revive()
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait_until(self, number: str, state: str, seconds: float = 60) -> dict[str, str]:
        self.wait_for_job(number, seconds, JobState=state)
        return self.job(number)

    def wait_for_job(self, number: str, seconds: float = 90, **expected: str) -> None:
        def happens():
            told = self.job(number)
            return all(told.get(name) == value for name, value in expected.items())

        wait_for(happens, f"job {number} to be {expected}", seconds, pause=0.5)  # asking costs more than looking

    def close(self) -> None:
        if len(self.daemons) > 1:
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            end = time.monotonic() + 15
            while self.run("squeue", "-h", check=False) and time.monotonic() < end:
                time.sleep(0.1)
        for daemon in reversed(self.daemons):  # munged last: the others speak through it
            daemon.terminate()
            daemon.wait(timeout=30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
