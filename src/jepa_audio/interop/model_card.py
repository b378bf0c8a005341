"""The model card of an exported encoder: README.md with the front matter of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jepa_audio.inference.encoder import Encoder
from jepa_audio.inference.folder import Origin

_CARD = """---
{front_matter}
---

# {name}

An encoder of audio, pretrained without labels as a joint-embedding predictive architecture (JEPA)
with jepa-audio{fine_tuned}.
It turns a waveform at {sample_rate:,} Hz{channels} into tokens of width {width}.

## Use

```python
import torch
from transformers import AutoFeatureExtractor, AutoModel

folder = "."  # this folder, or its name on the Hub
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)

clips = [{example} for seconds in (1.0, 0.7)]
batch = extractor(clips, sampling_rate={sample_rate}, return_tensors="pt")
with torch.no_grad():
    output = model(**batch, output_hidden_states=True)
output.last_hidden_state  # [clips, tokens, {width}]
output.attention_mask  # True at the tokens of each clip
mask = output.attention_mask[..., None]
embedding = (output.last_hidden_state * mask).sum(1) / mask.sum(1)  # [clips, {width}]
```

It needs {packages}. With jepa-audio: `load_encoder(folder)`.

- **Tokens.** {tokens}
- **Padding** has no influence: each clip is encoded at its own length, and clips of equal length
  are encoded together. The tokens of a clip in a batch and alone differ by less than 1e-5
  in float32.
- **Long clips.** A clip longer than {seconds:g} s, the length of a training crop, is encoded in
  windows of this length. No position has a value that it did not have in training.
- **Half precision.** The front end always computes in float32.

## Training

| | |
|---|---|
{training}

## Scores

{scores}

## Licence

{licence}
"""


def model_card(
    encoder: Encoder, origin: Origin, licence: str | None, scores: Sequence[str] = ()
) -> str:
    """The text of README.md.

    Args:
        encoder: the exported encoder.
        origin: where its weights come from.
        licence: identifier of the licence; `None` leaves a place to fill in.
        scores: lines of the table of probe results.
    """
    grid = encoder.front_end.grid(encoder.window_samples)
    seconds = encoder.window_samples / encoder.sample_rate
    front_matter = [
        "library_name: transformers",
        "pipeline_tag: feature-extraction",
        "tags: [audio, self-supervised, jepa, jepa-audio]",
        f"license: {licence}" if licence else "# license: cc-by-4.0  # fill in the licence",
    ]
    channels = encoder.num_channels
    leading = f"{channels}, " if channels > 1 else ""
    table = ["| task | metric | score [95 % interval] | layer | head |", "|---|---|---|---|---|"]
    rows = grid.num_freq
    return _CARD.format(
        front_matter="\n".join(front_matter),
        name=origin.name + (f", fine-tuned on {origin.fine_tuned[1]}" if origin.fine_tuned else ""),
        fine_tuned=(
            ", then fine-tuned with labels in the mode {} on {}".format(*origin.fine_tuned)
            if origin.fine_tuned
            else ""
        ),
        sample_rate=encoder.sample_rate,
        channels="" if channels == 1 else f" with {channels} channels",
        width=encoder.encoder.embed_dim,
        example=f"torch.randn({leading}round(seconds * {encoder.sample_rate}))",
        packages=_packages(encoder),
        tokens=(
            f"A clip of {seconds:g} s has {grid.num_time} time columns"
            + (f" with {rows} frequency rows each, all rows of a column first" if rows > 1 else "")
            + "; `output.times` has their times in seconds."
        ),
        seconds=seconds,
        training="\n".join(f"| {name} | {value} |" for name, value in _training(encoder, origin)),
        scores="\n".join([*table, *scores])
        if scores
        else "Not measured. `jepa-audio probe` measures the scores of labelled tasks.",
        licence=licence
        or "To be filled in by the author, here and in the first lines of the file.",
    )


def _packages(encoder: Encoder) -> str:
    text = repr(encoder.settings)
    needed = ["torch", "torchaudio", "timm", "einops", "transformers"]
    if not any(name in text for name in ("LogMel", "CQT", "VQT", "Gammatone")):
        needed.remove("torchaudio")
    if any(name in text for name in ("CQT", "VQT", "Gammatone")):
        needed[1:2] = ["nnAudio"]
    return ", ".join(needed[:-1]) + " and " + needed[-1]


def _training(encoder: Encoder, origin: Origin) -> list[tuple[str, Any]]:
    front_end, network = encoder.front_end, encoder.encoder
    spectrogram = getattr(front_end, "spectrogram", None)
    kind = type(front_end).__name__
    kind += f" ({type(spectrogram).__name__})" if spectrogram is not None else ""
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    lines = [
        ("corpus", ", ".join(origin.corpus) or "unknown"),
        ("optimizer steps", "unknown" if origin.steps is None else f"{origin.steps:,}"),
        ("encoder", f"{encoder.which} encoder of the run {origin.name}"),
        *(
            [("fine-tuning", "on {1}, mode {0}".format(*origin.fine_tuned))]
            if origin.fine_tuned
            else []
        ),
        ("front end", kind),
        (
            "network",
            f"{network.depth} blocks, width {network.embed_dim}, {network.num_heads} heads, "
            f"{type(network.positions).__name__}, {parameters:,} parameters with the front end",
        ),
    ]
    return lines + [(name, f"`{_short(value)}`") for name, value in origin.model.items()]


def _short(value: Any) -> str:
    """Settings in one line, with class names without modules."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = _short(value.get("init_args") or {})[1:-1]
        return f"{str(value['class_path']).rpartition('.')[2]}({arguments})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value).replace("|", "/").replace("`", "'")
