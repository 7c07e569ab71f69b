"""Model architectures of the field's templates, for plugins to configure; a template may as well bring its own."""
