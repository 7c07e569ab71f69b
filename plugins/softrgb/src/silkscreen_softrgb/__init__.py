"""The soft RGB template: sets the mean of each colour channel."""
