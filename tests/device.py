"""A pretended GPU: CPU tensors that count as being on the device "cuda", and a count of what would make the
host wait for it.

    with FarDevice() as device:
        device.move(pipe.unet)     # its parameters are far now, and so is all that is computed from them
        ...
    device.waits                   # what waited, with the line that asked

A far tensor answers `.device` with "cuda".  An operation on a far and a near tensor raises, as on a GPU,
unless the near one has no dimensions.  The host waits where it reads a far value (`item`, `tolist`, `bool`,
`cpu`), where a shape depends on far values (`nonzero`, a mask as an index), and where it writes without
`non_blocking`.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

FAR, NEAR = torch.device("cuda"), torch.device("cpu")
SHAPED = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}  # shapes depend on values
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
READ = {Tensor.tolist, Tensor.numpy, torch.equal, Tensor.equal}
PACKAGE = Path(__file__).parent.parent / "minireflect"


def tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    """Those of lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


class FarDevice:
    """The two modes, and the storages that are far."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        # storages by address; a weak reference frees their memory, and no address is used again
        self.far: dict[int, StorageWeakRef] = {}
        self.modes = (OnFunctions(self), OnOperations(self))

    def __enter__(self) -> "FarDevice":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def is_far(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.far

    def mark(self, x: Tensor) -> Tensor:
        if not self.is_far(x):
            self.far[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())
        return x

    def move(self, *modules: nn.Module) -> None:
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self.mark(tensor.data)

    def wait(self, why: str) -> None:
        """Count it, by the line of the package that asked."""
        ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
        at = (
            f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno} {ours[-1].line}"
            if ours
            else ""
        )
        self.waits[f"{why:8} {at}"] += 1


class OnFunctions(TorchFunctionMode):
    """`.device`, `.to` and the like, which C++ decides by the true device."""

    def __init__(self, device: FarDevice) -> None:
        super().__init__()
        self.it = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        it, kwargs = self.it, kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if func == Tensor.device.__get__:
            return FAR if it.is_far(x) else NEAR
        if func == Tensor.is_cuda.__get__:
            return it.is_far(x)
        if func is Tensor.cpu or (func is Tensor.to and x is not None):
            return self.copied(x, func, args[1:], kwargs)
        if func in READ and any(map(it.is_far, args)):
            it.wait("read")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{name}: a generator of the CPU cannot draw on the device")
            if func is torch.tensor:
                it.wait("write")
            return it.mark(func(*args, **kwargs | {"device": NEAR}))
        if (
            name.startswith(("new_", "to_"))
            and it.is_far(x)
            and isinstance(out := func(*args, **kwargs), Tensor)
        ):
            return it.mark(out)
        if name.endswith("_like") and it.is_far(x):
            return it.mark(func(*args, **kwargs))
        return func(*args, **kwargs)

    def copied(self, x: Tensor, func, args, kwargs) -> Tensor:
        it, was = self.it, self.it.is_far(x)
        args, kwargs = list(args), dict(kwargs)
        like = next((a for a in args if isinstance(a, Tensor)), None)
        asked = kwargs.pop("device", None) if like is None else (FAR if it.is_far(like) else NEAR)
        for i, a in enumerate(args):
            if isinstance(a, torch.device | str):
                asked, args[i] = a, NEAR
        goal = NEAR if func is Tensor.cpu else FAR if asked and torch.device(asked).type == "cuda" else asked
        far = was if goal is None else goal == FAR
        out = func(x, *args, **kwargs)
        if goal != FAR and "torch/" in sys._getframe(2).f_code.co_filename:  # C++ told it the true device
            return out
        if far == was:
            return it.mark(out) if far else out
        if was or not kwargs.get("non_blocking"):
            it.wait("read" if was else "write")
        out = out.clone() if out.untyped_storage()._cdata == x.untyped_storage()._cdata else out
        if far:
            return it.mark(out)
        it.far.pop(out.untyped_storage()._cdata, None)
        return out


class OnOperations(TorchDispatchMode):
    """What an operation makes of far tensors is far."""

    def __init__(self, device: FarDevice) -> None:
        super().__init__()
        self.it = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        it, name = self.it, func.__name__.split(".")[0]
        tensors = [*tensors_in((*args, *(kwargs or {}).values()))]
        far = [x for x in tensors if it.is_far(x)]
        near = [x for x in tensors if x.ndim and not it.is_far(x)]
        out = func(*args, **(kwargs or {}))
        if not far:
            return out
        if any(isinstance(value, torch.Generator) for value in (*args, *(kwargs or {}).values())):
            raise RuntimeError(f"{name}: a generator of the CPU cannot draw on the device")
        if name in SHAPED | {"_local_scalar_dense", "is_nonzero", "equal"}:
            it.wait("shape" if name in SHAPED else "read")
        elif name in INDEXED:
            self.indexed(args)
        elif near and name not in ("copy_", "_foreach_add_", "_unsafe_index") and "fused" not in name:
            shapes = [f"{tuple(x.shape)} far {it.is_far(x)}" for x in tensors]
            raise RuntimeError(f"{resolve_name(func) or name}: tensors on two devices: {shapes}")
        for made in tensors_in((out,)):
            it.mark(made)
        return out

    def indexed(self, args) -> None:
        x, indices = args[0], [i for i in args[1] if i is not None]
        if not self.it.is_far(x):
            raise RuntimeError("a near tensor is indexed by a far one, or gets far values")
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            fills = len(args) > 2 and args[2].numel() == 1 and len(indices) == 1  # that is masked_fill
            if not fills:
                self.it.wait("shape")
        elif any(not self.it.is_far(i) for i in indices):
            self.it.wait("write")
