"""Write the trained flux2-tiny into the package, in diffusers' layout and float16: `python export.py RUN_DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

import checkpoint
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from train_transformer import Denoiser, build_tokenizer

PACKAGE = Path(__file__).parents[1] / "src" / "silkscreen_tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, default=PACKAGE)
    args = parser.parse_args()

    model = Denoiser()
    average = checkpoint.Average(model, decay=0.0)
    path = args.run_dir / "transformer.safetensors"
    if not checkpoint.load(path, model, average):
        raise SystemExit(f"there is no {path}: run train_transformer.py first")
    average.copy_to(model)
    vae = AutoencoderKLFlux2.from_pretrained(args.run_dir / "vae")
    vae.register_to_config(_name_or_path="flux2-tiny")  # in place of the run's folder
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        transformer=model.transformer,
        is_distilled=False,
    )
    pipe.to(torch.float16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
