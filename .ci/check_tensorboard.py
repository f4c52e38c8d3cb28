"""Reads a run's event files with the tensorboard package itself and compares every number with loss.csv.

    python -m venv /tmp/tensorboard
    /tmp/tensorboard/bin/pip install tensorboard==2.20.0
    /tmp/tensorboard/bin/python .ci/check_tensorboard.py RUN_FOLDER

Not part of the Rust tests, which need no Python. Ends with 0 if each step stands in the events exactly once with the
numbers of loss.csv (to the precision of the 32-bit floats that events hold), otherwise with 1.
"""

import csv
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = ["loss", "gradient_norm", "learning_rate", "samples_per_sec"]
# Events hold 32-bit floats, and loss.csv has seven digits, or three after the point.
RELATIVE, ABSOLUTE = 1e-6, 1e-3


def close(column, event, row):
    if math.isnan(row):
        return math.isnan(event)
    return math.isclose(event, row, rel_tol=RELATIVE, abs_tol=ABSOLUTE if column == "samples_per_sec" else 0.0)


def main(run):
    rows = list(csv.DictReader((run / "loss.csv").open()))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    expected = sorted(f"train/{column}" for column in COLUMNS)
    assert tags == expected, f"tags {tags}, expected {expected}"
    assert rows, f"{run}/loss.csv has no rows"
    for column in COLUMNS:
        scalars = events.Scalars(f"train/{column}")
        steps = [scalar.step for scalar in scalars]
        assert steps == [int(row["step"]) for row in rows], f"{column}: steps {steps}"
        for scalar, row in zip(scalars, rows):
            value = float(row[column])
            assert close(column, scalar.value, value), f"step {scalar.step}: {column} {scalar.value}, expected {value}"
    print(f"{run}: tensorboard reads {len(rows)} steps of {len(COLUMNS)} scalars, all as in loss.csv")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except AssertionError as error:
        sys.exit(f"error: {error}")
