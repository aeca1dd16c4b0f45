"""A real Slurm of two nodes on this host, for tests: munged, slurmctld and two slurmd in a directory of their own."""

import os
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
FirstJobId={first_job}
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={nodes[0]} NodeAddr={nodes[0]} Port={ports[1]} CPUs=8 RealMemory=2000 Gres=gpu:2
NodeName={nodes[1]} NodeHostname={nodes[1]} NodeAddr={nodes[1]} Port={ports[2]} CPUs=8 RealMemory=2000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
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


def wait_for(happens: Callable[[], object], what: str, seconds: float = 60):
    """Poll until `happens()` is true and return that; AssertionError that names `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


class Cluster:
    """Two nodes of eight made-up cores and two made-up GPUs each. `folder` gets keys, state, logs; `close` ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []
        (folder / "state").mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        text = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            nodes=NODES,
            ports=free_ports(3),
            first_job=random.SystemRandom().randrange(1000, 50000),  # ports of jobs come from their numbers
        )
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
            self._daemon("slurmd", "-D", "-N", node)
        idle = ["sinfo", "--partition=all", "--noheader", "--Node", "--states=idle", "--format=%N"]
        wait_for(lambda: self.run(*idle, check=False).split() == [*NODES], "two idle nodes")

    def _daemon(self, name: str, *arguments: str) -> None:
        """In the foreground and gone with us, however we go."""
        path = shutil.which(name)
        log = (self.folder / f"{name}.log").open("a")
        command = ["setpriv", "--pdeathsig", "TERM", path, *arguments]
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """-> what a command printed, with this cluster's Slurm around it. AssertionError when it fails."""
        env = {**self.environment, **environment}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout + done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows of it: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait_until(self, number: str, state: str, seconds: float = 60) -> dict[str, str]:
        wait_for(lambda: self.job(number)["JobState"] == state, f"job {number} to be {state}", seconds)
        return self.job(number)

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
