"""Inputs of every kind that is fuzzed: some hundreds made here, and all that were ever handled wrongly."""

import random
from itertools import islice
from pathlib import Path

import pytest
from support.checkpoints import LINUX
from support.fuzzing import TARGETS

CORPUS = Path(__file__).parent / "corpus"
FOUND = sorted(CORPUS.glob("*/*"))

pytestmark = pytest.mark.skipif(not LINUX, reason="the processes of POSIX")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {name: kind(tmp_path_factory.mktemp("fuzzing") / "own") for name, kind in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_and_damaged_ones_are_handled_as_promised(targets, name):
    target = targets[name]
    for data in target.samples:
        target.check(data)
    for data in islice(target.inputs(random.Random(1)), 150):
        target.check(data)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name} {path.name}")
def test_what_was_once_handled_wrongly_is_handled_as_promised(targets, path):
    targets[path.parent.name].check(path.read_bytes())
