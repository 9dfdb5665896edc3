"""`k25.RMSNorm`: root mean square normalisation with a bf16 weight, as stored."""
