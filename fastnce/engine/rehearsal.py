"""Run a step's networks and losses without training: nothing that the next step depends on changes.

A compiled or recorded step cannot check its kernels at their first use, so they are checked in a rehearsal before it
(see `fastnce.common.first_use`). `run.check_every` compares the kernels of a step in a rehearsal (see `live_check`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..methods.base import Batch, Draws
from . import accumulate


@contextmanager
def buffers_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Restore afterwards every buffer of these modules: pools, banks, statistics. Their addresses stay."""
    owners = {id(owner): owner for module in modules for owner in module.modules()}.values()
    before = [(owner, dict(owner._buffers)) for owner in owners if owner._buffers]
    copies = {id(b): (b, b.detach().clone()) for _, buffers in before for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        for owner, buffers in before:
            owner._buffers.clear()
            owner._buffers.update(buffers)
        with torch.no_grad():
            for buffer, copy in copies.values():
                buffer.copy_(copy)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore afterwards the states of the default generators of the CPU and the device."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        yield


def rehearse(step: Any, batch: Batch, draws: Draws) -> None:
    """Generate and compute every phase's loss as the uncompiled step does, without gradients of parameters or updates.

    The method's state that follows from the image sizes is made here, as the step would make it. Call it right before
    the step, with the generators seeded for it.

    Args:
        step: a `fastnce.engine.step.Step`.
    """
    method = step.method
    batch = Batch(*(pictures.contiguous(memory_format=step.layout) for pictures in batch))
    method.prepare(batch)
    if step.options.accumulate > 1:
        batch, draws = accumulate.split(batch, draws, step.options.accumulate)[0]
    networks = [*method.generators().values(), *method.discriminators().values()]
    stateful = [method, *method.extra_state_modules().values()]
    device = step.bad_steps.device
    with buffers_kept(stateful), random_numbers_kept(device), step.weights(networks), step.autocast():
        outputs: dict[str, Any] = method.generate(batch, draws)
        for phase in method.phases():
            phase.loss(batch, outputs, draws)
