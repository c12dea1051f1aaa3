"""How long it takes and what memory it needs, side by side with its peers: `make bench`."""
