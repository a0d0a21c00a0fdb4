"""Channel dropout: the formula of the layer, the distribution of the masks, and their use in a step."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from engine.data.transfer import Batch
from engine.runtime.distributed import World
from engine.training.dropout_masks import DropoutMasks
from engine.training.step import StepOptions, Stepper
from loss import CriterionDSN
from networks import ChannelDropout, Seg_Model

CPU = torch.device("cpu")
CLASSES, CHANNELS, RATES = 3, (64, 32), (0.1, 0.5)


class Heads(nn.Module):
    """Two heads with dropout after a common norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, width, 1), ChannelDropout(width, rate), nn.Conv2d(width, CLASSES, 1))
            for width, rate in zip(CHANNELS, RATES, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.norm(images)
        return [head(x) for head in self.heads]


class Alone(World):
    """One of several processes, without the others."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.device = rank, size, CPU

    def all_reduce(self, tensor: Tensor) -> None:
        pass


def masks_of(model: nn.Module, step: int, samples: range, seed: int = 5) -> list[Tensor]:
    """Return the mask of each layer, bool [samples, channels]."""
    masks = DropoutMasks(model, seed, CPU)
    masks.draw(step, samples)
    with masks.applied(0, 1):
        return [layer.kept.clone() for layer in masks.layers]


class Noted:
    """Records the masks that each layer of `model` uses, part by part."""

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if isinstance(module, ChannelDropout)]
        self.masks: list[list[Tensor]] = [[] for _ in self.layers]
        for layer, masks in zip(self.layers, self.masks, strict=True):
            layer.register_forward_pre_hook(lambda layer, _, masks=masks: masks.append(layer.kept.clone()))


def stepper(model: nn.Module, world: World = World(0, 1, CPU), **options):  # noqa: B008
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Stepper(model, CriterionDSN(), optimizer, world, StepOptions(**options))


def batch(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    labels = torch.randint(0, CLASSES, (count, 8, 8), generator=generator)
    return Batch(images, labels, [""] * count)


class TestLayer:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 6, 2, 3, 4), (2, 6)])
    def test_formula(self, dtype, shape):
        layer = ChannelDropout(6, 0.25)
        layer.kept = torch.tensor(
            [[True, False, True, True, False, True], [False, True, True, True, True, True]]
        )
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = layer(x)
        expected = torch.zeros(shape, dtype=dtype)
        expected[layer.kept] = x.detach()[layer.kept] * torch.tensor(4 / 3, dtype=dtype)
        assert y.dtype == dtype and torch.equal(y, expected)
        y.sum().backward()
        factors = layer.kept.to(dtype) * torch.tensor(4 / 3, dtype=dtype)
        assert torch.equal(x.grad.view(2, 6, -1)[..., 0], factors)

    def test_all_dropped(self):
        layer = ChannelDropout(3, 1.0)
        layer.kept = torch.zeros(1, 3, dtype=torch.bool)
        assert torch.equal(layer(torch.ones(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))

    def test_evaluation_takes_no_mask(self):
        layer, x = ChannelDropout(3, 0.5).eval(), torch.randn(2, 3, 2, 2)
        layer.kept = torch.zeros(2, 3, dtype=torch.bool)
        assert torch.equal(layer(x), x)

    def test_memory_format_stays(self):
        layer = ChannelDropout(6, 0.5)
        layer.kept = torch.ones(2, 6, dtype=torch.bool)
        x = torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)

    def test_without_masks_pytorch_draws_whole_channels(self):
        model = Seg_Model(5, backbone="resnet50", dropout=0.5).train()
        layers = [module for module in model.modules() if "Dropout" in type(module).__name__]
        assert [layer.p for layer in layers] == [0.5, 0.5] and [layer.channels for layer in layers] == [
            512,
            512,
        ]
        x = torch.ones(4, 512, 3, 3)
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            y = layers[0](x)
            assert torch.equal(y, y[..., :1, :1].expand_as(y)) and set(y.unique().tolist()) == {0.0, 2.0}
            drawn.append(y)
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    def test_rate_out_of_range(self):
        with pytest.raises(ValueError):
            ChannelDropout(3, 1.5)


class TestMasks:
    def test_function_of_seed_step_and_sample(self):
        model = Heads()
        whole = masks_of(model, 7, range(6))
        for samples in (range(0, 2), range(2, 6), range(5, 6)):
            part = masks_of(model, 7, samples)
            assert all(torch.equal(one, mask[list(samples)]) for one, mask in zip(part, whole, strict=True))
        for step, samples, seed in ((8, range(6), 5), (7, range(1, 7), 5), (7, range(6), 6)):
            others = masks_of(model, step, samples, seed)
            assert not any(torch.equal(one, other) for one, other in zip(whole, others, strict=True))

    def test_rates_and_independence(self):
        """Rates over channels, samples, steps and heads are right to seven sigma in 600,000 decisions."""
        model = nn.ModuleList([ChannelDropout(500, rate) for rate in (0.1, 0.1)])
        steps = [torch.stack(masks_of(model, step, range(20))) for step in range(1, 31)]
        kept = torch.stack(steps).double()  # [steps, heads, samples, channels]
        assert kept.mean().item() == pytest.approx(0.9, abs=7 * 0.3 / kept.numel() ** 0.5)
        per_channel = kept.mean((0, 1, 2))
        assert per_channel.var().item() == pytest.approx(0.09 / 1200, rel=0.4)
        pairs = {
            "channels": (kept[..., :-1], kept[..., 1:]),
            "samples": (kept[:, :, :-1], kept[:, :, 1:]),
            "heads": (kept[:, 0], kept[:, 1]),
            "steps": (kept[:-1], kept[1:]),
            "diagonals": (kept[:-1, :, 1:], kept[1:, :, :-1]),
        }
        for name, (one, other) in pairs.items():
            correlation = ((one - 0.9) * (other - 0.9)).mean().item() / 0.09
            assert abs(correlation) < 7 / one.numel() ** 0.5, name

    def test_rate_zero_has_no_masks(self):
        model = nn.ModuleList([ChannelDropout(5, 0.0), nn.Dropout2d(0.5)])
        masks = DropoutMasks(model, 1, CPU)
        masks.draw(1, range(3))
        with masks.applied(0, 1):
            assert masks.layers == [] and model[0].kept is None

    def test_masks_stay_in_place(self):
        """Masks stay in the same memory, as a captured CUDA graph requires."""
        model = Heads()
        masks = DropoutMasks(model, 1, CPU)
        places = set()
        for step in range(3):
            masks.draw(step, range(4))
            with masks.applied(1, 2):
                places.add(model.heads[1][1].kept.data_ptr())
        assert len(places) == 1


class TestStep:
    def test_a_process_takes_the_masks_of_its_samples(self):
        images, labels, records = batch(4)
        used = {}
        for size in (1, 2, 4):
            masks: list[list[Tensor]] = [[], []]
            for rank in range(size):
                model = Heads()
                noted = Noted(model)
                share = slice(rank * 4 // size, (rank + 1) * 4 // size)
                part = Batch(images[share], labels[share], records[share])
                stepper(model, Alone(rank, size), seed=5).step(9, part)
                for layer, own in zip(masks, noted.masks, strict=True):
                    layer += own
            used[size] = [torch.cat(layer) for layer in masks]
        for masks in used.values():
            assert all(map(torch.equal, masks, masks_of(Heads(), 9, range(4))))

    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_parts_of_a_batch_have_its_masks(self, parts):
        model = Heads()
        noted = Noted(model)
        stepper(model, accumulate=parts, seed=5).step(9, batch(4))
        assert [len(layer) for layer in noted.masks] == [parts, parts]
        assert all(map(torch.equal, map(torch.cat, noted.masks), masks_of(Heads(), 9, range(4))))

    def test_no_mask_is_left_behind(self):
        model = Heads()
        samples = batch(4)
        made = stepper(model)
        made.step(1, samples)
        assert all(layer.kept is None for layer in made.dropout.layers)
        samples.images[0, 0, 0, 0] = float("nan")
        with pytest.raises(RuntimeError):
            made.step(2, samples)
        assert all(layer.kept is None for layer in made.dropout.layers)

    def test_loss_does_not_depend_on_pytorch_s_random_numbers(self):
        losses = []
        for seed in (1, 2):
            model = Heads()
            torch.manual_seed(seed)
            losses.append(stepper(model).step(1, batch()).numbers().loss)
        assert losses[0] == losses[1]
        assert stepper(Heads(), seed=1).step(1, batch()).numbers().loss != losses[0]

    def test_compiled_network_takes_each_step_s_masks_and_compiles_once(self):
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        for parts in (1, 2):
            counter, losses = CompileCounter(), []
            for compiled in (False, True):
                model = Heads()
                parallel = torch.compile(model, backend=counter) if compiled else model
                made = stepper(parallel, accumulate=parts)
                losses.append([made.step(step, batch()).numbers().loss for step in range(1, 5)])
            assert losses[1] == pytest.approx(losses[0], rel=1e-5) and counter.frame_count == 1
            assert all(one != other for one, other in itertools.pairwise(losses[0]))
            torch._dynamo.reset()
