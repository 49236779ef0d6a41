"""What to choose: rank configs, search spaces and their exact cost. No torch in here."""
