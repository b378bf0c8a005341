"""Does encoding a longer file need more memory, apart from the memory of the features?

The script encodes noise of several lengths with a base-size encoder, each length in a separate
process. It prints the peak of the resident memory, minus the memory before encoding, and the size
of the features.

    python -m benchmarks.encode_memory [--recipe wavjepa|pupujepa] [--minutes 1 5 20]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

CONFIGS = Path(__file__).parent.parent / "configs"


def resident_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(recipe: str, minutes: float) -> None:
    """Encode one waveform and print time and memory."""
    # These imports are not at the top, because only the measuring processes need them.
    from jepa_audio.cli.trainer import JEPACLI  # noqa: PLC0415
    from jepa_audio.inference.encoder import Encoder  # noqa: PLC0415

    sys.argv[1:] = []
    cli = JEPACLI(
        [f"--config={CONFIGS / recipe}.yaml", "--data.root=unused", "--trainer.logger=false"],
        run=False,
    )
    jepa, num_samples = cli.model, cli.datamodule.num_samples
    frozen = Encoder(jepa.front_end, jepa.encoder, num_samples, max_windows=8)
    waveform = torch.randn(1, 1, round(60 * minutes * frozen.sample_rate))
    before, start = resident_mib(), time.perf_counter()
    features = frozen.encode_batch(waveform, layers=[-1])
    seconds = time.perf_counter() - start
    (layer,) = features.layers
    print(
        f"{recipe}, {minutes:g} min: {layer.shape[1] * layer.shape[2]} tokens of width "
        f"{layer.shape[-1]}, features {layer.nbytes / 2**20:.0f} MiB, peak "
        f"{resident_mib() - before:.0f} MiB above {before:.0f} MiB, "
        f"{60 * minutes / seconds:.1f} times real time"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", choices=["wavjepa", "pupujepa"], default="wavjepa")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 20])
    parser.add_argument("--here", action="store_true", help="measure one length, in this process")
    args = parser.parse_args()
    if args.here:
        measure(args.recipe, args.minutes[0])
        return
    for minutes in args.minutes:
        options = ["--recipe", args.recipe, "--minutes", str(minutes), "--here"]
        subprocess.run([sys.executable, "-m", "benchmarks.encode_memory", *options], check=True)


if __name__ == "__main__":
    main()
