"""A Ray cluster of two raylets gives what one process gives, though workers and a machine die and another joins."""

import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from halfplate.cli import main
from halfplate.compression import hidden_states as hidden
from halfplate.compression.compress import compress
from halfplate.engines import EngineChoice
from halfplate.engines import local as engines
from halfplate.engines import ray as cluster_module
from halfplate.engines.needs import Needs
from halfplate.errors import HalfplateError
from halfplate.recipe import Recipe

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'halfplate[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402
from ray.scripts.scripts import start  # noqa: E402

from halfplate.engines.ray import RayCluster, Site, run_on_site  # noqa: E402

LIMIT = 240  # seconds until a test gives up; workers take some to start, many on a busy machine
WORKER = "ray::run_on_site"
IDLE = "ray::IDLE"
LITTLE = Needs()


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one CPU each, as far as Ray knows; the second is `cluster.second`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        source = Path(engines.__file__).parents[2]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]))
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        settings = {"worker_niceness": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
        machine = {"num_cpus": 1, "object_store_memory": 10**8}
        found = Cluster(
            initialize_head=True, head_node_args={**machine, "include_dashboard": False, "_system_config": settings}
        )
        found.join = lambda: found.add_node(**machine)
        found.second = found.join()
        yield found
        found.shutdown()


@pytest.fixture
def engine(cluster, tmp_path):
    engine = RayCluster(cluster.address, None, 1, tmp_path)
    yield engine
    engine.close()


@dataclass(frozen=True)
class Waiting:
    """A task that says where it runs and waits to be let go."""

    folder: Path
    number: int
    cost: float = 1.0
    needs: Needs = LITTLE
    keeps: ClassVar[type] = dict

    def run(self, blocks):
        (self.folder / f"{self.number}-{os.getpid()}-{os.getppid()}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)
        return self.number


@dataclass(frozen=True)
class Refusing:
    cost: float = 1.0
    needs: Needs = LITTLE
    keeps: ClassVar[type] = dict

    def run(self, blocks):
        raise HalfplateError("weight=3 is not to be had")


@dataclass(frozen=True)
class Appending:
    path: Path
    cost: float
    needs: Needs = LITTLE
    keeps: ClassVar[type] = dict

    def run(self, blocks):
        with self.path.open("a") as file:
            file.write(f"{self.cost:g} ")


def started(folder, count):
    """The processes that tasks run in, as (number, process, its raylet), once there have been `count`."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = [tuple(map(int, path.name.split("-"))) for path in folder.glob("*-*-*")]
        if len(found) >= count:
            return sorted(found, key=lambda entry: (folder / "-".join(map(str, entry))).stat().st_mtime_ns)
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} tasks have begun, expected {count}")


def workers(prefix=WORKER):
    """Processes of Ray that run a task; with `IDLE`, those that wait for one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name = (entry / "cmdline").read_bytes().partition(b"\0")[0].decode()
        except OSError:
            continue
        if name.startswith(prefix):
            found.append(int(entry.name))
    return found


def test_a_killed_process_is_replaced(engine, tmp_path):
    results = engine.run([Waiting(tmp_path, 7)])
    ((_, process, _),) = started(tmp_path, 1)
    os.kill(process, signal.SIGKILL)
    second = started(tmp_path, 2)[1]
    assert second[0] == 7
    assert second[1] != process
    (tmp_path / "go").touch()
    assert list(results) == [7]


def test_a_task_that_always_kills_its_process_is_given_up(engine, tmp_path):
    results = engine.run([Waiting(tmp_path, 0)])
    for time_ in range(engines.TRIES):
        os.kill(started(tmp_path, time_ + 1)[-1][1], signal.SIGKILL)
    with pytest.raises(HalfplateError, match=r"a task was lost 3 times .* continue with --resume"):
        list(results)


def test_a_machine_is_lost_and_another_joins(cluster, engine, tmp_path):
    results = engine.run([Waiting(tmp_path, 0), Waiting(tmp_path, 1)])
    running = started(tmp_path, 2)
    raylets = {raylet for _, _, raylet in running}
    assert len(raylets) == 2  # side by side, one on each machine
    cluster.remove_node(cluster.second, allow_graceful=False)
    time.sleep(1)
    assert len(started(tmp_path, 2)) == 2  # the one that is left has no room
    cluster.second = cluster.join()
    again = started(tmp_path, 3)[2]
    assert again[2] not in raylets
    (tmp_path / "go").touch()
    assert list(results) == [0, 1]


def test_same_bytes_through_deaths_a_newcomer_and_a_break(cluster, tiny_folder, tmp_path, monkeypatch):
    """The run loses a worker and a machine, gains another, is broken off, and goes on in this process."""
    monkeypatch.setattr(hidden, "CHUNKS", 2)  # of 5 batches, so that chunks hold several
    monkeypatch.chdir(tmp_path)  # no worker runs here, so a relative path must not matter
    recipe = Recipe(method="sparsegpt", samples=36, seq_len=16, threads=1)
    compress("tiny_llama", "one", recipe)
    happened = []

    def report(phase, done, total, *more, **named):
        if phase == "compressing" and done >= 2 and not happened:
            found = workers() or (workers(IDLE) if done >= 4 else [])  # tasks are short, so perhaps none runs now
            if found:
                os.kill(found[0], signal.SIGKILL)
                happened.append("worker")
        elif phase == "compressing" and done >= 5 and len(happened) == 1:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = cluster.join()
            happened.append("machine")
        elif phase == "compressing" and done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress("tiny_llama", "two", recipe, engine="ray", address=cluster.address, report=report)
    assert happened == ["worker", "machine"]
    assert not ray.is_initialized()
    compress("tiny_llama", "two", recipe, resume=True)
    compress("tiny_llama", "three", recipe, engine="ray", address=cluster.address)
    for file in ("model.safetensors", "halfplate.json", "config.json"):
        whole = (tmp_path / "one" / file).read_bytes()
        assert (tmp_path / "two" / file).read_bytes() == whole, file
        assert (tmp_path / "three" / file).read_bytes() == whole, file


def test_refusals_of_a_cluster(cluster, engine, tmp_path):
    with pytest.raises(HalfplateError, match=r"^weight=3 is not to be had$"):
        list(engine.run([Refusing()]))
    with pytest.raises(
        HalfplateError, match=r"needs 64 CPUs, 1 GPU and 1.0 GB .* the largest of the cluster has 1 CPU and"
    ):
        engine.run([Refusing(needs=Needs(64, 1, 10**9))])
    with pytest.raises(HalfplateError, match="connected to Ray already"):
        RayCluster(cluster.address, None, 1, tmp_path)
    site = Site.here(tmp_path)
    run_on_site(site, Appending(tmp_path / "file", 1))
    other = Site(site.halfplate, "1.0", site.processor, tmp_path)
    with pytest.raises(HalfplateError, match=r"torch is '2.* on machine .* and '1.0' where the command runs"):
        run_on_site(other, Refusing())
    gone = Site(site.halfplate, site.torch, site.processor, tmp_path / "gone")
    with pytest.raises(HalfplateError, match=r"cannot read '.*gone'; put OUT and the model on storage"):
        run_on_site(gone, Refusing())


def test_no_machine_is_left_for_a_task(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "PATIENCE", 0.1)
    results = engine.run([Waiting(tmp_path, 0)])
    monkeypatch.setattr(engine, "_machines", lambda: [])
    with pytest.raises(HalfplateError, match=r"needs 1 CPU and .* cluster has 0 CPUs and .*; continue with --resume"):
        list(results)


def test_a_cluster_of_its_own_takes_the_costliest_first(tmp_path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    engine = RayCluster(None, 1, 1, tmp_path)
    try:
        list(engine.run([Appending(tmp_path / "order", cost) for cost in (2, 4, 1, 3)]))
    finally:
        engine.close()
    assert (tmp_path / "order").read_text() == "4 3 2 1 "


def test_commands_of_the_page_run(cluster, tiny_folder, tmp_path, monkeypatch, capsys):
    tiny_folder.rename(tmp_path / "SmolLM2")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"^\$ (.*)$", page, re.MULTILINE)]
    runs = [words[1:] for words in lines if words[0] == "halfplate"]
    assert len(runs) == 2
    for words in runs:
        words = [cluster.address if word == "head:6379" else word for word in words]
        assert main([*words, "--method", "wanda", "--samples", "4", "--seq-len", "32"]) == 0, capsys.readouterr().err
    # Two machines of this command would both want the port.
    known = {option for parameter in start.params for option in parameter.opts}
    starts = [words[2:] for words in lines if words[:2] == ["ray", "start"]]
    assert [{word.partition("=")[0] for word in words} - known for words in starts] == [set(), set()]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "is not of the form HOST:PORT"),
        ("ray://127.0.0.1:10001", "is not of the form HOST:PORT"),
        ("127.0.0.1:99999", "is not of the form HOST:PORT"),
        ("no-such-host.invalid:6379", "cannot be reached"),
    ],
)
def test_addresses_that_cannot_be(tmp_path, address, message):
    with pytest.raises(HalfplateError, match=message):
        RayCluster(address, None, 1, tmp_path)


def test_nobody_listens_at_the_address(tiny_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(HalfplateError, match=rf"address='127.0.0.1:{port}' cannot be reached \(Connection refused\)"):
        compress(
            str(tiny_folder), tmp_path / "out", Recipe(method="magnitude"), engine="ray", address=f"127.0.0.1:{port}"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tiny_llama"]


@pytest.mark.parametrize(
    ("says", "message"), [(b"", "cannot be reached"), (b"HTTP/1.1 400 no\r\n", "not the address of a Ray cluster")]
)
def test_what_listens_at_the_address_is_no_cluster(tmp_path, monkeypatch, says, message):
    monkeypatch.setattr(cluster_module, "PROBE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.sendall(says)
            connection.recv(1)
            time.sleep(1)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HalfplateError, match=message):
            RayCluster(f"127.0.0.1:{server.getsockname()[1]}", None, 1, tmp_path)
        thread.join()


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("halfplate.engines.find_spec", lambda name: None)
    with pytest.raises(HalfplateError, match=r"engine='ray' needs the package ray.*pip install 'halfplate\[ray\]'"):
        EngineChoice("ray")


def test_choices_that_cannot_be():
    with pytest.raises(HalfplateError, match=r"address='auto' .* engine='local' does not use one; add --engine ray"):
        EngineChoice("local", address="auto")
    with pytest.raises(HalfplateError, match=r"workers=2 with address='auto'"):
        EngineChoice("ray", 2, "auto")
    with pytest.raises(HalfplateError, match="workers=0 must be at least 1"):
        EngineChoice("ray", 0)
