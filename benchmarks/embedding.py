"""Is `jepa-audio embed` faster than a plain loop over the files, and how much memory does it need?

The script writes noise as wav files of random lengths, saves an encoder with random weights of a
recipe, and embeds the files twice, each time in a separate process: with `jepa-audio embed`, and
with the loop `for file: soundfile.read, encoder.embed`. It prints clips per second of both without
the time to start, and the largest difference of the vectors. With `--long_hours`, it embeds one
long file instead, and prints the peak of the resident memory of the process.

    python -m benchmarks.embedding [--recipe demo/wavjepa] [--files 200] [--seconds 1 15]
    python -m benchmarks.embedding --long_hours 10 --pooling frames
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

CONFIGS = Path(__file__).parent.parent / "configs"


def save_random_encoder(recipe: str, folder: Path) -> int:
    """Save the encoder of a recipe with its weights of step 0; return its sample rate."""
    from jepa_audio.cli.trainer import JEPACLI  # noqa: PLC0415
    from jepa_audio.inference.encoder import Encoder  # noqa: PLC0415
    from jepa_audio.inference.folder import save_encoder  # noqa: PLC0415

    sys.argv[1:] = []
    options = ["--data.root=unused", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = JEPACLI([f"--config={CONFIGS / recipe}.yaml", *options], run=False)
    encoder = Encoder.from_jepa(cli.model, cli.datamodule.clips.crop_samples)
    save_encoder(encoder, folder)
    return encoder.sample_rate


def write_noise(folder: Path, count: int, seconds: tuple[float, float], rate: int) -> None:
    """Write wav files of noise with lengths in a range."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        length = round(noise.uniform(*seconds) * rate)
        sf.write(folder / f"{number:06}.wav", 0.1 * noise.standard_normal(length), rate)


def write_long(folder: Path, hours: float, rate: int) -> None:
    """Write one long file in blocks."""
    folder.mkdir()
    block = 0.1 * np.random.default_rng(0).standard_normal(60 * rate)
    with sf.SoundFile(folder / "long.wav", "w", rate, 1) as file:
        for _ in range(round(60 * hours)):
            file.write(block)


def embed(folder: Path, pooling: str, device: str) -> None:
    """Run the command in this process; print seconds and memory."""
    from jepa_audio.inference.embedding.run import embed as command  # noqa: PLC0415

    start = time.perf_counter()
    output = folder / "embeddings.parquet"
    print(
        command(
            str(folder / "encoder"),
            [str(folder / "audio")],
            output,
            pooling=pooling,
            accelerator=device,
            devices=1,
        )
    )
    report("embed", folder, start)


def loop(folder: Path, pooling: str, device: str) -> None:
    """Embed file by file; print seconds and memory, and the difference to the command."""
    import pyarrow.parquet as pq  # noqa: PLC0415

    from jepa_audio import load_encoder  # noqa: PLC0415

    encoder = load_encoder(folder / "encoder").to("cuda" if device == "gpu" else device)
    start = time.perf_counter()
    vectors = []
    for path in sorted((folder / "audio").iterdir()):
        samples, rate = sf.read(path, dtype="float32")
        vectors.append(encoder.embed(samples, rate, pool=pooling).cpu())
    report("plain loop", folder, start)
    found = np.stack(pq.read_table(folder / "embeddings.parquet")["vector"].to_numpy())
    print(f"largest difference: {np.abs(found - torch.cat(vectors).numpy()).max():.2g}")


def report(name: str, folder: Path, start: float) -> None:
    seconds = time.perf_counter() - start
    count = len(list((folder / "audio").iterdir()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name}: {count / seconds:.2f} files/s, {seconds:.1f} s, peak {peak:.0f} MiB", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo/wavjepa")
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--seconds", type=float, nargs=2, default=(1, 15))
    parser.add_argument("--long_hours", type=float)
    parser.add_argument("--pooling", default="mean")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--here", choices=["embed", "loop"], help="one of the two, in this process")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.here:
        {"embed": embed, "loop": loop}[args.here](args.folder, args.pooling, args.device)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rate = save_random_encoder(args.recipe, folder / "encoder")
        if args.long_hours:
            write_long(folder / "audio", args.long_hours, rate)
        else:
            write_noise(folder / "audio", args.files, tuple(args.seconds), rate)
        options = ["--folder", name, "--pooling", args.pooling, "--device", args.device]
        for part in ["embed"] if args.long_hours else ["embed", "loop"]:
            command = [sys.executable, "-m", "benchmarks.embedding", "--here", part, *options]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
