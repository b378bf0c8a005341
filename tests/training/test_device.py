"""A training step does not wait for a GPU; what makes it faster on one changes no result."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_audio.steps.encoder import packing
from jepa_audio.steps.grid import AudioBatch, Masks
from jepa_audio.steps.regularizers import SIGReg, VICReg
from jepa_audio.training import device as device_module
from jepa_audio.training.device import use_fused_kernel
from jepa_audio.training.ema import TargetEncoderEMA
from jepa_audio.training.jepa import JEPA
from jepa_audio.training.optimizer import clip_gradients

CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
aten = torch.ops.aten
# Operations whose result or its shape the host must know.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}
READS |= {aten._unique2, aten.unique_dim, aten.bincount}


def reads_values(function: torch._ops.OpOverload, arguments: tuple) -> bool:
    """Whether the host waits for the operation: it reads values, or indexes with a boolean mask."""
    if function.overloadpacket is aten.index:
        return any(index is not None and index.dtype == torch.bool for index in arguments[1])
    return function.overloadpacket in READS


class NoWaiting(TorchDispatchMode):
    """Raise where the host would wait for a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        tensors = [x for x in (*arguments, *settings.values()) if isinstance(x, Tensor)]
        if any(x.device.type == "cuda" for x in tensors):
            assert not reads_values(function, arguments), function
        if function.overloadpacket in (aten._to_copy, aten.copy_):
            source = arguments[-1] if function.overloadpacket is aten.copy_ else arguments[0]
            target = arguments[0].device if function.overloadpacket is aten.copy_ else None
            target = settings.get("device", None) or target or source.device
            assert target.type == source.device.type or settings.get("non_blocking"), function
        return function(*arguments, **settings)


@contextmanager
def half_precision() -> Iterator[None]:
    """Autocast to bfloat16 on a GPU that does not exist, which `torch.autocast` refuses."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    yield
    torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


CLASSES = "--model.distance={class_path: CrossEntropy, init_args: {codebook: RandomProjection}}"
CLUSTERS = (
    "--model.distance={class_path: CrossEntropy, init_args: {codebook: {class_path: "
    "OnlineClusters, init_args: {num_classes: 8}}}}"
)
STEPS = {
    "masked": ("wave", ("--model.packed=false", "--model.target_front_end=momentum")),
    "packed": (
        "wave",
        (
            "--model.masks_per_clip=2",
            "--model.encoder.num_registers=2",
            "--model.encoder.drop_path=0.2",
            "--model.encoder.qk_norm=true",
        ),
    ),
    "blocks, recomputed": ("mel", ("--model.encoder.checkpoint_every=1",)),
    "unequal targets, classes": ("mel", ("--model.masker=MultiBlockMasker", CLASSES)),
    "clusters, regularizers": ("mel", (CLUSTERS,)),
}

PACKED = ("packed", "unequal targets, classes")


@pytest.mark.parametrize("name", STEPS)
def test_no_operation_of_a_step_waits_for_a_gpu(
    tiny_jepa: Callable[..., JEPA],
    batch: AudioBatch,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    """All tensors are fake ones on a GPU, which have shapes and no values.

    The backward pass needs a real GPU; it has no operations of its own that could wait.
    """
    import torch.nn.attention.varlen

    flavour, settings = STEPS[name]
    jepa = tiny_jepa(flavour, *settings).train()
    if "regularizers" in name:
        jepa.regularizers = (VICReg(), SIGReg())
    masks = jepa.draw_masks(batch)
    monkeypatch.setattr(packing, "_kernel_works", lambda *_: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    packed: list[int] = []
    original = packing.PackedRows.of
    count = staticmethod(lambda *parts: packed.append(1) or original(*parts))
    monkeypatch.setattr(packing.PackedRows, "of", count)
    fake = FakeTensorMode()
    masks = masks._map(partial(_fake_copy, fake))
    batch = batch._replace(waveform=fake.from_tensor(batch.waveform), masks=masks)
    jepa._apply(partial(_fake_copy_there, fake))
    with fake:
        trained = [p for p in jepa.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1)
        use_fused_kernel(optimizer)
        assert optimizer.param_groups[0]["fused"]
        with NoWaiting():
            on_device = batch.to(CUDA)
            assert on_device.masks is not None
            with half_precision():
                output = jepa(on_device.waveform, on_device.masks)
            assert output.loss.device.type == "cuda"
            assert output.loss.requires_grad
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            assert clip_gradients(jepa, 1.0, None).device.type == "cuda"
            TargetEncoderEMA.update(jepa, 0.9)
    assert bool(packed) == (name in PACKED)


@torch.no_grad()
def _fake_copy_there(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    with fake:
        return fake.from_tensor(tensor).to(CUDA)


def _fake_copy(fake: FakeTensorMode, tokens):
    valid = None if tokens.valid is None else fake.from_tensor(tokens.valid)
    return type(tokens)(fake.from_tensor(tokens.index), valid, tokens.num_valid)


def test_the_check_finds_operations_that_wait():
    with FakeTensorMode(), NoWaiting():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for waits in (
            lambda: there[there > 0],
            lambda: there.sum().item(),
            there.nonzero,
            there.cpu,
            lambda: here.to("cuda"),
            lambda: there.copy_(here),
            lambda: torch.tensor(1.0, device="cuda"),
        ):
            with pytest.raises(AssertionError):
                waits()
        here.to("cuda", non_blocking=True)


class CountReads(TorchDispatchMode):
    """Stores the line of this package or of Lightning that reads a value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if reads_values(function, arguments):
            self.add()
        return function(*arguments, **(settings or {}))

    def add(self) -> None:
        frames = [f for f in traceback.extract_stack() if "test_device" not in f.filename]
        ours = [f for f in frames if "jepa_audio" in f.filename or "lightning" in f.filename]
        self.lines.append(f"{ours[-1].filename.rpartition('/')[2]}: {ours[-1].line}")


class WatchSteps(Callback):
    """Counts the values that are read in each optimizer step, from one batch to the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: dict[int, list[str]] = {}
        self._mode: CountReads | None = None
        for name in ("tolist", "numpy", "cpu", "__array__"):
            original = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, self._counted(original))

    def _counted(self, original: Callable) -> Callable:
        def method(tensor: Tensor, *arguments, **settings):
            if self._mode is not None:
                self._mode.add()
            return original(tensor, *arguments, **settings)

        return method

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.close()
        self._mode = CountReads()
        self._mode.__enter__()
        self.reads[trainer.global_step + 1] = self._mode.lines

    def close(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def on_train_end(self, trainer, pl_module) -> None:
        self.close()


def test_a_run_reads_values_of_tensors_only_in_steps_that_log(
    tiny_cli: Callable, monkeypatch: pytest.MonkeyPatch
):
    watch = WatchSteps(monkeypatch)
    cli = tiny_cli(
        "wave",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.1",
        "--trainer.logger=true",
        "--trainer.max_steps=12",
        "--trainer.log_every_n_steps=5",
        "--trainer.gradient_clip_val=1.0",
        "--monitor.every_n_steps=10",
    )
    cli.trainer.callbacks.append(watch)
    numbers: list[str] = []
    log = type(cli.model).log

    def log_tensors(module: JEPA, name: str, value: object, **settings: object) -> None:
        if not isinstance(value, Tensor):
            numbers.append(name)
        log(module, name, value, **settings)

    monkeypatch.setattr(JEPA, "log", log_tensors)
    cli.trainer.fit(cli.model, cli.datamodule)
    # Lightning copies a number to the device, and waits for it.
    assert not numbers
    # `row` stays on the CPU; the loader reads its files and draws its masks in this process.
    allowed = ("jepa.py: torch.manual_seed", "clips.py", "grid.py", "source.py", "numbers.py")
    allowed += ("order.py", "resample.py", "read.py", "spans.py")
    # The loss of the progress bar, which is on the CPU.
    allowed += ("apply_func.py: return value.item()",)
    reads = {
        step: [line for line in lines if not line.startswith(allowed)]
        for step, lines in watch.reads.items()
    }
    logging = {step for step, lines in reads.items() if lines}
    assert {5, 10} <= logging
    assert {step: reads[step] for step in range(2, 10) if step != 5} == {
        step: [] for step in range(2, 10) if step != 5
    }


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("flavour", ["wave", "mel"])
def test_cuda_waits_for_nothing_in_steps_that_do_not_log(tiny_cli: Callable, flavour: str):
    class Debug(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            quiet = trainer.global_step in (2, 3, 6, 7)
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            torch.cuda.set_sync_debug_mode("default")

    cli = tiny_cli(
        flavour,
        "--trainer.accelerator=gpu",
        "--trainer.devices=1",
        "--trainer.precision=bf16-mixed",
        "--trainer.logger=true",
        "--trainer.max_steps=10",
        "--trainer.log_every_n_steps=5",
        "--monitor.every_n_steps=10",
    )
    cli.trainer.callbacks.append(Debug())
    try:
        cli.trainer.fit(cli.model, cli.datamodule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
def test_the_fused_optimizer_equals_the_other_on_a_gpu():
    weights = []
    for settings in ({}, {"foreach": True}):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64).cuda()
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, **settings)
        use_fused_kernel(optimizer)
        assert bool(optimizer.param_groups[0]["fused"]) == (not settings)
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.ones(4, 64, device="cuda")).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"foreach": False}, {"fused": False}, {"foreach": True}, {"capturable": True}]
)
def test_an_optimizer_with_an_implementation_is_not_changed(settings: dict[str, bool]):
    with FakeTensorMode():
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2, device="cuda"))], **settings)
        before = dict(optimizer.param_groups[0])
        use_fused_kernel(optimizer)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in before.items() if k != "params"
    }


def test_other_optimizers_and_parameters_on_the_cpu_are_not_changed():
    parameter = nn.Parameter(torch.ones(2))
    for optimizer in (torch.optim.AdamW([parameter]), torch.optim.SGD([parameter])):
        use_fused_kernel(optimizer)
        assert optimizer.param_groups[0]["fused"] is None


def test_compiled_versions_of_a_block_are_not_limited_to_eight(
    tiny_cli: Callable, tiny_jepa: Callable[..., JEPA]
):
    compiled = tiny_cli("wave", "--model.compile=true").model
    names = [name for name, part in compiled.named_modules() if part._compiled_call_impl]
    assert {"front_end", "encoder.blocks.0", "predictor.trunk.blocks.0"} <= set(names)
    assert torch._dynamo.config.recompile_limit >= device_module._MAX_VERSIONS
    plain = tiny_jepa("wave")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert not any(part._compiled_call_impl for part in plain.modules())
    assert plain.encoder.packs
    assert not tiny_jepa("wave", "--model.packed=false").encoder.packs
    assert isinstance(plain.draw_masks(AudioBatch(torch.zeros(2, 1, 500), torch.arange(2))), Masks)


COUNT_GRAPHS = """
import torch
from benchmarks import gpu
compile_module = torch.nn.Module.compile
# Without the slow last stage of the compiler, which does not change the number of graphs.
torch.nn.Module.compile = lambda part, **options: compile_module(part, backend="eager", **options)
model = gpu.Model.of("wavjepa", "tiny", torch.device("cpu"))
gpu.prepare_modules(model.jepa, packed=False, compiled=True)
for step in range(8):
    batch = model.batch(3, step)
    model.jepa.loss(batch.waveform, batch.masks).backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print("graphs", graphs, batch.masks.context.index.shape[-1])
"""


def test_rows_of_other_lengths_compile_nothing_again():
    # A process of its own: the checks of shapes in tests divide the graphs.
    command = [sys.executable, "-c", COUNT_GRAPHS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split()[1:] for line in printed.splitlines() if line.startswith("graphs")]
    # Context encoder, target encoder, predictor and front end: one graph each.
    assert [count for count, _ in rows] == ["4"] * 8
    assert len({length for _, length in rows}) > 4
