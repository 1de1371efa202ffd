"""A small GLUE folder and a small BERT, made once for each file that asks for them."""

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO

import pytest
from tiny_glue import save_bert, write_glue


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def in_process():
    """What stands in for `subprocess.run` of a module of mpop: a process takes seconds to begin."""

    def run(command, **options):
        python, flag, module, *arguments = command
        assert (python, flag) == (sys.executable, "-m")
        main = import_module("mpop.cli" if module == "mpop" else module).main
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main(arguments) or 0
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run
