"""The package itself: its public names, and what importing it loads."""

import subprocess
import sys

import jepa_audio


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_nothing_else_that_is_installed():
    code = (
        "import sys; before = set(sys.modules); import jepa_audio; "
        "after = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(after - sys.stdlib_module_names))"
    )
    assert run_python(code) == "['jepa_audio']"


def test_every_public_name_is_imported_from_the_package():
    from jepa_audio import Encoder, __version__, load_encoder
    from jepa_audio.inference import encoder, load

    assert Encoder is encoder.Encoder
    assert load_encoder is load.load_encoder
    assert __version__[0].isdigit()
    assert set(jepa_audio.__all__) <= set(dir(jepa_audio))


def test_an_unknown_name_is_not_an_attribute():
    assert not hasattr(jepa_audio, "Encodre")
