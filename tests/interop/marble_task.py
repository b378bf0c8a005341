"""A task of MARBLE v2 for an encoder of another package, shortened."""

MARBLE_TASK = """
trainer: {logger: {save_dir: ./output/probe.Task.OTHER-v1/}}
model:
  init_args:
    sample_rate: 24000
    encoder: {class_path: marble.encoders.OTHER.model.Encoder}
    emb_transforms:
    - {class_path: LayerSelector, init_args: {layers: [7]}}
    - {class_path: MLPReduce, init_args: {num_layers: 13, hidden_size: 768}}
    decoders: [{init_args: {in_dim: 768, hidden_layers: [512]}}]
data:
  init_args:
    audio_transforms: {train: [{class_path: marble.encoders.OTHER.model.X}, {class_path: own.Y}]}
    train: {init_args: {sample_rate: 24000, channels: 1, label_freq: 75}}
"""
