"""Two hosts in one: network namespaces that reach each other over a cable and nothing else."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .runs import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "kvt0"
# Every key and every permission is this test's own.
SSHD = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


def needs(*programs: str) -> None:
    """Skip, and say why, where the machine has no such program."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (apt install iproute2 openssh-server pdsh)")


def ip(*words: str) -> None:
    """Run ``ip``; raises ``CalledProcessError``."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with a cable between them; skips where the machine forbids that."""
    needs("ip")
    first, second = names = (f"kvtrain{os.getpid()}a", f"kvtrain{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine forbids network namespaces ({error.stderr.strip()})")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(host: str, words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Run a command on one of the hosts."""
    place = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *words], cwd=ROOT, env=place, stdout=file, stderr=subprocess.STDOUT
        )


def finish(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    """Exit codes; whatever is left after the time is killed."""
    try:
        return [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


@contextmanager
def ssh_servers(hosts: tuple[str, str], folder: Path) -> Iterator[Path]:
    """A server on each host that lets this user in; yields the client's configuration."""
    needs("sshd", "ssh", "ssh-keygen", "pdsh")
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd.conf").write_text(SSHD.format(folder=folder))
    (folder / "ssh.conf").write_text(SSH.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    sshd = str(shutil.which("sshd"))
    servers = [
        start(
            host, [sshd, "-D", "-f", str(folder / "sshd.conf"), "-o", f"ListenAddress={address}"], folder / "sshd.log"
        )
        for host, address in zip(hosts, ADDRESSES, strict=True)
    ]
    try:
        yield folder / "ssh.conf"
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=10)
