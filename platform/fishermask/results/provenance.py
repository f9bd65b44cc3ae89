"""How the rounds of a run were computed: its pool, its identities and the environments of its processes."""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fishermask.config import flatten, hash_json
from fishermask.guard import one_line

COLUMNS = ("fishermask", "torch", "ray", "python", "device", "cpu", "cpu_capability", "git_commit")
"""Values of an environment that become columns of the table of rounds."""


@dataclass(frozen=True)
class Provenance:
    """The content of ``provenance.json``. Each round contains the hashes of its identity and its environment."""

    pool: str = ""
    """File name of the run's pool in the sweep's folder ``pools``."""
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Identities by their hashes. The last one is the current identity."""
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Parse the file's content.

        Raises:
            ValueError: the text is not the content of such a file.
        """
        content = json.loads(text)
        tables = [content.get(key) for key in ("identities", "environments")] if isinstance(content, dict) else []
        if not tables or not isinstance(content.get("pool"), str) or content.keys() != cls().__dict__.keys():
            raise ValueError("expected the keys pool, identities and environments")
        if not all(isinstance(t, dict) and all(isinstance(entry, dict) for entry in t.values()) for t in tables):
            raise ValueError("identities and environments must be tables")
        return cls(**content)

    def to_json(self) -> str:
        """Return the file's content."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @property
    def identity(self) -> dict[str, Any] | None:
        """The identity of the last rounds; None if none is recorded."""
        return next(reversed(self.identities.values()), None)

    def with_identity(self, identity: dict[str, Any]) -> "Provenance":
        """Return a copy whose current identity is ``identity``."""
        key = hash_json(identity)
        earlier = {name: value for name, value in self.identities.items() if name != key}
        return replace(self, identities=earlier | {key: identity})

    def with_environment(self, environment: dict[str, Any]) -> "Provenance":
        """Return a copy that holds ``environment``."""
        return replace(self, environments=self.environments | {hash_json(environment): environment})

    def round_columns(self, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return columns for each of a run's rounds: versions, device, CPU, commit, hash of the settings.

        ``continued`` says whether the round was computed under another identity than round 0.
        """
        first = rounds[0].get("identity") if rounds else None
        rows = []
        for result in rounds:
            environment = self.environments.get(result.get("environment", ""), {})
            settings = self.identities.get(result.get("identity", ""), {}).get("settings")
            row = {name: environment.get(name) for name in COLUMNS}
            row["config_hash"] = None if settings is None else hash_json(settings)
            rows.append(row | {"continued": result.get("identity") != first})
        return rows


def describe_mixed_runs(runs: Iterable[list[dict[str, Any]]], ignored: Collection[str]) -> dict[str, list[str]]:
    """Return a phrase for each value that is not the same in all runs, by section of the identity.

    Args:
        runs: for each run, the identities of its rounds.
        ignored: dotted paths of settings that may differ.
    """
    flat_runs = [[flatten(identity) for identity in identities] for identities in runs if identities]
    phrases: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for run in flat_runs for identity in run for key in identity):
        section, _, path = key.partition(".")
        if any(path == parent or path.startswith(f"{parent}.") for parent in ignored):
            continue
        counts = Counter(value for run in flat_runs for value in dict.fromkeys(repr(i.get(key)) for i in run))
        if len(counts) > 1:
            name = path if section == "settings" else key
            *first, last = (f"{one_line(text, 60)} in {count_runs(number)}" for text, number in counts.most_common())
            phrases.setdefault(section, []).append(f"{name} is {', '.join(first)} and {last}")
    return phrases


def count_runs(number: int) -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{number} run" if number == 1 else f"{number} runs"
