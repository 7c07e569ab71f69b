"""flux2-tiny: a FLUX.2 small enough to draw on any laptop's CPU, and the scenes it was trained on."""
