"""Labelled tasks: audio files and what a head has to say of them."""

from jepa_audio.probing.tasks.base import LabelledClips, ProbeTask, Task
from jepa_audio.probing.tasks.nsynth import NSynth

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        NSynth("nsynth_pitch", label_key="pitch"),
        NSynth("nsynth_instrument", label_key="instrument_family_str"),
    )
}
"""Every task by name."""

__all__ = ["TASKS", "LabelledClips", "NSynth", "ProbeTask", "Task"]
