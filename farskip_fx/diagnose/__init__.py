"""Looking at a conversion: what it would do (explain), what it costs (profiling), and what is wrong with it (bisect)."""
