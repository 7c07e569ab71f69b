from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from silkscreen.training import objective
from silkscreen.training.config import TrainingConfig
from silkscreen.training.data import Sizing, batches, load_picture, read_rows
from silkscreen.training.trainer import train


def test_the_grid_of_sigmas_and_its_weights_are_the_fields() -> None:
    sigmas, bell = [], []
    for i in range(1000):
        s = 1 + (1 / 1000 - 1) * i / 999
        sigmas.append(math.exp(0.8) / (math.exp(0.8) + 1 / s - 1))
        bell.append(math.exp(-2 * ((1000 * sigmas[-1] - 500) / 1000) ** 2))
    low = min(bell)
    total = sum(y - low for y in bell)
    torch.testing.assert_close(objective.sigmas(), torch.tensor(sigmas), atol=1e-6, rtol=0)
    expected = torch.tensor([(y - low) * 1000 / total for y in bell])
    torch.testing.assert_close(objective.weights(), expected, atol=1e-5, rtol=0)


def test_the_loss_equals_a_naive_one() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise, velocity = torch.randn(3, 2, 4, 4, 4, generator=generator)
    index = torch.tensor([17, 803])
    noisy = objective.add_noise(latents, noise, index)
    naive = 0.0
    for n, i in enumerate(index.tolist()):
        sigma = objective.sigmas()[i].item()
        assert torch.allclose(noisy[n], (1 - sigma) * latents[n] + sigma * noise[n], atol=1e-6)
        errors = [
            (v - (e - x)) ** 2
            for v, e, x in zip(*(t[n].flatten().tolist() for t in (velocity, noise, latents)), strict=True)
        ]
        naive += objective.weights()[i].item() * sum(errors) / len(errors) / 2
    assert objective.loss(velocity, latents, noise, index).item() == pytest.approx(naive, abs=1e-6)


def test_a_picture_is_turned_upright_put_on_white_and_cropped(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 70), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.png", exif=exif)
    loaded = load_picture(tmp_path / "a.png", Sizing(2000))
    assert loaded.mode == "RGB"
    assert (loaded.width % 16, loaded.height % 16) == (0, 0)
    assert loaded.width > loaded.height
    assert loaded.getpixel((5, 5)) == (255, 255, 255)
    assert load_picture(tmp_path / "a.png", Sizing(2000, 16, 32)).size == (32, 16)


def test_batches_are_full_hold_one_size_and_every_item() -> None:
    sizes = [(128, 128)] * 5 + [(64, 128)] * 4
    epoch = batches(sizes, 4, repeat=3, seed=1, epoch=0)
    assert all(len(batch) == 4 for batch in epoch)
    assert all(len({sizes[item % 9] for item in batch}) == 1 for batch in epoch)
    items = [item for batch in epoch for item in batch]
    assert set(items) == set(range(27))
    assert len(items) == 28  # 15 of one size are filled up to 16
    assert epoch == batches(sizes, 4, repeat=3, seed=1, epoch=0)
    assert epoch != batches(sizes, 4, repeat=3, seed=1, epoch=1)


def dataset(folder: Path, count: int = 4) -> Path:
    rows = []
    for n in range(count):
        Image.new("RGB", (128, 128), (n * 60, 100, 100)).save(folder / f"{n}.png")
        rows.append(
            {
                "image": f"{n}.png",
                "prompt": "a small red star on a blue background",
                "template_inputs": {"scale": n / count},
            }
        )
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_bad_row_is_listed_with_its_line(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with path.open("a") as file:
        file.write(
            '\nnot json\n{"image": "none.png", "prompt": "p"}\n'
            '{"image": "text.png", "prompt": "p"}\n{"image": "0.png"}\n'
        )
    rows, problems = read_rows(path)
    assert len(rows) == 4
    assert len(problems) == 4
    for line, reason in ((5, "not JSON"), (6, "there is no file"), (7, "is not a picture"), (8, "no prompt")):
        assert any(f"jsonl:{line}:" in part and reason in part for part in problems)


def test_training_changes_the_template_alone_and_lowers_the_loss(tmp_path: Path) -> None:
    config = TrainingConfig(
        template_model_id_or_path="brightness",
        dataset_metadata_path=dataset(tmp_path),
        output_path=tmp_path / "run",
        batch_size=4,
        num_epochs=2,
        dataset_repeat=8,
        learning_rate=3e-3,
        save_dtype="float16",
        from_scratch=True,
    )
    path = train(config)
    tensors = load_file(path)
    assert path.name == "epoch-1.safetensors"
    assert set(tensors) == set(load_file(tmp_path / "run" / "epoch-0.safetensors"))
    assert all(value.dtype == torch.float16 for value in tensors.values())
    with (tmp_path / "run" / "log.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 16
    assert sum(losses[-5:]) < sum(losses[:5])
    first = {name: value.clone() for name, value in tensors.items()}
    again = load_file(train(TrainingConfig(**{**vars(config), "output_path": tmp_path / "again"})))
    assert all(torch.equal(first[name], again[name]) for name in first)
