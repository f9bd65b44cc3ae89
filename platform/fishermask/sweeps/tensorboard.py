"""TensorBoard event files of a run: metrics by number of labels, and the HParams tab."""

import math
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fishermask.config import ExperimentConfig
from fishermask.results.files import RunFolder
from fishermask.results.tables import METRICS, format_value, setting, strategy_label


class RunEvents:
    """Writer of the event file in a run's folder.

    It replaces the events of an earlier attempt by the rounds in ``history``, so that no round appears twice.
    """

    def __init__(
        self, folder: RunFolder, config: ExperimentConfig, varied: list[str], history: list[dict[str, Any]]
    ) -> None:
        for old_file in folder.path.glob("events.out.tfevents.*"):
            old_file.unlink()
        self.config, self.varied = config, varied
        self.results: list[dict[str, Any]] = []
        self.writer = SummaryWriter(str(folder.path))
        for result in history:
            self.add(result)

    def add(self, result: dict[str, Any]) -> None:
        """Write a round, and flush it."""
        scalars = {f"metrics/{metric}": result[metric] for metric in METRICS}
        scalars |= {f"recall/{name}": value for name, value in result["recall"].items()}
        scalars |= {f"batch/{name}": count for name, count in result["batch_classes"].items() if result["batch"]}
        scalars |= {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
        scalars |= {f"notes/{name}": value for name, value in result.get("notes", {}).items()}
        scalars |= {"training/epochs": result["epochs"], "training/accuracy": result["train_accuracy"]}
        for tag, value in scalars.items():
            if value is not None and math.isfinite(value):
                self.writer.add_scalar(tag, value, result["labels"])
        self.writer.flush()
        self.results.append(result)

    def finish(self) -> None:
        """Write the hyperparameters, the metrics of the last round and the mean metrics, and close the file.

        The means are over the rounds after round 0, as in ``results.tables.summarize``.
        """
        settings = {path: setting(self.config, path) for path in self.varied}
        settings |= {"strategy": strategy_label(self.config.strategy), "seed": self.config.seed}
        columns = {
            path: value if isinstance(value, int | float) else format_value(value) for path, value in settings.items()
        }
        last = self.results[-1]
        metrics = {f"final/{metric}": _mean([last[metric]]) for metric in METRICS}
        metrics |= {f"mean/{metric}": _mean([r[metric] for r in self.results[1:]]) for metric in METRICS}
        finite_metrics = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        self.writer.add_hparams(columns, finite_metrics, run_name=".", global_step=last["labels"])
        self.writer.close()


def _mean(values: list[float | None]) -> float:
    """Return the mean of the values that are not None; NaN if there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else math.nan
