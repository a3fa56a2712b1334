"""Two hosts on one machine, joined by a link, and a real Slurm on them. Needs root; Slurm's part also its packages.

A host is a network namespace; a program on it has its own host name and /etc/hosts besides. The link is a veth pair.
It may have a rate and a delay: by tc netem where the kernel has it, or else by a relay in this file. By hand:

    # On both hosts; {host} in the command becomes 0 and 1.
    python tests/support/cluster_emulation.py [--rate_mbit 1000 --delay_ms 1] COMMAND
    # On node-a, with a Slurm on both.
    python tests/support/cluster_emulation.py --slurm sbatch --wait FILE
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import itertools
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SLURM_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")

SLURM_CONF = """
ClusterName=two
SlurmctldHost=node-a(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials end after 5 seconds instead of 120: a requeued job waits as long before it may start again.
AuthInfo=cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
KillWait=5
NodeName=node-a NodeAddr=10.77.0.1 CPUs=2 RealMemory=4000
NodeName=node-b NodeAddr=10.77.0.2 CPUs=2 RealMemory=4000
PartitionName=debug Nodes=node-a,node-b Default=YES MaxTime=INFINITE State=UP
"""


def missing(slurm: bool = False) -> str | None:
    """Why two hosts cannot be had here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "nsenter", "unshare", *(SLURM_PROGRAMS if slurm else ())):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = f"probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
        return "ip netns add fails: no right to make network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class TwoHosts(AbstractContextManager["TwoHosts"]):
    """The hosts node-a and node-b, 10.77.0.1 and 10.77.0.2.

    Args:
        rate_mbit: bandwidth of the link each way; None: as fast as the machine.
        delay_ms: delay each way.
    """

    _numbers = itertools.count()

    def __init__(self, rate_mbit: float | None = None, delay_ms: float = 0.0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
        number = next(self._numbers)
        self.spaces = [f"{name}-{os.getpid()}-{number}" for name in NAMES]
        self.slow = (rate_mbit, delay_ms) if rate_mbit is not None else None
        self.link = "veth"
        self._relay: Relay | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoHosts:
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        )
        try:
            for space in self.spaces:
                _do("ip", "netns", "add", space)
                _do("ip", "-n", space, "link", "set", "lo", "up")
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self) -> None:
        a, b = self.spaces
        _do("ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        if self.slow is not None:
            rate, delay = self.slow
            netem = ("root", "netem", "rate", f"{rate}mbit", "delay", f"{delay}ms", "limit", "100000")
            if all(_can("tc", "-n", space, "qdisc", "add", "dev", "eth0", *netem) for space in self.spaces):
                self.link = "veth, tc netem"
            else:
                _do("ip", "-n", a, "link", "del", "eth0")
                self._relay = Relay(self.spaces, rate * 1e6, delay / 1e3)
                self.link = "tun and a relay in place of tc netem, which this kernel lacks"
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            _do("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "up")

    def command(self, host: int, *command: object) -> list[str]:
        """``command`` to be run on a host."""
        inside = f'hostname {NAMES[host]}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        # Not `ip netns exec`: it mounts /sys anew without the control groups that slurmd looks for.
        enter = ("nsenter", f"--net=/run/netns/{self.spaces[host]}", "unshare", "--uts", "--mount")
        return [*enter, "bash", "-c", inside, "bash", *map(str, command)]

    def start(
        self, host: int, *command: object, env: dict[str, str] | None = None, log: Path
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on a host; it ends with this object at the latest."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(host, *command), env=env, stdout=file, stderr=file, start_new_session=True
            )
        self._processes.append(process)
        return process

    def run(self, host: int, *command: object, env: dict[str, str] | None = None) -> str:
        """Run ``command`` on a host to its end, and give what it printed; RuntimeError with that if it fails."""
        done = subprocess.run(self.command(host, *command), env=env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def run_on_both(self, commands: Sequence[Sequence[object]], env: dict[str, str], timeout: float) -> list[str]:
        """Run one command on each host, both at once, and give what each printed; RuntimeError if one fails."""
        logs = [self.folder / f"{name}.log" for name in NAMES]
        for log in logs:
            log.unlink(missing_ok=True)
        running = [self.start(host, *command, env=env, log=logs[host]) for host, command in enumerate(commands)]
        deadline = time.monotonic() + timeout
        try:
            statuses = [process.wait(max(1.0, deadline - time.monotonic())) for process in running]
        except subprocess.TimeoutExpired:
            statuses = ["too slow"]
        texts = [log.read_text(errors="replace") for log in logs]
        if any(statuses):
            raise RuntimeError(f"exit {statuses}\n" + "\n----\n".join(text[-3000:] for text in texts))
        return texts

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._relay is not None:
            self._relay.stop()
        for space in self.spaces:
            _can("ip", "netns", "del", space)
        shutil.rmtree(self.folder, ignore_errors=True)


class Relay:
    """Carries packets between two hosts, each way at ``rate`` bits per second and ``delay`` seconds later.

    For kernels without netem. Packets are large, since each costs a few microseconds here.
    """

    MTU = 60000
    _TUNSETIFF, _TUN_NO_HEADER = 0x400454CA, 0x1001

    def __init__(self, spaces: Sequence[str], rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self._files = []
        for number, space in enumerate(spaces):
            file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            name = f"relay{number}-{os.getpid() % 10**6}"
            fcntl.ioctl(file, self._TUNSETIFF, struct.pack("16sH", name.encode(), self._TUN_NO_HEADER))
            _do("ip", "link", "set", name, "netns", space, "name", "eth0")
            _do("ip", "-n", space, "link", "set", "eth0", "mtu", str(self.MTU), "txqueuelen", "2000")
            self._files.append(file)
        # A process of its own: this one's other threads would hold it up.
        self._pid = os.fork()
        if self._pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
            os.nice(-20)
            with suppress(BaseException):
                self._carry()
            os._exit(0)

    def _carry(self) -> None:
        due: list[tuple[float, int, int, bytes]] = []  # when, a number to keep the order, where to, what
        free, number = dict.fromkeys(self._files, 0.0), itertools.count()
        opposite = dict(zip(self._files, reversed(self._files), strict=True))
        while True:
            wait = max(0.0, due[0][0] - time.monotonic()) if due else None
            for file in select.select(self._files, [], [], wait)[0]:
                with suppress(BlockingIOError):
                    for _ in range(64):
                        packet = os.read(file, self.MTU + 100)
                        free[file] = max(free[file], time.monotonic()) + 8 * len(packet) / self.rate
                        heapq.heappush(due, (free[file] + self.delay, next(number), opposite[file], packet))
            now = time.monotonic()
            while due and due[0][0] <= now:
                _, _, target, packet = heapq.heappop(due)
                with suppress(OSError):  # dropped: the host's interface is down, or its queue full
                    os.write(target, packet)

    def stop(self) -> None:
        """End it."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        for file in self._files:
            os.close(file)


class Slurm(AbstractContextManager["Slurm"]):
    """A real Slurm on two hosts: slurmctld on the first, slurmd on both."""

    def __init__(self, hosts: TwoHosts) -> None:
        self.hosts = hosts
        self.folder = hosts.folder / "slurm"
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._munged: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Slurm:
        for name in ("state", *(f"spool-{name}" for name in NAMES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        env = {**os.environ, **self.env}
        if not Path("/run/munge/munge.socket.2").is_socket() or not _can("munge", "-n"):
            _do("install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge")
            self._munged = subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground", "--force"])
            _until(lambda: _can("munge", "-n"), 10, "munged does not answer")
        log = self.folder / "daemons.log"
        self.hosts.start(0, "slurmctld", "-D", "-c", env=env, log=log)
        for host, name in enumerate(NAMES):
            self.hosts.start(host, "slurmd", "-D", "-N", name, env=env, log=log)
        try:
            _until(lambda: self._states() == {"idle"}, 30, f"nodes are not idle, see {log}")
        except BaseException:
            print(log.read_text()[-3000:], file=sys.stderr)
            self.__exit__()
            raise
        return self

    def _states(self) -> set[str]:
        with suppress(RuntimeError):
            return set(self.run("sinfo", "-h", "-N", "-o", "%T").split())
        return set()

    def run(self, *command: object, env: dict[str, str] | None = None) -> str:
        """Run a program of Slurm on the first host."""
        return self.hosts.run(0, *command, env={**os.environ, **(env or {}), **self.env})

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        return dict(pair.split("=", 1) for pair in self.run("scontrol", "show", "job", job).split() if "=" in pair)

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):
            for job in self.run("squeue", "-h", "-o", "%i").split():
                self.run("scancel", job)
            _until(lambda: not self.run("squeue", "-h"), 15, "jobs do not end")
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scontrol", "shutdown")
        if self._munged is not None:
            self._munged.terminate()
            self._munged.wait()


def bandwidth(hosts: TwoHosts, megabytes: int = 50) -> tuple[float, float]:
    """What the link gives from the first host to the second: megabits per second, milliseconds there and back."""
    receive = (
        "import socket; s = socket.create_server(('10.77.0.2', 5001)); c = s.accept()[0]; n = 0\n"
        "for _ in range(20): c.sendall(c.recv(1))\n"
        f"while n < {megabytes} * 10**6: n += len(c.recv(1 << 20))\n"
        "c.sendall(b'x')"
    )
    send = (
        "import socket, time; s = socket.create_connection(('10.77.0.2', 5001)); t = []\n"
        "s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)\n"
        "for _ in range(20): b = time.perf_counter(); s.sendall(b'x'); s.recv(1); t.append(time.perf_counter() - b)\n"
        f"b = time.perf_counter(); s.sendall(bytes({megabytes} * 10**6)); s.recv(1)\n"
        f"print({megabytes} * 8 / (time.perf_counter() - b), 1e3 * sorted(t)[10])"
    )
    server = hosts.start(1, sys.executable, "-c", receive, log=hosts.folder / "receive.log")
    time.sleep(1)
    rate, there_and_back = map(float, hosts.run(0, sys.executable, "-c", send).split())
    server.wait(10)
    return rate, there_and_back


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _can(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _until(met, seconds: float, otherwise: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not met():
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--rate_mbit", type=float)
    parser.add_argument("--delay_ms", type=float, default=0.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    flags = parser.parse_args()
    if problem := missing(flags.slurm):
        sys.exit(problem)
    with TwoHosts(flags.rate_mbit, flags.delay_ms) as hosts:
        rate, there_and_back = bandwidth(hosts)
        print(f"link: {hosts.link}: {rate:.0f} Mbit/s, {there_and_back:.2f} ms there and back", flush=True)
        if flags.slurm:
            with Slurm(hosts) as slurm:
                env = {**os.environ, **slurm.env}
                sys.exit(subprocess.run(hosts.command(0, *flags.command), env=env).returncode)
        commands = [[word.replace("{host}", str(host)) for word in flags.command] for host in range(2)]
        log = hosts.folder / "second.log"
        second = hosts.start(1, *commands[1], env=dict(os.environ), log=log)
        status = subprocess.run(hosts.command(0, *commands[0])).returncode or second.wait()
        if status:
            print(f"the second host said:\n{log.read_text()[-3000:]}")
        sys.exit(status)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
