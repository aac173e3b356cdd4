"""Data parallelism over several processes: `torchrun --nproc_per_node N -m minireflect train ...`.

Every process runs the whole program with the same random streams and holds the same pictures, rewards and
weights. Only the evaluation of networks is distributed: each process evaluates its share of a batch, `spread`
gathers the results, and `sum_gradients` adds the gradients. So N processes with B / N pictures each compute
the same as one process with B pictures, and a run can be resumed with another N. Without torchrun these
functions do nothing.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

MAX = dist.ReduceOp.MAX  # for `total`


def start(device: torch.device) -> torch.device:
    """Join the process group if torchrun started this process.  -> the device of this process"""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def own_folder(folder: Path, resume: bool) -> Path:
    """The run folder for process 0; for every other process a temporary folder, on resume with a copy of it.

    Processes other than 0 also stop printing.
    """
    if world() == 1:
        return folder
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        place = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        folder = shutil.copytree(folder, place / "run") if resume and folder.exists() else place / "run"
    dist.barrier()  # process 0 must not change the folder before it is copied
    return folder


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process. Process 0 writes the run folder and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int, unit: int = 1) -> slice:
    """The rows of a batch of n that belong to this process, in multiples of `unit`.

    The slice is empty if there are fewer units than processes and none is left for this one.
    """
    units = -(-n // unit)
    first, end = (min(n, unit * (r * units // world())) for r in (rank(), rank() + 1))
    return slice(first, end)


def rows(n: int, unit: int = 1) -> slice:
    """The rows that this process evaluates: its share, or row 0 if its share is empty, so that no network
    gets an empty batch. `gather` drops the result of that extra row.
    """
    own = share(n, unit)
    return own if own.stop > own.start else slice(0, 1)


def spread(f: Callable[..., Tensor], *batch: Tensor | Sequence, unit: int = 1) -> Tensor:
    """Compute f(*batch): each process computes its share of the rows, and the results are gathered.

    `unit` is the number of rows that f computes at once. Kernels differ in the last bits between batch sizes;
    with a fixed `unit` the result does not depend on the number of processes. No gradients pass through.

    Shapes: each of batch (b ...) -> (b ...)
    """
    n = len(batch[0])
    return gather(f(*(values[rows(n, unit)] for values in batch)), n, unit)


def gather(part: Tensor, n: int, unit: int = 1) -> Tensor:
    """Join the results for the `rows` of each process into a batch of n.  Shapes: part (r ...) -> (n ...)"""
    if world() == 1:
        return part
    part = torch.as_tensor(part)  # a reward may give a list
    own, kind = share(n, unit), torch.uint8 if part.dtype == torch.bool else part.dtype
    whole = torch.zeros(n, *part.shape[1:], dtype=kind, device=part.device)
    whole[own] = part[: own.stop - own.start].to(kind)
    return total(whole).to(part.dtype)


def total(x: Tensor, of: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Replace x by its sum over all processes, or by its maximum with `of=MAX`.  -> x"""
    if world() > 1:
        dist.all_reduce(x, of)
    return x


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradients by their sums over all processes. A process with an empty share has none."""
    if world() == 1:
        return
    parameters = list(parameters)
    has = total(torch.tensor([float(p.grad is not None) for p in parameters])).bool().tolist()  # on the CPU
    trained = [p for p, given in zip(parameters, has) if given]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = total(torch.cat([g.flatten() for g in grads]))
    for p, grad, g in zip(trained, grads, flat.split([g.numel() for g in grads])):
        p.grad = grad.copy_(g.view_as(p))  # keeps the memory format of p
