"""Loads exported folders with transformers alone: `python -I FILE SITE FOLDER...`.

For each folder, it reads `clips.safetensors` next to the folder, and writes `FOLDER.results`.
"""

import importlib.abc
import sys
import tempfile
from pathlib import Path

BLOCKED = ("jepa_audio", "lightning", "pytorch_lightning", "jaxtyping", "beartype", "jsonargparse")


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoFeatureExtractor, AutoModel  # noqa: E402


def load(folder, **settings):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **settings)


def extractor_of(folder):
    return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def results(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(f"{folder}.clips")
    clips = [stored[str(i)].numpy() for i in range(len(stored))]
    arrays = [clip[0] if len(clip) == 1 else clip for clip in clips]
    model, extractor = load(folder), extractor_of(folder)
    batch = extractor(arrays, sampling_rate=16000, return_tensors="pt")
    output = model(**batch, output_hidden_states=True)
    found = {f"layer/{i}": layer for i, layer in enumerate(output.hidden_states)}
    found |= {"mask": output.attention_mask, "times": output.times}
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    assert len(model(**batch, return_dict=False)) == 3
    for i, array in enumerate(arrays):
        alone = model(torch.as_tensor(array)[None])
        assert alone.attention_mask.all()
        found[f"alone/{i}"] = alone.last_hidden_state[0]
    for dtype in (torch.float16, torch.bfloat16):
        loaded, moved = load(folder, dtype=dtype), load(folder).to(dtype)
        kinds = {parameter.dtype for parameter in loaded.encoder.parameters()}
        assert kinds == {dtype}
        for half in (loaded, moved):
            assert {each.dtype for each in half.front_end.parameters()} <= {torch.float32}
            assert {each.dtype for each in half.front_end.buffers()} <= {torch.float32}
        tokens = loaded(**batch).last_hidden_state
        assert tokens.dtype == dtype
        assert torch.equal(tokens, moved(**batch).last_hidden_state)
        found[f"half/{dtype}"] = tokens.float()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        extractor.save_pretrained(saved)
        again = extractor_of(saved)(arrays, sampling_rate=16000, return_tensors="pt")
        found["saved"] = load(saved)(**again).last_hidden_state
        half = load(folder, dtype=torch.bfloat16)
        half.save_pretrained(saved)
        found["saved_half"] = load(saved)(**batch).last_hidden_state.float()
    new = AutoModel.from_config(model.config, trust_remote_code=True)
    assert new(**batch).last_hidden_state.isfinite().all()
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def learns(folder: Path) -> None:
    """Gradients reach the front end and the encoder, also through padding."""
    model = load(folder).train()
    waveform = torch.randn(2, model.front_end.num_channels, 16000)
    mask = torch.ones(2, 16000, dtype=torch.long)
    mask[1, 9000:] = 0
    model(waveform, mask).last_hidden_state.square().mean().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def refuses(folder: Path) -> None:
    """Wrong inputs are refused with a sentence."""
    extractor, model = extractor_of(folder), load(folder)
    clip = torch.zeros(model.front_end.num_channels, 16000)
    left = torch.ones(1, 16000, dtype=torch.long)
    left[:, :100] = 0
    wrong = {
        "`sampling_rate` (8000) must be 16000": lambda: extractor(clip, sampling_rate=8000),
        "must be scaled to [-1, 1]": lambda: extractor(
            (clip + 3).to(torch.int16), sampling_rate=16000
        ),
        "mix channels": lambda: extractor([torch.zeros(5, 16000)], sampling_rate=16000),
        "`input_values`": lambda: model(torch.zeros(1, 5, 16000)),
        "the padding is after the clip": lambda: model(clip[None], left),
        "must be [1, 16000]": lambda: model(clip[None], left[:, :50]),
        "a clip of 0 samples": lambda: model(clip[None], 0 * left),
    }
    for message, call in wrong.items():
        try:
            call()
        except ValueError as error:
            assert message in str(error), (message, error)
        else:
            raise AssertionError(message)


for name in sys.argv[2:]:
    save_file(results(Path(name)), f"{name}.results")
    refuses(Path(name))
    learns(Path(name))
