"""DataLoaders and samplers as a Brain makes them."""
