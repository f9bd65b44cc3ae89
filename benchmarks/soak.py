"""A sweep whose processes are killed at random, compared with the same sweep without kills.

    python benchmarks/soak.py [--shard-every 14] [--trial-every 45] [--driver-every 60] [--rounds 3]

At the given intervals in seconds, SIGKILL ends a random shard actor, a random trial or the driver, until the sweep is
finished. A killed driver is started again with the same command. Without timings, the results must be equal. Do not run
this script on a machine on which other Ray jobs run.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
import yaml
from table import machine, show


def write_sweep_file(folder, rounds):
    """Write and return a sweep file: two concurrent runs on two cores, with two Ray shards each."""
    resources = {"cpus": 0.5, "shards": 2, "workers": "ray", "cpus_per_shard": 0.25, "restarts": 10_000}
    base = {
        "model": {"name": "small_cnn", "params": {"width": 8}},
        "budget": {"initial": 20, "query": 30, "total": 20 + 30 * (rounds - 1)},
        "training": {"max_epochs": 10},
        "resources": resources,
    }
    strategies = [{"name": "fisher_mask", "params": {"fraction": 0.1, "fisher_samples": 256}}, "badge"]
    file = folder / "soak.yaml"
    file.write_text(yaml.safe_dump({"name": "soak", "base": base, "grid": {"strategy": strategies, "seed": [0]}}))
    return file


def start(file, output):
    """Start the driver of the sweep and return its process."""
    command = [sys.executable, "-m", "fishermask.cli", "sweep", str(file), f"output={output}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def find_processes(driver, title):
    """Return the Ray worker processes below ``driver`` whose command line contains ``title``."""
    try:
        return [p for p in psutil.Process(driver.pid).children(recursive=True) if title in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def soak(file, output, every, generator):
    """Run the sweep with kills until it ends. Return the seconds, and the number of killed processes of each kind."""
    killed, started = dict.fromkeys(every, 0), time.monotonic()
    due = {kind: started + seconds for kind, seconds in every.items()}
    driver = start(file, output)
    while driver.poll() is None:
        time.sleep(0.2)
        for kind in [kind for kind in every if time.monotonic() > due[kind]]:
            due[kind] = time.monotonic() + every[kind] * (0.5 + generator.random())
            if kind == "driver":
                driver.kill()
                driver.wait()
                killed[kind] += 1
                driver = start(file, output)
            elif victims := find_processes(driver, {"shard": "ray::ShardActor", "trial": "ray::ImplicitFunc"}[kind]):
                os.kill(generator.choice(victims).pid, signal.SIGKILL)
                killed[kind] += 1
    if driver.returncode:
        raise SystemExit(f"the sweep failed: {driver.stderr.read()}")
    return time.monotonic() - started, killed


def read_results(output):
    """Return the results of the sweep without timings."""
    results = pd.read_parquet(output / "soak" / "results.parquet")
    return results[[name for name in results.columns if "seconds" not in name]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard-every", type=float, default=14, metavar="SECONDS")
    parser.add_argument("--trial-every", type=float, default=45, metavar="SECONDS")
    parser.add_argument("--driver-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    every = {"shard": arguments.shard_every, "trial": arguments.trial_every, "driver": arguments.driver_every}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = write_sweep_file(folder, arguments.rounds)
        never = dict.fromkeys(every, float("inf"))
        undisturbed, _ = soak(file, folder / "undisturbed", never, random.Random(0))
        print(f"  without kills: {undisturbed:.0f} s", flush=True)
        seconds, killed = soak(file, folder / "soak", every, random.Random(arguments.seed))
        are_equal = read_results(folder / "undisturbed").equals(read_results(folder / "soak"))
    cells = [undisturbed, seconds, seconds / undisturbed, *killed.values(), "equal" if are_equal else "DIFFERENT"]
    header = ["without kills s", "with kills s", "ratio", *(f"{kind}s killed" for kind in killed), "tables"]
    show(f"A sweep of 2 runs and {2 * arguments.rounds} rounds with random kills. {machine()}", header, [cells])
    if not are_equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
