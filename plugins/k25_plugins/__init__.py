"""The `k25` operators: one table of signatures, one folder an operator. Importing this imports nothing heavy."""
