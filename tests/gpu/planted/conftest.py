"""A checkpoint made once for all sessions of the process, and an empty card for every test."""

import gc
import tempfile

import pytest

_made = []


@pytest.fixture
def checkpoint():
    import train

    if not _made:
        _made.append(tempfile.TemporaryDirectory())
        train.make_checkpoint(_made[0].name)
    return _made[0].name


@pytest.fixture(autouse=True)
def empty_card():
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
