"""The command `jepa-audio`: LightningCLI for fit, validate and test, plain functions for all that needs no Trainer."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from jepa_audio.jepa import JEPA
from jepa_audio.data.datamodule import AudioDataModule
import jepa_audio.front_ends, jepa_audio.masking, jepa_audio.losses, jepa_audio.schedules, jepa_audio.positions

class JEPACLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.encoder.init_args.embed_dim", "model.front_end.init_args.embed_dim")
        parser.link_arguments("model.encoder.init_args.embed_dim", "model.predictor.init_args.embed_dim")
        parser.link_arguments("model", "data.sample_rate", compute_fn=lambda m: m.front_end.sample_rate, apply_on="instantiate")
        parser.link_arguments("model", "data.num_channels", compute_fn=lambda m: m.front_end.num_channels, apply_on="instantiate")
    def _parse_ckpt_path(self):
        return

def main(args=None):
    JEPACLI(JEPA, AudioDataModule, auto_configure_optimizers=False, seed_everything_default=0, args=args)
