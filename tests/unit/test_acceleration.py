"""Folded batch norm, precision and memory format: the same predictions, faster."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import fill

from engine import acceleration
from engine.acceleration import Speed, accelerate, choose_precision
from networks import ABN, Seg_Model, fold_batch_norm
from networks.variants import VARIANTS
from utils.errors import UsageError

CPU = torch.device("cpu")


def make(variant: str = "ccnet", classes: int = 5) -> Seg_Model:
    model = Seg_Model(classes, backbone="resnet50", variant=variant)
    fill(model)
    return model.eval()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_folded_logits_are_exact_in_float64(variant: str) -> None:
    model = make(variant).double()
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    images = torch.randn(2, 3, 33, 41, dtype=torch.float64) * 50
    with torch.no_grad():
        right, found = model(images)[0], folded(images)
    assert len(found) == 1 and (found[0] - right).abs().max() < 1e-11 * right.abs().max()
    assert not any(isinstance(module, ABN) for module in folded.modules())
    # The network itself keeps its weights and its auxiliary head.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(model(images)) == 2 and folded.dsn is None
    again = fold_batch_norm(folded)
    with torch.no_grad():
        assert torch.equal(again(images)[0], found[0])


def test_a_norm_without_its_convolution_is_kept() -> None:
    net = torch.nn.Sequential(ABN(3), torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), ABN(4)).eval()
    for norm in (net[0], net[3]):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.running_mean)
    folded = fold_batch_norm(net)
    assert isinstance(folded[0], ABN) and isinstance(folded[3], ABN)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(folded(x), net(x))


def test_a_norm_of_other_channels_is_kept() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), ABN(2)).eval()
    assert isinstance(fold_batch_norm(net)[1], ABN)


@pytest.mark.parametrize("channels_last", [False, True])
def test_float32_is_the_same_up_to_rounding(channels_last: bool) -> None:
    model = make()
    images = torch.randn(1, 3, 65, 49) * 50
    run = accelerate(fold_batch_norm(model), CPU, Speed(channels_last=channels_last))
    with torch.inference_mode():
        right = model.double()(images.double())[0]
        found = run(images)[0]
    assert found.dtype == torch.float32 and (found - right).abs().max() < 1e-4 * right.abs().max()


def test_bf16_computes_in_bf16() -> None:
    model = fold_batch_norm(make())
    dtypes = []
    model.layer1.register_forward_hook(lambda _module, _input, y: dtypes.append(y.dtype))
    run = accelerate(model, CPU, Speed("bf16", channels_last=True))
    with torch.inference_mode():
        run(torch.randn(1, 3, 33, 33))
    assert dtypes == [torch.bfloat16]
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_compiled_is_the_same_up_to_rounding() -> None:
    model = fold_batch_norm(make())
    images = torch.randn(1, 3, 33, 41) * 50
    with torch.inference_mode():
        right = model(images)[0]
        found = accelerate(model, CPU, Speed(compile=True))(images)[0]
    assert (found - right).abs().max() < 1e-4 * right.abs().max()


def test_auto_takes_bf16_where_it_is_fast(tmp_path, monkeypatch) -> None:
    for words, fast in (("flags : avx512f avx512_bf16 sse", True), ("flags : avx512f sse", False),
                        ("Features : fp asimd bf16", True), ("Features : fp asimd i8mm", False)):  # fmt: skip
        (tmp_path / "cpuinfo").write_text(words)
        monkeypatch.setattr(acceleration, "CPU_INFO", tmp_path / "cpuinfo")
        amp, line = choose_precision("auto", CPU)
        assert amp == ("bf16" if fast else None)
        assert line.startswith(f"--amp auto: {'bf16' if fast else 'float32'}, ")
    monkeypatch.setattr(acceleration, "CPU_INFO", tmp_path / "missing")
    assert choose_precision("auto", CPU)[0] is None
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (choose_precision("auto", torch.device("cuda", 0))[0] == "bf16") == fast


def test_given_precisions() -> None:
    assert choose_precision(None, CPU) == (None, None) and choose_precision("bf16", CPU) == ("bf16", None)
    assert choose_precision("fp16", torch.device("cuda", 0)) == ("fp16", None)
    with pytest.raises(UsageError, match="--amp fp16: requires a GPU"):
        choose_precision("fp16", CPU)
    with pytest.raises(UsageError, match="--amp half: is not one of auto, bf16, fp16"):
        choose_precision("half", CPU)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(UsageError, match="--cuda-graph: requires a GPU"):
        accelerate(torch.nn.Conv2d(3, 5, 1), CPU, Speed(cuda_graph=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_give_the_same_logits_for_each_size() -> None:
    gpu = torch.device("cuda")
    model = fold_batch_norm(Seg_Model(5, backbone="resnet50")).to(gpu)
    plain, recorded = (
        accelerate(model, gpu, Speed("bf16", True, cuda_graph=graph)) for graph in (False, True)
    )
    with torch.inference_mode():
        for size in [(33, 33), (33, 49), (33, 33), (49, 33), (65, 33), (33, 65), (33, 49)]:
            images = torch.randn(2, 3, *size, device=gpu) * 50
            torch.testing.assert_close(recorded(images)[0], plain(images)[0], rtol=2e-2, atol=2e-2)
