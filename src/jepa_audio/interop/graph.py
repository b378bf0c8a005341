"""Export an encoder as an ONNX model or as a program of `torch.export`, with its front end."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.pos_embed_sincos import freq_bands, pixel_freq_bands
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from typing_extensions import override

from jepa_audio.errors import MAX_SECONDS, UserError
from jepa_audio.files import atomic_path
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import check_parents, find_origin
from jepa_audio.inference.windowed import scale_loudness
from jepa_audio.steps.encoder.positions import RotaryPositions
from jepa_audio.steps.front_ends import FrontEnd
from jepa_audio.steps.grid import Grid

log = logging.getLogger(__name__)

INPUT, OUTPUT = "waveform", "last_hidden_state"
METADATA = "jepa_audio.json"
"""Name of the metadata in a file of `torch.export`."""
OPSET = 18
_MAX_CLIPS = 1 << 16
# A file of the format protobuf has at most 2 GB.
_MAX_PROTOBUF = 1.9e9


@dataclass(frozen=True)
class GraphMetadata:
    """What a program needs to use an exported file; all values are in its metadata.

    Attributes:
        sample_rate: sample rate of the input, in Hz.
        num_channels: audio channels C of the input `[B, C, S]`.
        min_samples: smallest number of samples S.
        max_samples: largest number of samples S, the length of a training crop.
        embed_dim: width D of the output `[B, T * num_freq, D]`.
        num_freq: tokens of a time column, lowest frequency first.
        first_time: time of the first column in seconds; column t is at `first_time` +
            t * `column_seconds`.
        column_seconds: seconds from one time column to the next.
        source: the run of the weights.
    """

    sample_rate: int
    num_channels: int
    min_samples: int
    max_samples: int
    embed_dim: int
    num_freq: int
    first_time: float
    column_seconds: float
    source: str

    @property
    def limits(self) -> str:
        """One line for the terminal."""
        low, high = (samples / self.sample_rate for samples in (self.min_samples, self.max_samples))
        length = f"{high:g} s" if low == high else f"{low:.3g} to {high:g} s"
        return f"clips of {length} at {self.sample_rate} Hz, {self.num_channels} channel(s)"


class TokenGraph(nn.Module):
    """A network without control flow that depends on values: waveform → tokens.

    Args:
        encoder: the modules are copied.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.front_end = copy.deepcopy(encoder.front_end)
        self.encoder = copy.deepcopy(encoder.encoder)
        self.loudness_dbfs = encoder.loudness_dbfs
        self.num_freq = encoder.front_end.grid(encoder.window_samples).num_freq
        positions = self.encoder.positions
        if isinstance(positions, RotaryPositions):
            self.encoder.positions = _RotaryOfAnyLength(**asdict(positions))
        self.requires_grad_(False).eval()

    @override
    def forward(self, waveform: Float[Tensor, "B C S"]) -> Float[Tensor, "B N D"]:
        tokens = self.front_end(scale_loudness(waveform, self.loudness_dbfs))
        # The number of columns as the tokens have it: a second formula would be a second symbol.
        return self.encoder(tokens, Grid(self.num_freq, tokens.shape[1] // self.num_freq))


@dataclass(frozen=True)
class _RotaryOfAnyLength(RotaryPositions):
    """The same table with operations whose number of time columns may be a symbol."""

    @override
    def rotary(self, grid: Grid, head_dim: int, device: torch.device) -> Float[Tensor, "N H"]:
        time_only = self.axes == "time"
        num_bands = head_dim // 2 if time_only else head_dim // 4
        if self.normalized:
            bands = pixel_freq_bands(num_bands, float(self.max_resolution), False, device)
        else:
            bands = freq_bands(num_bands, self.temperature, 1, device)
        time = self._axis(grid.num_time, device)[:, None] * bands
        angles = time.repeat_interleave(grid.num_freq, dim=0)
        if not time_only:
            freq = self._axis(grid.num_freq, device)[:, None] * bands
            angles = torch.cat([angles, freq.repeat(grid.num_time, 1)], dim=-1)
        # Two neighbouring values are the real and the imaginary part.
        table = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return table.repeat_interleave(2, dim=-1)

    def _axis(self, size: int, device: torch.device) -> Float[Tensor, " size"]:
        index = torch.arange(size, device=device).float()
        if not self.normalized:
            return index
        # As `torch.linspace(-1, 1, size)`, which computes the second half from its end.
        last = index.new_ones(()) * (size - 1)
        step = 2 / last.clamp_min(1)
        return torch.where(index < size / 2, step * index - 1, 1 - step * (last - index))


def export_torch(encoder: Encoder, file: Path, seconds: float | None = None) -> GraphMetadata:
    """Write an encoder as a program of `torch.export`.

    `torch.export.load(file).module()` is a function `[B, C, S] → [B, N, D]` without this package.

    Args:
        encoder: the encoder.
        file: the `.pt2` file, which must not exist.
        seconds: fixed length of the clips; `None` for any length up to a training crop.

    Raises:
        UserError: if the file exists, or if the front end cannot be exported; the message names the
            remedy.
    """
    _check_file(file)
    program, metadata = trace(encoder, seconds)
    # torch warns about file names that do not end with .pt2.
    with atomic_path(file) as unfinished, unfinished.open("wb") as opened:
        torch.export.save(program, opened, extra_files={METADATA: _to_json(metadata)})
    return metadata


def export_onnx(encoder: Encoder, file: Path, seconds: float | None = None) -> GraphMetadata:
    """Write an encoder as an ONNX model; the front end is part of it.

    The input is `waveform` `[B, C, S]`, the output `last_hidden_state` `[B, N, D]`. The metadata of
    the file has the values of `GraphMetadata` as text.

    Args:
        encoder: the encoder.
        file: the `.onnx` file, which must not exist.
        seconds: fixed length of the clips; `None` for any length up to a training crop.

    Raises:
        UserError: if the file exists, a package is missing, or the front end cannot be exported.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"`export onnx` needs {' and '.join(missing)}: pip install 'jepa-audio[onnx]'"
        )
    import onnx  # noqa: PLC0415

    _check_file(file)
    program, metadata = trace(encoder, seconds)
    with _errors(encoder, seconds), _quiet():
        made = torch.onnx.export(
            program,
            (),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    if seconds is None:
        _refuse_longer(model, metadata.max_samples)
    for name, value in asdict(metadata).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, str(value)
    if sum(parameter.nbytes for parameter in encoder.state_dict().values()) > _MAX_PROTOBUF:
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save_model(model, file, save_as_external_data=True, location=f"{file.name}.data")
        log.info("%s is larger than 2 GB: its weights are in %s.data", file, file.name)
        return metadata
    onnx.checker.check_model(model)
    with atomic_path(file) as unfinished:
        onnx.save_model(model, unfinished)
    return metadata


def _check_file(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file} exists: give another file or folder with `-o`")
    check_parents(file)


def trace(encoder: Encoder, seconds: float | None = None) -> tuple[ExportedProgram, GraphMetadata]:
    """The program of an encoder, with a dynamic batch, and a dynamic length without `seconds`.

    Raises:
        UserError: see `export_torch`.
    """
    front_end = encoder.front_end
    max_samples = encoder.window_samples
    if seconds is not None:
        if not 0 < seconds <= MAX_SECONDS:
            raise UserError(f"`seconds` ({seconds:g}) must be in (0, {MAX_SECONDS:g}]")
        max_samples = round(seconds * encoder.sample_rate)
        if max_samples > encoder.window_samples:
            longest = encoder.window_samples / encoder.sample_rate
            raise UserError(
                f"`seconds` ({seconds:g}) must be at most {longest:g}, the length of a training "
                "crop: cut longer clips into windows of this length"
            )
    min_samples = max_samples if seconds is not None else _samples_of_two_columns(front_end)
    if min_samples > max_samples:
        raise UserError(
            f"a training crop ({max_samples} samples) has fewer than two time columns: a model "
            f"with a dynamic length needs {min_samples} samples; give `--seconds`"
        )
    times = front_end.times(max_samples).double()
    step = float(times[1] - times[0]) if len(times) > 1 else 0.0
    grid = front_end.grid(max_samples)
    metadata = GraphMetadata(
        encoder.sample_rate,
        encoder.num_channels,
        min_samples,
        max_samples,
        encoder.encoder.embed_dim,
        grid.num_freq,
        float(times[0]),
        step,
        str(find_origin(encoder)),
    )
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=_MAX_CLIPS)}
    if seconds is None:
        shapes[2] = Dim("samples", min=min_samples, max=max_samples)
    # Sizes that are no special case of a transform: neither the smallest nor the largest ones.
    example = torch.randn(3, encoder.num_channels, (min_samples + max_samples) // 2)
    with _errors(encoder, seconds), _quiet():
        program = torch.export.export(
            TokenGraph(encoder),
            (example,),
            dynamic_shapes={INPUT: shapes},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    return program, metadata


def read_metadata(text: str) -> GraphMetadata:
    """The metadata of a file of `export_torch`."""
    values = json.loads(text)
    return GraphMetadata(**{field.name: values[field.name] for field in fields(GraphMetadata)})


def _to_json(metadata: GraphMetadata) -> str:
    return json.dumps(asdict(metadata), indent=2)


def _samples_of_two_columns(front_end: FrontEnd) -> int:
    """Samples of the shortest clip with two time columns; one column is a special case in torch."""

    def has_two(num_samples: int) -> bool:
        try:
            return front_end.grid(num_samples).num_time >= 2
        except UserError:
            return False

    return bisect_left(range(1 << 31), True, lo=1, key=has_two)


def _refuse_longer(model: Any, max_samples: int) -> None:
    """Let the model fail for clips longer than a training crop, whose positions were not trained.

    The number S // (`max_samples` + 1) is an index into a table of one zero, which is added to the
    waveform: the index 1 does not exist.
    """
    from onnx import TensorProto, helper  # noqa: PLC0415

    def integers(name: str, values: list[int]) -> Any:
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    limit, zero = f"max_samples_plus_one_{max_samples + 1}", "zero_if_not_too_long"
    model.graph.initializer.extend(
        [
            integers(limit, [max_samples + 1]),
            helper.make_tensor(zero, TensorProto.FLOAT, [1], [0.0]),
        ]
    )
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == INPUT:
                node.input[i] = f"{INPUT}_not_too_long"
    for i, node in enumerate(
        [
            helper.make_node("Shape", [INPUT], ["num_samples"], start=2, end=3),
            helper.make_node("Div", ["num_samples", limit], ["number_of_crops"]),
            helper.make_node(
                "Gather",
                [zero, "number_of_crops"],
                ["length_check"],
                "clip_longer_than_max_samples",
            ),
            helper.make_node("Add", [INPUT, "length_check"], [f"{INPUT}_not_too_long"]),
        ]
    ):
        model.graph.node.insert(i, node)


@contextmanager
def _errors(encoder: Encoder, seconds: float | None) -> Iterator[None]:
    """Turn a failed export into a sentence that names the front end and the remedy."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        front_end = encoder.front_end
        names = [type(part).__name__ for part in (front_end, getattr(front_end, "spectrogram", 0))]
        name = " with ".join(names[: 2 if hasattr(front_end, "spectrogram") else 1])
        remedy = (
            f"give a fixed length, such as `--seconds "
            f"{encoder.window_samples / encoder.sample_rate:g}`"
            if seconds is None
            else "use `jepa-audio export hf`, which exports every front end"
        )
        kind = "a dynamic length" if seconds is None else "a fixed length"
        log.debug("the export failed", exc_info=error)
        reason = str(error).strip().splitlines()[:1]
        raise UserError(
            f"the front end {name} cannot be exported with {kind} by this version of torch: "
            f"{remedy} ({type(error).__name__}: {' '.join(reason)[:200]})"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the warnings of the exporters, which no user can act on."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
