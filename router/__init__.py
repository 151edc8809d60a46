"""The fleet's front door."""
