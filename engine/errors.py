"""Errors of the engine.

EngineError (ValueError)
├── ConfigError      sizes that do not fit together, a config file that is wrong
├── WeightsError     a file or folder of weights that cannot be loaded as it is
├── AdapterError     an adapter (LoRA) that cannot be loaded, or not into this model
├── RequestError     an edit request that cannot be run
├── TrainingError    a training that cannot go on
└── NonFiniteError   a row whose result holds NaN or infinity
"""

from __future__ import annotations

from collections.abc import Iterable


class EngineError(ValueError):
    """Base of all errors that a user of the engine can cause."""


class ConfigError(EngineError):
    """The sizes of a model contradict one another or are missing."""


class WeightsError(EngineError):
    """A file of weights is missing, pickled, damaged, or does not match the model's config."""

    @classmethod
    def mismatch(
        cls, where: str, *, missing: Iterable[str], surplus: Iterable[str], shapes: Iterable[str]
    ) -> WeightsError:
        """One error that lists (the first of) all keys that are wrong in `where`."""
        parts = []
        for label, names in (("missing", missing), ("surplus", surplus), ("wrong shape", shapes)):
            listed = sorted(names)
            if listed:
                more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
                parts.append(f"{len(listed)} {label}: {', '.join(listed[:5])}{more}")
        return cls(
            f"{where} does not match its config; {'; '.join(parts)}. Take weights and config from one complete copy of "
            "the model"
        )


class AdapterError(EngineError):
    """An adapter is of an unsupported kind, pickled, damaged, or does not fit the model."""


class RequestError(EngineError):
    """An edit request is wrong: sides, steps, noise shape, a reference layout that does not exist."""


class TrainingError(EngineError):
    """A training cannot go on: it diverged."""


class NonFiniteError(EngineError):
    """The result of a row is not finite."""
