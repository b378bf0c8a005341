"""The package itself: its public names are there, and importing it is fast."""

import subprocess
import sys

import jepa_audio


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, jepa_audio; print(sorted({'torch', 'lightning'} & sys.modules.keys()))"
    assert run_python(code) == "[]"


def test_importing_the_package_takes_less_than_300_ms():
    code = "import time; t = time.perf_counter(); import jepa_audio; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_every_public_name_is_imported_from_the_package():
    from jepa_audio import Encoder, __version__, load_encoder
    from jepa_audio.inference import encoder

    assert Encoder is encoder.Encoder
    assert load_encoder is encoder.load_encoder
    assert __version__[0].isdigit()
    assert set(jepa_audio.__all__) <= set(dir(jepa_audio))


def test_an_unknown_name_is_not_an_attribute():
    assert not hasattr(jepa_audio, "Encodre")
