"""Functions that run a sweep as the commands do."""

from rich.console import Console

from fishermask.planning.placement import this_machine
from fishermask.sweeps import cluster, runner, tune_runner

QUIET = Console(quiet=True)


def run_on_ray(sweep, console=QUIET):
    """Plan a sweep for the connected cluster, and run it there."""
    nodes = cluster.connected_cluster()
    return tune_runner.run_on_ray(sweep, runner.plan_sweep(sweep, nodes, console), nodes, console)


def run_in_process(sweep, console=QUIET):
    """Plan a sweep for this machine, and run it in this process."""
    return runner.run_in_process(sweep, runner.plan_sweep(sweep, this_machine(), console, True), console)
