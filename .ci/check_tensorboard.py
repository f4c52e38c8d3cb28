"""Reads a run's event files with the tensorboard package itself and compares every number with loss.csv and
monitor.csv.

    python -m venv /tmp/tensorboard
    /tmp/tensorboard/bin/pip install tensorboard==2.20.0
    /tmp/tensorboard/bin/python .ci/check_tensorboard.py RUN_FOLDER

Not part of the Rust tests, which need no Python. Ends with 0 if each step stands in the events exactly once with the
numbers of the table (to the precision of the 32-bit floats that events hold), otherwise with 1.
"""

import csv
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Event folder, the table with the same numbers, and what the tags start with.
PAIRS = [
    ("tensorboard", "loss.csv", "train", ["loss", "gradient_norm", "learning_rate", "samples_per_sec"]),
    (
        "tensorboard/monitor",
        "monitor.csv",
        "monitor",
        ["paired_error", "saturation_ratio", "contrast_ratio", "sharpness_ratio", "diversity_ratio"],
    ),
]
# Events hold 32-bit floats, and the tables have seven digits, or for a speed three after the point.
RELATIVE, ABSOLUTE = 1e-6, 1e-3


def close(column, event, row):
    if math.isnan(row):
        return math.isnan(event)
    return math.isclose(event, row, rel_tol=RELATIVE, abs_tol=ABSOLUTE if column == "samples_per_sec" else 0.0)


def check(run, folder, table, prefix, columns):
    rows = list(csv.DictReader((run / table).open()))
    events = EventAccumulator(str(run / folder), size_guidance={"scalars": 0})
    events.Reload()
    assert rows, f"{run / table} has no rows"
    for column in columns:
        expected = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if not expected:
            continue
        scalars = events.Scalars(f"{prefix}/{column}")
        steps = [scalar.step for scalar in scalars]
        assert steps == [step for step, _ in expected], f"{column}: steps {steps}"
        for scalar, (step, value) in zip(scalars, expected):
            assert close(column, scalar.value, value), f"step {step}: {column} {scalar.value}, expected {value}"
    print(f"{run / folder}: tensorboard reads {len(rows)} steps of {len(columns)} scalars, all as in {table}")


def main(run):
    for folder, table, prefix, columns in PAIRS:
        if table == "loss.csv" or (run / table).exists():
            check(run, folder, table, prefix, columns)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (AssertionError, KeyError) as error:
        sys.exit(f"error: {error}")
