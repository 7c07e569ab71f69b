"""FLUX.2 as diffusers has it: loading a base, and what is put into its transformer for the length of one call."""
