"""The modules that the package imports: imports are most of the time that a worker needs to start."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A trial with SGD, a trial with Adam, and one that resumes from its checkpoint.
TRIALS = """
import io
import torch
from hpo.train.loop import train
import hpo.train.probe
torch.set_num_threads(1)
data = {"dataset": "fashion_mnist_sample", "train_samples": 4, "val_samples": 10}
options = {"data": data, "seed": 0, "max_epochs": 3, "device": "cpu"}
next(train({"batch_size": 4, "optimizer": "sgd", "momentum": 0.9}, **options))
report = next(train({"batch_size": 4}, **options))
file = io.BytesIO()
torch.save(report.state(), file)
file.seek(0)
next(train({"batch_size": 4}, checkpoint=torch.load(file, weights_only=True), **options))
"""


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import hpo.train.params", ["torch", "numpy"]),
        # Modules that are slow to import, and the search around the training.
        (
            TRIALS,
            ["torch._dynamo", "sympy", "torchvision", "ray", "optuna", "sqlalchemy", "pydantic", "rich", "storage"],
        ),
    ],
    ids=["params", "trials"],
)
def test_slow_and_foreign_packages_are_not_imported(code: str, absent: list[str]) -> None:
    check = f"{code}\nimport sys\nprint([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
