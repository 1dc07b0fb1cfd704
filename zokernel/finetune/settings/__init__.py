"""What the user asked for, and what a run is going to do."""
