"""What guidance costs on the user's own machine and models, measured in fair turns."""
