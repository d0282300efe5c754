"""Training log: one CSV row per step and per measurement, and a plot of the losses."""

import csv
from pathlib import Path

from euryale.training import pictures


class Journal:
    """Writes ``out/log.csv`` and ``out/losses.png``, on the leader only.

    A resumed training drops the rows of the steps it repeats. Losses are in nats per token; ``top{r}_{k}`` is the top-r
    accuracy of head k.
    """

    def __init__(self, out: Path, num_heads: int, first_step: int) -> None:
        """Continue the log in ``out`` after ``first_step`` steps. ValueError if matplotlib is missing."""
        pictures.check()
        heads = range(num_heads)
        self.columns = ["kind", "step", "tokens", "backbone_loss", *(f"loss_{k}" for k in heads)]
        self.columns += [f"top{r}_{k}" for r in range(1, 6) for k in heads] + ["learning_rate", "tokens_per_second"]
        self._path, self._picture = out / "log.csv", out / "losses.png"
        self._num_heads = num_heads
        self.rows: list[dict] = []
        if first_step and self._path.is_file():
            with self._path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        rewritten = self._path.with_suffix(".tmp")  # replaced atomically: a kill must not lose the log
        with rewritten.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        rewritten.replace(self._path)

    @property
    def _measurements(self) -> list[dict]:
        return [row for row in self.rows if row["kind"] == "held-out"]

    @property
    def first(self) -> dict:
        """The oldest measurement, in the format of ``log_measurement``."""
        return self._restored(self._measurements[0])

    @property
    def last(self) -> dict:
        """The latest measurement, in the format of ``log_measurement``."""
        return self._restored(self._measurements[-1])

    def log_step(self, step: int, losses: list[float], tokens: int, learning_rate: float, rate: float) -> None:
        """Log a step: its ``losses`` in nats, the backbone's first, tokens so far, and tokens per second (``rate``)."""
        row = {"kind": "train", "step": step, "tokens": tokens, "learning_rate": f"{learning_rate:.3e}"}
        self._append(row | self._losses(losses) | {"tokens_per_second": f"{rate:.0f}"})

    def log_measurement(self, step: int, measurement: dict) -> None:
        """Log the result of ``loop.measure``."""
        row = {"kind": "held-out", "step": step}
        row |= self._losses([measurement["backbone_loss"], *measurement["head_losses"]])
        row |= {
            f"top{r + 1}_{k}": accuracy
            for k, accuracies in enumerate(measurement["top"])
            for r, accuracy in enumerate(accuracies)
        }
        self._append(row)

    def draw(self) -> None:
        """Plot the losses so far."""
        pictures.draw_losses(self._picture, self.rows, self._num_heads)

    def _losses(self, losses: list[float]) -> dict:
        return {name: f"{loss:.5f}" for name, loss in zip(self.columns[3:], losses, strict=False)}

    def _append(self, row: dict) -> None:
        self.rows.append(row)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _restored(self, row: dict) -> dict:
        heads = range(self._num_heads)
        return {
            "backbone_loss": float(row["backbone_loss"]),
            "head_losses": [float(row[f"loss_{k}"]) for k in heads],
            "top": [[float(row[f"top{r}_{k}"]) for r in range(1, 6)] for k in heads],
        }
