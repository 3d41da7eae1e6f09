"""Whatever a file holds: it loads, or fails with an error that says where, soon and without a traceback."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.errors import HpoError, SettingError, SpaceError
from hpo.space.document import MAX_PROBLEMS
from hpo.space.model import load_space

ROOT = Path(__file__).parent.parent
CPU_SECONDS = 1.5  # of one load: most take a hundredth, and a machine may be busy

FULL = """\
description: all there is
command: python train.py --lr={lr} --momentum={momentum} {seed}
metric: accuracy
direction: maximize
sampler: {name: tpe, seed: 0, n_startup_trials: 5}
scheduler: {name: asha, grace_period: 5, reduction_factor: 3}
max_epochs: 100
data: {dataset: fashion_mnist, train_samples: null, val_samples: 5000}
parameters:
  batch_size: {type: int, low: 16, high: 1024, log: true, default: 64}
  layers: {type: int, low: 2, high: 8, step: 2}
  lr: {type: float, low: 1e-4, high: 1.0, log: true}
  optimizer: {type: categorical, choices: [sgd, adam, adamw], default: adam}
  momentum: {type: float, low: 0.0, high: 0.9, step: 0.3, when: {optimizer: sgd}, default: 0.9}
  nesterov: {choices: [true, false], when: {momentum: [0.3, 0.6], optimizer: [sgd]}}
  stem: &stem [imagenet, cifar, null]
  other: *stem
  weight_decay: 0
constraints: ["lr <= 0.004 * batch_size", optimizer == 'sgd' or lr < 0.1]
derived: {warmup_epochs: "0.05 * max_epochs", decay: "1 - momentum * warmup_epochs"}
budget: {trials: 200, time: 1d12h}
resources: {cpu: 2, gpu: auto}
replicates: 1
max_failures: 2
trial_timeout: 30m
checkpoint_every: 2
seed: 0
"""
TEXTS = [FULL, *((ROOT / f"search_spaces/{name}.yaml").read_text() for name in ("grid", "quick", "extended"))]
FRAGMENTS = [
    "\t", "\n", " ", ":", "- ", "{", "}", "[", "]", ",", "&a ", "*a", "*stem", "!!int ", "!x ", "|\n", ">\n", "'", '"', "#",
    "%", "@", "`", "? ", "---\n", "...\n", "<<: *stem\n", "1e999", "-1", "0", ".nan", ".inf", "9" * 400, "true", "null",
    "\u2028", "\x00", "\ufeff", "\ud7ff", "é", "{lr}", "when: ", "low: ", "~", "2024-01-01", "lr", "grid", "cmaes", "\r",
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 10**30, -(10**400), 2**53, 1e308, -1e308, 5e-324, float("inf"), float("nan"), 1e-300])
    | st.floats()
    | st.sampled_from(
        ["", "sgd", "lr", "grid", "qmc", "gp", "cmaes", "nsga2", "tpe", "pbt", "median", "lr < 0", "1/0", "4h"]
    )
    | st.text(max_size=12)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "low", "high", "step", "log", "choices", "when", "default", "name", "lr", "a"])
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
        | st.fixed_dictionaries({"type": st.sampled_from(["int", "float"]), "low": inner, "high": inner, "step": inner})
        | st.fixed_dictionaries({"choices": inner, "when": inner})
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("document") / "space.yaml"


def check(file: Path, text: str) -> bool:
    """Load a file; return whether it was well. What is well can be drawn from, or expanded."""
    file.write_bytes(text.encode(errors="surrogatepass"))
    started = time.process_time()
    try:
        space = load_space(str(file))
    except HpoError as error:
        if not str(error).startswith(str(file)) or len(str(error)) > 100_000:
            pytest.fail(f"a strange error: {error}")
        return False
    finally:
        assert time.process_time() - started < CPU_SECONDS
    json.dumps([space.fingerprint, space.model_dump(mode="json")])
    if space.sampler.name == "grid":
        assert set(next(space.grid_points())) <= set(space.distributions())
    else:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        space.draw(study.ask())
    return True


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(item, (*path, key))


SETTINGS = settings(
    max_examples=1000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_mutated_below_is_well_before(file: Path, text: str) -> None:
    assert check(file, text)


@SETTINGS
@given(data=st.data())
def test_a_file_with_any_change_of_its_text_loads_or_says_where_it_is_wrong(file: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.sampled_from([0, 0, 1, 3, 40]))
        new = data.draw(st.sampled_from(FRAGMENTS) | st.text(max_size=4))
        text = text[:start] + new + text[start + cut :]
    check(file, text)


@SETTINGS
@given(data=st.data())
def test_a_file_with_any_change_of_its_values_loads_or_says_where_it_is_wrong(file: Path, data: st.DataObject) -> None:
    document = copy.deepcopy(yaml.safe_load(data.draw(st.sampled_from(TEXTS)).replace("1e-4", "1.0e-4")))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(paths(document))))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        match data.draw(st.sampled_from(["replace", "replace", "delete", "rename"])):
            case "replace":
                parent[path[-1]] = data.draw(values)
            case "delete":
                del parent[path[-1]]
            case "rename" if isinstance(parent, dict):
                parent[data.draw(st.text(max_size=8) | st.sampled_from(["lr", "lrr", "when"]))] = parent.pop(path[-1])
        if not document:
            break
    check(file, yaml.safe_dump(document, allow_unicode=True))


# --- what a mutation is unlikely to find ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000,
        "a: " + "{a: " * 5000,
        "- " * 5000,
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500)),
        "sampler: grid\nmax_epochs: " + "9" * 5000 + "\nparameters: {lr: 1}\n",
        "sampler: grid\nmax_epochs: 2\nparameters: {lr: " + "9" * 5000 + "}\n",
        "sampler: grid\nmax_epochs: 2\nparameters:\n" + "".join(f"  p{i}: 1\n" for i in range(9000)),
        "sampler: grid\nmax_epochs: 2\nparameters:\n" + "".join(f"  p{i}: [1, 2, 3]\n" for i in range(200)),
        "sampler: grid\nmax_epochs: 2\nparameters: {lr: 1}\n" + "".join(f"parametrs{i}: 1\n" for i in range(4000)),
        "sampler: tpe\nmax_epochs: 2\nparameters:\n"
        + "".join(f"  p{i}: {{type: int, low: 5, high: 1, steb: 1}}\n" for i in range(200)),
        "sampler: tpe\nmax_epochs: 2\nbudget: {trials: 2}\nparameters: {lr: {type: float, low: 0, high: 1}}\nconstraints:\n"
        + "  - lr ** 999 * (lr + 1) ** 999 < 0 and lr > 0\n" * 10,
    ],
    ids=range(11),
)
def test_a_file_made_to_hurt_is_refused_in_a_moment(file: Path, text: str) -> None:
    assert not check(file, text)


def test_a_file_with_very_many_mistakes_tells_the_first_ones(file: Path) -> None:
    file.write_text("sampler: grid\nmax_epochs: 2\nparameters: {lr: 1}\n" + "".join(f"key{i}: 1\n" for i in range(500)))
    with pytest.raises(SpaceError) as caught:
        load_space(str(file))
    lines = str(caught.value).splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    assert [
        re.match(re.escape(f"{file}:{line}:1: key{line - 4}: "), lines[line - 4]) is not None for line in range(4, 20)
    ]
    assert lines[-1] == f"{file}: and {500 - MAX_PROBLEMS} more mistakes"


def test_a_large_file_is_not_read(file: Path) -> None:
    file.write_bytes(b"a" * 10_000_000)
    started = time.process_time()
    with pytest.raises(SpaceError, match="10000000 bytes; a search space has at most"):
        load_space(str(file))
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("path", ["/dev/zero", "fifo"])
def test_what_is_no_file_is_not_read(tmp_path: Path, path: str) -> None:
    link = tmp_path / "space.yaml"
    if path == "fifo":
        os.mkfifo(link)
    else:
        link.symlink_to(path)
    with pytest.raises(SettingError, match="not a file"):
        load_space(str(link))


def test_a_byte_order_mark_is_no_part_of_the_first_key(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + TEXTS[1].encode())
    assert load_space(str(file)).max_epochs == 50


def test_lines_end_as_windows_ends_them(file: Path) -> None:
    file.write_bytes(TEXTS[0].replace("\n", "\r\n").replace("seed: 0\r", "sed: 0\r").encode())
    with pytest.raises(SpaceError) as caught:
        load_space(str(file))
    line = TEXTS[0].splitlines().index("seed: 0") + 1
    assert f"{file}:{line}:1: sed: unknown key, did you mean seed?" in str(caught.value).splitlines()
