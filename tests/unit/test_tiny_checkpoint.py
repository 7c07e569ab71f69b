from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TRAINING = Path(__file__).parents[2] / "plugins" / "tiny" / "training"


def test_a_stopped_training_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINING))
    import checkpoint

    def run(stop: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        average = checkpoint.Average(model, decay=0.9)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(vectors)]
        start = checkpoint.load(tmp_path / f"{stop}.safetensors", model, average, *optimizers)
        for step in range(start, 6):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            average.update(model, step)
            if step + 1 == stop:
                checkpoint.save(tmp_path / f"{stop}.safetensors", stop, model, average, *optimizers)
                return run(stop)
        return model, average.values

    (whole, whole_average), (resumed, resumed_average) = run(0), run(3)
    sys.modules.pop("checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert list(whole_average) == list(resumed_average)
    assert all(torch.equal(whole_average[name], resumed_average[name]) for name in whole_average)
