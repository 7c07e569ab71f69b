"""The training objective of the field's templates: flow matching on a shifted grid of 1000 timesteps, bell-weighted."""

from __future__ import annotations

import math
from functools import cache

import torch

STEPS = 1000
SHIFT = 0.8
"""mu, by which the grid of sigmas is shifted towards noise."""


@cache
def sigmas() -> torch.Tensor:
    """Return the grid of noise levels, (1000,), from 1 down: sigma = e^mu / (e^mu + 1/s - 1) for even s."""
    s = torch.linspace(1.0, 1.0 / STEPS, STEPS, dtype=torch.float64)
    return (math.exp(SHIFT) / (math.exp(SHIFT) + 1 / s - 1)).float()


@cache
def weights() -> torch.Tensor:
    """Return the loss weight of each grid point, (1000,): a bell over the timesteps, its minimum 0 and its mean 1."""
    timesteps = sigmas().double() * STEPS
    bell = torch.exp(-2 * ((timesteps - STEPS / 2) / STEPS) ** 2)
    bell = bell - bell.min()
    return (bell * (STEPS / bell.sum())).float()


def draw_index(generator: torch.Generator, first: float = 0.0, end: float = 1.0) -> torch.Tensor:
    """Return a grid point, (1,), drawn evenly from the part of the grid between two shares of it."""
    low, high = round(first * STEPS), round(end * STEPS)
    return torch.randint(low, max(high, low + 1), (1,), generator=generator)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return (1 - sigma) latents + sigma noise, for grid points (B,) of latents (B, ...)."""
    sigma = sigmas().to(latents.device)[index].view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def loss(velocity: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean square error of velocities (B, ...) against noise - latents, averaged over the batch."""
    errors = (velocity.float() - (noise - latents).float()).square().flatten(1).mean(dim=1)
    return (weights().to(errors.device)[index] * errors).mean()
