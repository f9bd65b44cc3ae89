"""A sweep under random kills against the same sweep left alone: the tables must be equal, timings apart.

    python benchmarks/soak.py [--shard-every 14] [--trial-every 45] [--driver-every 60] [--rounds 3]

SIGKILL to a random shard actor, a random trial and the driver every so many seconds, until the sweep is finished; a
killed driver is started again with the same command. Not for a machine on which other Ray jobs run.
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


def sweep_file(folder, rounds):
    """Two runs, both at once on two cores, each with two shards that are actors of their own."""
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
    command = [sys.executable, "-m", "fishermask.cli", "sweep", str(file), f"output={output}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def processes(driver, title):
    """Ray's worker processes below ``driver`` whose title holds ``title``."""
    try:
        return [p for p in psutil.Process(driver.pid).children(recursive=True) if title in " ".join(p.cmdline())]
    except psutil.Error:
        return []


def soak(file, output, every, chance):
    """Finish the sweep under kills: seconds, and how many processes of each kind were killed."""
    killed, started = dict.fromkeys(every, 0), time.monotonic()
    due = {kind: started + seconds for kind, seconds in every.items()}
    driver = start(file, output)
    while driver.poll() is None:
        time.sleep(0.2)
        for kind in [kind for kind in every if time.monotonic() > due[kind]]:
            due[kind] = time.monotonic() + every[kind] * (0.5 + chance.random())
            if kind == "driver":
                driver.kill()
                driver.wait()
                killed[kind] += 1
                driver = start(file, output)
            elif victims := processes(driver, {"shard": "ray::ShardActor", "trial": "ray::ImplicitFunc"}[kind]):
                os.kill(chance.choice(victims).pid, signal.SIGKILL)
                killed[kind] += 1
    if driver.returncode:
        raise SystemExit(f"the sweep failed: {driver.stderr.read()}")
    return time.monotonic() - started, killed


def table(output):
    """The sweep's results without what was timed."""
    found = pd.read_parquet(output / "soak" / "results.parquet")
    return found[[name for name in found.columns if "seconds" not in name]]


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
        file = sweep_file(folder, arguments.rounds)
        never = dict.fromkeys(every, float("inf"))
        alone, _ = soak(file, folder / "alone", never, random.Random(0))
        print(f"  left alone: {alone:.0f} s", flush=True)
        seconds, killed = soak(file, folder / "soak", every, random.Random(arguments.seed))
        same = table(folder / "alone").equals(table(folder / "soak"))
    cells = [alone, seconds, seconds / alone, *killed.values(), "equal" if same else "DIFFERENT"]
    header = ["left alone s", "under kills s", "ratio", *(f"{kind}s killed" for kind in killed), "tables"]
    show(f"A sweep of 2 runs and {2 * arguments.rounds} rounds under random kills. {machine()}", header, [cells])
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
