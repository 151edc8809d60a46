"""An engine with a modelled clock and cache, on a real wire."""
