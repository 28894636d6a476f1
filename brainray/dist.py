"""Collectives: the only module that uses torch.distributed.

Every collective also works without a process group, as on a single rank. All ranks must call them
unconditionally and in the same order.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from brainray.errors import BrainrayError, error_from_dict, error_to_dict
from brainray.log import log

_PATIENCE = timedelta(minutes=10)


def _is_distributed() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    return torch_dist.get_rank() if _is_distributed() else 0


def world_size() -> int:
    return torch_dist.get_world_size() if _is_distributed() else 1


def log_once(message: str) -> None:
    """Log on the first rank only."""
    if rank() == 0:
        log(message)


def sum_across_ranks(tensor: Tensor) -> Tensor:
    """Elementwise sum over all ranks, the same on each; the argument is not modified."""
    if world_size() == 1:
        return tensor
    total = tensor.clone().contiguous()
    torch_dist.all_reduce(total, op=torch_dist.ReduceOp.SUM)
    return total


def count_across_ranks(num_rows: int, device: torch.device) -> int:
    """Sum of the ranks' counts."""
    return int(sum_across_ranks(torch.tensor(num_rows, device=device)))


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate (n_rank, ...) tensors of all ranks along dimension 0, in rank order.

    The number of rows may differ between ranks and may be zero; dtype and trailing dimensions
    must agree.
    """
    if world_size() == 1:
        return rows
    num_rows = torch.zeros(world_size(), dtype=torch.int64)
    num_rows[rank()] = rows.shape[0]
    counts = sum_across_ranks(num_rows.to(rows.device)).tolist()
    longest = max(counts)
    # all_gather needs equal shapes: pad to the longest shard and cut afterwards.
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    torch_dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def gather_equal_rows(rows: Tensor) -> Tensor:
    """Differentiable `gather_rows` for the same number of rows on every rank.

    Rows are not counted first, so there is no device synchronisation. Backward is collective too: a
    row's gradient is the sum of the gradients of all ranks' losses. As DDP averages gradients, this
    gives the gradient of the mean loss.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherEqualRows.apply(rows)
    return gathered


class _GatherEqualRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
        torch_dist.all_gather_single(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        first = rank() * ctx.num_rows
        return sum_across_ranks(gradient)[first : first + ctx.num_rows]


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Rank 0's values on every rank; the argument (same shape and dtype everywhere) is not
    modified.
    """
    if world_size() == 1:
        return tensor
    shared = tensor.clone().contiguous()
    torch_dist.broadcast(shared, src=0)
    return shared


def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers, such as batch statistics, to every rank."""
    for buffer in model.buffers():
        buffer.copy_(broadcast_from_first(buffer))


def average_buffers(model: nn.Module, weight: int) -> None:
    """Give floating-point buffers their mean over the ranks, each with its weight (collective).

    Where all weights are 0, nothing changes.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    total = sum_across_ranks(torch.tensor(weight, device=buffers[0].device))
    for buffer in buffers:
        mean = sum_across_ranks(buffer.double() * weight) / total
        buffer.copy_(torch.where(total > 0, mean, buffer))


@contextmanager
def raise_on_all_ranks(device: torch.device) -> Iterator[None]:
    """Raise one rank's error on every rank: the others would wait for it in a collective.

    ``device`` is the one that collectives use. No collective may be called inside the block, which
    a rank may leave early.
    """
    problem: BrainrayError | None = None
    try:
        yield
    except BrainrayError as error:
        problem = error
    line = b"" if problem is None else json.dumps(error_to_dict(problem)).encode()
    rows = torch.tensor(list(line + b"\n"), dtype=torch.uint8, device=device)
    lines = bytes(gather_rows(rows).tolist()).splitlines()
    if problem is not None:
        raise problem
    for line in filter(None, lines):
        raise error_from_dict(json.loads(line))


def run_on_ranks(
    work: Callable[..., Any], num_ranks: int, *arguments: Any, num_threads: int = 1
) -> list[Any]:
    """Run ``work(*arguments)`` in new processes, one per rank of a gloo group, without Ray.

    For tests and measurements of results that must not depend on the number of ranks. ``work`` must
    be a module's top-level function, because it is pickled with its arguments. An exception on any
    rank is raised here, with that rank's traceback.

    Returns:
        The ranks' return values, in rank order.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (num_ranks, num_threads, folder, work, arguments), nprocs=num_ranks)
        return [
            torch.load(_result_of_rank(folder, number), weights_only=False)
            for number in range(num_ranks)
        ]


def _run_rank(
    number: int,
    num_ranks: int,
    num_threads: int,
    folder: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(num_threads)
    torch_dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=number,
        world_size=num_ranks,
        timeout=_PATIENCE,
    )
    try:
        torch.save(work(*arguments), _result_of_rank(folder, number))
    finally:
        torch_dist.destroy_process_group()


def _result_of_rank(folder: str, number: int) -> Path:
    return Path(folder, f"{number}.pt")
