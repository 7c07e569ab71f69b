"""What a template's author needs around the model: a project folder, a wheel, and the proof that it works."""
