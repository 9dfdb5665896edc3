"""`k25.MLA`: multi-head latent attention over a paged latent cache."""
