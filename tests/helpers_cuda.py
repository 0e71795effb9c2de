"""Whole steps on a GPU that is not there, by a build of torch for CPUs: shapes, dtypes and devices are those
of CUDA, nothing is computed. What it cannot show: kernels, NCCL, generated code and their numbers.

It has to be imported before torch: `pytest -p helpers_cuda` with NO_CUDA set to the library that
`build_library` made of helpers_cuda.cpp.
"""

import ctypes
import dataclasses
import importlib.util
import os
import subprocess
import traceback
import weakref
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
HERE = Path(__file__).resolve().parent


def build_library(folder: Path) -> Path:
    """The guard and hooks of helpers_cuda.cpp; a few seconds with g++."""
    library, source = folder / "libno_cuda.so", HERE / "helpers_cuda.cpp"
    include = TORCH / "include"
    flags = f"-shared -fPIC -std=c++20 -I{include} -I{include}/torch/csrc/api/include -L{TORCH}/lib"
    subprocess.run(["g++", *flags.split(), source, "-o", library, "-lc10", "-ltorch_cpu"], check=True)
    return library


if "NO_CUDA" in os.environ:
    for library in (TORCH / "lib" / "libc10.so", TORCH / "lib" / "libtorch_cpu.so", os.environ["NO_CUDA"]):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model
import train_pretrain

CUDA = torch.device("cuda", 0)


def pretend() -> None:
    """Answers that torch's Python side takes from a driver."""
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False

    class OnCpu(torch.Generator):
        def __new__(cls, device=None):
            return real_generator("cpu")

    real_generator, torch.Generator = torch.Generator, OnCpu


def caller() -> str:
    """The line of the six scripts that is being executed: file, function and text."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).parent == model.HERE:
            return f"{Path(frame.filename).name} {frame.name}: {frame.line}"
    return "elsewhere"


def on_cuda(values) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in tree_leaves(values))


# Their results have as many rows as the data says, so that the host waits for it.
SIZE_OF_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
SIZE_OF_DATA |= {"repeat_interleave", "bincount", "masked_scatter_backward"}


class Waits(TorchDispatchMode):
    """Where the host would wait for the GPU: (what, line) -> how often. What asks for a number gets 1."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and on_cuda(args):
            self.places["number", caller()] += 1
            return 1.0 if args[0].dtype.is_floating_point else 1
        if name in SIZE_OF_DATA and on_cuda(args):
            self.places[name, caller()] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and on_cuda(args):
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.places["mask as index", caller()] += 1
        if name in ("_to_copy", "copy_"):
            copies = name == "copy_"  # copy_(target, source, non_blocking), or _to_copy(source, device=...)
            source, target = (args[1], args[0].device) if copies else (args[0], kwargs.get("device"))
            non_blocking = args[2] if copies and len(args) > 2 else kwargs.get("non_blocking", False)
            crosses = target is not None and torch.device(target).type != source.device.type
            if crosses and not non_blocking:
                self.places[f"copy to {torch.device(target).type}", caller()] += 1
        return func(*args, **kwargs)


class Memory(TorchDispatchMode):
    """Bytes of all live storages on a device, as CUDA's caching allocator rounds them, and their peak."""

    def __init__(self, device: torch.device = CUDA):
        super().__init__()
        self.device = device
        self.bytes, self.now, self.peak, self.peak_at = {}, 0, 0, ""

    def add(self, x) -> None:
        x = getattr(x, "_local_tensor", x)  # of a sharded weight
        if not isinstance(x, torch.Tensor) or x.device != self.device:
            return
        storage = x.untyped_storage()
        if storage._cdata not in self.bytes:
            weakref.finalize(storage, self.resize, storage._cdata, None)
            self.resize(storage._cdata, storage.nbytes())

    def resize(self, key: int, size: int | None) -> None:
        """None: the storage is gone."""
        self.now -= self.bytes.pop(key, 0)
        if size is not None:
            self.bytes[key] = -(-size // 512) * 512
            self.now += self.bytes[key]
            if self.now > self.peak:
                self.peak, self.peak_at = self.now, caller()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::_local_scalar_dense" and self.device.type == "cpu":
            return 1.0 if args[0].dtype.is_floating_point else 1  # its value is not known
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self.add(x)
        return out


def fake_vlm(cfg: model.ModelConfig, flags: train_pretrain.RunConfig, device=CUDA) -> model.VLM:
    """On the GPU that is not there; made on "meta", so that 30 billion weights take no memory either."""
    with torch.device("meta"):
        vlm = model.VLM(cfg)
    train_pretrain.freeze(vlm, flags)
    for module in vlm.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(empty, p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return vlm


@dataclasses.dataclass
class Trace:
    """Of optimizer steps: what the model and its log became, where the host waited, how much was held."""

    vlm: model.VLM
    stats: dict
    places: Counter
    memory: Memory
    weights: int  # bytes before the first step


def trace_steps(cfg, flags, batches: list[data.Batch], stage: str, loss_of, after=None) -> Trace:
    """Optimizer steps of one micro-batch each; what happens in the last of them is counted. after: called
    behind each step instead of that, as nothing compiles while operators are watched.
    """
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        vlm = fake_vlm(cfg, flags)
        run = train_pretrain.Run(stage, flags, 0, 1, CUDA)
        optimizers = train_pretrain.make_optimizers(vlm, flags)
        ddp = train_pretrain.prepare(run, vlm)
        memory = Memory()
        for x in [*vlm.parameters(), *vlm.buffers()]:
            memory.add(x)
        weights = memory.now
        for step, batch in enumerate(batches):
            waits, memory.peak = Waits(), 0
            with nullcontext() if after else memory, nullcontext() if after else waits:
                micro = [batch.map(mode.from_tensor).to(CUDA)]  # without its data
                stats = train_pretrain.optimizer_step(run, ddp, micro, optimizers, step, loss_of)
                del micro
            if after:
                after()
    return Trace(vlm, stats, waits.places, memory, weights)
