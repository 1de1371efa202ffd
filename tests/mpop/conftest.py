"""A small GLUE folder and a small BERT, made once for each file that asks for them."""

import pytest
from tiny_glue import save_bert, write_glue


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))
