"""SGLang on a CPU, without what it has only for GPUs: imported before anything of it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from unittest.mock import MagicMock

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that SGLang's modules import names from and these tests never call."""

    packages = ("sgl_kernel", "torchvision")

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: MagicMock()  # type: ignore[method-assign]


sys.meta_path.insert(0, _Absent())


def start(rank: int = 0, processes: int = 1, address: str = "127.0.0.1:0") -> None:
    """SGLang's configuration of this process, and its groups."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path="dummy", device="cpu", tp_size=processes)
    publish(arguments, role="test", ranks=SpawnRanks(world_rank=rank))
    parallel_state.init_distributed_environment(
        backend="gloo",
        world_size=processes,
        rank=rank,
        local_rank=rank,
        distributed_init_method=f"tcp://{address}",
    )
    parallel_state.initialize_model_parallel()


def stop() -> None:
    from sglang.srt.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
