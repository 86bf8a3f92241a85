"""Random rows, and how near two models' scores are."""

from dataclasses import dataclass

import numpy as np
from errors import ExportError
from graphs import Input

# One row, few, many, and a request's worth; none a multiple of another's blocks.
BATCHES = (1, 2, 7, 64, 900)


def rows(inputs: list[Input], n: int, values: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Features as the server gives them: float32 `[n, width]` by input."""
    made = {}
    for spec in inputs:
        if spec.ids is not None:
            drawn = rng.integers(0, spec.ids, (n, spec.width)).astype(np.float32)
        elif spec.name in values:  # trees: on thresholds, beside them, between them, and missing
            columns = [rng.choice(v, n) for v in values[spec.name]]
            drawn = np.stack(columns, 1)
            drawn += (
                rng.standard_normal(drawn.shape).astype(np.float32) * np.abs(drawn) * (rng.random(drawn.shape) < 0.5)
            )
            for at, v in enumerate(values[spec.name]):  # members of sets are whole numbers
                if np.array_equal(v, np.round(v)):
                    drawn[:, at] = np.round(drawn[:, at])
            drawn[rng.random(drawn.shape) < 0.1] = np.nan
        else:  # of several magnitudes
            drawn = rng.standard_normal((n, spec.width)) * 10.0 ** rng.integers(-1, 2, (n, 1))
        made[spec.name] = np.ascontiguousarray(drawn, np.float32)
    return made


def native(inputs: list[Input], dtypes: dict, given: dict) -> dict[str, np.ndarray]:
    """The same as the source wants them."""
    return {
        i.name: given[i.name].reshape((-1, *i.shape)).astype(dtypes.get(i.name, np.float32), copy=False) for i in inputs
    }


def score(values: np.ndarray, n: int, column: int | None) -> np.ndarray:
    """One number per row, float64.

    Raises ExportError for another shape.
    """
    values = np.asarray(values, np.float64)
    if column is not None and values.ndim == 2 and values.shape[1] > column:
        values = values[:, column]
    if values.size != n:
        raise ExportError(
            f"an output has shape {list(values.shape)} for {n} rows; a score is one value per row (--column)"
        )
    return values.reshape(n)


def furthest(want: np.ndarray, got: np.ndarray) -> float:
    """Largest difference, over the largest magnitude (1 at least); infinite where only one is a finite number."""
    finite = np.isfinite(want)
    if (finite != np.isfinite(got)).any():
        return float("inf")
    size = max(1.0, np.abs(want[finite]).max(initial=0.0))
    return float(np.abs(want - got)[finite].max(initial=0.0) / size)


def ndcg(want: np.ndarray, got: np.ndarray, places: int = 10) -> float:
    """NDCG@10 as the server measures it: the first ten of `want` are worth 10 to 1."""
    places = min(places, len(want))
    best = np.argsort(-want, kind="stable")[:places]
    gains = np.zeros(len(want))
    gains[best] = places - np.arange(places)
    discount = 1 / np.log2(np.arange(places) + 2)
    order = np.argsort(-np.nan_to_num(got, nan=-np.inf), kind="stable")[:places]
    return float((gains[order] * discount).sum() / (gains[best] * discount).sum())


@dataclass
class Fidelity:
    """How near a variant comes to float32."""

    # Mean over batches of 900 rows.
    ndcg: float
    # Largest difference over the spread of the scores.
    error: float

    def __str__(self) -> str:
        return f"NDCG@10 {self.ndcg:.5f}, error {self.error:.4f} of the spread"


def fidelity(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Fidelity:
    spread = max(np.concatenate([want for want, _ in pairs]).std(), np.finfo(np.float32).tiny)
    worst = max(np.abs(want - got).max() if np.isfinite(got).all() else np.inf for want, got in pairs)
    return Fidelity(float(np.mean([ndcg(want, got) for want, got in pairs])), float(worst / spread))
