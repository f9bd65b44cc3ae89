"""Tests of docs/security.md: which inputs can run code, and which ports are open."""

import ast
import io
import os
import pickle
import secrets
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from fishermask import cli
from fishermask.config import DataConfig
from fishermask.data import cache
from fishermask.data.store import ensure_store
from fishermask.errors import InputError

SOURCES = Path(cli.__file__).parent
SWEEP = {
    "name": "tiny",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 1, "total": 300},
        "training": {"max_epochs": 1},
        "resources": {"workers": "ray", "shards": 1, "cpus": 0.5, "cpus_per_shard": 0.5},
    },
    "grid": {"strategy": ["margin"], "seed": [0]},
}
SMALL = {"budget": {"initial": 10, "query": 10, "total": 20}, "resources": {}}


class Planted:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """Return a path that exists after planted code has run, and check once that unpickling creates it."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Planted(path)))
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """Return a small sweep file in an empty working folder, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SWEEP | {"base": SWEEP["base"] | SMALL}))
    return path


def run_and_get_error(arguments, capsys):
    """Return the one-line error of a command."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fishermask: ")
    assert error.count("\n") == 1
    return error


def list_calls(tree):
    """Yield the dotted name, the keywords and the node of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}, node


def find_unsafe_calls(source):
    """Return the names of calls in ``source`` that can run code from their input."""
    names = []
    for name, keywords, node in list_calls(ast.parse(source)):
        function = name.split(".")[-1]
        unsafe = name in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "joblib.load")
        unsafe |= name.startswith(("pickle.load", "cloudpickle.load", "dill.", "marshal.load", "shelve."))
        unsafe |= function in ("Unpickler", "unsafe_load", "full_load", "read_pickle")
        unsafe |= keywords.get("allow_pickle", "False") != "False"
        if function == "load" and name.split(".")[0] == "yaml":
            loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            unsafe |= loader not in ("StrictLoader", "yaml.SafeLoader")
        if unsafe:
            names.append(name)
    return names


def test_only_documented_files_of_the_package_make_unsafe_calls():
    unsafe = {
        str(path.relative_to(SOURCES)): calls
        for path in SOURCES.rglob("*.py")
        if (calls := find_unsafe_calls(path.read_text()))
    }
    assert unsafe == {
        "pool/packing.py": ["pickle.loads"],  # messages between a run and its shards
        "user_modules.py": ["exec", "compile"],  # Python files that settings name
    }
    from fishermask.yaml_files import StrictLoader

    assert issubclass(StrictLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    ["pickle.load(f)", "torch.load(p, weights_only=True)", "yaml.load(t, yaml.Loader)", "yaml.load(t)", "eval(x)",
     "np.load(p, allow_pickle=True)", "yaml.unsafe_load(t)", "pickle.Unpickler(f).load()", "pd.read_pickle(p)"],
)  # fmt: skip
def test_the_search_finds_each_kind_of_unsafe_call(source):
    assert find_unsafe_calls(source)


@pytest.mark.parametrize("where", ["file", "setting"])
def test_a_python_tag_in_yaml_is_refused_and_runs_no_code(sweep_file, trap, capsys, where):
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]"
    if where == "file":
        sweep_file.write_text(f"name: {tag}\n")
        assert "is not YAML" in run_and_get_error(["sweep", str(sweep_file)], capsys)
    else:
        assert "is not YAML" in run_and_get_error(["sweep", str(sweep_file), f"seed={tag}"], capsys)
    assert not trap.exists()


def objects(trap):
    """Return contents that create ``trap`` when they are unpickled: an array of objects, and a plain pickle."""
    array = io.BytesIO()
    np.save(array, np.array([Planted(trap)], dtype=object), allow_pickle=True)
    return array.getvalue(), pickle.dumps(Planted(trap))


def test_pickled_objects_in_a_cache_are_refused_and_run_no_code(sweep_file, trap):
    store = ensure_store(DataConfig()) / "train"
    for path in (store / name for name in (cache.IMAGES, cache.IDS, cache.LABELS, cache.SOURCE_ROWS)):
        for content in objects(trap):
            path.write_bytes(content)
            with pytest.raises(InputError, match="is damaged"):
                cache.map_array(path)
    # Use a new process, because this process caches the stores that it has opened.
    command = [sys.executable, "-m", "fishermask.cli", "sweep", str(sweep_file), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"fishermask: {cache.VARIABLE}: ")
    assert result.stderr.count("\n") == 1
    assert not trap.exists()


def test_planted_pickles_in_a_results_folder_run_no_code(sweep_file, trap, capsys):
    assert cli.main(["run", str(sweep_file)]) == 0
    (folder,) = (sweep_file.parent / "results").iterdir()
    planted_pickle = pickle.dumps(Planted(trap))
    for run in (folder / "runs").iterdir():
        lines = (run / "rounds.jsonl").read_bytes().splitlines(keepends=True)
        (run / "rounds.jsonl").write_bytes(lines[0])  # the run has rounds to resume
        for name in ("journal.jsonl", "model.pt", "state.pkl", "events.out.tfevents.1.x.0"):
            (run / name).write_bytes(planted_pickle)
    (folder / "results.parquet").write_bytes(planted_pickle)
    (folder / "results.csv").write_bytes(planted_pickle)
    capsys.readouterr()
    assert cli.main(["report", str(folder)]) == 0
    assert cli.main(["run", str(sweep_file)]) in (0, 1, 2)
    assert not trap.exists()


def test_a_dry_run_calls_the_factory_that_a_sweep_file_names(sweep_file, trap, monkeypatch):
    (sweep_file.parent / "theirs.py").write_text(
        "import torch\n"
        "from pathlib import Path\n"
        "def model(num_classes, path):\n"
        "    Path(path).touch()\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, num_classes))\n"
    )
    model = f"model={{name: 'theirs:model', params: {{path: '{trap}'}}}}"
    monkeypatch.syspath_prepend(sweep_file.parent)
    assert cli.main(["sweep", str(sweep_file), "--dry-run", model]) == 0
    assert trap.exists()


class Sweep:
    """A running sweep and its processes."""

    def __init__(self, folder):
        (folder / "tiny.yaml").write_text(yaml.safe_dump(SWEEP))
        # Without the variables that conftest sets, so that the cluster has its own token.
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fishermask.cli", "sweep", "tiny.yaml"],
            cwd=folder, env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while not list(folder.glob("results/tiny/runs/*/rounds.jsonl")):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        driver = psutil.Process(self.process.pid)
        self.processes = [driver, *driver.children(recursive=True)]
        self.gcs = next(process for process in self.processes if process.name() == "gcs_server")
        self.listening = []
        """(process name, address, port) of each listening socket."""
        for process in self.processes:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    self.listening.append((process.cmdline()[0].strip() or process.name(), *connection.laddr))

    def environment(self):
        """Return the environment of a process of the cluster."""
        return self.gcs.environ()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    running = Sweep(tmp_path_factory.mktemp("listening"))
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.communicate()


def test_open_ports_of_a_sweep_are_those_in_the_documentation(sweep):
    on_all_addresses = [Path(name).name for name, address, _ in sweep.listening if address in ("::", "0.0.0.0")]
    documented_ports = {
        "gcs_server": 1,
        "raylet": 2,
        "python": 1,
        "ray::RunStorage": 1,
        "ray::ImplicitFunc": 1,
        "ray::ShardActor": 1,
    }
    for prefix, count in documented_ports.items():
        assert sum(name.startswith(prefix) for name in on_all_addresses) == count, (prefix, on_all_addresses)
    # Ray may keep an idle worker, which becomes a trial or a shard.
    other_processes = [name for name in on_all_addresses if not name.startswith(tuple(documented_ports))]
    assert set(other_processes) <= {"ray::IDLE"}
    ((agent, _),) = [(name, address) for name, address, _ in sweep.listening if address not in ("::", "0.0.0.0")]
    assert agent == "ray::RuntimeEnvAgent"


def query_gcs(sweep, **settings):
    """Run a client of the cluster's GCS with the token in the environment variables ``settings``."""
    port = next(port for name, _, port in sweep.listening if name.endswith("gcs_server"))
    code = (
        "from ray._raylet import GcsClient\n"
        f"client = GcsClient(address='127.0.0.1:{port}')\n"
        "print(len(client.internal_kv_keys(b'', namespace=None, timeout=10)))\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=inherited | settings
    )


def test_only_a_client_with_the_token_of_the_sweep_is_accepted(sweep):
    token = sweep.environment()["RAY_AUTH_TOKEN"]
    assert len(bytes.fromhex(token)) == 32
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    assert query_gcs(sweep, **settings).returncode == 0
    for changed_settings in ({"RAY_AUTH_MODE": "disabled"}, settings | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        answer = query_gcs(sweep, **changed_settings)
        assert answer.returncode != 0
        assert "InvalidAuthToken" in answer.stderr
    ((_, address, port),) = [port for port in sweep.listening if port[0] == "ray::RuntimeEnvAgent"]
    with pytest.raises(urllib.error.HTTPError) as exception_info:
        urllib.request.urlopen(f"http://{address}:{port}/", data=b"x", timeout=10)
    assert exception_info.value.code == 401


def test_other_users_cannot_connect_to_the_unix_sockets(sweep):
    session = next(part for part in sweep.gcs.cmdline() if part.startswith("--log_dir=")).removeprefix("--log_dir=")
    sockets = list((Path(session).parent / "sockets").iterdir())
    assert len(sockets) == 2
    for path in sockets:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        assert path.stat().st_uid == os.getuid()


def test_a_killed_raylet_ends_the_sweep_and_all_its_processes(sweep):
    """This test is the last one in the file, because it ends the sweep that the tests share."""
    next(process for process in sweep.processes if process.name() == "raylet").kill()
    _, error = sweep.process.communicate(timeout=60)
    assert sweep.process.returncode == 1
    assert error.startswith("fishermask: raylet, a process of Ray on this machine, has ended")
    assert "0 of 1 runs are finished, and all finished rounds are in " in error
    assert error.count("\n") == 1
    _, alive = psutil.wait_procs(sweep.processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
