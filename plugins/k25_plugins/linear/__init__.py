"""`k25.Linear`: activation times bf16 weight, as stored."""
