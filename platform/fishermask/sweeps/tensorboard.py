"""TensorBoard event files of a run, beside its other files: metrics by number of labels, and the HParams tab."""

import math
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from fishermask.config import ExperimentConfig
from fishermask.results.files import RunFolder
from fishermask.results.tables import METRICS, setting, strategy_label


class RunEvents:
    """Writes one run's events. What an earlier attempt left is replaced by ``history``, so nothing stands twice."""

    def __init__(
        self, folder: RunFolder, config: ExperimentConfig, varied: list[str], history: list[dict[str, Any]]
    ) -> None:
        for old in folder.path.glob("events.out.tfevents.*"):
            old.unlink()
        self.config, self.varied = config, varied
        self.results: list[dict[str, Any]] = []
        self.writer = SummaryWriter(str(folder.path))
        for result in history:
            self.add(result)

    def add(self, result: dict[str, Any]) -> None:
        """Write a round; it can be seen at once."""
        labels = result["labels"]
        scalars = {f"metrics/{metric}": result[metric] for metric in METRICS}
        scalars |= {f"recall/{name}": value for name, value in result["recall"].items() if math.isfinite(value)}
        scalars |= {f"batch/{name}": count for name, count in result["batch_classes"].items() if result["batch"]}
        scalars |= {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
        scalars |= {f"notes/{name}": value for name, value in result.get("notes", {}).items()}
        scalars |= {"training/epochs": result["epochs"], "training/accuracy": result["train_accuracy"]}
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, labels)
        self.writer.flush()
        self.results.append(result)

    def finish(self) -> None:
        """Write the hyper-parameters with the final and mean metrics, and close."""
        cells = {path: setting(self.config, path) for path in self.varied}
        cells |= {"strategy": strategy_label(self.config.strategy), "seed": self.config.seed}
        values = {key: value if isinstance(value, int | float | str) else str(value) for key, value in cells.items()}
        count = len(self.results)
        final = {f"final/{metric}": self.results[-1][metric] for metric in METRICS}
        mean = {f"mean/{metric}": sum(r[metric] for r in self.results) / count for metric in METRICS}
        self.writer.add_hparams(values, final | mean, run_name=".", global_step=self.results[-1]["labels"])
        self.writer.close()
