"""The brightness template: sets how bright the picture is."""
