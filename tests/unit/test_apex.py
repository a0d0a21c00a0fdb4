"""The apex backend without apex: errors if it can't be used, and its use of a stand-in.

The stand-ins have the signatures of NVIDIA's classes at tag 25.05 and compute with plain torch.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.runtime import apex
from networks import ABN, synchronize
from utils.errors import UsageError

EXTENSIONS = ("amp_C", "syncbn")
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "from test_apex import FusedSGD",
    "apex/parallel/__init__.py": "from test_apex import DistributedDataParallel",
    "apex/parallel/optimized_sync_batchnorm_kernel.py": "from test_apex import SyncBatchnormFunction",
    "amp_C.py": "",
    "syncbn.py": "",
}


class FusedSGD(torch.optim.SGD):
    def __init__(
        self,
        params,
        lr,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=False,
    ):
        assert not wd_after_momentum
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)


class DistributedDataParallel(nn.Module):
    def __init__(self, module, message_size=10000000, delay_allreduce=False, gradient_average=True):
        super().__init__()
        self.module, self.gradient_average, self.reduces = module, gradient_average, True

    def disable_allreduce(self):
        self.reduces = False

    def enable_allreduce(self):
        self.reduces = True


class SyncBatchnormFunction:
    """Behaves as if two processes held the same data."""

    calls = 0

    @classmethod
    def apply(
        cls,
        input,
        z,
        weight,
        bias,
        running_mean,
        running_variance,
        eps,
        track_running_stats=True,
        momentum=1.0,
        process_group=None,
        channel_last=False,
        fuse_relu=False,
    ):
        assert z is None and track_running_stats and not channel_last and not fuse_relu
        assert process_group == "both processes"
        cls.calls += 1
        variance, mean = torch.var_mean(input.detach(), (0, 2, 3), correction=0)
        total = 2 * input.numel() / input.size(1)
        # NVIDIA's class replaces the storage too.
        running_mean.data = running_mean.data * (1 - momentum) + momentum * mean
        running_variance.data = running_variance.data * (1 - momentum) + momentum * variance * total / (
            total - 1
        )
        return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that replaces apex by a package with given files."""

    def forget() -> dict:
        names = [name for name in sys.modules if name.partition(".")[0] in ("apex", *EXTENSIONS)]
        return {name: sys.modules.pop(name) for name in names}

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for name in ("apex", *EXTENSIONS):
            if not files.keys() & {f"{name}.py", f"{name}/__init__.py"}:
                sys.modules[name] = None  # hides an installed one
        monkeypatch.syspath_prepend(tmp_path)

    before = forget()
    yield write
    forget()
    sys.modules.update(before)


def without(*prefixes: str) -> dict[str, str]:
    return {name: text for name, text in APEX.items() if not name.startswith(prefixes)}


class TestRequire:
    def refusal(self, device_type: str = "cuda") -> str:
        with pytest.raises(UsageError) as error:
            apex.require(device_type)
        text = str(error.value)
        assert text.startswith("--backend apex: ") and "\n" not in text and "omit the flag" in text
        return text

    def test_complete(self, install):
        install(APEX)
        apex.require("cuda")

    def test_cpu(self, install):
        install(APEX)
        assert "requires an NVIDIA GPU" in self.refusal("cpu")

    @pytest.mark.parametrize(
        ("files", "said"),
        [
            ({}, "is not installed; build"),
            (without("apex/optimizers", "apex/parallel"), "is not NVIDIA's"),
            ({"apex.py": ""}, "is not NVIDIA's"),
            (without("apex/parallel"), "removed after tag 25.05"),
            (without("amp_C"), "without its CUDA extensions"),
            (without("syncbn"), "without its CUDA extensions"),
            (
                {**APEX, "amp_C.py": "raise ImportError('undefined symbol: _ZN3c10\\nat')"},
                "(undefined symbol: _ZN3c10)",
            ),
        ],
    )
    def test_what_is_missing_is_said(self, install, files, said):
        install(files)
        text = self.refusal()
        assert said in text and "github.com/NVIDIA/apex" in text


def test_optimizer_is_torch_sgd_with_momentum_and_weight_decay(install):
    install(APEX)
    options = {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.125}
    ends = []
    for make in (torch.optim.SGD, apex.optimizer):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make([weight], **options)
        for factor in (1.0, 3.0):
            optimizer.zero_grad()
            (factor * weight.square()).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    assert type(optimizer) is FusedSGD
    assert torch.equal(*ends)


class TestDataParallel:
    def test_gradients_are_averaged_but_in_no_sync(self, install):
        install(APEX)
        model = nn.Conv2d(2, 3, 3)
        parallel = apex.data_parallel(model)
        assert parallel.module is model and parallel.gradient_average and parallel.reduces
        with pytest.raises(KeyError), parallel.no_sync():
            assert not parallel.reduces
            raise KeyError
        assert parallel.reduces

    def test_channels_last_weights_are_refused(self, install):
        install(APEX)
        with pytest.raises(UsageError, match="^--channels-last: not supported by --backend apex"):
            apex.data_parallel(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last))


class TestABN:
    group = SimpleNamespace(size=2, group="both processes", all_reduce=lambda tensor: tensor.mul_(2))

    def filled(self, backend: str, activation: str = "leaky_relu") -> ABN:
        norm = ABN(6, activation, backend, eps=0.1)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([-1.5, -0.2, 0.0, 0.3, 1.0, 2.0]))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
        return norm

    @pytest.mark.parametrize("activation", ["leaky_relu", "identity"])
    def test_synchronized_equals_torch(self, install, activation):
        install(APEX)
        torch.manual_seed(1)
        batches = [torch.randn(2, 3, 6, 5, 4) * 2 + 1 for _ in range(2)]
        results = []
        for backend in ("torch", "apex"):
            norm, calls = self.filled(backend, activation), SyncBatchnormFunction.calls
            synchronize(norm, self.group)
            kept = norm.state_dict()
            for x, grad in batches:
                x = x.clone().requires_grad_()
                y = norm(x)
                y.backward(grad)
            results.append(
                [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
            )
            assert SyncBatchnormFunction.calls - calls == (2 if backend == "apex" else 0)
            for name, value in norm.state_dict().items():
                assert torch.equal(kept[name], value), "an earlier state dict still shares the storage"
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("case", ["alone", "eval", "bfloat16", "float64"])
    def test_torch_serves_the_rest(self, install, case):
        install(APEX)
        torch.manual_seed(2)
        x = torch.randn(3, 6, 5, 4).to({"bfloat16": torch.bfloat16, "float64": torch.float64}.get(case))
        calls, results = SyncBatchnormFunction.calls, []
        for backend in ("torch", "apex"):
            norm = self.filled(backend).train(case != "eval")
            synchronize(norm, None if case == "alone" else self.group)
            results.append(norm(x).detach())
        assert torch.equal(*results)
        assert SyncBatchnormFunction.calls == calls

    def test_without_apex_construction_fails(self, install):
        install({})
        with pytest.raises(ImportError):
            ABN(6, backend="apex")
