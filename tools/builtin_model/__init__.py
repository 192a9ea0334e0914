"""How the built-in model was made: prepare, train, export, and what it is measured against."""
