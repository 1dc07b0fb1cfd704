"""What is watched while a run trains: steps, divergence and time."""
