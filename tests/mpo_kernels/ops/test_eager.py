"""What the operator is for beside its result: gradients, modes, tracers, the profiler."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_kernels import MPOLinear, MPOShape
from mpo_kernels.ops import eager, functional


class Absent:
    def __get__(self, instance, owner):
        raise AttributeError("_is_zerotensor")


class TestCallsThatSomethingObserves:
    """An eager call goes past the dispatcher; whatever would see the operator still does."""

    @pytest.fixture
    def layer(self):
        return MPOLinear(12, 8, MPOShape((3, 4), (4, 2), 3)).requires_grad_(False)

    @pytest.fixture
    def reloaded(self):
        """Read torch's names anew, now and when the test is over."""
        yield lambda: importlib.reload(eager)
        importlib.reload(eager)

    def test_this_torch_has_the_names(self):
        assert eager.MISSING is None, "eager calls are slower with this torch: see ops/eager.py"

    @pytest.mark.parametrize(
        "place, name",
        [
            (torch._C, "_get_tracing_state"),
            (torch._C, "_is_any_autocast_enabled"),
            (torch._C, "_len_torch_dispatch_stack"),
            (torch._C, "_len_torch_function_stack"),
            (torch._C._functorch, "peek_interpreter_stack"),
            (torch.autograd, "_profiler_enabled"),
            (torch.autograd.forward_ad, "_current_level"),
            (torch.Tensor, "_is_zerotensor"),
        ],
    )
    def test_a_torch_without_one_dispatches_every_call(
        self, layer, reloaded, monkeypatch, place, name
    ):
        x = torch.randn(3, 12)
        direct = layer(x)
        with monkeypatch.context() as without:
            if place is torch.Tensor:  # whose base, which has it, cannot be changed
                without.setattr(place, name, Absent(), raising=False)
            else:
                without.delattr(place, name)
            reloaded()
        assert name in eager.MISSING
        assert not eager.unobserved(x, list(layer.cores), layer.bias)
        assert torch.equal(layer(x), direct)

    def operators(self, call):
        seen = []

        class Spy(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        with Spy():
            call()
        return seen

    def test_nothing_else_is_different(self, layer, monkeypatch):
        x = torch.randn(3, 2, 12)
        direct = layer(x)
        monkeypatch.setattr(functional, "unobserved", lambda *_: False)
        assert torch.equal(layer(x), direct)
        with pytest.raises(TypeError, match="expected cores and bias like x"):
            layer(x.double())
        monkeypatch.undo()
        with pytest.raises(TypeError, match="expected cores and bias like x"):
            layer(x.double())

    def test_modes_tracers_and_the_profiler(self, layer):
        x = torch.randn(3, 12)
        assert "mpo_kernels.linear.default" in self.operators(lambda: layer(x))
        graph = make_fx(layer)(x).graph
        assert any("mpo_kernels.linear" in str(node.target) for node in graph.nodes)
        with torch.autograd.profiler.profile() as profile:
            layer(x)
        assert any(event.name == "mpo_kernels::linear" for event in profile.function_events)
        traced = torch.jit.trace(layer, x)
        y = torch.randn(3, 12)
        torch.testing.assert_close(traced(y), layer(y))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(layer(mode.from_tensor(x)), FakeTensor)

    def test_gradients(self, layer):
        x = torch.randn(3, 12, requires_grad=True)
        assert layer(x).requires_grad
        with torch.no_grad():
            assert not layer(x).requires_grad
        with torch.inference_mode():
            assert layer(x.detach()).is_inference()

    def test_forward_mode_is_refused_rather_than_lost(self, layer):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(torch.randn(3, 12), torch.randn(3, 12))
            with pytest.raises(RuntimeError, match="forward mode AD"):
                layer(x)
