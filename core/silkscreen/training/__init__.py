"""Training a template on a base: the field's objective, on rows of pictures, prompts and template inputs."""
