"""What proves, measures and compares the recipe. Run a script as `python -m lab.NAME`."""
