"""A checkpoint made once for each file that asks for it, and copies to spoil."""

import shutil

import pytest
from tiny_models import build

import mpop


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small compressed BERT classifier on disk."""
    path = tmp_path_factory.mktemp("saved") / "bert"
    model = build("bert")
    mpop.compress(model, mpop.CompressionConfig(compression=0.8))
    mpop.save(model, path)
    return path


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "broken")
