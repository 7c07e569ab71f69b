"""Plugins to begin with, a module and a manifest each: `silkscreen new` copies them."""
