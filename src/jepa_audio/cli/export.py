"""The commands `export ...`, with docstrings that are their `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jepa_audio.errors import UserError
from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import find_origin
from jepa_audio.inference.load import load_encoder
from jepa_audio.interop.hub import check_name, push_folder
from jepa_audio.interop.hugging_face import export_hugging_face

Which = Literal["context", "target"]


def hf(
    run: str,
    output: Path | None = None,
    which: Which = "context",
    license: str | None = None,  # noqa: A002 (the name of the option)
    results: Path | None = None,
    push: str | None = None,
    private: bool = False,
) -> str:
    """Write an encoder of any recipe as a folder for the transformers library.

    The folder has safetensors, config.json, one Python file with the model, the feature extractor
    and a model card. `AutoModel.from_pretrained(DIR, trust_remote_code=True)` loads it without
    jepa-audio and without Lightning. `jepa-audio probe` and `load_encoder` read it, too.

    Args:
        run: folder of a run, a `.ckpt` file, or a folder of `export hf`.
        output: output folder (-o). The default is `exported/NAME`.
        which: the context encoder or the target encoder.
        license: licence of the weights for the model card, such as "cc-by-4.0".
        results: `results.jsonl` of `jepa-audio probe`, for the scores in the model card. The
            default is `probe/results.jsonl` in the folder of the run, if it exists.
        push: also upload the folder to this repository of the Hub, "USER/NAME".
        private: create a private repository.
    """
    if push is not None:
        check_name(push)
    encoder = load_encoder(run, which)
    folder = export_hugging_face(
        encoder,
        output or _default_folder(encoder),
        licence=license,
        scores=probe_scores(encoder, results),
    )
    lines = [
        str(folder),
        f"  load:   AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)",
    ]
    if push is not None:
        try:
            lines.append(f"  pushed: {push_folder(folder, push, private=private)}")
        except UserError as error:
            command = f"jepa-audio export push {folder} {push}{' --private' if private else ''}"
            raise UserError(f"{error}\nthe folder is written: `{command}` uploads it") from error
    else:
        lines.append(f"  push:   jepa-audio export push {folder} USER/NAME")
    return "\n".join(lines)


def onnx(
    run: str,
    output: Path | None = None,
    which: Which = "context",
    seconds: float | None = None,
) -> str:
    """Write an encoder with its front end as an ONNX model, `model.onnx`.

    Input: `waveform` [batch, channels, samples], float32, at the sample rate in the metadata.
    Output: `last_hidden_state` [batch, tokens, width]. Batch and length are dynamic, up to the
    length of a training crop; longer clips must be cut into windows. It needs the extra `onnx`.

    Args:
        run: folder of a run, a `.ckpt` file, or a folder of `export hf`.
        output: output folder, or a file that ends in `.onnx` (-o). The default is `exported/NAME`.
        which: the context encoder or the target encoder.
        seconds: fixed length of the clips, for front ends that allow no other.
    """
    from jepa_audio.interop.graph import export_onnx  # noqa: PLC0415

    encoder = load_encoder(run, which)
    file = _file(output or _default_folder(encoder), "model.onnx")
    metadata = export_onnx(encoder, file, seconds)
    return f"{file}\n  {metadata.limits}\n  load: onnxruntime.InferenceSession({str(file)!r})"


def torch(
    run: str,
    output: Path | None = None,
    which: Which = "context",
    seconds: float | None = None,
) -> str:
    """Write an encoder with its front end as a program of torch.export, `model.pt2`.

    Input: [batch, channels, samples], float32. Output: tokens [batch, tokens, width]. Batch and
    length are dynamic, up to the length of a training crop; other lengths are refused.

    Args:
        run: folder of a run, a `.ckpt` file, or a folder of `export hf`.
        output: output folder, or a file that ends in `.pt2` (-o). The default is `exported/NAME`.
        which: the context encoder or the target encoder.
        seconds: fixed length of the clips, for front ends that allow no other.
    """
    from jepa_audio.interop.graph import export_torch  # noqa: PLC0415

    encoder = load_encoder(run, which)
    file = _file(output or _default_folder(encoder), "model.pt2")
    metadata = export_torch(encoder, file, seconds)
    return f"{file}\n  {metadata.limits}\n  load: torch.export.load({str(file)!r}).module()"


def marble(
    run: str, task: Path, output: Path | None = None, layers: list[int] | None = None
) -> str:
    """Write the settings of a task of MARBLE v2, made for another encoder, for an encoder.

    `python cli.py fit --config FILE` and `python cli.py test --config FILE` in MARBLE's folder then
    probe the encoder. It stays frozen. All settings without relation to the encoder are kept.

    Args:
        run: folder of a run, a `.ckpt` file, or a folder of `export hf`.
        task: a file of MARBLE's folder `configs`, such as probe.MERT-v1-95M.GTZANGenre.yaml.
        output: the file to write (-o). The default is a file in the working directory, whose name
            has the name of the run in place of the other encoder.
        layers: layers for MARBLE's LayerSelector; 0 is the input of the first block. The default
            is the last layer.
    """
    from jepa_audio.interop.adapters.marble import write_settings  # noqa: PLC0415

    file = write_settings(run, task, output, layers)
    command = f"python cli.py fit --config {file.absolute()}"
    return f"{file}\n  in the folder of MARBLE: {command}"


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a folder of `jepa-audio export hf` to the Hugging Face Hub.

    Args:
        folder: the exported folder.
        name: repository, "USER/NAME"; it is created if it does not exist.
        private: create a private repository.
    """
    return push_folder(folder, name, private=private)


def wavjepa(checkpoint: Path, output: Path | None = None) -> Path:
    """Write a checkpoint in the published layout of WavJEPA and WavJEPA-Nat.

    Args:
        checkpoint: the `.ckpt` file of a run or of an import.
        output: output folder (-o). The default is `exported/` in the folder of the run.
    """
    return _export_published("wavjepa", checkpoint, output)


def pupujepa(checkpoint: Path, output: Path | None = None) -> Path:
    """Write a checkpoint in the published layout of PupuJEPA.

    Args:
        checkpoint: the `.ckpt` file of a run or of an import.
        output: output folder (-o). The default is `exported/` in the folder of the run.
    """
    return _export_published("pupujepa", checkpoint, output)


def _export_published(layout: str, checkpoint: Path, output: Path | None) -> Path:
    from jepa_audio.interop import export_weights  # noqa: PLC0415

    return export_weights(layout, checkpoint, output or checkpoint.parent.parent / "exported")


def probe_scores(encoder: Encoder, results: Path | None) -> list[str]:
    """Lines of the table of probe results with exactly these weights; the last ones of each task.

    Raises:
        UserError: if a given file has no result of these weights.
    """
    from jepa_audio.probing.encoders import state_hash  # noqa: PLC0415
    from jepa_audio.probing.rows import read_rows  # noqa: PLC0415

    folder = find_origin(encoder).folder
    file = results or (folder and folder / "probe" / "results.jsonl")
    if file is None or (results is None and not file.is_file()):
        return []
    weights = state_hash(encoder)
    rows = [row for row in read_rows(file) if row.encoder_hash == weights]
    if results is not None and not rows:
        raise UserError(f"{results} has no result of the weights of {encoder.source}")
    latest = {(row.task, row.preset, row.head, row.pooling): row for row in rows}
    return [
        f"| {row.task} | {row.metric} | {row.score} | {row.layer} | {row.head} ({row.preset}) |"
        for row in latest.values()
    ]


def _file(output: Path, name: str) -> Path:
    """`output` if it has the suffix of a file, else the file of this name in it.

    Raises:
        UserError: if `output` has the suffix of the other format.
    """
    suffix = Path(name).suffix
    if output.suffix in {".onnx", ".pt2"} - {suffix} and not output.is_dir():
        raise UserError(f"`-o` ({output}) must be a folder, or a file that ends in {suffix}")
    return output if output.suffix == Path(name).suffix else output / name


def _default_folder(encoder: Encoder) -> Path:
    return Path("exported") / find_origin(encoder).short_name
