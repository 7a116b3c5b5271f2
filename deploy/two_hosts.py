"""Two hosts on one machine: network namespaces joined by a veth pair, a Ray node in each, k2dist over both.

    sudo .venv/bin/python deploy/two_hosts.py          # asks one question, then serves until Ctrl-C
    sudo .venv/bin/python deploy/two_hosts.py --once   # asks it and ends

         namespace k2-<pid>-a                                  namespace k2-<pid>-b
         10.77.0.1  Ray's head, supervisor,    veth pair    10.77.0.2  Ray's second node,
                    coordinator, two ranks   <─────────>               two ranks

The two share this machine's cores, memory and files, and nothing of its network: ranks 0 and 1 reach ranks
2 and 3 over the pair and no other way, so what works on one machine only fails here. Root, for `ip netns`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "cluster_configs" / "cpu-2x2.yaml"
QUESTION = "What is the capital of Italy?"
RAY_PORT = 6379
CPUS = 2  # that each node's Ray has to give: with one for each rank, two ranks a host
OBJECT_STORE_BYTES = 80 * 2**20
UP_S = 60.0
# A lost host says nothing, and by its defaults (3 s, 10 s, 5 times) Ray needs more than 45 s to notice.
NOTICE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
GONE_S = 20.0


@dataclass(frozen=True)
class Host:
    """One namespace. `address`: of its end of the pair."""

    namespace: str
    address: str
    link: str

    def start(
        self, *command: str, output: IO[str] | int = subprocess.PIPE, **settings: str
    ) -> subprocess.Popen[str]:
        """Run a Python module there, in a session of its own, with RAY_* from `settings` only. `output`:
        where what it prints goes, with its errors unless that is a pipe."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=None if output == subprocess.PIPE else subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment | {"RAY_AUTH_MODE": "token"} | settings,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        """Of every process there."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def lose(self) -> None:
        """As if its power were cut: nothing more comes from it, not even the end of a connection."""
        _ip("-n", self.namespace, "link", "set", self.link, "down")
        self.kill()

    def kill(self) -> None:
        """End every process there, at once."""
        give_up_s = time.monotonic() + GONE_S
        while pids := self.pids():
            assert time.monotonic() < give_up_s, f"{self.namespace}: processes {pids} do not end"
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it has ended meanwhile
            time.sleep(0.1)


def why_not() -> str:
    """Why this machine cannot do it; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"k2-{os.getpid()}-probe"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no `ip` command (package iproute2)"
    if made.returncode != 0:
        return f"ip netns add: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two namespaces that reach each other; with the context they end, and every process in them."""
    pid = os.getpid()
    hosts = [Host(f"k2-{pid}-{name}", f"10.77.0.{i}", f"k2{name}") for i, name in ((1, "a"), (2, "b"))]
    with ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
            stack.callback(host.kill)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        _name(hosts, stack)
        first, second = hosts
        ends = ("type", "veth", "peer", "name", second.link, "netns", second.namespace)
        _ip("link", "add", first.link, "netns", first.namespace, *ends)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.link)
            _ip("-n", host.namespace, "link", "set", host.link, "up")
            # Ray finds its own address by a route to the world, which leads nowhere here.
            _ip("-n", host.namespace, "route", "add", "default", "dev", host.link)
        yield first, second


def _name(hosts: list[Host], stack: ExitStack) -> None:
    """In each, /etc/hosts knows both. Else every new connection asks for a name, of nobody, for 6 s."""
    lines = ["127.0.0.1 localhost"]
    for host in hosts:
        lines += [f"{host.address} {host.link}", f"::ffff:{host.address} {host.link}"]  # as IPv6 sockets ask
    for host in hosts:
        directory = Path("/etc/netns", host.namespace)  # ip-netns(8): mounted over /etc there
        directory.mkdir(parents=True)
        stack.callback(shutil.rmtree, directory)
        (directory / "hosts").write_text("\n".join(lines) + "\n")


@contextmanager
def ray_on(first: Host, second: Host) -> Iterator[str]:
    """A Ray of two nodes; its address."""
    address = f"{first.address}:{RAY_PORT}"
    ray = ["ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    size = [f"--num-cpus={CPUS}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="k2-", ignore_cleanup_errors=True))
        head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={directory}"]
        for host, role in ((first, head), (second, [f"--address={address}"])):
            words = stack.enter_context(Path(directory, f"{host.link}.log").open("w"))
            own = f"--node-ip-address={host.address}"
            started = host.start(*ray, *size, *role, own, output=words, **NOTICE)
            stack.callback(_end, started, signal.SIGKILL)  # what it started ends with its namespace
            _await_words(started, Path(words.name), "Ray runtime started")
        yield address


@contextmanager
def served(first: Host, ray_address: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`k2dist serve` on the first host; its output is what it says as JSON, a line each."""
    ports = ["--grpc", f"{first.address}:50051", "--http", f"{first.address}:8000"]
    command = ["k2dist", "serve", str(CONFIG), "--json", "--insecure", *ports, *options]
    running = first.start(*command, RAY_ADDRESS=ray_address)
    try:
        yield running
    finally:
        _end(running, signal.SIGINT)


def ask(first: Host, question: str) -> str:
    """Over gRPC, from the first host."""
    chat = first.start(
        "k2dist", "chat", "--address", f"{first.address}:50051", "--temperature", "0", "--json"
    )
    output, _ = chat.communicate(question, timeout=UP_S)
    if chat.returncode != 0:
        raise SystemExit(f"two_hosts: `k2dist chat` failed: {output}")
    answer: str = json.loads(output)["content"]
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--once", action="store_true", help="ask one question and end")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        raise SystemExit(f"two_hosts: {reason}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with two_hosts() as (first, second), ray_on(first, second) as address, served(first, address) as serving:
        assert serving.stdout is not None
        answer = json.loads(serving.stdout.readline())
        if "error" in answer:
            serving.wait(GONE_S)
            raise SystemExit(f"two_hosts: {answer['error']['message']}")
        for rank in answer["ranks"]:
            print(f"rank {rank['world_rank']} on {rank['node']}, process {rank['pid']}")
        print(f"{QUESTION}\n{ask(first, QUESTION)}", flush=True)
        if not options.once:
            print(
                f"serving until Ctrl-C; talk to it with\n  ip netns exec {first.namespace} "
                f"{sys.executable} -m k2dist chat --address {first.address}:50051",
                flush=True,
            )
            serving.wait()


def _await_words(process: subprocess.Popen[str], log: Path, words: str) -> None:
    """Until the log has them. Ray says them within seconds, or ends."""
    give_up_s = time.monotonic() + UP_S
    while words not in log.read_text():
        if process.poll() is not None or time.monotonic() > give_up_s:
            raise SystemExit(f"two_hosts: Ray did not start: {log.read_text()[-1000:]}")
        time.sleep(0.2)


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Ask it to end, and its session with it; insist where it does not."""
    if process.poll() is None:
        os.killpg(process.pid, how)
    try:
        process.wait(GONE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
