"""Train with several processes: `torchrun --nproc_per_node=N -m fastnce train ...`.

Every rank applies the same networks to its own share of the batch. Gradients are averaged in one flat all-reduce per
phase. N ranks of batch b take the steps of one process of batch N*b: the same images, crops and patch ids.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .stop import default

FIRST_STEP_SECONDS = 300
"""How long a rank may be silent during the first steps, which may compile."""
STEP_SECONDS = 100
"""How long a rank may be silent after them."""


class RankLost(RuntimeError):
    """Another rank is gone or silent; the message says what this rank was waiting for."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a run; a single process by default."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes logs, samples and checkpoints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank: `name`, with the rank's own index if it names none."""
        if self.world > 1 and name in ("auto", "cuda", "xpu") and torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            return f"{kind.type if kind else name}:{self.local}"
        return name

    def broadcast(self, modules: Sequence[nn.Module]) -> None:
        """Copy the first rank's parameters and buffers to every rank."""
        if self.world > 1:
            with _watch("the first parameters"):
                for tensor in _tensors(modules):
                    # detached: else autograd would record the exchange, and keep the process group alive
                    dist.broadcast(tensor.detach(), src=0)

    def average(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The mean over ranks of each tensor, with the strides of `like`, in one all-reduce."""
        present = [(i, t) for i, t in enumerate(tensors) if t is not None]
        if self.world == 1 or not present:
            return tuple(tensors)
        flat = present[0][1].new_empty(sum(t.numel() for _, t in present))
        result: list[Tensor | None] = list(tensors)
        views, offset = [], 0
        for i, tensor in present:
            # the parameter's strides, so that Adam need not copy
            view = flat[offset : offset + tensor.numel()].as_strided(like[i].shape, like[i].stride(), offset)
            views.append(view)
            result[i] = view
            offset += tensor.numel()
        torch._foreach_copy_(views, [t for _, t in present])
        with _watch("the others' gradients"):
            dist.all_reduce(flat)
        flat.mul_(1.0 / self.world)
        return tuple(result)

    def others(self, tensor: Tensor) -> Tensor:
        """The tensors that the other ranks pass in this call, (...) -> (world - 1, ...), without gradients."""
        every = tensor.new_empty(self.world, *tensor.shape)
        with _watch("the others' keys"):
            dist.all_gather_into_tensor(every.flatten(), tensor.detach().contiguous().flatten())
        return torch.cat([every[: self.rank], every[self.rank + 1 :]])

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a small tensor over ranks, for logs."""
        if self.world == 1:
            return values
        values = values.clone()
        with _watch("the others' losses"):
            dist.all_reduce(values)
        return values / self.world

    def most(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each value over all ranks."""
        if self.world == 1:
            return list(values)
        most = torch.tensor(values, device=device)
        with _watch("the others' answers"):
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return most.tolist()

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """Within: code that succeeds on all ranks or fails on all. A rank that failed alone would leave others waiting.

        The code must not communicate.

        Raises:
            ValueError: another rank has failed by a mistake of the user (a `ValueError` or an `OSError` there).
            RankLost: another rank has failed otherwise.
        """
        if self.world == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        mistake = isinstance(failed, ValueError | OSError)
        try:
            mistaken, lost = self.most([float(mistake), float(failed is not None and not mistake)], device)
        except Exception:
            if failed is not None:
                raise failed from None
            raise
        if failed is None and (mistaken or lost):
            failed = (RankLost if lost else ValueError)("another rank cannot go on, and says why")
        if failed is not None:
            failed.__dict__["everywhere"] = True
            raise failed

    def check_drift(self, modules: Sequence[nn.Module]) -> None:
        """RuntimeError if the ranks' parameters are not bit-equal, because they were updated differently.

        Buffers must be equal too, except for the statistics of batch norms: each rank has those of its own images, and
        the first rank's are stored.
        """
        if self.world == 1:
            return
        norms = [part for module in modules for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        apart = {id(buffer) for norm in norms for buffer in norm.buffers()}
        # almost any difference changes one of these two integer sums
        sums = []
        for tensor in [t for t in _tensors(modules) if id(t) not in apart]:
            bits = tensor.detach().contiguous().flatten().view(torch.uint8).to(torch.int64)
            places = torch.arange(1, len(bits) + 1, device=bits.device) % 65521
            sums += [bits.sum(), (bits * places).sum()]
        low = torch.stack(sums)
        high = low.clone()
        with _watch("the others' checksums"):
            dist.all_reduce(low, op=dist.ReduceOp.MIN)
            dist.all_reduce(high, op=dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError(
                f"rank {self.rank}: the ranks' parameters have drifted apart; the last checkpoint is good"
            )

    def settle(self) -> None:
        """Shorten the timeout. Call it once every kind of step has been compiled."""
        if self.world > 1:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=STEP_SECONDS), dist.group.WORLD)


def fails_everywhere(error: Exception) -> bool:
    """Whether all ranks have failed in `Ranks.together`, and so can still communicate."""
    return bool(error.__dict__.get("everywhere"))


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [t for module in modules for t in [*module.parameters(), *module.buffers()]]


@contextmanager
def _watch(what: str) -> Iterator[None]:
    """Within: the library's errors about lost peers become one `RankLost`."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        reason = str(error).splitlines()[0][:200]
        raise RankLost(f"another rank is gone or silent: waited for {what} ({reason})") from None


def read_ranks() -> Ranks:
    """The ranks that the launcher's variables describe, before anything is connected; `Ranks()` without a launcher.

    Raises:
        ValueError: a variable is missing or out of range. The processes would wait for each other forever.
    """
    if "WORLD_SIZE" not in os.environ:
        return Ranks()
    world = _number("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ and world > 1]
    if missing:
        raise ValueError(f"WORLD_SIZE={world}, but {', '.join(missing)} is not set: start with torchrun")
    ranks = Ranks(_number("RANK", 0, world - 1), world, _number("LOCAL_RANK", 0, world - 1))
    if world == 1:
        return Ranks()
    _number("MASTER_PORT", 1, 65535)
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) != socket.EAI_AGAIN:  # a slow name server is not a mistake of the user
            raise ValueError(f"MASTER_ADDR={address!r} names no machine: start with torchrun") from None
    return ranks


def _number(name: str, least: int, most: int | None = None) -> int:
    """The value of a launcher's variable; `least` if it is not set."""
    text = os.environ.get(name, str(least))
    if text.isdecimal() and int(text) >= least and (most is None or int(text) <= most):
        return int(text)
    limit = f"from {least} on" if most is None else f"from {least} to {most}"
    why = f" (WORLD_SIZE={most + 1})" if most is not None and name.endswith("RANK") else ""
    raise ValueError(f"{name}={text!r} must be a whole number {limit}{why}: start with torchrun")


@contextmanager
def ranks_of_launcher(device: str) -> Iterator[Ranks]:
    """Within: the ranks that torchrun (or SLURM through it) started, connected; `Ranks()` without a launcher."""
    ranks = read_ranks()
    if ranks.world == 1:
        yield ranks
        return
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    backend = "gloo" if on_cpu else dist.get_default_backend_for_device(ranks.device(device))
    if not on_cpu:
        there = torch.accelerator.device_count()
        if ranks.local >= there:
            raise ValueError(
                f"LOCAL_RANK={ranks.local}, but {there} accelerators are here, numbered from 0: start fewer processes, "
                f"or set run.device=cpu"
            )
        torch.accelerator.set_device_index(ranks.local)
    try:
        with _watch("the others to start"), default():
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=FIRST_STEP_SECONDS))
    except RankLost as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"MASTER_PORT={os.environ['MASTER_PORT']} is another program's: name a free one") from None
        raise
    try:
        yield ranks
    except RankLost:
        raise  # destroying the group would wait for the lost rank, or abort
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
