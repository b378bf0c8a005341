"""The benchmark of a GPU runs on a CPU in small, with equal losses of all variants."""

import pytest
import torch
from benchmarks import gpu

from jepa_audio.steps.encoder import packing, transformer
from tests.oracles import packed_literal


@pytest.mark.slow
def test_every_variant_is_measured_with_the_loss_of_float32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def pack_on_cpu() -> None:
        monkeypatch.setattr(packing, "attend_rows", packed_literal.attend_rows)
        monkeypatch.setattr(transformer, "can_pack", lambda *_: True)

    monkeypatch.setattr(gpu, "pack_on_cpu", pack_on_cpu)
    monkeypatch.setattr(gpu, "PATIENCE", 100.0)
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "STEP_SECONDS", 0.1)
    before = torch.get_float32_matmul_precision()
    options = ["--device=cpu", "--size=tiny", "--no-compile", "--doublings=1"]
    status = gpu.main([*options, "--minutes=60", "--parts", "masks", "embedding"])
    torch.set_float32_matmul_precision(before)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    assert status == 0, lines
    assert "cut: nothing" in lines[-1]
    expected = [("wavjepa", v) for v in ("masked, eager", "packed, eager", "literal")]
    measured = [(row[0], row[1]) for row in rows if row[0] in {"wavjepa", "pupujepa"}]
    assert measured[:3] == expected
    assert measured[3][1] in {"masked, eager", "packed, eager"}
    pupujepa = [("pupujepa", v) for v in ("equal rows, eager", "literal", "equal rows, eager")]
    assert measured[4:] == pupujepa
    assert [row[2] for row in rows if row[0] == "wavjepa"] == ["2", "2", "2", "4"]
    assert sum(line.startswith(("masks, ", "embedding, ")) for line in lines) == 4


def test_a_part_that_takes_too_long_is_cut_and_named():
    clock = gpu.Clock(60.0)
    with clock.part("endless", 0.1):
        while True:
            torch.zeros(10).sum()
    with clock.part("broken", 1.0):
        raise RuntimeError("no compiler\nmore lines")
    done = []
    with clock.part("short", 5.0):
        done.append(1)
    assert done
    assert clock.cut == ["endless (after 0 s)", "broken (failed: no compiler)"]
