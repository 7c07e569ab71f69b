"""The structure template: makes the picture follow an outline drawing."""
