"""The optimiser step that all trainings share, and the schedule of the plain ones."""

import copy
from pathlib import Path

import pytest
import torch

from minireflect import rng
from minireflect.run import Job, Run
from minireflect.training import Training, lr_factor, optimise, set_lr, take_step


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [lr_factor(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == 1
    assert all(a >= b for a, b in zip(rates[5:], rates[6:])) and rates[-1] < 1e-3
    assert lr_factor(0, 1) == 1  # a training of one step takes it


def test_a_step_is_torchs_with_a_clipped_gradient() -> None:
    torch.manual_seed(0)
    one = torch.nn.Linear(4, 3)
    two = copy.deepcopy(one)
    x = torch.randn(5, 4, generator=rng(0, "x"))
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1.0) for net in (one, two)]
    for lr in (0.1, 0.01):
        optimizers[0].zero_grad()
        (10 * one(x)).square().mean().backward()
        set_lr(optimizers[0], lr)
        norm = take_step(optimizers[0])
        assert norm > 1 and optimizers[0].param_groups[0]["lr"] == lr
        optimizers[1].zero_grad()
        (10 * two(x)).square().mean().backward()
        assert torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0).item() == norm
        optimizers[1].param_groups[0]["lr"] = lr
        optimizers[1].step()
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_the_loop_takes_the_steps_of_adamw_with_a_stream_of_each(tmp_path: Path) -> None:
    """Against torch's: both betas, weight decay, and the schedule's rate; what does not learn stays."""
    torch.manual_seed(0)
    one, frozen = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).requires_grad_(False)
    two, kept = copy.deepcopy(one), copy.deepcopy(frozen)
    optimizer = torch.optim.AdamW(two.parameters(), betas=(0.9, 0.5), weight_decay=0.3)
    config, job, streams = Training(steps=45, lr=0.1), Job(Run(tmp_path / "run", {}), 5), []
    for step, generator, minimise in optimise("x", config, {"a": one, "b": frozen}, job, 0.3, 0.5):
        streams.append(generator.initial_seed())
        x = torch.randn(5, 4, generator=generator)
        minimise(one(x).square().mean(), twice=2.0)
        set_lr(optimizer, 0.1 * lr_factor(step, 45))
        optimizer.zero_grad()
        two(x).square().mean().backward()
        take_step(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert streams == [rng(5, "x", "batch", step).initial_seed() for step in range(45)]
    assert torch.equal(frozen.weight, kept.weight)
    assert [row["step"] for row in job.run.metrics("x")] == [*range(45)]
    assert job.run.metrics("x")[0]["twice"] == 2


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(FloatingPointError, match=r"not finite; lower the learning rate, 1\.00e-01 now$"):
        (weight / 0).sum().backward()
        take_step(optimizer)
    assert torch.equal(weight.detach(), torch.ones(2))
