"""Stage `validate`: references, metrics and reports. Importing this imports nothing heavy."""
