"""Tensors that claim to be on a GPU, computed on the CPU: for tests of devices without a GPU.

Within `emulated_gpu`, mixed devices raise an error as with CUDA and NCCL: operations between a
GPU's and the CPU's tensors, generators of another device, tensors that become NumPy arrays without
a copy to the CPU, launches over nothing, collectives of the CPU's tensors. Speed, memory, the order
of asynchronous work, and dtypes that some operations lack on a GPU are not emulated.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from brainray import dist

GPU = torch.device("cuda:1")  # not the first, which is used where no index is given

_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
_UPSAMPLES = "aten::_upsample_bilinear2d_aa"  # without a check for empty tensors in CUDA


@contextmanager
def emulated_gpu() -> Iterator[torch.device]:
    """A device for tensors; what is computed with them within the block is checked."""
    with ExitStack() as stack:
        torch.utils._device._device_constructors()  # its cache must hold the real functions
        for name, replacement in list(_replacements()):
            stack.enter_context(patch(name, replacement))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_Checked())
        yield GPU


class GpuTensor(Tensor):
    """A tensor with the values of ``on_host``, which claims to be on the GPU."""

    on_host: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: Tensor) -> "GpuTensor":
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=torch.device("meta"),  # for which PyTorch starts nothing
            requires_grad=on_host.requires_grad,
        )
        made.on_host = on_host
        return made

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GpuTensor({self.on_host})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on a GPU has no NumPy array")

    def tolist(self) -> Any:
        return self.on_host.tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared without its first arguments
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


class _Checked(TorchDispatchMode):
    """Also sees what creates tensors, and copies to the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_composite = func is not torch.ops.prim.device.default and (
            torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        )
        if is_composite:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return GPU if isinstance(args[0], GpuTensor) else torch.device("cpu")
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    gpu_tensors = [tensor for tensor in tensors if isinstance(tensor, GpuTensor)]
    if gpu_tensors:
        _check_devices(name, args, [t for t in tensors if not isinstance(t, GpuTensor)])
    options = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    to_gpu = bool(gpu_tensors)
    if options.get("device") is not None:
        device = torch.device(options["device"])
        assert device in {GPU, torch.device("cpu"), torch.device("meta")}, f"{name} on {device}"
        to_gpu = device.type != "cpu"
        options["device"] = torch.device("cpu")
    on_host = tree_map(_on_host, (args, options))
    result = func(*on_host[0], **on_host[1])
    if gpu_tensors and name.endswith("_") and isinstance(args[0], GpuTensor):
        return args[0]  # in place
    if name == "aten::_to_copy":
        result = result.clone()  # never the memory of another device

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = [tensor for tensor in tensors if _on_host(tensor) is value]
        return same[0] if same else GpuTensor(value) if to_gpu else value

    return tree_map(placed, result)


def _on_host(value: Any) -> Any:
    return value.on_host if isinstance(value, GpuTensor) else value


def _check_devices(name: str, args: Any, cpu_tensors: list[Tensor]) -> None:
    """Scalars of the CPU and, as indices, its tensors may meet a GPU's tensors."""
    if name == _UPSAMPLES:
        assert args[0].numel(), f"{name} of no slices: an invalid launch"
    if name in _COPIES:
        return
    if name.endswith("_"):  # in place
        assert not any(args[0] is tensor for tensor in cpu_tensors), (
            f"{name} of a tensor on the CPU"
        )
    if name in _INDEXED:
        assert isinstance(args[0], GpuTensor), f"{name}: a GPU's indices of the CPU's tensor"
        cpu_tensors = [tensor for tensor in args[2:3] if not isinstance(tensor, GpuTensor)]
    mixed = [tuple(tensor.shape) for tensor in cpu_tensors if tensor.dim() > 0]
    assert not mixed, f"{name}: tensors {mixed} are on the CPU"


class _Generator:
    """A generator of either device."""

    _real = torch.Generator

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.on_host = self._real()

    def manual_seed(self, seed: int) -> "_Generator":
        self.on_host.manual_seed(seed)
        return self


def _set_device(device: torch.device) -> None:
    assert device == GPU, f"a thread on {device}"


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def _drawing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that draws numbers, with generators as above and without pinned memory."""

    def draw(*args: Any, generator: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
        device = torch.device(options.pop("device", None) or "cpu")
        assert not (pin_memory and device == GPU), "only the CPU's memory can be pinned"
        if generator is not None:
            assert generator.device == device, f"a generator on {generator.device}, not {device}"
            return function(*args, generator=generator.on_host, **options).to(device)
        return function(*args, device=device, **options)

    return draw


def _collective(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def checked(tensor: Tensor) -> Tensor:
        assert isinstance(tensor, GpuTensor), "NCCL takes tensors of GPUs only"
        assert tensor.dtype != torch.bool, "NCCL takes no bool"
        return function(tensor)

    return checked


def _replacements() -> Iterator[tuple[str, Any]]:
    yield "torch.cuda._lazy_init", lambda: None
    yield "torch.cuda.set_device", _set_device
    yield "torch.cuda.Event", _Event
    for module in ("average", "epoch", "self_supervised"):
        yield f"brainray.engine.{module}.Generator", _Generator
    yield "torch.Generator", _Generator
    for name in ("rand", "randn", "randperm", "empty"):
        yield f"torch.{name}", _drawing(getattr(torch, name))
    for name in ("sum_across_ranks", "gather_rows", "gather_equal_rows", "broadcast_from_first"):
        yield f"brainray.dist.{name}", _collective(getattr(dist, name))
    yield "brainray.engine.recipe.sum_across_ranks", _collective(dist.sum_across_ranks)
