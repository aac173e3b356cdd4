"""Several processes that train one model: `torchrun --nproc_per_node N -m minireflect train ...`.

Every process runs the whole program with the same random streams, and holds the same pictures, rewards and
weights.  Only networks are shared out: a process evaluates its share of a batch, and `spread` joins the
shares; the gradient is the sum of those of all processes.  So N processes at B / N pictures each do what one
does at B, and a run continues with another N.  Without torchrun all of this is the identity.
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

MAX = dist.ReduceOp.MAX  # see `total`


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started.  -> the device of this one"""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def own_folder(folder: Path, resume: bool) -> Path:
    """The run folder of process 0; a temporary folder with the same files for every other process."""
    if world() == 1:
        return folder
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        place = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        folder = shutil.copytree(folder, place / "run") if resume and folder.exists() else place / "run"
    dist.barrier()  # copied before process 0 goes on
    return folder


def finish() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes the run folder and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(n: int, unit: int = 1) -> slice:
    """The rows of a batch of n that this process has, in whole units; none where there are too few."""
    units = -(-n // unit)
    first, end = (min(n, unit * (r * units // world())) for r in (rank(), rank() + 1))
    return slice(first, end)


def rows(n: int, unit: int = 1) -> slice:
    """The rows that this process evaluates: its share, or else the first, whose result `gather` drops."""
    own = share(n, unit)
    return own if own.stop > own.start else slice(0, 1)


def spread(f: Callable[..., Tensor], *batch: Tensor | Sequence, unit: int = 1) -> Tensor:
    """f of a batch, of which each process computes its share, in units that f computes at once.

    Kernels differ in the last bits between sizes of a batch; a unit has the same result in any process.

    Shapes: each of batch (b ...) -> (b ...).  No gradients.
    """
    if world() == 1:
        return f(*batch)
    n = len(batch[0])
    return gather(f(*(values[rows(n, unit)] for values in batch)), n, unit)


def gather(part: Tensor, n: int, unit: int = 1) -> Tensor:
    """A batch of n from the `rows` of each process.  Shapes: part (r ...) -> (n ...)"""
    if world() == 1:
        return part
    own, kind = share(n, unit), torch.uint8 if part.dtype == torch.bool else part.dtype
    whole = torch.zeros(n, *part.shape[1:], dtype=kind, device=part.device)
    whole[own] = part[: own.stop - own.start].to(kind)
    return total(whole).to(part.dtype)


def total(x: Tensor, of: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum over all processes, in place; or the maximum."""
    if world() > 1:
        dist.all_reduce(x, of)
    return x


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all processes; one whose share was empty has none."""
    if world() == 1:
        return
    parameters = list(parameters)
    has = total(torch.tensor([float(p.grad is not None) for p in parameters])).bool().tolist()  # on the CPU
    trained = [p for p, given in zip(parameters, has) if given]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = total(torch.cat([g.flatten() for g in grads]))
    for p, grad, g in zip(trained, grads, flat.split([g.numel() for g in grads])):
        p.grad = grad.copy_(g.view_as(p))  # in the layout of p
